"""Use one run of a logger in all Trainers of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger


@contextmanager
def one_run(logger: Logger, settings: dict[str, Any]) -> Iterator[None]:
    """Log the settings, share the logger between Trainers, and finalize it at the end.

    Lightning finalizes a logger after each fit, which ends the run of some loggers; here it is
    finalized once, also after an error. The run of a process-wide client, such as Weights & Biases,
    is finished as well, as the next job of a sweep would log to it otherwise.

    Args:
        logger: A logger that no Trainer has used before.
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
