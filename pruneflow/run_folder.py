"""Files of a run folder: weights with their history, and the checkpoints of unfinished stages."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pruneflow.files import write_whole
from pruneflow.history import Row
from pruneflow.state_dicts import (
    described,
    load_safetensors,
    safetensors_metadata,
    with_description,
)


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a run folder, which a finished run has no use for."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.unlink()


def save_network(network: nn.Module, path: Path, rows: list[Row] | None = None) -> None:
    """Write a network's `state_dict` as safetensors, whole or not at all.

    Args:
        network: The network.
        path: The file.
        rows: History to keep with it, as metadata.
    """
    state_dict = network.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    metadata = safetensors_metadata(state_dict)
    if rows is not None:
        metadata["history"] = json.dumps(rows)
    with write_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_network(network: nn.Module, path: Path) -> list[Row]:
    """Read back what `save_network` wrote, and return the history that was kept with it."""
    state_dict = load_safetensors(path)
    modules = described(state_dict) or described(network.state_dict())
    network.load_state_dict(with_description(state_dict, modules))
    with safe_open(path, framework="pt") as file:
        rows: list[Row] = json.loads(file.metadata()["history"])
    return rows
