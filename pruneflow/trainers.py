"""What a Trainer can be asked: the one place that knows its insides and those of its callbacks."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from pruneflow.plan import Clock
from pruneflow.rewinding import Schedulers


def training_length(
    trainer: L.Trainer, pl_module: L.LightningModule, clock: Clock, has_rounds: bool
) -> int | None:
    """Epochs or steps of the training; None when it has no end, or it is not known."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        # Every round runs at once, so all that a plain function needs is room for one.
        return None if has_rounds else clock.start + 1
    if clock.unit == "epoch":
        return None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    if not pl_module.automatic_optimization:
        return None if trainer.max_steps == -1 else trainer.max_steps
    if trainer.ckpt_path is not None and has_rounds:
        # Lightning would set the data up to count its steps, before it restores their state. The
        # plan was checked when the training began.
        return None
    steps = trainer.estimated_stepping_batches
    return None if steps in (-1, float("inf")) else int(steps)


def schedulers(trainer: L.Trainer) -> Schedulers:
    """The learning-rate schedulers of a fit."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def averaged_models(trainer: L.Trainer) -> Iterator[tuple[str, nn.Module]]:
    """Every averaged copy of the model in a fit, with the name of the callback that keeps it."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None:
            yield type(callback).__name__, average.module
        if isinstance(callback, StochasticWeightAveraging) and average is not None:
            yield type(callback).__name__, average


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies that flatten many parameters into one, which leaves nothing to prune.

    Raises:
        ValueError: Naming the strategy.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
        raise ValueError(
            "`strategy` is expected to keep every parameter by itself, but "
            f"{type(trainer.strategy).__name__} flattens many into one; use strategy='ddp', or "
            "ModelParallelStrategy for sharded parameters"
        )
