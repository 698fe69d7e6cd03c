"""The pipeline of a run: dense -> rounds -> remove -> test -> export -> report."""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from filelock import FileLock
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pruneflow.deploy import Form
from pruneflow.deploy.classifying import describe, metadata
from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.models import Classifier, Loss, load_weights
from pruneflow.pruning.plan import Clock, Plan
from pruneflow.report.facts import (
    Facts,
    Final,
    FinishedRound,
    Setup,
    layers,
    planned_rounds,
    removed,
    size,
)
from pruneflow.report.writing import write_report
from pruneflow.run import provenance
from pruneflow.run.callback_group import (
    build_callbacks,
    check_averages,
    check_callbacks,
    check_monitors,
)
from pruneflow.run.callbacks import History, ReseedEachEpoch, RoundWatch, Row, SaveEachEpoch
from pruneflow.run.deploy_task import write_forms
from pruneflow.run.folder import (
    count_images,
    drop_checkpoints,
    load_cached,
    save_cached,
    save_example,
    save_network,
)
from pruneflow.run.loggers import one_run
from pruneflow.run.names import check_trainer_keys
from pruneflow.run.preflight import (
    build,
    build_data,
    build_network,
    build_scope,
    building,
    check_folder,
    check_loss,
    check_trainer,
    check_values,
    steps_per_epoch,
)
from pruneflow.structure.parameters import select
from pruneflow.structure.sparsity import SparsityReport, sparsity_report
from pruneflow.training.calibration import Calibration
from pruneflow.training.callback import PruningCallback
from pruneflow.training.checkpoint import SparsityCheckpoint
from pruneflow.training.checkpoint_io import AtomicCheckpointIO, check_whole
from pruneflow.training.state import stable_repr

_log = logging.getLogger(__name__)


class Experiment:
    """One run: everything is built and checked before training starts.

    Each stage saves a checkpoint after each epoch, from which a run that was killed can resume:
    finished stages are skipped, and an interrupted epoch is trained again.

    Args:
        config: The composed configuration; see `conf/config.yaml`. With `resume`, it must be that
            of the run in the folder.
        folder: The run folder.
        recipe: Name of the recipe, for the report.
        command: The command of this run, for the report.

    Raises:
        ValueError: If the configuration cannot be run.
    """

    def __init__(self, config: DictConfig, folder: Path, recipe: str, command: str) -> None:
        check_trainer_keys(config.trainer)
        check_values(config)
        checkpoint = config.checkpoint
        remedy = "set task=deploy to measure it, or dense.weights=FILE to start from it"
        unset, expected = checkpoint is None, "be left out when pruning"
        expect(unset, "checkpoint", expected, repr(checkpoint), remedy)
        self.config = config
        self.folder = folder
        self.recipe = recipe
        self.command = command
        self.seconds: dict[str, float] = {}
        self.step = 0
        self.resume: bool = config.resume and (folder / "config.yaml").exists()
        for path in filter(None, map(self._resume_from, ("dense", "rounds"))):
            check_whole(path)

        if config.dense.cache is not None:
            check_folder("dense.cache", config.dense.cache)
        self.schedule, self.importance, self.granularity, self.costs, masking = (
            build(config, key)
            for key in ("schedule", "importance", "granularity", "costs", "masking")
        )
        self.loss: Loss = build(config, "loss")
        self.plan, clock = self._lay_plan()
        trainer = check_trainer(config.trainer)
        self.logger: Logger | None = build(config, "logger")
        L.seed_everything(config.seed, verbose=False)
        with self._timed("data"):
            self.data = build_data(config.data, trainer)
        check_loss(self.loss, self.data.num_classes, self.data.image_shape)
        self.network = build_network(config.model, self.data)
        if config.dense.weights is not None:
            with building("dense.weights"):
                load_weights(self.network, config.dense.weights)
        node: Any = OmegaConf.to_container(config.model, resolve=True)
        self.description = describe(node, self.data)
        self.selection = select(self.network, config.pruning.include, tuple(config.pruning.exclude))
        self.selection.warn_overlooked()
        self.scope = build_scope(config)
        self.pruning = PruningCallback(
            self.schedule,
            importance=self.importance,
            calibration=Calibration(Classifier.loss, config.pruning.gradient_batches),
            granularity=self.granularity,
            costs=self.costs,
            scope=self.scope,
            include=list(self.selection.slots),
            start_epoch=clock.start,
            epochs_per_round=clock.every,
            masking=masking,
            rewind=config.pruning.rewind,
            optimizer_state=config.pruning.optimizer_state,
        )
        example = self._example()
        blank = torch.cat([example, example]), torch.tensor([0, 1])
        self.pruning.check(self._classifier(self.network, 1), example, [blank])
        # The learning-rate schedule spans all rounds, or with `rewind` the last and longest one.
        last_round = config.pruning.epochs - (self.schedule.rounds - 1) * clock.every
        self.schedule_epochs = last_round if config.pruning.rewind else config.pruning.epochs
        for epochs in filter(None, (config.dense.epochs, self.schedule_epochs)):
            self._check_training(epochs)
        self._check_callbacks(masking, steps_per_epoch(self.data, trainer))

    def run(self) -> Facts:
        """Run all stages and write the run folder.

        Returns:
            The facts of the report.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resume:
            _log.info("Resuming the run in %s", self.folder)
        else:
            if self.config.resume:
                _log.info("No unfinished run to resume; starting a new one in %s", self.folder)
            (self.folder / "report.html").unlink(missing_ok=True)
            drop_checkpoints(self.folder)
        table = self.plan.table(self._counted())
        _log.info("Plan:\n%s", table)
        if dense := self.selection.describe_dense():
            _log.info(dense)
        with write_whole(self.folder / "plan.txt") as path:
            path.write_text(table + "\n")
        with write_whole(self.folder / "config.yaml") as path:
            OmegaConf.save(self.config, path, resolve=True)

        settings: Any = OmegaConf.to_container(self.config, resolve=True)
        with one_run(self.logger, settings) if self.logger else nullcontext():
            return self._run_stages()

    # -- stages -----------------------------------------------------------------------------------

    def _run_stages(self) -> Facts:
        rows, cached = self._dense_phase()
        dense = copy.deepcopy(self.network)
        rounds, rows = self._rounds(rows)
        before, after = self._test(dense)
        example, forms = self._export(dense, after.batches)

        report = sparsity_report(self.network, self._example(), include=list(self.selection.slots))
        facts: Facts = {
            **self._setup(),
            "dense": {
                "epochs": [row["stage"] for row in rows].count("dense"),
                "val_accuracy": before.metrics["val_accuracy"],
                "test_accuracy": before.metrics["test_accuracy"],
            },
            "dense_cached": cached,
            "rounds": rounds,
            "final": self._final(report, after),
            "size": size(report, self.folder),
            "layers": layers(report),
            "example": example,
            "forms": forms,
            "seconds": self.seconds,
        }
        write_report(self.folder, facts, rows)
        drop_checkpoints(self.folder)
        return facts

    def _dense_phase(self) -> tuple[list[Row], bool]:
        target = self.folder / "checkpoints" / "dense.safetensors"
        config = self.config.dense
        if not hasattr(self.data, "fingerprint"):
            _log.warning("`data` has no fingerprint(): the dense phase is not cached")
        if config.cache is None or not config.epochs or not hasattr(self.data, "fingerprint"):
            rows = self._train_dense()
            save_network(self.network, target, metadata(self.description))
            return rows, False
        cache = Path(config.cache) / f"{self._dense_key()}.safetensors"
        cache.parent.mkdir(parents=True, exist_ok=True)
        # One of several jobs that run at the same time trains it; the others wait here.
        with FileLock(cache.with_suffix(".lock")):
            cached = cache.exists() and self._resume_from("dense") is None
            if cached:
                try:
                    rows = load_cached(self.network, cache)
                    _log.info("Dense phase: loaded from the cache, %s", cache)
                except ValueError as error:
                    _log.warning("Dense phase: %s; training it again", error)
                    cached = False
            if not cached:
                rows = self._train_dense()
                save_cached(self.network, cache, rows)
        save_network(self.network, target, metadata(self.description))
        return rows, cached

    def _train_dense(self) -> list[Row]:
        epochs = self.config.dense.epochs
        if not epochs:
            return []
        _log.info("Dense phase: %s", _epochs(epochs))
        return self._fit("dense", self._classifier(self.network, epochs), 0, epochs, [])

    def _rounds(self, rows: list[Row]) -> tuple[list[FinishedRound], list[Row]]:
        start = self.config.dense.epochs
        epochs = self.config.pruning.epochs
        classifier = self._classifier(self.network, self.schedule_epochs)
        if self.pruning.rule.needs_example:
            classifier.example_input_array = self._example()
        watch = RoundWatch(self.pruning)
        _log.info("Pruning rounds: %d in %s", len(self.plan.rounds), _epochs(epochs))
        rows = self._fit("rounds", classifier, start, start + epochs, rows, self.pruning, watch)
        # Rows are in order, so the last one of each round is kept.
        fine_tuned = {row["round"]: row["val_accuracy"] for row in rows}
        rounds: list[FinishedRound] = [
            {**measured, "fine_tuned_accuracy": fine_tuned[measured["round"]]}  # type: ignore[typeddict-item]
            for measured in watch.rounds
            if measured["round"] in fine_tuned
        ]
        return rounds, rows

    def _fit(
        self, stage: str, classifier: Any, start: int, end: int, rows: list[Row], *callbacks: Any
    ) -> list[Row]:
        epochs = self.config.dense.epochs + self.config.pruning.epochs
        history = History(self.folder / "metrics.csv", stage, rows, epochs)
        save = SaveEachEpoch(self._checkpoint(stage))
        trainer = self._trainer(start, end, *callbacks, *self._callbacks(stage), history, save)
        trainer.fit(classifier, datamodule=self.data, ckpt_path=self._resume_from(stage))
        if trainer.should_stop and trainer.current_epoch < end:
            _log.warning(
                "Stopped early: %s (%s) ended after epoch %d",
                {"dense": "the dense phase", "rounds": "the rounds"}[stage],
                _epochs(end - start),
                trainer.current_epoch - 1,
            )
        self.seconds[stage], self.step = history.seconds, history.step
        return history.rows

    def _test(self, dense: nn.Module) -> tuple[Evaluation, Evaluation]:
        with self._timed("test"):
            _log.info("Testing the dense and the pruned network")
            before, after = self._evaluate(dense), self._evaluate(self.network)
        if self.logger is not None:
            tested = [key for key in after.metrics if key.startswith("test_")]
            metrics = {f"dense_{key}": before.metrics[key] for key in tested}
            metrics.update({key: after.metrics[key] for key in tested})
            self.logger.log_metrics(metrics, step=self.step)
        return before, after

    def _evaluate(self, network: nn.Module) -> Evaluation:
        classifier = self._classifier(network, 1)
        trainer = self._trainer(0, 1, enable_progress_bar=False, logger=False)
        validated = trainer.validate(classifier, datamodule=self.data, verbose=False)[0]
        tested = trainer.test(classifier, datamodule=self.data, verbose=False)[0]
        counted = zip(classifier.test_per_class, classifier.test_counts, strict=True)
        return Evaluation(
            {**validated, **tested},
            [accuracy if count else None for accuracy, count in counted],
            sum(classifier.test_counts),
            int(trainer.num_test_batches[0]),
        )

    def _export(self, dense: nn.Module, batches: int) -> tuple[str | None, list[Form]]:
        about = metadata(self.description)
        save_network(self.network, self.folder / "model.safetensors", about)
        example = save_example(self.data, self.folder / "example.png")
        settings = self.config.deploy
        if settings.batches:
            _log.info("Measuring the deployment formats of the model")
        with self._timed("deliver"):  # a key of report.json
            forms = write_forms(
                dense,
                self.network,
                islice(self.data.test_dataloader(), batches),
                self.folder,
                batches=settings.batches,
                threads=settings.threads,
                metadata=about,
            )
        return example, forms

    # -- parts ------------------------------------------------------------------------------------

    def _lay_plan(self) -> tuple[Plan, Clock]:
        rounds, epochs = self.schedule.rounds, self.config.pruning.epochs
        enough, expected = epochs >= rounds, f"be at least {rounds}, one per round"
        remedy = "raise it, or lower `schedule.rounds`"
        expect(enough, "pruning.epochs", expected, epochs, remedy)
        # The same budget for all schedules, split evenly; the remainder follows the last round.
        clock = Clock(start=self.config.dense.epochs, every=epochs // rounds)
        return Plan.lay(self.schedule, clock, clock.start + epochs), clock

    def _check_training(self, epochs: int) -> None:
        """Build the module, optimizer and scheduler, to check their settings."""
        self._classifier(self.network, epochs)
        with building("optimizer"):
            optimizer = instantiate(self.config.optimizer)(self.network.parameters())
        instantiate(self.config.lr_scheduler, epochs=epochs)(optimizer)

    def _check_callbacks(self, masking: Any, steps: int | None) -> None:
        callbacks = build_callbacks(self.config)
        check_callbacks(callbacks, self.logger, masking)
        if get_object(self.config.classifier._target_) is Classifier:
            check_monitors(callbacks)
        begin, end = self.config.dense.epochs, self.config.dense.epochs + self.config.pruning.epochs
        with building("callbacks"):
            trainer = self._trainer(begin, end, *callbacks.values())
        epochs = {"the dense phase": range(begin), "the rounds": range(begin, end)}
        check_averages(callbacks, trainer, self._classifier(self.network, 1), epochs, steps)

    def _callbacks(self, stage: str) -> list[L.Callback]:
        """New callbacks for each stage, as they have state."""
        return [
            callback
            for callback in build_callbacks(self.config).values()
            if stage == "rounds" or not isinstance(callback, SparsityCheckpoint)
        ]

    def _classifier(self, network: nn.Module, epochs: int) -> Any:
        scheduler = instantiate(self.config.lr_scheduler, epochs=epochs)
        return instantiate(self.config.classifier)(
            network,
            num_classes=self.data.num_classes,
            optimizer=instantiate(self.config.optimizer),
            lr_scheduler=scheduler,
            loss=self.loss,
        )

    def _trainer(self, start: int, end: int, *callbacks: L.Callback, **overrides: Any) -> L.Trainer:
        settings: dict[str, Any] = {
            "max_epochs": end,
            "devices": 1,
            "callbacks": [ReseedEachEpoch(self.config.seed), *callbacks],
            "logger": self.logger or False,
            "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
            # Without a terminal, its control sequences would end up in the output.
            "enable_progress_bar": sys.stdout.isatty()
            and self.config.trainer.get("enable_progress_bar", True),
            "default_root_dir": str(self.folder),
        }
        trainer: L.Trainer = instantiate(self.config.trainer, **(settings | overrides))
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Epochs are counted over the whole run: rounds start at the end of the dense phase.
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = start
        return trainer

    def _example(self) -> Tensor:
        return next(self.network.parameters()).new_zeros(1, *self.data.image_shape)

    def _checkpoint(self, stage: str) -> Path:
        return self.folder / "checkpoints" / f"{stage}.ckpt"

    def _resume_from(self, stage: str) -> Path | None:
        path = self._checkpoint(stage)
        return path if self.resume and path.exists() else None

    def _dense_key(self) -> str:
        names = (
            *("model", "data", "loss", "optimizer", "lr_scheduler", "classifier"),
            *("trainer", "callbacks", "seed"),
        )
        resolved: Any = OmegaConf.to_container(self.config, resolve=True)
        files = [self.config.dense.weights, self.config.model.get("weights")]
        return provenance.digest(
            provenance.relevant_settings({name: resolved.get(name) for name in names}),
            self.config.dense.epochs,
            [provenance.file_digest(Path(f)) for f in files if f and Path(f).is_file()],
            self.data.fingerprint(),
            provenance.versions(),
            provenance.commit(),
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began

    def _counted(self) -> int | None:
        """Number of prunable weights; None if targets count something else."""
        if self.costs is not None:
            return None
        return sum(slot.parameter.numel() for slot in self.selection.slots.values())

    def _setup(self) -> Setup:
        return {
            "recipe": self.recipe,
            "command": self.command,
            "seed": self.config.seed,
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "target": self.plan.rounds[-1].sparsity,
            "scope": stable_repr(self.scope),
            "schedule": repr(self.schedule),
            "importance": stable_repr(self.importance),
            "granularity": stable_repr(self.granularity),
            "costs": None if self.costs is None else stable_repr(self.costs).partition("(")[0],
            "classes": list(self.data.classes),
            "plan": planned_rounds(self.plan, self._counted()),
            "classifier": self.description,
            "frozen": list(self.selection.frozen),
            "stay_dense": self.selection.describe_dense(),
        }

    def _final(self, report: SparsityReport, tested: Evaluation) -> Final:
        return {
            "sparsity": report.sparsity,
            "removed": removed(report, self.pruning.cost_per_weight),
            "val_accuracy": tested.metrics["val_accuracy"],
            "test_accuracy": tested.metrics["test_accuracy"],
            "test_per_class": tested.per_class,
            "tested": tested.images,
            "test_pictures": count_images(self.data.test_dataloader()),
        }


class Evaluation(NamedTuple):
    """Metrics of a network.

    Args:
        metrics: Metrics of validation and test, as the classifier logs them.
        per_class: Test accuracy of each class; None if it has no test images.
        images: Number of test images.
        batches: Number of test batches.
    """

    metrics: dict[str, float]
    per_class: list[float | None]
    images: int
    batches: int


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"
