"""A run folder: the files in it, and whether the run in it is the one to go on with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from yaml import YAMLError  # type: ignore[import-untyped]

from pruneflow.files import write_whole
from pruneflow.report.facts import Facts
from pruneflow.run import provenance
from pruneflow.run.callbacks import Row
from pruneflow.run.names import rename_keys
from pruneflow.state_dicts import load_safetensors, save_safetensors

_log = logging.getLogger(__name__)


def given(key: str) -> bool:
    """Whether the command sets this key of Hydra's."""
    return any(o.startswith(f"{key}=") for o in HydraConfig.get().overrides.hydra)


def check_resumed(config: DictConfig, folder: Path) -> None:
    """Refuse to go on with a run of another configuration."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if not given("hydra.sweep.dir"):
            raise ValueError(
                "`hydra.sweep.dir` is expected with `resume=true` in a sweep, and none came; give "
                "the folder of the sweep that is to be resumed"
            )
    elif not given("hydra.run.dir"):
        _name_others(config, folder)
    if not (folder / "config.yaml").exists():
        return
    try:
        there = _settings_of(folder)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and `resume` starts anew there") from error
    different = _differences(there, _settings(config))
    if different:
        raise ValueError(
            f"`resume` is expected to find a run of this configuration, but the one in {folder} "
            f"differs: {'; '.join(different)}; choose another `hydra.run.dir`, or set them alike"
        )


def run_folder(parent: str, fresh: str, *, _root_: DictConfig) -> str:
    """With `resume`, the newest unfinished run of this configuration in a folder; else a new one.

    The configuration calls it for `hydra.run.dir`, before anything is written.
    """
    if not (_root_.resume and _root_.task == "prune"):
        return str(Path(parent, fresh))
    same = [folder for folder, different in _unfinished(Path(parent), _root_) if different == []]
    return str(max(same, key=_changed, default=Path(parent, fresh)))


def _unfinished(parent: Path, config: DictConfig) -> list[tuple[Path, list[str] | str]]:
    """The unfinished runs in a folder, each with what differs, or why that cannot be told."""
    here, found = _settings(config), list[tuple[Path, list[str] | str]]()
    paths = (*parent.glob("*/config.yaml"), *parent.glob("*/checkpoints"))
    for folder in sorted({path.parent for path in paths}):
        if not is_finished(folder):
            try:
                found.append((folder, _differences(_settings_of(folder), here)))
            except ValueError as error:
                found.append((folder, str(error)))
    return found


def _name_others(config: DictConfig, folder: Path) -> None:
    """Say which runs are passed over because they are damaged, or differ, where none is resumed."""
    others = [(path, why) for path, why in _unfinished(folder.parent, config) if path != folder]
    for path, why in others:
        if isinstance(why, str):
            _log.warning("`resume` passes over %s: %s; delete it if it is of no use", path, why)
    near = [(path, why) for path, why in others if why and isinstance(why, list)]
    if near and not (folder / "config.yaml").exists():
        path, different = min(near, key=lambda other: (len(other[1]), -_changed(other[0])))
        _log.warning(
            "`resume` found no unfinished run of this configuration; the nearest, %s, differs: %s; "
            "set them alike to go on with it",
            path,
            "; ".join(different),
        )


def _changed(folder: Path) -> float:
    return (folder / "config.yaml").stat().st_mtime


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What determines the result and differs."""
    return [
        f"`{key}` was {there.get(key)!r} and is {here.get(key)!r}"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def _settings(config: Any) -> dict[str, Any]:
    """All that determines the result: `schedule.target` and so on, and their values."""
    keys = [key for key in config if key != "hydra"]
    copy = OmegaConf.masked_copy(config, keys)
    rename_keys(copy)
    node: Any = OmegaConf.to_container(copy, resolve=True)
    return provenance.determining(node)


def _settings_of(folder: Path) -> dict[str, Any]:
    """The same of a run.

    Raises:
        ValueError: If the file that holds them is missing or damaged.
    """
    path = folder / "config.yaml"
    try:
        return _settings(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is missing or damaged ({said})") from error


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder has ended."""
    return (folder / "report.html").exists()  # written last


def read_facts(folder: Path) -> Facts:
    """The facts of a finished run.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        facts: Facts = json.loads((folder / "report.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'report.json'} must be the report of a finished run, got a damaged file; "
            "delete report.html beside it and resume, or start anew"
        ) from error
    return facts


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
