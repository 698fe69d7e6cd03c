"""PruningCallback: runs the rounds, resumes from checkpoints, logs sparsity."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from pruneflow.errors import expect
from pruneflow.pruning.distribution import Scope
from pruneflow.pruning.granularity import Granularity
from pruneflow.pruning.importance import Importance, magnitude
from pruneflow.pruning.masking import Masking, clear
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.optimizers import OptimizerState, check_optimizer_state
from pruneflow.pruning.plan import Clock, Controller, Plan, Round
from pruneflow.pruning.pruner import Pruner
from pruneflow.pruning.schedules import ScheduleLike, as_schedule
from pruneflow.pruning.selection import MaskRule
from pruneflow.pruning.torch_methods import TorchMethod, rule_for
from pruneflow.structure.costs import CostFunction, Costs
from pruneflow.structure.parameters import Pattern, locate
from pruneflow.structure.running import Example
from pruneflow.training.calibration import Calibration
from pruneflow.training.checks import (
    LearningRates,
    callback_warnings,
    check_arguments,
    check_averages,
    check_disjoint,
    swapping_optimizers,
)
from pruneflow.training.metrics import SparsityMetrics
from pruneflow.training.rewinding import LearningRateSnapshot
from pruneflow.training.state import PruningState, check_state, method_state
from pruneflow.training.trainer import (
    averaged_models,
    check_steps,
    check_strategy,
    drop_log_methods,
    example_input,
    schedulers,
    training_length,
)


@dataclass
class _Fit:
    """State of one fit."""

    pruner: Pruner
    controller: Controller
    rates: LearningRates


class PruningCallback(L.Callback):
    """Prune in rounds during training, and fine-tune in between.

    Each round prunes at the start of an epoch (or step); the epochs that follow fine-tune. The plan
    is printed before training. At the end of `fit`, or after an exception, masks are removed, which
    leaves plain parameters with exact zeros. Another `fit` of the same model keeps the zeros and
    does not prune again; another model starts at round 0. Checkpoints contain the masks and the
    round. Averaged weights (`WeightAveraging`, `StochasticWeightAveraging`) are pruned as well.
    Several callbacks can prune different tensors of one model.

    Args:
        schedule: Cumulative sparsity after each round: `Compounding(target=0.98, rounds=8)`, a list
            such as `[0.5, 0.8, 0.9]`, or a function of the round, which runs as many rounds as fit
            the training. The number of rounds if `importance` has its own amount. None to prune
            nothing, with `from_zeros`.
        importance: Scores, higher = keep, or a method of `torch.nn.utils.prune`; see `Pruner`.
        calibration: Loss and batches for an importance such as `taylor`, which looks at more than
            the weights: `Calibration(loss, batches=8)`.
        granularity: What is removed together: `Weights()` (the default), `NM(2, 4)`,
            `Block(1, 16)` or whole `Channels()`.
        costs: `multiply_adds` or `latency`, if the schedule is to count these instead of weights;
            or qualified name -> cost of each weight of that tensor.
        scope: What competes together: `"global"`, `"layer"`, another distribution, or group name
            -> globs; see `Pruner`.
        include: Globs over qualified names and module types; None for all tensors that are
            prunable by default.
        exclude: Tensors to leave out, as for `include`.
        clock: When the rounds run: `Epochs(10, every=5)` or `Steps(1000, every=100)`. Alternatively
            use the next four arguments.
        start_epoch: Zero-based epoch at whose start round 1 prunes; default 0.
        epochs_per_round: Epochs from one round to the next; default 1.
        start_step: Like `start_epoch`, in optimizer steps (Lightning's `global_step`).
        steps_per_round: Steps from one round to the next.
        masking: How masks are enforced; default `InPlace()`.
        rewind: `"learning_rate"` restarts the learning-rate schedule in every round, from its state
            at the start of training (for parameter groups and schedulers added later, from when
            they were added); None does not change it.
        optimizer_state: What happens to momentum and other state after each prune:
            `"zero_pruned"`, `"reset"` or `"keep"`; see `Pruner`.
        from_zeros: Keep the exact zeros of the weights at the start of training, to continue with a
            sparse model. They count towards the schedule, whose first round must reach their
            sparsity. Tensors with no other values are treated as untrained and stay dense, unless
            this is `"all"`.
        gradients: Former name of `calibration`.

    Raises:
        ValueError: At construction, for arguments out of range or both epochs and steps; at the
            start of `fit`, for a plan that does not fit the training, patterns that match nothing,
            tensors that another PruningCallback prunes, or a checkpoint of another plan or method.

    Example:
        >>> from pruneflow import Compounding
        >>> pruning = PruningCallback(
        ...     Compounding(target=0.98, rounds=8), epochs_per_round=5, start_epoch=10
        ... )
        >>> trainer = L.Trainer(max_epochs=60, callbacks=[pruning], logger=False)
    """

    def __init__(
        self,
        schedule: ScheduleLike,
        *,
        importance: Importance | TorchMethod = magnitude,
        calibration: Calibration | None = None,
        granularity: Granularity | None = None,
        costs: CostFunction | Mapping[str, float] | None = None,
        scope: Scope = "global",
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] = (),
        clock: Clock | None = None,
        start_epoch: int | None = None,
        epochs_per_round: int | None = None,
        start_step: int | None = None,
        steps_per_round: int | None = None,
        masking: Masking | None = None,
        rewind: Literal["learning_rate"] | None = None,
        optimizer_state: OptimizerState = "zero_pruned",
        from_zeros: bool | Literal["all"] = False,
        gradients: Calibration | None = None,
    ) -> None:
        if gradients is not None:
            rank_zero_info("`gradients` is now called `calibration`; the old name still works")
            calibration = gradients
        self.schedule = as_schedule(schedule)
        self.rule = rule_for(importance, scope, granularity, costs)
        check_arguments(self.schedule, self.rule, calibration, rewind, from_zeros=from_zeros)
        check_optimizer_state(optimizer_state)
        self.clock = Clock.counting(
            start_epoch, epochs_per_round, start_step, steps_per_round, clock
        )
        fits = self.schedule.rounds is None
        Plan.lay(self.schedule, self.clock, self.clock.start + 1 if fits else None)
        self.calibration = calibration
        self.include = include
        self.exclude = exclude
        self.masking = masking
        self.rewind = rewind
        self.optimizer_state = optimizer_state
        self.from_zeros = from_zeros
        self.plan = Plan.lay(None, self.clock)  # until the first fit
        self._fit: _Fit | None = None
        self._model: weakref.ref[L.LightningModule] | None = None  # of the last fit
        self._restored: Mapping[str, Any] | None = None
        self._others: list[str] = []  # keys of other callbacks' states in a restored checkpoint
        self._reset()

    def _reset(self) -> None:
        self._state = PruningState(method=method_state(self.rule, self.rewind))
        self._learning_rate: LearningRateSnapshot | None = None
        self._metrics = SparsityMetrics()
        self._validated = False  # since the last training step

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, but spawned processes must recognise the model.
        return vars(self) | {"_model": None if self._model is None else self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        vars(self).update(state | {"_model": None if model is None else weakref.ref(model)})

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints; contains `include` and `exclude` to be unique."""
        if self.include is None and not self.exclude:
            return type(self).__qualname__
        return self._generate_state_key(include=_names(self.include), exclude=_names(self.exclude))

    @property
    def pruner(self) -> Pruner | None:
        """The Pruner of the current fit; None outside of `fit`."""
        return self._fit.pruner if self._fit else None

    @property
    def round(self) -> int:
        """Number of rounds done."""
        return self._state.round

    @property
    def sparsity(self) -> float:
        """Cumulative sparsity of the current masks; after `fit`, of the last ones."""
        if self.pruner and self.pruner.masks:
            return self.pruner.weight_masks.sparsity
        masks = self._state.masks
        return MaskSet.from_state({name: masks[name] for name in self._state.names}).sparsity

    @property
    def cost_per_weight(self) -> Mapping[str, float] | None:
        """Qualified name -> cost of each weight; None if weights are counted, or before `fit`."""
        return self._state.costs if callable(self.rule.costs) else self.rule.costs

    def check(
        self,
        model: nn.Module,
        example: Example | None = None,
        batches: Iterable[Any] | None = None,
    ) -> None:
        """Check that a model can be pruned with these settings, as `fit` does before training.

        Args:
            model: The model; not changed.
            example: Example input, for `Channels()` and measured costs.
            batches: Batches for the calibration, to check that it covers all tensors; None not to.

        Raises:
            ValueError: If it cannot.
        """
        pruner = self._make_pruner(model, self.rule, [], example)
        pruner.check(self._target)
        if batches is not None and self.calibration is not None and self.rule.needs is not None:
            pruner.check_evidence(self.rule.needs(model, batches, self.calibration.loss))

    @torch.inference_mode(False)
    def enforce(self) -> None:
        """Set pruned weights to zero again, in case something else has changed them."""
        if self.pruner is not None and self.pruner.masking.raw_masks:
            self.pruner.hold(self.pruner.masks)

    # -- hooks, in the order in which Lightning calls them ----------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Discard the state of a checkpoint that was loaded for something else, such as a test."""
        self._restored, self._others = None, []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state of a checkpoint until the next fit starts."""
        self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find out whether a checkpoint has the state of this callback, or only of others."""
        mine = {callback.state_key for callback in pruning_callbacks(trainer)}
        stored = checkpoint["callbacks"]
        if self.state_key in stored:
            self._restored = stored[self.state_key]  # Lightning does not load an empty one
        else:
            kind = type(self).__qualname__
            self._others = sorted({key for key in stored if key.startswith(kind)} - mine)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the plan, check that it fits the model and the training, and print it."""
        check_strategy(trainer)
        if self._model is None or self._model() is not pl_module:
            self._reset()
        self._model = weakref.ref(pl_module)
        self._learning_rate = None  # it belongs to the optimizers of another fit
        finished = self._state.plan is not None and self.round == len(self.plan.rounds)
        rule: Any = self.rule
        if callable(rule.costs) and self._state.costs is not None:
            rule = replace(rule, costs=self._state.costs)  # do not measure them again
        example = example_input(trainer, pl_module) if rule.needs_example else None
        pruner = self._make_pruner(pl_module, rule, trainer.optimizers, example)
        if callable(self.rule.costs):
            self._state.costs = pruner.costs
        if finished:
            rank_zero_info("The pruning plan is finished: zeros are kept, nothing more is pruned")
        else:
            self._lay_plan(trainer, pl_module, pruner)
        self._fit = _Fit(pruner, self.plan, LearningRates(trainer.optimizers))
        if pruner.frozen:
            rank_zero_info(f"Not pruned, as they are frozen: {', '.join(pruner.frozen)}")
        if dense := pruner.selection.describe_dense():
            rank_zero_info(dense)
        if self.optimizer_state == "keep" and (names := swapping_optimizers(trainer.optimizers)):
            rank_zero_warn(
                f"With optimizer_state='keep', `eval()` of {', '.join(names)} can restore pruned "
                "weights after training; use optimizer_state='zero_pruned'"
            )
        check_averages(trainer, self.masking)
        check_disjoint([each.pruner for each in pruning_callbacks(trainer) if each.pruner])
        self._load_restored()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the masks so far, now that optimizers exist and a checkpoint has been loaded."""
        self._load_restored()  # some strategies load the checkpoint only now
        pruner, state = self._fitting.pruner, self._state
        self._metrics.epoch = None  # nothing logged in this fit yet
        self._fitting.rates = LearningRates(trainer.optimizers)
        if self.rewind:
            if self._learning_rate is None:
                self._learning_rate = LearningRateSnapshot([], [])
            self._learning_rate.update(trainer.optimizers, schedulers(trainer))
            if trainer.checkpoint_callbacks:
                self._learning_rate.state()  # raises now instead of at the first checkpoint
        if state.masks:
            pruner.include_unfrozen(state.names)
            pruner.hold(MaskSet.from_state(state.masks))
        elif self.from_zeros:
            pruner.hold_zeros(empty=self.from_zeros == "all")
            self.plan.check_start(pruner.removed)
        self._mask_averages(trainer)
        self._metrics.measure(pruner, self.round)
        if self.calibration is not None and self.rule.needs is not None and self._rounds_left:
            self.calibration.check(trainer, self.rule.needs, pruner.check_evidence)
        due = self._due(trainer)
        if due and due.number - self.round > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"Rounds {self.round + 1} to {due.number} of the plan are due at the start of this "
                "training, so they are pruned at once; set `start_epoch` (or `start_step`) to the "
                "epoch (or step) it starts at"
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune if a round is due at this epoch; log the sparsity of the epoch."""
        self._fitting.rates.update(trainer.optimizers)
        if self.clock.unit == "epoch":
            self._run_due_rounds(trainer)
        self._metrics.log(trainer, pl_module, _all_metrics(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if a round is due at this step."""
        self._fitting.pruner.set_optimizers(trainer.optimizers)
        if self._validated:
            self.enforce()
            self._validated = False
        if self._learning_rate is not None:
            self._learning_rate.update(trainer.optimizers, schedulers(trainer))
        # on_train_epoch_start is not called if training resumes in the middle of an epoch.
        if self._run_due_rounds(trainer) or self._metrics.epoch != trainer.current_epoch:
            self._metrics.log(trainer, pl_module, _all_metrics(trainer))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the current sparsity and round, for the names of checkpoints after validation."""
        if self.pruner is not None and not (trainer.sanity_checking or trainer.barebones):
            # The logger gets the same values at the end of the epoch.
            self._metrics.log_totals(pl_module, _all_metrics(trainer), logger=False)
        self._validated = True

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Mask again, as some optimizers use other weights for validation."""
        if batch_idx == 0:
            self.enforce()

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), round, plan and learning-rate snapshot, as tensors and builtins."""
        self._store_masks()
        snapshot = self._learning_rate
        self._state.learning_rate = snapshot.state() if snapshot else None
        return self._state.as_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the masks, and warn about tensors that were unfrozen too late."""
        if self.pruner is not None and self.pruner.unfrozen:
            rank_zero_warn(
                f"{', '.join(self.pruner.unfrozen)} became trainable after the last round, so they "
                "stayed dense; unfreeze them earlier, or schedule more rounds"
            )
        self._remove()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the masks also if there was nothing to train; warn if the target was missed."""
        self._remove()
        if self._rounds_left:
            rank_zero_warn(
                f"Training ended in round {self.round} of {len(self.plan.rounds)}, at sparsity "
                f"{self.sparsity:.4f}, below the target; train longer, or fit again to continue"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the masks without hiding the exception."""
        try:
            self._remove()
        except Exception as error:
            exception.add_note(f"pruneflow could not remove its masks after this: {error!r}")
        drop_log_methods(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set pruned weights that another callback has changed to zero; release the model."""
        if stage == "fit" and clear(pl_module, MaskSet.from_state(self._state.masks)):
            rank_zero_warn(
                "Pruned weights were changed after training, so they were set to zero again; "
                "change weights that should be dense after `fit`"
            )
        drop_log_methods(self)

    # ---------------------------------------------------------------------------------------------

    @property
    def _fitting(self) -> _Fit:
        if self._fit is None:
            raise RuntimeError(
                "`PruningCallback` must be called by a Trainer in `fit`, got no fit; call `fit`"
            )
        return self._fit

    @property
    def _rounds_left(self) -> bool:
        return self.round < len(self.plan.rounds)

    @property
    def _target(self) -> float | None:
        rounds = self.plan.rounds
        if not rounds and self.schedule.rounds is not None:  # there is no plan yet
            rounds = Plan.lay(self.schedule, self.clock).rounds
        return rounds[-1].sparsity if rounds else None

    def _make_pruner(
        self,
        model: nn.Module,
        rule: MaskRule,
        optimizers: Sequence[Optimizer],
        example: Example | None,
    ) -> Pruner:
        return Pruner(
            model,
            rule=rule,
            include=self.include,
            exclude=self.exclude,
            optimizers=optimizers,
            masking=self.masking,
            optimizer_state=self.optimizer_state,
            example_input=example,
        )

    def _lay_plan(self, trainer: L.Trainer, pl_module: L.LightningModule, pruner: Pruner) -> None:
        known = self.schedule.rounds is not None
        length = training_length(trainer, pl_module, self.clock, known)
        self.plan = Plan.lay(self.schedule, self.clock, length)
        self._state.plan = self.plan.state()
        check_steps(trainer, pl_module, self.plan)
        pruner.check(self._target)
        counted = self.cost_per_weight is None
        rank_zero_info(f"Pruning plan:\n{self.plan.table(pruner.weights if counted else None)}")
        for message in callback_warnings(trainer, self.plan):
            rank_zero_warn(message)

    def _due(self, trainer: L.Trainer) -> Round | None:
        epochs = self.clock.unit == "epoch"
        position: float = trainer.current_epoch if epochs else trainer.global_step
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            position = inf
        return self._fitting.controller.next(position, self.round)

    def _run_due_rounds(self, trainer: L.Trainer) -> bool:
        due = self._due(trainer)
        if due is None:
            return False
        pruner = self._fitting.pruner
        pruner.include_unfrozen()
        if due.sparsity is None:
            for _ in range(due.number - self.round):
                pruner.prune()
        else:
            evidence = None
            if self.calibration is not None and self.rule.needs is not None:
                evidence = self.calibration.collect(trainer, self.rule.needs)
            pruner.prune_to(due.sparsity, round=due.number, evidence=evidence)
        self._state.round = due.number
        self._mask_averages(trainer)
        self._metrics.measure(pruner, self.round)
        if self._learning_rate is not None:
            self._learning_rate.restore(trainer.optimizers, schedulers(trainer))
        elif message := self._fitting.rates.warning(self.plan, due.number, trainer.optimizers):
            rank_zero_warn(message)
        return True

    def _mask_averages(self, trainer: L.Trainer) -> None:
        for _, average in averaged_models(trainer):
            self._fitting.pruner.apply_to(average)

    def _load_restored(self) -> None:
        others, stored = self._others, self._restored
        self._others, self._restored = [], None
        expect(
            not others,
            "ckpt_path",
            f"hold the state of {self.state_key!r}",
            f"that of {', '.join(map(repr, others))}",
            "resume with the same `include` and `exclude`, or start from its weights with "
            "`from_zeros=True`",
        )
        if stored is None:
            return
        pruner = self._fitting.pruner
        state = PruningState.read(stored, self._state.method)
        check_state(
            state,
            self.plan.state(),
            self._state.method,
            {name: slot.parameter for name, slot in locate(pruner.model).items()},
            same_length=self.schedule.rounds is not None,
        )
        if state.costs is not None and pruner.costs is not None:  # do not measure them again
            state.costs = Costs(state.costs, pruner.costs.power)
            pruner.rule = replace(pruner.rule, costs=state.costs)  # type: ignore[type-var]
        self._state = replace(state, plan=self.plan.state())
        saved = state.learning_rate
        self._learning_rate = LearningRateSnapshot.from_state(saved) if saved else None

    def _store_masks(self) -> None:
        if self.pruner is not None and self.pruner.masks:
            self._state.masks = self.pruner.masks.state()
            self._state.names = list(self.pruner.weight_names)

    def _remove(self) -> None:
        if self.pruner is not None:
            self._store_masks()
            self.pruner.remove()
            self._fit = None
        if self._learning_rate is not None:
            self._learning_rate.release()


def pruning_callbacks(trainer: L.Trainer) -> list[PruningCallback]:
    """The PruningCallbacks of a Trainer, in order."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, PruningCallback)]


def _all_metrics(trainer: L.Trainer) -> list[SparsityMetrics]:
    return [each._metrics for each in pruning_callbacks(trainer) if each.pruner is not None]


def _names(patterns: Sequence[Pattern] | None) -> list[str] | None:
    if patterns is None:
        return None
    return [pattern if isinstance(pattern, str) else pattern.__qualname__ for pattern in patterns]
