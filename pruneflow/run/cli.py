"""The command line: Hydra's entry point, messages and exit codes."""

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
from pruneflow.run.deploy_task import DeployTask
from pruneflow.run.ends import TARGET_MISSED, no_space, signals
from pruneflow.run.experiment import Experiment
from pruneflow.run.folder import (
    check_resumed,
    drop_checkpoints,
    is_finished,
    is_set,
    read_facts,
    run_folder,
)
from pruneflow.run.names import allow_hidden, log_old_names, rename_keys
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
        log_old_names(settings.runtime.choices, rename_keys(config))
        if config.resume and config.task == "prune":
            check_resumed(config, folder)
            if is_finished(folder):
                _log.info("Already finished: %s (task=deploy measures its forms again)", folder)
                drop_checkpoints(folder)  # left by a run that was killed just before its end
                return _show(read_facts(folder), folder)
        job = _prepare(config, folder, recipe)
    except Timeout:
        sys.exit(
            f"pruneflow: `hydra.run.dir` must be used by one run at a time, got {folder}, which is "
            "in use; wait for the other run, or choose another folder"
        )
    except InstantiationException as error:
        _fail(_error_message(unwrap(error)))
        return None
    except (ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        _fail(_error_message(error))
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
                f"pruneflow: no space left on the disk ({error}); all complete files are kept in "
                f"{folder}. {_resume_hint()}"
            )
        raise
    return None


def _fail(message: str, *, trained: bool = False) -> None:
    """Exit with a message; a sweep continues with its other jobs if it has trained something."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN or not (trained or settings.job.num):
        sys.exit(message)
    _log.error(message)
    _failed.append(settings.job.num)


def _error_message(error: Exception) -> str:
    """Message for invalid input, with the config node that could not be built and what sets it."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    if not isinstance(error, BuildError):
        return f"pruneflow: {error}"
    causes = [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").startswith(error.key)]
    remedy = f"change or leave out {', '.join(causes)}" if causes else "see --cfg job"
    return (
        f"pruneflow: {error}\n(in `{error.key}`; {remedy}; set HYDRA_FULL_ERROR=1 for the "
        "traceback)"
    )


def _prepare(config: DictConfig, folder: Path, recipe: str) -> Experiment | DeployTask:
    """Build the task, which checks its input."""
    if config.task == "deploy":
        _warn_about_unused("deploy")
        return DeployTask(config, folder)
    overrides = map(shlex.quote, HydraConfig.get().overrides.task)
    return Experiment(config, folder, recipe, " ".join([*_PROGRAM, *overrides]))


def _warn_about_unused(task: str) -> None:
    """Warn about settings of the command that a task does not use."""
    used = ("task", "checkpoint", "recipe", "seed", "model", "data", "deploy", "dense.weights")
    unused = [
        override
        for override in HydraConfig.get().overrides.task
        if not re.match(rf"[+~]*({'|'.join(map(re.escape, used))})\b", override)
    ]
    if unused:
        _log.warning("task=%s does not use %s", task, ", ".join(unused))


def _show(facts: Facts, folder: Path) -> float:
    rich.print(summary(facts))
    rich.print(f"Report: {folder / 'report.html'}")
    if not document(facts, str(folder)).reached:
        _missed.append(folder)
    return facts["final"]["val_accuracy"]


_PROGRAM = ("python", "-m", "pruneflow")
_failed: list[int] = []  # jobs of this command's sweep
_missed: list[Path] = []  # folders of this command's runs that missed their target


def _resume_hint() -> str:
    """The command that resumes the current run."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]
    if not HydraConfig.initialized():
        return "Nothing has been run yet."
    settings = HydraConfig.get()
    if "task=deploy" in arguments:
        return f"Start again with: {shlex.join([*_PROGRAM, *arguments])}"
    if settings.mode == RunMode.MULTIRUN and not is_set("hydra.sweep.dir"):
        arguments.append(f"hydra.sweep.dir={settings.sweep.dir}")
    return f"Resume with: {shlex.join([*_PROGRAM, *arguments, 'resume=true'])}"


class FolderCheck(Callback):
    """Check that the output folder can be written to, before Hydra writes there.

    Used in `conf/config.yaml`.
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
    """Log a warning in one line, without its line of code."""
    _log.warning("Warning: %s", message)


def main() -> None:
    """Run `python -m pruneflow`; see `pruneflow.run.ends` for the exit codes."""
    # Raised by Lightning with newer versions of PyTorch.
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    logging.raiseExceptions = False  # continue if the log cannot be written
    warnings.showwarning = _log_warning
    sys.argv[1:] = allow_hidden(sys.argv[1:])
    store_recipes()
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    with signals(_resume_hint):
        _run()
    if _failed:
        jobs = ", ".join(f"#{job}" for job in _failed)
        sys.exit(f"pruneflow: failed jobs of the sweep: {jobs}; see their messages above")
    if _missed:
        sys.exit(TARGET_MISSED)
