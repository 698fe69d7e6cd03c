"""Files of a run folder: weights with their history, and the checkpoints of unfinished stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from pruneflow.files import write_whole
from pruneflow.history import Row
from pruneflow.state_dicts import load_safetensors, save_safetensors


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a run folder, which a finished run has no use for."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.unlink()


def save_network(network: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a network's `state_dict` as safetensors, whole or not at all.

    Args:
        network: The network.
        path: The file.
        metadata: Texts to keep with it.
    """
    with write_whole(path) as temporary:
        save_safetensors(_tensors(network), temporary, metadata or {})


def save_cached(network: nn.Module, path: Path, rows: list[Row]) -> None:
    """Write a network and the history of its training, with a digest of both."""
    history = json.dumps(rows)
    digest = _digest(_tensors(network), history)
    save_network(network, path, {"history": history, "digest": digest})


def load_cached(network: nn.Module, path: Path) -> list[Row]:
    """Read back what `save_cached` wrote, and return the history.

    Raises:
        ValueError: If the file is damaged; the network is left as it is.
    """
    try:
        tensors = load_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if metadata.get("digest") != _digest(tensors, metadata.get("history", "")):
        raise ValueError(f"{path} is damaged (its contents do not have their digest)")
    network.load_state_dict(tensors)
    rows: list[Row] = json.loads(metadata["history"])
    return rows


def pictures(loader: Any) -> int | None:
    """How many pictures a loader gives; None where it does not say."""
    count: int | None = getattr(getattr(loader, "sampler", None), "count", None)
    if count is None and hasattr(getattr(loader, "dataset", None), "__len__"):
        count = len(loader.dataset)
    return count


def save_example(data: Any, path: Path) -> str | None:
    """Write the first test picture of a datamodule as it was before it was normalised.

    Returns:
        The name of its class; None where mean and deviation are not known, or it is no picture.
    """
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is None or std is None or data.image_shape[0] not in (1, 3):
        return None
    images, labels = next(iter(data.test_dataloader()))
    mean, std = (torch.tensor(list(values)).reshape(-1, 1, 1) for values in (mean, std))
    image = (images[0].cpu().float() * std + mean).clamp(0, 1)
    with write_whole(path) as temporary:
        to_pil_image(image).save(temporary)
    return str(data.classes[int(labels[0])])


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` on the CPU."""
    state_dict = network.state_dict()
    for name, value in state_dict.items():
        state_dict[name] = value.detach().cpu().contiguous()
    return state_dict


def _digest(tensors: Mapping[str, Tensor], history: str) -> str:
    digest = hashlib.sha256(history.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
