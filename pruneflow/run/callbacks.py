"""Callbacks of a run: metrics.csv, accuracy after pruning, seeds, checkpoints."""

from __future__ import annotations

import csv
import logging
import math
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from torch import nn

from pruneflow.files import write_whole
from pruneflow.training.callback import PruningCallback
from pruneflow.training.trainer import averaged_models

_log = logging.getLogger(__name__)
_log_file = logging.getLogger(f"{__name__}.file")  # not shown on the terminal, see conf/config.yaml

Row = dict[str, float | str | None]

COLUMNS = (
    "stage",
    "epoch",
    "round",
    "sparsity",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
)


class DivergedError(ValueError):
    """Training has diverged: weights are NaN or infinite."""


class History(L.Callback):
    """Write one row per epoch to a CSV file and to the log.

    The file is rewritten atomically. Checkpoints contain the rows, so that a resumed training
    removes rows after its checkpoint.

    Args:
        path: The file.
        stage: `"dense"` or `"rounds"`, for new rows.
        rows: Rows of earlier stages.
        epochs: Number of epochs of the whole run, to estimate the remaining time.

    Attributes:
        seconds: Wall time of the finished epochs of the stage.
        step: Optimizer steps since the start of the run, for loggers.
    """

    def __init__(self, path: Path, stage: str, rows: list[Row], epochs: int) -> None:
        self.path = path
        self.stage = stage
        self.rows = rows
        self.epochs = epochs
        self.seconds = 0.0
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Rows, wall time and steps so far."""
        return {"rows": self.rows, "seconds": self.seconds, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.rows, self.seconds = state_dict["rows"], state_dict["seconds"]
        self.step = state_dict["step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows so far, in case there is nothing left to train."""
        self._began = time.perf_counter() - self.seconds
        self._write()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue the step count of the previous stage, for loggers."""
        batches = trainer.num_training_batches
        if batches != math.inf:
            steps = math.ceil(batches / trainer.accumulate_grad_batches)
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.current_epoch * steps

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the learning rate at the start of the epoch."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of this epoch.

        Raises:
            DivergedError: If weights are no longer finite.
        """
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        fixed: Row = {
            "stage": self.stage,
            "epoch": trainer.current_epoch,
            "round": int(measured.get("round", 0)),
            "sparsity": measured.get("sparsity", 0.0),
            "lr": self._lr,
        }
        self.rows.append({name: fixed.get(name, measured.get(name)) for name in COLUMNS})
        self.seconds = time.perf_counter() - self._began
        self.step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._write()
        self._log_epoch(trainer)
        trained = (weight for weight in pl_module.parameters() if weight.requires_grad)
        if not all(bool(weight.isfinite().all()) for weight in trained):
            raise DivergedError(
                f"training has diverged: weights are NaN or infinite after epoch "
                f"{trainer.current_epoch}; lower optimizer.lr, or set trainer.gradient_clip_val=1"
            )

    def _log_epoch(self, trainer: L.Trainer) -> None:
        epochs = [row["stage"] for row in self.rows].count(self.stage)
        left = self.seconds / epochs * (self.epochs - trainer.current_epoch - 1)
        line = epoch_line(self.rows[-1], self.epochs, left)
        bar = trainer.progress_bar_callback
        if bar is None:
            _log.info(line)
        else:  # on the terminal, the line appears above the bar
            _log_file.info(line)
            bar.print(line)

    def _write(self) -> None:
        with write_whole(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def epoch_line(row: dict[str, Any], epochs: int, left: float) -> str:
    r"""Format the metrics of an epoch.

    Args:
        row: Row of `metrics.csv`.
        epochs: Number of epochs of the whole run.
        left: Remaining time in seconds.

    Example:
        >>> row = dict(zip(COLUMNS, ("rounds", 4, 2, 0.75, 0.1, 0.5, 0.88, 0.6, 0.8125)))
        >>> print(epoch_line(row, 20, 754.2).replace(", val", ",\nval"))
        Epoch 4 (5 of 20), round 2, 75.00 % sparse, train loss 0.5000, train accuracy 88.00 %,
        val loss 0.6000,
        val accuracy 81.25 %; 0:12:34 left
    """
    measured = [
        f"{name.replace('_', ' ')} "
        + (f"{100 * row[name]:.2f} %" if name.endswith("accuracy") else f"{row[name]:.4f}")
        for name in COLUMNS[5:]
        if row[name] is not None
    ]
    return (
        f"Epoch {row['epoch']} ({row['epoch'] + 1} of {epochs}), round {row['round']}, "
        f"{100 * row['sparsity']:.2f} % sparse, {', '.join(measured)}; "
        f"{timedelta(seconds=round(left))} left"
    )


class RoundWatch(L.Callback):
    """Measure validation accuracy right after each prune, before fine-tuning.

    As in Lightning's validation, averaged weights are used if there are any. It must come after the
    `PruningCallback` in the list of callbacks.

    Args:
        pruning: The PruningCallback.
    """

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.rounds: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far."""
        return {"rounds": self.rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.rounds = state_dict["rounds"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure if a round has just pruned."""
        done = len(self.rounds)
        if self.pruning.round > done:
            assert self.pruning.pruner is not None  # during training
            masks = self.pruning.pruner.weight_masks
            self.rounds.append(
                {
                    "round": self.pruning.round,
                    "epoch": trainer.current_epoch,
                    "sparsity": masks.sparsity,
                    "kept": masks.weights - masks.pruned,
                    "pruned_accuracy": _accuracy(trainer, _validated_model(trainer, pl_module)),
                }
            )


class ReseedEachEpoch(L.Callback):
    """Seed every epoch from (seed, epoch, rank).

    This makes results independent of a cached dense phase and of resuming.

    Args:
        seed: The seed of the experiment.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed Python, NumPy and PyTorch."""
        key = (self.seed, trainer.current_epoch, trainer.global_rank)
        state = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)


class SaveEachEpoch(Checkpoint):
    """Save a checkpoint to resume from at the end of each epoch, and at the end of training.

    The last checkpoint has the final model, which other callbacks may have changed at the end of
    training, for example to averaged weights. As a `Checkpoint`, it runs after all other callbacks,
    so that it contains their latest state.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = False

    def state_dict(self) -> dict[str, Any]:
        """Whether training has been stopped, for example by early stopping."""
        return {"stop": self._stop}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._stop = state_dict["stop"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once if training had been stopped."""
        trainer.should_stop = self._stop

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, unless this was the last epoch."""
        assert trainer.max_epochs is not None  # set in every stage
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        if trainer.current_epoch + 1 < trainer.max_epochs and not stops:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final model."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._stop = trainer.should_stop
        trainer.save_checkpoint(self.path)


def _validated_model(trainer: L.Trainer, pl_module: L.LightningModule) -> nn.Module:
    """The model whose weights Lightning validates."""
    for name, average in averaged_models(trainer):
        if name != StochasticWeightAveraging.__name__:  # swaps weights at the end of training only
            return average
    return pl_module


@torch.no_grad()
def _accuracy(trainer: L.Trainer, model: nn.Module) -> float:
    # `trainer.validate` cannot be called during `fit`.
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    limit = trainer.limit_val_batches
    batches = len(loader)
    if limit is not None:
        batches = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
    model.eval()
    correct = total = 0
    for _, batch in zip(range(batches), loader, strict=False):
        images, labels = trainer.precision_plugin.convert_input(
            trainer.strategy.batch_to_device(batch)
        )
        with trainer.precision_plugin.forward_context():
            predicted = model(images).argmax(1)
        correct += int((predicted == labels).sum())
        total += len(labels)
    model.train()
    return correct / max(total, 1)
