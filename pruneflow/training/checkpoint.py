"""The best checkpoint of each round, and never a denser one by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pruneflow.training.callback import pruning_callbacks
from pruneflow.training.trainer import let_go

_REFUSED = {
    "save_top_k": "one checkpoint of each round is kept",
    "every_n_epochs": "every validation is compared",
    "every_n_train_steps": "every validation is compared",
    "train_time_interval": "every validation is compared",
    "save_on_train_epoch_end": "weights are saved when the validation that measured them ends",
    "save_on_exception": "no validation has measured the weights at an exception",
    "enable_version_counter": "the checkpoints of two rounds never share a name",
}

_NAME, _MONITOR = 230, 150  # bytes


class SparsityCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint of each round, and call best only one that reaches the target.

    Stands beside a `PruningCallback` in place of a `ModelCheckpoint`, whose best model may well be
    an early, dense one. `best_model_path` is the best checkpoint since the plan's last round, and
    empty until there is one (a training that ends so says it), so `trainer.test(ckpt_path="best")`
    gets a model at the target (of several checkpoint callbacks Lightning asks the first).
    `best_of_rounds` has the path for each round, 0 being the dense phase.

    A checkpoint is written when a validation ends, with the weights that it measured (the averaged
    ones, if Lightning's `WeightAveraging` put them there), their masks and their round. It loads
    strict into the plain model, and training resumes from it.

    Args:
        monitor: A metric that every validation logs.
        mode: What is best, `"min"` or `"max"`.
        dirpath: Where to write; as for `ModelCheckpoint`.
        filename: Template of the names, of metrics, `{round:.0f}`, `{sparsity}`, `{epoch}`
            and `{step}`; sparsity and metric unless given.
        **options: `verbose`, `save_last`, `save_weights_only` and `auto_insert_metric_name`, as for
            `ModelCheckpoint`.

    Raises:
        ValueError: At construction, for other options of `ModelCheckpoint` and names that are too
            long; when `fit` begins, without a PruningCallback or validation; when a validation did
            not log the metric.

    Example:
        >>> from pruneflow import Compounding, PruningCallback
        >>> pruning = PruningCallback(Compounding(target=0.98, rounds=8))
        >>> checkpoint = SparsityCheckpoint(monitor="val_accuracy", mode="max")
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[pruning, checkpoint], logger=False)
    """

    def __init__(
        self,
        *,
        monitor: str,
        mode: str = "min",
        dirpath: str | Path | None = None,
        filename: str | None = None,
        **options: Any,
    ) -> None:
        refused = [
            f"`{name}` is expected to be left out of SparsityCheckpoint, since {why}, but "
            f"{options[name]!r} came; set it on a ModelCheckpoint beside this one"
            for name, why in _REFUSED.items()
            if name in options
        ]
        if refused:
            raise ValueError("\n".join(refused))
        if not isinstance(monitor, str):
            raise ValueError(
                "`monitor` is expected to be the name of a metric that validation logs, but "
                f"{monitor!r} came"
            )
        if filename is None:
            # A slash in the metric's name would make a folder.
            name = monitor.replace("/", "_").encode()[:_MONITOR].decode(errors="ignore")
            filename = f"sparsity={{sparsity:.4f}}-{name}={{{monitor}:.4f}}"
            options["auto_insert_metric_name"] = False
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=False,
            **options,
        )
        self._check_names(filename)
        self._best: dict[int, dict[str, Tensor]] = {}  # round -> {path: metric}, at most one each
        self._before: Tensor | None = None

    def _check_names(self, filename: str) -> None:
        made = self._format_checkpoint_name(
            filename, {}, auto_insert_metric_name=self.auto_insert_metric_name
        )
        longest = max(len(part.encode()) for part in made.split("/"))
        if longest > _NAME:
            raise ValueError(
                f"`filename` must make names of at most {_NAME} bytes (file systems allow 255, a "
                f"suffix is added), got {longest} for {filename!r}; shorten it"
            )

    @property
    def best_of_rounds(self) -> dict[int, str]:
        """Round -> path of its best checkpoint; several PruningCallbacks add their rounds up."""
        return {round: path for round, best in self._best.items() for path in best}

    # -- Lightning calls these --------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there are rounds, and that something measures them."""
        if not pruning_callbacks(trainer):
            raise ValueError(
                "SparsityCheckpoint is expected beside a PruningCallback, but the Trainer has "
                "none; add one, or use ModelCheckpoint"
            )
        if not trainer.enable_validation:
            raise ValueError(
                f"`monitor` is expected to be a metric that validation logs, but {self.monitor!r} "
                "came and the training has no validation; add one, or use ModelCheckpoint"
            )
        if _ends_unvalidated(trainer):
            rank_zero_warn(
                "No validation will follow the last round (`check_val_every_n_epoch`="
                f"{trainer.check_val_every_n_epoch}, `max_epochs`={trainer.max_epochs}), so no "
                "checkpoint will be at the target; validate more often, or train longer"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start over, unless this training goes on from a checkpoint."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None:
            self._best = {}
            self.best_model_path, self.best_model_score = "", None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where nothing has measured the last round."""
        super().on_train_end(trainer, pl_module)
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self.best_model_path and _finished(trainer) and not trial:
            rank_zero_warn(
                "No validation followed the last round, so `best_model_path` is empty, though the "
                "model is at the target; save that, and next time validate more often "
                "(`check_val_every_n_epoch`, `val_check_interval`) or train longer"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Keep no hold on the model."""
        super().on_exception(trainer, pl_module, exception)
        let_go(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep no hold on the model."""
        super().teardown(trainer, pl_module, stage)
        let_go(self)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the metric from before, to tell it from the one to come."""
        self._before = self._metric(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was just measured, if it is the best of its round.

        The end of the training epoch would be too late: averages and other callbacks may have moved
        the weights by then.
        """
        self._last_global_step_saved = -1  # compare it also if no step was taken since the last
        if not self._should_skip_saving_checkpoint(trainer):
            if self._metric(trainer) is self._before:
                raise ValueError(
                    f"`monitor` is expected to be a metric that every validation logs, but this "
                    f"one did not log {self.monitor!r}; log it there, or use ModelCheckpoint"
                )
            super().on_validation_end(trainer, pl_module)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if self.monitor in candidates:
            # Processes that compare, or name files by, metrics of their own would wait for ever.
            candidates[self.monitor] = trainer.strategy.reduce(
                candidates[self.monitor], reduce_op="mean"
            )
        return candidates

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether `current` is the best of the present round: Lightning's top 1 of each round."""
        self.best_k_models = self._best.setdefault(_round(trainer), {})
        return super().check_monitor_top_k(trainer, current)

    def state_dict(self) -> dict[str, Any]:
        """What ModelCheckpoint stores, and the best checkpoint of each round."""
        best = {round: dict(paths) for round, paths in self._best.items()}
        return super().state_dict() | {"best_of_rounds": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; or start over in another folder, which ModelCheckpoint says."""
        lacking = [f"no `{key}`" for key in self.state_dict() if key not in state_dict]
        if lacking:
            raise ValueError(
                "the checkpoint's state of SparsityCheckpoint must be whole, got "
                f"{', '.join(lacking)}; resume from another, or without SparsityCheckpoint"
            )
        super().load_state_dict(state_dict)
        self._best = state_dict["best_of_rounds"] if state_dict["dirpath"] == self.dirpath else {}

    def _metric(self, trainer: L.Trainer) -> Tensor | None:
        assert self.monitor is not None  # so at construction
        return trainer.callback_metrics.get(self.monitor)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not _finished(trainer):
            self.best_model_path, self.best_model_score = "", None
        for pruning in pruning_callbacks(trainer):
            pruning.enforce()  # what the validation ran on may have been put back by now
        super()._save_checkpoint(trainer, filepath)


def _finished(trainer: L.Trainer) -> bool:
    return all(p.plan and p.round == len(p.plan.rounds) for p in pruning_callbacks(trainer))


def _ends_unvalidated(trainer: L.Trainer) -> bool:
    """Whether it is known ahead that no validation follows the last round."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is None or epochs in (None, -1) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return False
    plans = [(p.plan, p.round) for p in pruning_callbacks(trainer) if p.plan]
    to_come = [
        plan.rounds[-1].at
        for plan, done in plans
        if plan.unit == "epoch" and done < len(plan.rounds)
    ]
    return epochs // every * every <= max(to_come, default=0)


def _round(trainer: L.Trainer) -> int:
    return sum(pruning.round for pruning in pruning_callbacks(trainer))
