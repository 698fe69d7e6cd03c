"""One run of a logger for a whole job, whatever the number of Trainers that log to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger


@contextmanager
def one_run(logger: Logger, settings: dict[str, Any]) -> Iterator[None]:
    """Log the settings, let Trainers share the logger, and close it in the end, also on errors.

    Lightning finalizes a logger after each fit, which for some ends the run that the next fit is to
    go on with; here it is finalized once. The run of a process-wide client, such as that of Weights
    & Biases, is finished too, or the next job of a sweep would log to it.

    Args:
        logger: Not used by a Trainer before.
        settings: The hyperparameters of the job, as builtins.
    """
    logger.finalize = lambda status: None  # type: ignore[method-assign]
    failed = True
    try:
        logger.log_hyperparams(settings)
        yield
        failed = False
    finally:
        del logger.finalize
        logger.finalize("failed" if failed else "success")
        finish = getattr(getattr(logger, "experiment", None), "finish", None)
        if callable(finish):
            finish(**({"exit_code": 1} if failed else {}))
