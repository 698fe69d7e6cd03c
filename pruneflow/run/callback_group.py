"""Build the callbacks of the config group `callbacks`, and check them before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from pruneflow.errors import expect
from pruneflow.pruning.masking import Masking, Reparametrize
from pruneflow.run.preflight import building
from pruneflow.training.callback import PruningCallback
from pruneflow.training.checkpoint import SparsityCheckpoint

_AVERAGES = (WeightAveraging, StochasticWeightAveraging)

# Metric logged by Classifier -> mode.
_METRICS = {"val_loss": "min", "val_accuracy": "max", "train_loss": "min", "train_accuracy": "max"}


def build_callbacks(config: DictConfig) -> dict[str, L.Callback]:
    """Build the callbacks of the Trainer.

    Returns:
        Config key -> callback.

    Raises:
        ValueError: If one cannot be built, or is not a callback.
    """
    built: dict[str, L.Callback] = {}
    for name, node in (config.get("callbacks") or {}).items():
        key = f"callbacks.{name}"
        with building(key):
            callback = instantiate(node) if OmegaConf.is_dict(node) else node
        if callback is not None:
            valid, remedy = isinstance(callback, L.Callback), "set its `_target_`, or leave it out"
            expect(valid, key, "build a Lightning callback", repr(callback), remedy)
            built[key] = callback
    return built


def check_callbacks(
    callbacks: Mapping[str, L.Callback], logger: Logger | None, masking: Masking | None
) -> None:
    """Check that callbacks are compatible with each other and with the rest of a run.

    Raises:
        ValueError: If they are not.
    """
    averages = [k for k, c in callbacks.items() if isinstance(c, _AVERAGES)]
    names = ", ".join(averages)
    expect(len(averages) <= 1, "callbacks", "average the weights once", names, "leave one out")
    compatible = not averages or not isinstance(masking, Reparametrize)
    expected = f"be in_place with {names}, which relies on the order of parameters"
    expect(compatible, "masking", expected, "reparametrize", "set masking=in_place")
    for key, callback in callbacks.items():
        expect(
            not isinstance(callback, PruningCallback),
            key,
            "not be a PruningCallback, as every run has one",
            type(callback).__name__,
            "set `schedule` and `pruning` instead",
        )
        needs_logger = isinstance(callback, LearningRateMonitor | DeviceStatsMonitor)
        logged, remedy = not needs_logger or logger is not None, "set logger=csv, or leave it out"
        expect(logged, key, "have a logger", "none", remedy)


def check_monitors(callbacks: Mapping[str, L.Callback]) -> None:
    """Check that monitored metrics are logged by `Classifier`, and that the mode fits.

    Raises:
        ValueError: If not.
    """
    for key, callback in callbacks.items():
        if not isinstance(callback, EarlyStopping | SparsityCheckpoint):
            continue
        after_validation = isinstance(callback, SparsityCheckpoint)
        known = [name for name in _METRICS if not (after_validation and name.startswith("train"))]
        monitor = str(callback.monitor)
        expect(
            monitor in known,
            f"{key}.monitor",
            f"be one of {', '.join(known)}",
            repr(monitor),
            f"set {key}.monitor=val_accuracy",
        )
        mode = _METRICS[monitor]
        expect(
            callback.mode == mode,
            f"{key}.mode",
            f"be {mode!r} for {monitor}",
            repr(callback.mode),
            f"set {key}.mode={mode}",
        )


def check_averages(
    callbacks: Mapping[str, L.Callback],
    trainer: L.Trainer,
    module: L.LightningModule,
    epochs: Mapping[str, range],
    steps: int | None,
) -> None:
    """Check that averaged weights can be built, and that every phase updates them.

    Otherwise a phase would end with its initial weights.

    Args:
        callbacks: Config key -> callback; not to be used again.
        trainer: Their Trainer.
        module: The module to train.
        epochs: Phase -> its epochs, counted over the whole run.
        steps: Steps per epoch; None if not known.

    Raises:
        ValueError: If not.
    """
    for key, callback in callbacks.items():
        if not isinstance(callback, WeightAveraging):
            continue
        with building(key):
            callback.setup(trainer, module, "fit")
        for phase, each in epochs.items():
            if steps is None:
                break
            count = steps * len(each)
            by_epoch = (callback.should_update(epoch_idx=epoch) for epoch in each)
            by_step = (callback.should_update(step_idx=step) for step in range(count))
            expect(
                not each or any(by_epoch) or any(by_step),
                key,
                "update the averaged weights in each phase",
                f"no update in {phase} (epochs {each.start} to {each.stop - 1}, {count} steps)",
                "start averaging earlier",
            )
