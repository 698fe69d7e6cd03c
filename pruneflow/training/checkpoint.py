"""SparsityCheckpoint: the best checkpoint of each round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pruneflow.errors import expect
from pruneflow.training.callback import pruning_callbacks
from pruneflow.training.trainer import drop_log_methods

_UNSUPPORTED = {
    "save_top_k": "it keeps one checkpoint per round",
    "every_n_epochs": "it compares every validation",
    "every_n_train_steps": "it compares every validation",
    "train_time_interval": "it compares every validation",
    "save_on_train_epoch_end": "it saves weights right after their validation",
    "save_on_exception": "weights at an exception have not been validated",
    "enable_version_counter": "checkpoints of different rounds never have the same name",
}

_MAX_NAME, _MAX_METRIC = 230, 150  # bytes


class SparsityCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint of each round; the best model is one at the target sparsity.

    Use it with a `PruningCallback` instead of a `ModelCheckpoint`, whose best model is often an
    early, dense one. `best_model_path` is the best checkpoint since the last round of the plan, so
    `trainer.test(ckpt_path="best")` tests a model at the target (with several checkpoint callbacks,
    Lightning uses the first). It is empty if there is none, with a warning at the end of training.
    `best_of_rounds` has the path for each round; round 0 is the dense phase.

    Checkpoints are saved at the end of validation, with the weights that were validated (the
    averaged ones, with Lightning's `WeightAveraging`), their masks and the round. They can be
    loaded into the plain model with `strict=True`, and training can resume from them.

    Args:
        monitor: Name of a metric that every validation logs.
        mode: Whether the `"min"` or the `"max"` of the metric is best.
        dirpath: Folder of the checkpoints; see `ModelCheckpoint`.
        filename: Template of the file names, with metrics, `{round:.0f}`, `{sparsity}`, `{epoch}`
            and `{step}`; by default, sparsity and metric.
        **options: `verbose`, `save_last`, `save_weights_only` and `auto_insert_metric_name`, see
            `ModelCheckpoint`.

    Raises:
        ValueError: At construction, for other options of `ModelCheckpoint` and names that are too
            long; at the start of `fit`, without a PruningCallback or validation; after a validation
            that did not log the metric.

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
        unsupported = [
            f"`{name}` must be left out of SparsityCheckpoint, as {why}, got {options[name]!r}; "
            "set it on an additional ModelCheckpoint"
            for name, why in _UNSUPPORTED.items()
            if name in options
        ]
        if unsupported:
            raise ValueError("\n".join(unsupported))
        expected = "be the name of a metric that validation logs"
        expect(isinstance(monitor, str), "monitor", expected, repr(monitor), "try 'val_loss'")
        if filename is None:
            # A slash in the name of the metric would create a folder.
            name = monitor.replace("/", "_").encode()[:_MAX_METRIC].decode(errors="ignore")
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
        name = self._format_checkpoint_name(
            filename, {}, auto_insert_metric_name=self.auto_insert_metric_name
        )
        longest = max(len(part.encode()) for part in name.split("/"))
        expect(
            longest <= _MAX_NAME,
            "filename",
            f"give names of at most {_MAX_NAME} bytes (file systems allow 255, including a suffix)",
            f"{longest} for {filename!r}",
            "shorten it",
        )

    @property
    def best_of_rounds(self) -> dict[int, str]:
        """Round -> path of its best checkpoint; rounds of several PruningCallbacks are added."""
        return {round: path for round, best in self._best.items() for path in best}

    # -- hooks ------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the Trainer has a PruningCallback and validation."""
        expect(
            pruning_callbacks(trainer),
            "callbacks",
            "contain a PruningCallback for SparsityCheckpoint",
            "none",
            "add one, or use ModelCheckpoint",
        )
        expect(
            trainer.enable_validation,
            "monitor",
            "be a metric that validation logs",
            f"{self.monitor!r} without validation",
            "add validation, or use ModelCheckpoint",
        )
        if _ends_unvalidated(trainer):
            rank_zero_warn(
                "No validation will follow the last round (`check_val_every_n_epoch`="
                f"{trainer.check_val_every_n_epoch}, `max_epochs`={trainer.max_epochs}), so there "
                "will be no checkpoint at the target; validate more often, or train longer"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget earlier checkpoints, unless training resumes from one."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None:
            self._best = {}
            self.best_model_path, self.best_model_score = "", None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if there was no validation after the last round."""
        super().on_train_end(trainer, pl_module)
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self.best_model_path and _finished(trainer) and not trial:
            rank_zero_warn(
                "No validation followed the last round, so `best_model_path` is empty, although "
                "the model is at the target; save it with `trainer.save_checkpoint`, and next time "
                "validate more often (`check_val_every_n_epoch`, `val_check_interval`) or train "
                "longer"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Release the model."""
        super().on_exception(trainer, pl_module, exception)
        drop_log_methods(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the model."""
        super().teardown(trainer, pl_module, stage)
        drop_log_methods(self)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the metric, to find out whether this validation logs it."""
        self._before = self._metric(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the model if it is the best of its round.

        The end of the training epoch would be too late: averaging and other callbacks may have
        changed the weights by then.
        """
        self._last_global_step_saved = -1  # compare even without a step since the last checkpoint
        if not self._should_skip_saving_checkpoint(trainer):
            expect(
                self._metric(trainer) is not self._before,
                "monitor",
                "be a metric that every validation logs",
                f"{self.monitor!r}, which was not logged",
                "log it in `validation_step`, or use ModelCheckpoint",
            )
            super().on_validation_end(trainer, pl_module)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if self.monitor in candidates:
            # With different values, processes would choose different files and wait forever.
            candidates[self.monitor] = trainer.strategy.reduce(
                candidates[self.monitor], reduce_op="mean"
            )
        return candidates

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether `current` is the best of the current round: Lightning's top 1 per round."""
        self.best_k_models = self._best.setdefault(_round(trainer), {})
        return super().check_monitor_top_k(trainer, current)

    def state_dict(self) -> dict[str, Any]:
        """State of ModelCheckpoint, and the best checkpoint of each round."""
        best = {round: dict(paths) for round, paths in self._best.items()}
        return super().state_dict() | {"best_of_rounds": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; in another folder, start over, with ModelCheckpoint's warning."""
        missing = [f"no `{key}`" for key in self.state_dict() if key not in state_dict]
        expect(
            not missing,
            "ckpt_path",
            "hold the whole state of SparsityCheckpoint",
            ", ".join(missing),
            "resume from another checkpoint, or without SparsityCheckpoint",
        )
        super().load_state_dict(state_dict)
        self._best = state_dict["best_of_rounds"] if state_dict["dirpath"] == self.dirpath else {}

    def _metric(self, trainer: L.Trainer) -> Tensor | None:
        assert self.monitor is not None  # checked at construction
        return trainer.callback_metrics.get(self.monitor)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not _finished(trainer):
            self.best_model_path, self.best_model_score = "", None
        for pruning in pruning_callbacks(trainer):
            pruning.enforce()  # something may have restored other weights after validation
        super()._save_checkpoint(trainer, filepath)


def _finished(trainer: L.Trainer) -> bool:
    return all(p.plan and p.round == len(p.plan.rounds) for p in pruning_callbacks(trainer))


def _ends_unvalidated(trainer: L.Trainer) -> bool:
    """Whether it is known in advance that no validation follows the last round."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is None or epochs in (None, -1) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return False
    plans = [(p.plan, p.round) for p in pruning_callbacks(trainer) if p.plan]
    last_rounds = [
        plan.rounds[-1].at
        for plan, done in plans
        if plan.unit == "epoch" and done < len(plan.rounds)
    ]
    return epochs // every * every <= max(last_rounds, default=0)


def _round(trainer: L.Trainer) -> int:
    return sum(pruning.round for pruning in pruning_callbacks(trainer))
