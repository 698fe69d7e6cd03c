"""Checkpoints that are written whole or not at all, and refused when they are damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pruneflow.files import sweep, write_whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints whole or not at all, and read them without running what they hold.

    Lightning's own writes by way of the system's temporary folder; where that is another file
    system, a process killed at the wrong moment leaves a truncated checkpoint. This one writes
    beside the checkpoint, which is then replaced at once, and sweeps up what killed writers left.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: The file; a URL is left to Lightning, since object stores replace files whole.
            storage_options: Refused, as by Lightning.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        sweep(path.parent, path.suffix)
        with write_whole(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: The file, or its URL.
            map_location: As `torch.load` takes it; tensors come to the CPU unless given.
            weights_only: False lets the file run any code; only for files you trust.

        Raises:
            ValueError: If the file is truncated or damaged.
        """
        check_whole(path)
        with get_filesystem(path).open(str(path), "rb") as file:
            checkpoint: dict[str, Any] = torch.load(
                file, map_location=map_location, weights_only=weights_only is not False
            )
        return checkpoint


def check_whole(path: str | Path) -> None:
    """Refuse a file of `torch.save` that is truncated or damaged, which `torch.load` may not see.

    Args:
        path: The file, or its URL.

    Raises:
        ValueError: If its contents do not have the checksums that were stored with them.
    """
    with get_filesystem(path).open(str(path), "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # there are as many kinds as there are ways to be damaged
            damaged = str(error)
    if damaged is not None:
        raise ValueError(
            f"checkpoint {str(path)!r} is expected to be a whole file of torch.save, but it is "
            f"truncated or damaged ({damaged}); delete it, and resume from an earlier one or start "
            "over"
        )
