"""Hydra entry point only."""

from __future__ import annotations

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
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pruneflow.report.facts import Facts
from pruneflow.report.sections import document
from pruneflow.report.writing import forms_summary, summary
from pruneflow.run.callbacks import DivergedError
from pruneflow.run.deploy_task import Deployment
from pruneflow.run.ends import TARGET_MISSED, no_space, signals
from pruneflow.run.experiment import Experiment
from pruneflow.run.folder import (
    check_resumed,
    drop_checkpoints,
    given,
    is_finished,
    read_facts,
    run_folder,
)
from pruneflow.run.names import let_hidden_through, note_old_names, rename_keys
from pruneflow.run.preflight import BuildError, check_folder, unwrap
from pruneflow.run.recipes import check_recipe, store_recipes
from pruneflow.run.resources import resource_dir

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")
def _run(config: DictConfig) -> float | None:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    recipe = settings.runtime.choices["recipe"]
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
        check_recipe(recipe, dict(settings.runtime.choices))
        note_old_names(settings.runtime.choices, rename_keys(config))
        if config.resume and config.task == "prune":
            check_resumed(config, folder)
            if is_finished(folder):
                _log.info("Finished already: %s (task=deploy measures its forms anew)", folder)
                drop_checkpoints(folder)  # a run killed just before it ended has left them
                return _show(read_facts(folder), folder)
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
    if settings.mode == RunMode.MULTIRUN and not given("hydra.sweep.dir"):
        arguments.append(f"hydra.sweep.dir={settings.sweep.dir}")
    return f"Go on with: {shlex.join([*_PROGRAM, *arguments, 'resume=true'])}"


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


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning as one line, also in `pruneflow.log`, without the line of code it came from."""
    _log.warning("Warning: %s", message)


def main() -> None:
    """Run `python -m pruneflow`; `pruneflow.run.ends` says how it may end."""
    # Lightning's own affair with newer PyTorch, of no use to who runs this.
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    logging.raiseExceptions = False  # a log that cannot be written ends nothing
    warnings.showwarning = _log_warning
    sys.argv[1:] = let_hidden_through(sys.argv[1:])
    store_recipes()
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    with signals(_how_to_go_on):
        _run()
    if _failed:
        jobs = ", ".join(f"#{job}" for job in _failed)
        sys.exit(f"pruneflow: jobs of the sweep that failed: {jobs}; each has said why above")
    if _missed:
        sys.exit(TARGET_MISSED)
