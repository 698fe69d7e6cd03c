"""A run folder: its files, and whether its run can be resumed."""

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

from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.report.facts import Facts
from pruneflow.run import provenance
from pruneflow.run.callbacks import Row
from pruneflow.run.names import rename_keys
from pruneflow.state_dicts import load_safetensors, save_safetensors

_log = logging.getLogger(__name__)


def is_set(key: str) -> bool:
    """Whether the command sets this key of Hydra's configuration."""
    return any(o.startswith(f"{key}=") for o in HydraConfig.get().overrides.hydra)


def check_resumed(config: DictConfig, folder: Path) -> None:
    """Check that the run to resume has this configuration.

    Raises:
        ValueError: If it has another one, or its configuration cannot be read.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        known, remedy = is_set("hydra.sweep.dir"), "set it to the folder of the sweep to resume"
        expect(known, "hydra.sweep.dir", "be set to resume a sweep", "none", remedy)
    elif not is_set("hydra.run.dir"):
        _warn_about_others(config, folder)
    if not (folder / "config.yaml").exists():
        return
    try:
        theirs = _settings_of(folder)
    except ValueError as error:
        raise ValueError(
            f"`resume` must find a readable configuration, got an error: {error}; delete the file "
            "to start again in this folder"
        ) from error
    different = _differences(theirs, _settings(config))
    expect(
        not different,
        "resume",
        "find a run of this configuration",
        f"another one in {folder}: {'; '.join(different)}",
        "choose another `hydra.run.dir`, or use the same settings",
    )


def run_folder(parent: str, fresh: str, *, _root_: DictConfig) -> str:
    """With `resume`, the newest unfinished run of this configuration in a folder; else a new one.

    A resolver of the configuration, for `hydra.run.dir`.
    """
    if not (_root_.resume and _root_.task == "prune"):
        return str(Path(parent, fresh))
    same = [folder for folder, different in _unfinished(Path(parent), _root_) if different == []]
    return str(max(same, key=_modified, default=Path(parent, fresh)))


def _unfinished(parent: Path, config: DictConfig) -> list[tuple[Path, list[str] | str]]:
    """The unfinished runs in a folder, each with its differences, or why they are not known."""
    ours, found = _settings(config), list[tuple[Path, list[str] | str]]()
    paths = (*parent.glob("*/config.yaml"), *parent.glob("*/checkpoints"))
    for folder in sorted({path.parent for path in paths}):
        if not is_finished(folder):
            try:
                found.append((folder, _differences(_settings_of(folder), ours)))
            except ValueError as error:
                found.append((folder, str(error)))
    return found


def _warn_about_others(config: DictConfig, folder: Path) -> None:
    """Warn about damaged runs, and about the most similar run if none is resumed."""
    others = [(path, why) for path, why in _unfinished(folder.parent, config) if path != folder]
    for path, why in others:
        if isinstance(why, str):
            _log.warning("`resume` skips %s: %s; delete it if you do not need it", path, why)
    near = [(path, why) for path, why in others if why and isinstance(why, list)]
    if near and not (folder / "config.yaml").exists():
        path, different = min(near, key=lambda other: (len(other[1]), -_modified(other[0])))
        _log.warning(
            "`resume` found no unfinished run of this configuration; the most similar one, %s, "
            "differs: %s; use the same settings to resume it",
            path,
            "; ".join(different),
        )


def _modified(folder: Path) -> float:
    return (folder / "config.yaml").stat().st_mtime


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings that differ."""
    return [
        f"`{key}` was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    ]


def _settings(config: Any) -> dict[str, Any]:
    """All settings that affect the result, flat: `schedule.target` and so on."""
    keys = [key for key in config if key != "hydra"]
    copy = OmegaConf.masked_copy(config, keys)
    rename_keys(copy)
    node: Any = OmegaConf.to_container(copy, resolve=True)
    return provenance.relevant_settings(node)


def _settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run that affect its result.

    Raises:
        ValueError: If its config.yaml is missing or damaged.
    """
    path = folder / "config.yaml"
    try:
        return _settings(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{path} is missing or damaged ({cause})") from error


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder is finished."""
    return (folder / "report.html").exists()  # the last file a run writes


def read_facts(folder: Path) -> Facts:
    """The facts of a finished run.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        facts: Facts = json.loads((folder / "report.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`resume` must find a readable report, got a damaged {folder / 'report.json'}; "
            "delete report.html in the same folder and resume, or start a new run"
        ) from error
    return facts


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in the folder of a finished run."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.unlink()


def save_network(network: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save the `state_dict` of a network as safetensors, atomically.

    Args:
        network: The network.
        path: The file.
        metadata: Metadata of the file.
    """
    with write_whole(path) as temporary:
        save_safetensors(_tensors(network), temporary, metadata or {})


def save_cached(network: nn.Module, path: Path, rows: list[Row]) -> None:
    """Save a network and the history of its training, with a digest of both."""
    history = json.dumps(rows)
    digest = _digest(_tensors(network), history)
    save_network(network, path, {"history": history, "digest": digest})


def load_cached(network: nn.Module, path: Path) -> list[Row]:
    """Load a network saved by `save_cached`, and return its history.

    Raises:
        ValueError: If the file is damaged; the network is not changed then.
    """
    try:
        tensors = load_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if metadata.get("digest") != _digest(tensors, metadata.get("history", "")):
        raise ValueError(f"{path} is damaged (its contents do not match their digest)")
    network.load_state_dict(tensors)
    rows: list[Row] = json.loads(metadata["history"])
    return rows


def count_images(loader: Any) -> int | None:
    """Number of images of a dataloader; None if not known."""
    count: int | None = getattr(getattr(loader, "sampler", None), "count", None)
    if count is None and hasattr(getattr(loader, "dataset", None), "__len__"):
        count = len(loader.dataset)
    return count


def save_example(data: Any, path: Path) -> str | None:
    """Save the first test image of a datamodule, without normalisation.

    Returns:
        The name of its class; None if mean and standard deviation are not known, or it is neither a
        grayscale nor an RGB image.
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
