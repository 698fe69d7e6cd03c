"""Hydra entry point only."""

from __future__ import annotations

import difflib
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import rich
from filelock import FileLock, Timeout
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pruneflow.deployment import Deployment
from pruneflow.experiment import Experiment
from pruneflow.facts import Facts
from pruneflow.report import forms_summary, summary
from pruneflow.resources import resource_dir
from pruneflow.run_folder import drop_checkpoints

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")
def _run(config: DictConfig) -> float | None:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    recipe = settings.runtime.choices["recipe"]
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
        _check_recipe(recipe, dict(settings.runtime.choices))
        if config.resume:
            _check_resumed(config, folder)
            if _is_finished(folder):
                _log.info("Finished already: %s", folder)
                drop_checkpoints(folder)  # a run killed just before it ended has left them
                return _show(json.loads((folder / "report.json").read_text("utf-8")), folder)
        job = _prepare(config, folder, recipe)
    except Timeout:
        sys.exit(
            f"pruneflow: `hydra.run.dir` is expected to be used by one run at a time, but another "
            f"one is writing to {folder}; wait for it, or choose another folder"
        )
    except InstantiationException as error:
        # Hydra wraps what the constructor said; the wrapping adds only which key it came from.
        cause = error.__cause__ or error
        sys.exit(f"pruneflow: {cause}\n(in `{str(error).rpartition('full_key: ')[2]}`)")
    except (ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        sys.exit(f"pruneflow: {error}")
    if isinstance(job, Experiment):
        return _show(job.run(), folder)
    rich.print(forms_summary(job.run()))
    rich.print(f"Files: {folder}")
    return None


def _prepare(config: DictConfig, folder: Path, recipe: str) -> Experiment | Deployment:
    """Build what the task needs, and refuse bad input."""
    if config.task == "deploy":
        return Deployment(config, folder)
    if config.task != "prune":
        raise ValueError(f"`task` is expected to be prune or deploy, but {config.task!r} came")
    overrides = map(shlex.quote, HydraConfig.get().overrides.task)
    return Experiment(config, folder, recipe, " ".join(["python -m pruneflow", *overrides]))


def _show(facts: Facts, folder: Path) -> float:
    rich.print(summary(facts))
    rich.print(f"Report: {folder / 'report.html'}")
    return facts["final"]["val_accuracy"]


def _check_resumed(config: DictConfig, folder: Path) -> None:
    """Refuse to go on with a run of another configuration."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN and not any(
        override.startswith("hydra.sweep.dir=") for override in settings.overrides.hydra
    ):
        raise ValueError(
            "`hydra.sweep.dir` is expected with `resume=true` in a sweep, and none came; give the "
            "folder of the sweep that is to be resumed"
        )
    different = _differences(folder, config)
    if different:
        raise ValueError(
            f"`resume` is expected to find a run of this configuration, but the one in {folder} "
            f"differs: {'; '.join(different)}; choose another `hydra.run.dir`, or set them alike"
        )


def _differences(folder: Path, config: DictConfig) -> list[str]:
    """What determines the result and differs from the run in a folder, if there is one."""
    if not (folder / "config.yaml").exists():
        return []
    there, here = _settings(OmegaConf.load(folder / "config.yaml")), _settings(config)
    return [
        f"`{key}` was {there.get(key)!r} and is {here.get(key)!r}"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def _settings(config: Any) -> dict[str, Any]:
    """All that determines the result: `schedule.target` and so on, and their values."""
    keys = [key for key in config if key not in ("hydra", "logger", "resume")]
    node: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
    return dict(_values(node))


def _values(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_finished(folder: Path) -> bool:
    return (folder / "report.html").exists()  # written last


def _run_folder(parent: str, fresh: str, *, _root_: DictConfig) -> str:
    """With `resume`, the newest unfinished run of this configuration in a folder; else a new one.

    The configuration calls it for `hydra.run.dir`, before anything is written.
    """
    configs = Path(parent).glob("*/config.yaml") if _root_.resume else ()
    unfinished = [
        config
        for config in configs
        if not _is_finished(config.parent) and not _differences(config.parent, _root_)
    ]
    newest = max(unfinished, key=lambda config: config.stat().st_mtime, default=None)
    return str(newest.parent if newest else Path(parent, fresh))


def _check_recipe(recipe: str, choices: dict[str, Any]) -> None:
    """Refuse keys of a recipe that no option has: Hydra merges them silently."""
    loader: Any = GlobalHydra.instance().config_loader()
    node = loader.repository.load_config(f"recipe/{recipe}").config
    groups = [
        f"{group}={choice}"
        for group, choice in choices.items()
        if group != "recipe" and not group.startswith("hydra/")
    ]
    base = hydra.compose("config", overrides=[*groups, "~recipe"])
    unknown = list(_unknown_keys(node, base))
    if unknown:
        known = list(_keys(base))
        lines = [
            f"recipe {recipe!r} sets `{key}`, which is expected to be a key of the configuration; "
            f"near names: {', '.join(difflib.get_close_matches(key, known, 3, 0.4)) or 'none'}"
            for key in unknown
        ]
        raise ValueError("\n".join(lines))


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    key: Any
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(value):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _unknown_keys(recipe: DictConfig, base: DictConfig, prefix: str = "") -> list[str]:
    unknown: list[str] = []
    key: Any
    for key, value in recipe.items_ex(resolve=False):
        if key == "defaults" and not prefix:
            continue
        if key not in base:
            unknown.append(f"{prefix}{key}")
        elif OmegaConf.is_dict(value) and OmegaConf.is_dict(base._get_node(key)):
            unknown += _unknown_keys(value, base[key], f"{prefix}{key}.")
    return unknown


def store_recipes() -> None:
    """Make each of `recipes/` an option of the group `recipe`.

    Hydra cannot map the group onto a folder of another name, so each is stored under its name.
    """
    store = ConfigStore.instance()
    for path in sorted(resource_dir("recipes").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(group="recipe", name=path.stem, node=node, package="_global_")


def main() -> None:
    """Run `python -m pruneflow`."""
    # Lightning's own affair with newer PyTorch, of no use to who runs this.
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    store_recipes()
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    _run()
