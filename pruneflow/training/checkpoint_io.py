"""Checkpoints that are written atomically, and checked for damage when loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pruneflow.errors import expect
from pruneflow.files import sweep, write_whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints atomically, and load them without running code in them.

    Lightning's own plugin writes to the system's temporary folder first. If that is on another file
    system, a process killed at the wrong moment leaves a truncated checkpoint. This plugin writes a
    temporary file in the same folder and renames it, and deletes leftovers of killed processes.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: The checkpoint.
            path: The file; URLs are left to Lightning, as object stores replace files atomically.
            storage_options: Not supported, as in Lightning.
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
            map_location: See `torch.load`; by default, tensors are loaded to the CPU.
            weights_only: False allows the file to run any code; use it only for files you trust.

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
    """Check a file of `torch.save` for damage, which `torch.load` may not notice.

    Args:
        path: The file, or its URL.

    Raises:
        ValueError: If its contents do not match their checksums.
    """
    with get_filesystem(path).open(str(path), "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # damaged files can raise anything
            damaged = str(error)
    expect(
        damaged is None,
        "path",
        "be a complete checkpoint",
        f"{str(path)!r}, which is truncated or damaged ({damaged})",
        "delete it, and resume from an earlier one or start over",
    )
