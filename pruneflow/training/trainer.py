"""Everything that relies on internals of Lightning's Trainer and callbacks."""

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

from pruneflow.errors import expect
from pruneflow.pruning.plan import Clock, Plan
from pruneflow.structure.running import Example
from pruneflow.training.rewinding import Schedulers


def training_length(
    trainer: L.Trainer, pl_module: L.LightningModule, clock: Clock, has_rounds: bool
) -> int | None:
    """Length of the training in epochs or steps; None if unlimited or not known."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        # All rounds run at once; a function without a number of rounds runs one.
        return None if has_rounds else clock.start + 1
    if clock.unit == "epoch":
        epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        # A function runs as many rounds as fit `max_steps`; for others see `check_steps`.
        if not has_rounds and (per_epoch := _steps_per_epoch(trainer, pl_module)) is not None:
            started = -(-trainer.max_steps // per_epoch)
            return started if epochs is None else min(epochs, started)
        return epochs
    if not pl_module.automatic_optimization:
        return None if trainer.max_steps == -1 else trainer.max_steps
    if trainer.ckpt_path is not None and has_rounds:
        # To count steps, Lightning would set up the data before it restores their state. The plan
        # was checked when the training started.
        return None
    steps = trainer.estimated_stepping_batches
    return None if steps in (-1, float("inf")) else int(steps)


def check_steps(trainer: L.Trainer, pl_module: L.LightningModule, plan: Plan) -> None:
    """Check that the last round of a plan by epochs starts before `max_steps`.

    Raises:
        ValueError: If it does not.
    """
    steps = _steps_per_epoch(trainer, pl_module) if plan.unit == "epoch" else None
    if steps is not None and plan.rounds:
        last = plan.rounds[-1]
        expect(
            last.at * steps < trainer.max_steps,
            "max_steps",
            f"leave time for all {last.number} rounds (the last one prunes at the start of epoch "
            f"{last.at}, step {last.at * steps})",
            trainer.max_steps,
            f"raise it above {last.at * steps}, or use fewer rounds or fewer epochs per round",
        )


def _steps_per_epoch(trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
    """Optimizer steps per epoch; None without `max_steps`, or if not known."""
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
    """The first batches of an epoch, on the device, without advancing the training dataloader."""
    module: Any = trainer.lightning_module
    loader: Any = copy.copy(trainer.fit_loop._combined_loader)
    generators = {
        generator: generator.get_state()
        for part in loader.flattened
        for owner in (part, getattr(part, "sampler", None))
        if (generator := getattr(owner, "generator", None)) is not None
    }
    loader.flattened = [_restarted(part) for part in loader.flattened]
    try:
        for batch, _, _ in islice(loader, count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        for generator, state in generators.items():
            generator.set_state(state)


def _restarted(loader: Any) -> Any:
    if isinstance(loader, DataLoader):
        # Persistent workers support one iterator only, which training uses.
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def example_input(trainer: L.Trainer, pl_module: L.LightningModule) -> Example:
    """The `example_input_array` of a LightningModule, on its device and in its precision.

    Raises:
        ValueError: If it has none.
    """
    example = pl_module.example_input_array
    expect(
        isinstance(example, Tensor | tuple | dict),
        "example_input_array",
        "be a tensor, or a tuple or dict of arguments of `forward`, for Channels and costs",
        f"{type(example).__name__} in {type(pl_module).__name__}",
        "in `__init__`, set for example `self.example_input_array = torch.zeros(1, 3, 32, 32)`",
    )
    moved: Example = move_data_to_device(example, pl_module.device)
    converted: Example = trainer.precision_plugin.convert_input(moved)
    return converted


def drop_log_methods(callback: L.Callback) -> None:
    """Remove the `log` methods that Lightning adds to a callback, which keep the model alive."""
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)


def averaged_models(trainer: L.Trainer) -> Iterator[tuple[str, nn.Module]]:
    """Averaged copies of the model, each with the name of its callback."""
    for callback in _callbacks(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None:
            yield type(callback).__name__, average.module
        if isinstance(callback, StochasticWeightAveraging) and average is not None:
            yield type(callback).__name__, average


def check_strategy(trainer: L.Trainer) -> None:
    """Check that a strategy does not flatten parameters, which cannot be pruned then.

    Raises:
        ValueError: If it does.
    """
    expect(
        not isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy),
        "strategy",
        "keep parameters separate",
        f"{type(trainer.strategy).__name__}, which flattens them",
        "use strategy='ddp', or ModelParallelStrategy for sharded parameters",
    )
