"""Hydra entry point only."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import rich
from filelock import FileLock, Timeout
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from pruneflow import provenance
from pruneflow.deployment import Deployment
from pruneflow.document import document
from pruneflow.ends import TARGET_MISSED, no_space, signals
from pruneflow.experiment import Experiment
from pruneflow.facts import Facts
from pruneflow.history import DivergedError
from pruneflow.preflight import BuildError, check_folder, unwrap
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
        if config.resume and config.task == "prune":
            _check_resumed(config, folder)
            if _is_finished(folder):
                _log.info("Finished already: %s (task=deploy measures its forms anew)", folder)
                drop_checkpoints(folder)  # a run killed just before it ended has left them
                return _show(_read_facts(folder), folder)
        job = _prepare(config, folder, recipe)
    except Timeout:
        sys.exit(
            f"pruneflow: `hydra.run.dir` is expected to be used by one run at a time, but another "
            f"one is writing to {folder}; wait for it, or choose another folder"
        )
    except InstantiationException as error:
        _fail(_refusal(unwrap(error)))
        return None
    except (ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        _fail(_refusal(error))
        return None
    try:
        if isinstance(job, Experiment):
            return _show(job.run(), folder)
        rich.print(forms_summary(job.run()))
        rich.print(f"Files: {folder}")
    except DivergedError as error:
        _fail(f"pruneflow: {error}", trained=True)
    except Exception as error:
        if no_space(error):
            sys.exit(
                f"pruneflow: no space is left on the disk ({error}); every file that was whole is "
                f"kept in {folder}. {_how_to_go_on()}"
            )
        raise
    return None


def _fail(message: str, *, trained: bool = False) -> None:
    """End with a message; but a sweep that has trained something goes on with its other jobs."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN or not (trained or settings.job.num):
        sys.exit(message)
    _log.error(message)
    _failed.append(settings.job.num)


def _refusal(error: Exception) -> str:
    """What is said of bad input: with which node could not be built, and what set it."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    if not isinstance(error, BuildError):
        return f"pruneflow: {error}"
    given = [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").startswith(error.key)]
    remedy = f"change or leave out {', '.join(given)}" if given else "--cfg job shows what is set"
    return (
        f"pruneflow: {error}\n(in `{error.key}`; {remedy}; HYDRA_FULL_ERROR=1 tells where it was "
        "raised)"
    )


def _prepare(config: DictConfig, folder: Path, recipe: str) -> Experiment | Deployment:
    """Build what the task needs, and refuse bad input."""
    if config.task == "deploy":
        _name_unread("deploy")
        return Deployment(config, folder)
    overrides = map(shlex.quote, HydraConfig.get().overrides.task)
    return Experiment(config, folder, recipe, " ".join([*_PROGRAM, *overrides]))


def _name_unread(task: str) -> None:
    """Say which of the command's settings a task does not read."""
    read = ("task", "checkpoint", "recipe", "seed", "model", "data", "deploy", "dense.weights")
    unread = [
        override
        for override in HydraConfig.get().overrides.task
        if not re.match(rf"[+~]*({'|'.join(map(re.escape, read))})\b", override)
    ]
    if unread:
        _log.warning("task=%s does not read %s", task, ", ".join(unread))


def _show(facts: Facts, folder: Path) -> float:
    rich.print(summary(facts))
    rich.print(f"Report: {folder / 'report.html'}")
    if not document(facts, str(folder)).reached:
        _missed.append(folder)
    return facts["final"]["val_accuracy"]


_PROGRAM = ("python", "-m", "pruneflow")
_failed: list[int] = []  # jobs of this command's sweep
_missed: list[Path] = []  # folders of this command's runs that ended short of their target


def _how_to_go_on() -> str:
    """The command that resumes what is running."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]
    if not HydraConfig.initialized():
        return "Nothing was running yet."
    settings = HydraConfig.get()
    if "task=deploy" in arguments:
        return f"Start it again with: {shlex.join([*_PROGRAM, *arguments])}"
    if settings.mode == RunMode.MULTIRUN and not _given("hydra.sweep.dir"):
        arguments.append(f"hydra.sweep.dir={settings.sweep.dir}")
    return f"Go on with: {shlex.join([*_PROGRAM, *arguments, 'resume=true'])}"


def _given(key: str) -> bool:
    return any(o.startswith(f"{key}=") for o in HydraConfig.get().overrides.hydra)


# -- resuming --------------------------------------------------------------------------------------


def _check_resumed(config: DictConfig, folder: Path) -> None:
    """Refuse to go on with a run of another configuration."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if not _given("hydra.sweep.dir"):
            raise ValueError(
                "`hydra.sweep.dir` is expected with `resume=true` in a sweep, and none came; give "
                "the folder of the sweep that is to be resumed"
            )
    elif not _given("hydra.run.dir"):
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


def _run_folder(parent: str, fresh: str, *, _root_: DictConfig) -> str:
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
        if not _is_finished(folder):
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
    node: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
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


def _is_finished(folder: Path) -> bool:
    return (folder / "report.html").exists()  # written last


def _read_facts(folder: Path) -> Facts:
    try:
        facts: Facts = json.loads((folder / "report.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'report.json'} must be the report of a finished run, got a damaged file; "
            "delete report.html beside it and resume, or start anew"
        ) from error
    return facts


class FolderCheck(Callback):
    """Refuses a folder that cannot be written to, before Hydra writes there.

    `conf/config.yaml` names it.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a run."""
        self._check("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a sweep."""
        self._check("hydra.sweep.dir", config.hydra.sweep.dir)

    def _check(self, key: str, folder: str) -> None:
        try:
            check_folder(key, folder)
        except ValueError as error:
            sys.exit(f"pruneflow: {error}")


# -- recipes ---------------------------------------------------------------------------------------


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


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning as one line, also in `pruneflow.log`, without the line of code it came from."""
    _log.warning("Warning: %s", message)


def main() -> None:
    """Run `python -m pruneflow`; `pruneflow.ends` says how it may end."""
    # Lightning's own affair with newer PyTorch, of no use to who runs this.
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    logging.raiseExceptions = False  # a log that cannot be written ends nothing
    warnings.showwarning = _log_warning
    store_recipes()
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    with signals(_how_to_go_on):
        _run()
    if _failed:
        jobs = ", ".join(f"#{job}" for job in _failed)
        sys.exit(f"pruneflow: jobs of the sweep that failed: {jobs}; each has said why above")
    if _missed:
        sys.exit(TARGET_MISSED)
