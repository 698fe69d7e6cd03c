"""What a Trainer can be asked: the one place that knows its insides and those of its callbacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pruneflow.pruning.plan import Clock, Plan
from pruneflow.structure.running import Example
from pruneflow.training.rewinding import Schedulers


def training_length(
    trainer: L.Trainer, pl_module: L.LightningModule, clock: Clock, has_rounds: bool
) -> int | None:
    """Epochs or steps of the training; None when it has no end, or it is not known."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        # Every round runs at once, so all that a plain function needs is room for one.
        return None if has_rounds else clock.start + 1
    if clock.unit == "epoch":
        epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        # Of a plain function as many rounds are taken as fit; for others see `check_steps`.
        if not has_rounds and (each := _steps_of_an_epoch(trainer, pl_module)) is not None:
            begun = -(-trainer.max_steps // each)
            return begun if epochs is None else min(epochs, begun)
        return epochs
    if not pl_module.automatic_optimization:
        return None if trainer.max_steps == -1 else trainer.max_steps
    if trainer.ckpt_path is not None and has_rounds:
        # Lightning would set the data up to count its steps, before it restores their state. The
        # plan was checked when the training began.
        return None
    steps = trainer.estimated_stepping_batches
    return None if steps in (-1, float("inf")) else int(steps)


def check_steps(trainer: L.Trainer, pl_module: L.LightningModule, plan: Plan) -> None:
    """Refuse a plan by epochs whose last round would begin after `max_steps`.

    Raises:
        ValueError: Naming the round and the remedy.
    """
    each = _steps_of_an_epoch(trainer, pl_module) if plan.unit == "epoch" else None
    if each is not None and plan.rounds and plan.rounds[-1].at * each >= trainer.max_steps:
        last = plan.rounds[-1]
        raise ValueError(
            f"`max_steps` must leave time for the whole plan, got {trainer.max_steps}, {each} an "
            f"epoch, where the last round, {last.number}, prunes at the start of epoch {last.at}; "
            f"raise it above {last.at * each}, or take fewer rounds or fewer epochs a round"
        )


def _steps_of_an_epoch(trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
    """Optimizer steps of an epoch; None where `max_steps` is no end, or they are not known."""
    if (
        trainer.max_steps == -1
        or trainer.fast_dev_run  # type: ignore[attr-defined]
        or trainer.ckpt_path is not None  # see `training_length`
        or not pl_module.automatic_optimization
        or any(isinstance(c, GradientAccumulationScheduler) for c in _callbacks(trainer))
    ):
        return None
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return (
        None
        if batches in (0, float("inf"))
        else -(-int(batches) // trainer.accumulate_grad_batches)
    )


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def schedulers(trainer: L.Trainer) -> Schedulers:
    """The learning-rate schedulers of a fit."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def training_batches(trainer: L.Trainer, count: int) -> Iterator[Any]:
    """The first batches of an epoch, ready for the model, without touching the training's own."""
    module: Any = trainer.lightning_module
    loader: Any = copy.copy(trainer.fit_loop._combined_loader)
    generators = {
        generator: generator.get_state()
        for part in loader.flattened
        for owner in (part, getattr(part, "sampler", None))
        if (generator := getattr(owner, "generator", None)) is not None
    }
    loader.flattened = [_anew(part) for part in loader.flattened]
    try:
        for batch, _, _ in islice(loader, count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        for generator, state in generators.items():
            generator.set_state(state)


def _anew(loader: Any) -> Any:
    if isinstance(loader, DataLoader):
        # Persistent workers serve one iteration at a time, which is the training's.
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def example_input(trainer: L.Trainer, pl_module: L.LightningModule) -> Example:
    """The example that a LightningModule has of what it takes, on its device, of its precision.

    Raises:
        ValueError: If it has none.
    """
    example = pl_module.example_input_array
    if not isinstance(example, Tensor | tuple | dict):
        raise ValueError(
            f"`example_input_array` of {type(pl_module).__name__} is expected to be what its "
            "`forward` takes, a tensor, or a tuple or dict of arguments, for Channels and costs, "
            f"but {type(example).__name__} came; "
            "set `self.example_input_array = torch.zeros(1, 3, 32, 32)`, say, in its `__init__`"
        )
    moved: Example = move_data_to_device(example, pl_module.device)
    converted: Example = trainer.precision_plugin.convert_input(moved)
    return converted


def let_go(callback: L.Callback) -> None:
    """Take off a callback the methods that Lightning has lent it, and that keep the model alive."""
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)


def averaged_models(trainer: L.Trainer) -> Iterator[tuple[str, nn.Module]]:
    """Every averaged copy of the model in a fit, with the name of the callback that keeps it."""
    for callback in _callbacks(trainer):
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
