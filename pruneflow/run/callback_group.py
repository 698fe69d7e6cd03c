"""The group `callbacks` of the configuration: built, and checked before anything runs."""

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

from pruneflow.pruning.masking import Masking, Reparametrize
from pruneflow.run.preflight import building
from pruneflow.training.callback import PruningCallback
from pruneflow.training.checkpoint import SparsityCheckpoint

_AVERAGES = (WeightAveraging, StochasticWeightAveraging)

# What Classifier logs, and what is best.
_METRICS = {"val_loss": "min", "val_accuracy": "max", "train_loss": "min", "train_accuracy": "max"}


def build_callbacks(config: DictConfig) -> dict[str, L.Callback]:
    """Build the callbacks of the Trainer, by the keys of their nodes.

    Raises:
        ValueError: If one is refused, or is none.
    """
    built: dict[str, L.Callback] = {}
    for name, node in (config.get("callbacks") or {}).items():
        key = f"callbacks.{name}"
        with building(key):
            callback = instantiate(node) if OmegaConf.is_dict(node) else node
        if isinstance(callback, L.Callback):
            built[key] = callback
        elif callback is not None:
            raise ValueError(
                f"`{key}` must build a Callback of Lightning, got {callback!r}; give it a "
                "`_target_`, or leave it out"
            )
    return built


def check_callbacks(
    callbacks: Mapping[str, L.Callback], logger: Logger | None, masking: Masking | None
) -> None:
    """Refuse callbacks that clash with each other or with the rest of a run.

    Raises:
        ValueError: Naming them and the remedy.
    """
    averages = [k for k, c in callbacks.items() if isinstance(c, _AVERAGES)]
    if len(averages) > 1:
        raise ValueError(
            f"`callbacks` must average the weights once, got {', '.join(averages)}; leave one out"
        )
    if averages and isinstance(masking, Reparametrize):
        raise ValueError(
            f"`masking` must be in_place beside {averages[0]}, which averages parameters by their "
            "order, got reparametrize; give masking=in_place"
        )
    for key, callback in callbacks.items():
        if isinstance(callback, PruningCallback):
            raise ValueError(
                f"`{key}` must not be a PruningCallback, as a run has its own; set `schedule` and "
                "`pruning` instead"
            )
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor) and logger is None:
            raise ValueError(
                f"`{key}` must have a logger to log to, got none; give logger=csv, or leave it out"
            )


def check_monitors(callbacks: Mapping[str, L.Callback]) -> None:
    """Refuse a metric that `Classifier` does not log, and one that is watched the wrong way round.

    Raises:
        ValueError: Naming the key and the remedy.
    """
    for key, callback in callbacks.items():
        if not isinstance(callback, EarlyStopping | SparsityCheckpoint):
            continue
        after_validation = isinstance(callback, SparsityCheckpoint)
        known = [name for name in _METRICS if not (after_validation and name.startswith("train"))]
        if callback.monitor not in known:
            raise ValueError(
                f"`{key}.monitor` must be one of {', '.join(known)}, got {callback.monitor!r}; "
                f"give {key}.monitor=val_accuracy"
            )
        best = _METRICS[callback.monitor]
        if callback.mode != best:
            raise ValueError(
                f"`{key}.mode` must be {best!r} for {callback.monitor}, got {callback.mode!r}; "
                f"give {key}.mode={best}"
            )


def check_averages(
    callbacks: Mapping[str, L.Callback],
    trainer: L.Trainer,
    module: L.LightningModule,
    epochs: Mapping[str, range],
    steps: int | None,
) -> None:
    """Refuse an average that cannot be made, or that a phase never updates.

    Such a phase would end with the weights that it began with.

    Args:
        callbacks: By the keys of their nodes; not used again.
        trainer: Their Trainer.
        module: What is trained.
        epochs: Phase -> its epochs, counted over the whole run.
        steps: How many steps make an epoch; None where it is not known.

    Raises:
        ValueError: Naming the callback.
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
            if each and not any(by_epoch) and not any(by_step):
                raise ValueError(
                    f"`{key}` must begin to average in each phase, got none in {phase} (epochs "
                    f"{each.start} to {each.stop - 1}, {count} steps); let it begin earlier"
                )
