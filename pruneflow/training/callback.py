"""PruningCallback: when a round runs, resume, logging."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pruneflow.distributed import decide
from pruneflow.pruning.distribution import Scope
from pruneflow.pruning.granularity import Granularity
from pruneflow.pruning.granularity.channels import Channels
from pruneflow.pruning.importance import Importance, magnitude, needs_gradients
from pruneflow.pruning.masking import Masking, clear
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.optimizers import OptimizerState, check_optimizer_state
from pruneflow.pruning.plan import Clock, Plan, has_rounds
from pruneflow.pruning.pruner import Pruner
from pruneflow.pruning.schedules import ScheduleLike, plain_number
from pruneflow.pruning.torch_methods import TorchMethod
from pruneflow.structure.costs import Costs
from pruneflow.structure.parameters import Pattern, locate
from pruneflow.training.calibration import Gradients
from pruneflow.training.checks import (
    LearningRates,
    check_arguments,
    check_averages,
    check_disjoint,
    denser_choices,
    plain_costs,
    swapping,
)
from pruneflow.training.metrics import Logged
from pruneflow.training.rewinding import LearningRateSnapshot
from pruneflow.training.state import VERSION, check_state, method_state
from pruneflow.training.trainer import (
    averaged_models,
    check_steps,
    check_strategy,
    example_input,
    let_go,
    schedulers,
    training_length,
)


class PruningCallback(L.Callback):
    """Prune in rounds while a Trainer trains, and fine-tune between them.

    A round prunes at the start of an epoch (or step) and the epochs after it fine-tune. The plan is
    printed before training. At the end of `fit`, also after an exception, masks are removed: plain
    parameters with exact zeros. A later `fit` of the same model holds the zeros and does not prune
    again; another model starts over. Checkpoints hold masks and plan position. Averages of the
    weights (`WeightAveraging`, `StochasticWeightAveraging`) are pruned along. Several callbacks may
    prune different tensors of one model.

    Args:
        schedule: Cumulative sparsity after each round: `Compounding(target=0.98, rounds=8)`, a list
            such as `[0.5, 0.8, 0.9]`, or a function of the round, which gets as many rounds as fit
            the training. The number of rounds where `importance` keeps its own amount. None to
            prune nothing, with `from_zeros`.
        importance: Scores, higher = keep, or a pruning method of torch; see `Pruner`.
        gradients: Where an importance such as `taylor` gets the gradients it needs:
            `Gradients(loss, batches=8)`.
        granularity: What is removed together: `NM(2, 4)`, `Block(1, 16)` or whole `Channels()`;
            None for each weight by itself.
        costs: `multiply_adds` or `latency`, to let the schedule count these instead of weights; or
            qualified name -> cost of each weight of that tensor.
        scope: What competes together: `"global"`, `"layer"`, or group name -> globs.
        include: Globs over qualified names and module types; None for what is prunable by default.
        exclude: What to leave out.
        start_epoch: Zero-based epoch at whose start round 1 prunes; 0 unless given.
        epochs_per_round: Epochs from one round to the next; 1 unless given.
        start_step: The same by optimizer steps (Lightning's `global_step`), instead of epochs.
        steps_per_round: Steps from one round to the next.
        masking: How masks are held; `InPlace()` unless given.
        rewind: `"learning_rate"` starts the learning-rate schedule again in every round, from where
            it stood when training began (for parameter groups and schedulers that came later, when
            they came); None leaves it alone.
        optimizer_state: What happens to momentum and the like after each prune: `"zero_pruned"`,
            `"reset"` or `"keep"`; see `Pruner`.
        from_zeros: Hold the exact zeros that the weights have when training starts, to go on with
            an already sparse model. The schedule counts them: its first round has to reach them.
            Tensors that are zero throughout are taken for untrained ones and left dense, unless
            this is `"all"`.

    Raises:
        ValueError: At construction, for arguments out of range or epochs and steps together; when
            `fit` begins, for a plan that does not fit the training, patterns that match nothing,
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
        schedule: ScheduleLike | int | None,
        *,
        importance: Importance | TorchMethod = magnitude,
        gradients: Gradients | None = None,
        granularity: Granularity | None = None,
        costs: Costs | Mapping[str, float] | None = None,
        scope: Scope = "global",
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] = (),
        start_epoch: int | None = None,
        epochs_per_round: int | None = None,
        start_step: int | None = None,
        steps_per_round: int | None = None,
        masking: Masking | None = None,
        rewind: Literal["learning_rate"] | None = None,
        optimizer_state: OptimizerState = "zero_pruned",
        from_zeros: bool | Literal["all"] = False,
    ) -> None:
        schedule = plain_number(schedule)
        check_arguments(schedule, importance, gradients, rewind, from_zeros=from_zeros)
        check_optimizer_state(optimizer_state)
        self.schedule = schedule
        self.clock = Clock.counting(start_epoch, epochs_per_round, start_step, steps_per_round)
        Plan.lay(schedule, self.clock, None if has_rounds(schedule) else self.clock.start + 1)
        self.importance = importance
        self.gradients = gradients
        self.granularity = granularity
        self.costs = costs if costs is None or callable(costs) else plain_costs(costs)
        self.scope = scope
        self.include = include
        self.exclude = exclude
        self.masking = masking
        self.rewind = rewind
        self.optimizer_state = optimizer_state
        self.from_zeros = from_zeros
        self.plan: Plan | None = None
        self.pruner: Pruner | None = None
        self._model: weakref.ref[L.LightningModule] | None = None  # of the last fit
        self._restored: Mapping[str, Any] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.round = 0
        self._masks: dict[str, Any] = {}
        self._scored: list[str] = []
        self._learning_rate: LearningRateSnapshot | None = None
        self._logged = Logged()
        self._costs: Mapping[str, float] | None = None
        self._validated = False  # since the last training step

    def __getstate__(self) -> dict[str, Any]:
        # A process that is spawned gets the model as well, and has to know it again.
        return vars(self) | {"_model": None if self._model is None else self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        vars(self).update(state | {"_model": None if model is None else weakref.ref(model)})

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep the state: by what it prunes, as there may be several."""
        if self.include is None and not self.exclude:
            return type(self).__qualname__
        return self._generate_state_key(include=_words(self.include), exclude=_words(self.exclude))

    @property
    def sparsity(self) -> float:
        """Cumulative sparsity of the masks that are held, or were when training ended."""
        if self.pruner and self.pruner.masks:
            return self.pruner.weight_masks.sparsity
        return MaskSet.from_state({name: self._masks[name] for name in self._scored}).sparsity

    @property
    def cost_per_weight(self) -> Mapping[str, float] | None:
        """Qualified name -> cost of each weight; None where weights are counted, or before fit."""
        return self._costs if callable(self.costs) else self.costs

    @torch.inference_mode(False)
    def enforce(self) -> None:
        """Zero what is pruned once more, should anything have put other weights in its place."""
        if self.pruner is not None and self.pruner.masking.held:
            self.pruner.hold(self.pruner.masks)

    # -- Lightning calls these, in this order -----------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what a checkpoint held that was loaded for something else, such as a test."""
        self._restored = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store what a checkpoint holds; it is put to use when a fit begins."""
        self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note where a checkpoint was pruned otherwise, which would go on from a dense plan."""
        mine = {callback.state_key for callback in pruning_callbacks(trainer)}
        stored = checkpoint["callbacks"]
        if self.state_key in stored:
            self._restored = stored[self.state_key]  # Lightning does not load an empty one
        kind = type(self).__qualname__
        others = {key for key in stored if key.startswith(kind)} - mine
        if others and self.state_key not in stored:
            self._restored = {"others": sorted(others)}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay the plan, check it against model and training, and print it."""
        check_strategy(trainer)
        if self._model is None or self._model() is not pl_module:
            self._start_over()
        self._model = weakref.ref(pl_module)
        self._learning_rate = None  # of another fit's optimizers
        finished = self.plan is not None and self.round == len(self.plan.rounds)
        granularity, given = self.granularity, None
        if isinstance(granularity, Channels):
            given = granularity.example_input
            if given is None:
                granularity = Channels(example_input(trainer, pl_module))
        if callable(self.costs) and self._costs is None:
            measure, example = self.costs, given
            if example is None:
                example = example_input(trainer, pl_module)
            # Times differ from process to process.
            self._costs = decide(lambda: plain_costs(measure(pl_module, example)), [])
        self.pruner = Pruner(
            pl_module,
            importance=self.importance,
            granularity=granularity,
            costs=self.cost_per_weight,
            scope=self.scope,
            include=self.include,
            exclude=self.exclude,
            optimizers=trainer.optimizers,
            masking=self.masking,
            optimizer_state=self.optimizer_state,
        )
        if finished:
            rank_zero_info(
                "The pruning plan is finished: its zeros are held, nothing more is pruned"
            )
        else:
            length = training_length(trainer, pl_module, self.clock, has_rounds(self.schedule))
            self.plan = Plan.lay(self.schedule, self.clock, length)
            check_steps(trainer, pl_module, self.plan)
            if self.plan.rounds:
                self.pruner.check(self.plan.rounds[-1].sparsity)
            table = self.plan.table(None if self.costs else self.pruner.weights)
            rank_zero_info(f"Pruning plan:\n{table}")
            for message in denser_choices(trainer, self.plan):
                rank_zero_warn(message)
        if self.pruner.frozen:
            rank_zero_info(f"Frozen, hence not pruned: {', '.join(self.pruner.frozen)}")
        if dense := self.pruner.selection.describe_dense():
            rank_zero_info(dense)
        if self.optimizer_state == "keep" and (names := swapping(trainer.optimizers)):
            rank_zero_warn(
                f"`optimizer_state` 'keep' lets the `eval()` of {', '.join(names)} bring pruned "
                "weights back after training; use 'zero_pruned'"
            )
        check_averages(trainer, self.masking)
        check_disjoint([each.pruner for each in pruning_callbacks(trainer) if each.pruner])
        self._take_restored()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold the masks so far, once optimizers exist and a checkpoint has been loaded."""
        assert self.plan is not None and self.pruner is not None  # made when fit began
        self._take_restored()  # some strategies load a checkpoint only now
        self._logged.epoch = None  # none of this fit yet
        self._rates = LearningRates(trainer.optimizers)
        if self.rewind:
            if self._learning_rate is None:
                self._learning_rate = LearningRateSnapshot([], [])
            self._learning_rate.follow(trainer.optimizers, schedulers(trainer))
            if trainer.checkpoint_callbacks:
                self._learning_rate.state()  # refuses now what the first checkpoint would
        if self._masks:
            self.pruner.admit(self._scored)
            self.pruner.hold(MaskSet.from_state(self._masks))
        elif self.from_zeros:
            self.pruner.hold_zeros(empty=self.from_zeros == "all")
            self.plan.check_start(self.pruner.removed)
        self._mask_averages(trainer)
        self._logged.measure(self.pruner, self.round)
        due = self._due(trainer)
        if due - self.round > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"Rounds {self.round + 1} to {due} of the plan are due where this training begins, "
                "so they are pruned at once; set `start_epoch` (or `start_step`) to where it begins"
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune if a round is due at this epoch; log the sparsity of the epoch."""
        self._rates.note(trainer.optimizers)
        if self.clock.unit == "epoch":
            self._run_due_rounds(trainer)
        self._logged.log(trainer, pl_module, _logged(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if a round is due at this step."""
        assert self.pruner is not None  # made when fit began
        self.pruner.follow(trainer.optimizers)
        if self._validated:
            self.enforce()
            self._validated = False
        if self._learning_rate is not None:
            self._learning_rate.follow(trainer.optimizers, schedulers(trainer))
        # A training that resumes within an epoch does not start it, but has to prune and log.
        if self._run_due_rounds(trainer) or self._logged.epoch != trainer.current_epoch:
            self._logged.log(trainer, pl_module, _logged(trainer))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is being validated: a checkpoint saved then must not go by last epoch's name."""
        if self.pruner is not None and not (trainer.sanity_checking or trainer.barebones):
            # Not to the logger, which gets the same numbers at the epoch's end.
            self._logged.log_totals(pl_module, _logged(trainer), logger=False)
        self._validated = True

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Mask once more, as some optimizers put other weights in place for validation."""
        if batch_idx == 0:
            self.enforce()

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), round, plan and learning-rate snapshot, as tensors and builtins."""
        held = self.pruner.masks if self.pruner else None
        return {
            "version": VERSION,
            "round": self.round,
            "method": self._method(),
            "costs": dict(self._costs) if self._costs else None,
            "plan": self.plan.state() if self.plan else None,
            "masks": held.state() if held else self._masks,
            "names": list(self.pruner.scored) if self.pruner and held else self._scored,
            "learning_rate": self._learning_rate.state() if self._learning_rate else None,
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove: plain parameters with exact zeros; say what was unfrozen too late."""
        if self.pruner is not None and self.pruner.unfrozen:
            rank_zero_warn(
                f"{', '.join(self.pruner.unfrozen)} became trainable after the last round, hence "
                "stayed dense; unfreeze before that, or let rounds follow"
            )
        self._remove()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go also where there was nothing to train; say so if it ended below the target."""
        self._remove()
        assert self.plan is not None  # laid when fit began
        if self.round < len(self.plan.rounds):
            rank_zero_warn(
                f"Training ended in round {self.round} of {len(self.plan.rounds)}, at sparsity "
                f"{self.sparsity:.4f}, below the target; train longer, or fit again to go on"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove, and never hide the exception."""
        try:
            self._remove()
        except Exception as error:
            exception.add_note(f"pruneflow could not remove its masks after this: {error!r}")
        let_go(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep no hold on the model, which other callbacks may have changed after training."""
        if stage == "fit" and clear(pl_module, MaskSet.from_state(self._masks)):
            rank_zero_warn(
                "Weights were put back after training that had been pruned, so they are zeroed "
                "again; put back what is to stay dense after `fit`"
            )
        let_go(self)

    # ---------------------------------------------------------------------------------------------

    def _due(self, trainer: L.Trainer) -> int:
        assert self.plan is not None  # laid when fit began
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return len(self.plan.rounds)
        return self.plan.due(
            trainer.current_epoch if self.plan.unit == "epoch" else trainer.global_step
        )

    def _run_due_rounds(self, trainer: L.Trainer) -> bool:
        assert self.plan is not None and self.pruner is not None
        due = self._due(trainer)
        if due <= self.round:
            return False
        self.pruner.admit()
        sparsity = self.plan.rounds[due - 1].sparsity
        if sparsity is None:
            for _ in range(due - self.round):
                self.pruner.prune()
        else:
            gradients = None
            if self.gradients is not None and needs_gradients(self.importance):
                gradients = self.gradients.compute(trainer)
            self.pruner.prune_to(sparsity, round=due, gradients=gradients)
        self.round = due
        self._mask_averages(trainer)
        self._logged.measure(self.pruner, self.round)
        if self._learning_rate is not None:
            self._learning_rate.restore(trainer.optimizers, schedulers(trainer))
        elif message := self._rates.decayed(self.plan, due, trainer.optimizers):
            rank_zero_warn(message)
        return True

    def _mask_averages(self, trainer: L.Trainer) -> None:
        assert self.pruner is not None
        for _, average in averaged_models(trainer):
            self.pruner.apply_to(average)

    def _method(self) -> dict[str, str]:
        return method_state(
            importance=self.importance,
            scope=self.scope,
            rewind=self.rewind,
            granularity=self.granularity,
            costs=self.costs,
        )

    def _take_restored(self) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        if "others" in state:
            raise ValueError(
                f"the checkpoint is expected to hold the state of {self.state_key!r}, but holds "
                f"{', '.join(map(repr, state['others']))}; resume with the same `include` and "
                "`exclude`, or start from its weights with `from_zeros=True`"
            )
        assert self.plan is not None and self.pruner is not None  # made when fit began
        check_state(
            state,
            self.plan.state(),
            self._method(),
            {name: slot.parameter for name, slot in locate(self.pruner.model).items()},
            longer_is_other=has_rounds(self.schedule),
        )
        self.round = state["round"]
        self._masks, self._scored = state["masks"], state["names"]
        if state["costs"] is not None:  # measured, so another measurement would find others
            self._costs = self.pruner.costs = state["costs"]
        saved = state["learning_rate"]
        self._learning_rate = LearningRateSnapshot.from_state(saved) if saved else None

    def _remove(self) -> None:
        if self.pruner is not None:
            if self.pruner.masks:
                self._masks, self._scored = self.pruner.masks.state(), list(self.pruner.scored)
            self.pruner.remove()
            self.pruner = None
        if self._learning_rate is not None:
            self._learning_rate.release()


def pruning_callbacks(trainer: L.Trainer) -> list[PruningCallback]:
    """The PruningCallbacks of a Trainer, in their order."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, PruningCallback)]


def _logged(trainer: L.Trainer) -> list[Logged]:
    return [each._logged for each in pruning_callbacks(trainer) if each.pruner is not None]


def _words(patterns: Sequence[Pattern] | None) -> list[str] | None:
    if patterns is None:
        return None
    return [pattern if isinstance(pattern, str) else pattern.__qualname__ for pattern in patterns]
