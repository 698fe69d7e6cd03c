"""What does not go together: arguments of a PruningCallback, other callbacks, the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from numbers import Real
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from pruneflow.pruning.importance import Importance, needs_gradients
from pruneflow.pruning.masking import Masking, Reparametrize
from pruneflow.pruning.plan import Plan
from pruneflow.pruning.pruner import Pruner
from pruneflow.pruning.schedules import ScheduleLike, plain_number
from pruneflow.pruning.torch_methods import TorchMethod, is_torch_method, keeps_own_amount
from pruneflow.training.calibration import Gradients
from pruneflow.training.trainer import averaged_models


def check_arguments(
    schedule: ScheduleLike | int | None,
    importance: Importance | TorchMethod,
    gradients: Gradients | None,
    rewind: str | None,
    *,
    from_zeros: bool | Literal["all"],
) -> None:
    """Refuse them; see `PruningCallback` for what they are.

    Raises:
        ValueError: Naming the argument and the remedy.
    """
    if from_zeros not in (True, False, "all"):
        raise ValueError(f"`from_zeros` must be True, False or 'all', got {from_zeros!r}")
    if schedule is None and not from_zeros:
        raise ValueError(
            "`schedule` is expected to say how much to prune, but None came, which only holds "
            "zeros that are there already; give a schedule, or set `from_zeros=True`"
        )
    own_amount = is_torch_method(importance) and keeps_own_amount(importance)
    rounds = isinstance(schedule, int)
    if schedule is not None and (own_amount != rounds or isinstance(schedule, bool)):
        expected = (
            f"the number of rounds, since {importance!r} keeps its own amount"
            if own_amount
            else "a schedule such as Compounding(target=0.98, rounds=8)"
        )
        raise ValueError(f"`schedule` is expected to be {expected}, but {schedule!r} came")
    if needs_gradients(importance) and gradients is None:
        raise ValueError(
            f"`gradients` is expected to say where {importance!r} gets the gradients it needs, "
            "but None came; give Gradients(loss), with the loss of your training"
        )
    if rewind not in (None, "learning_rate"):
        raise ValueError(f"`rewind` is expected to be 'learning_rate' or None, but {rewind!r} came")


def plain_costs(costs: Mapping[str, float]) -> dict[str, float]:
    """Costs as plain floats, which every checkpoint can hold.

    Raises:
        TypeError: If they are no mapping.
        ValueError: If one is no number.
    """
    if not isinstance(costs, Mapping):
        raise TypeError(
            f"`costs` must map qualified names to numbers, got {costs!r}; use multiply_adds, say"
        )
    numbers = {str(name): plain_number(cost) for name, cost in costs.items()}
    wrong = [f"{cost!r} for {name}" for name, cost in numbers.items() if not isinstance(cost, Real)]
    if wrong:
        raise ValueError(
            f"`costs` must be numbers, got {', '.join(wrong)}; give what a weight of the tensor "
            "costs, such as 9.0"
        )
    return {name: float(cost) for name, cost in numbers.items()}


# Of these the largest is never from an earlier round than the others.
_GROWING = ("epoch", "step", "round", "sparsity")

# Of the highest learning rate so far. After a prune of 72 % of what remained (a small CNN on the
# digits, two seeds, 3 epochs), training at the full rate reaches 54 and 69 % accuracy, at half of
# it the same, at a fifth 44 and 61 %, at a tenth 34 and 54 %. Half a cosine over four rounds of
# equal length is at 15 % where the last begins.
_DECAYED = 0.15
# Of the remaining weights; what removes less, as the last rounds of Cubic do, does little damage.
_LITTLE = 0.1


def denser_choices(trainer: L.Trainer, plan: Plan) -> list[str]:
    """Which callbacks of a Trainer may pick, or stop at, a model from before the last round.

    Args:
        trainer: The Trainer.
        plan: The plan that is about to run.

    Returns:
        For each such callback a message that names the remedy.

    Example:
        >>> best = ModelCheckpoint(monitor="val_loss")
        >>> trainer = L.Trainer(max_epochs=2, callbacks=[best], logger=False)
        >>> [message] = denser_choices(trainer, Plan.lay([0.5, 0.8]))
        >>> message.partition(";")[2]
        " use SparsityCheckpoint(monitor='val_loss', mode='min') instead"
        >>> denser_choices(trainer, Plan.lay([0.8]))
        []
    """
    last = plan.rounds[-1].at if plan.rounds else 0
    if last == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []  # nothing is measured before the last round
    end = _fine_tuned(plan)
    messages = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = f"{type(callback).__name__}(monitor={getattr(callback, 'monitor', None)!r})"
        if isinstance(callback, ModelCheckpoint) and _compares_rounds(callback):
            messages.append(
                f"{name} compares models of all rounds, so its best may be denser than the target; "
                f"use SparsityCheckpoint(monitor={callback.monitor!r}, mode={callback.mode!r}) "
                "instead"
            )
        if isinstance(callback, EarlyStopping) and not _waits(trainer, callback, plan, end):
            messages.append(
                f"{name} may stop the training before the last round, which prunes at {plan.unit} "
                f"{last}, has been fine-tuned, or at a model denser than the target, as a metric "
                "that pruning has lowered counts as one that no longer improves; set "
                f"Trainer(min_{plan.unit}s={end})"
            )
    return messages


def _compares_rounds(callback: ModelCheckpoint) -> bool:
    """Whether it keeps the best of all rounds; not if a subclass decides, as SparsityCheckpoint."""
    return (
        callback.monitor is not None
        and callback.save_top_k != 0
        and not (callback.monitor in _GROWING and callback.mode == "max")
        and not is_overridden("check_monitor_top_k", callback, ModelCheckpoint)
    )


def _fine_tuned(plan: Plan) -> int:
    """Epochs or steps after which the last round has had as much fine-tuning as the others."""
    *others, last = (planned.at for planned in plan.rounds)
    if others:
        end = 2 * last - others[-1]
        return end if plan.length is None else min(end, plan.length)
    return plan.length or last + 1


def _waits(trainer: L.Trainer, callback: EarlyStopping, plan: Plan, end: int) -> bool:
    """Whether it cannot stop the training before the plan's end, but for a metric that is NaN."""
    least = trainer.min_epochs if plan.unit == "epoch" else trainer.min_steps
    if least is not None and least >= end:
        return True
    # The first check is an improvement, so that the patience ends at the end of epoch `patience`.
    thresholds = (callback.stopping_threshold, callback.divergence_threshold)
    once_an_epoch = plan.unit == "epoch" and trainer.val_check_interval == 1.0
    return once_an_epoch and thresholds == (None, None) and callback.patience >= end - 1


class LearningRates:
    """The learning rates of a fit, to notice when they have decayed before the last rounds.

    Args:
        optimizers: Whose.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> rates, plan = LearningRates([optimizer]), Plan.lay([0.5, 0.75])
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> rates.decayed(plan, 2, [optimizer]).partition("; ")[2].partition(",")[0]
        'use rewind="learning_rate"'
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._highest: dict[tuple[int, int], float] = {}
        self._said = False
        self.note(optimizers)

    def note(self, optimizers: Sequence[Optimizer]) -> None:
        """Remember the highest rate of each parameter group."""
        for key, rate in _rates(optimizers):
            self._highest[key] = max(rate, self._highest.get(key, rate))

    def decayed(self, plan: Plan, round: int, optimizers: Sequence[Optimizer]) -> str | None:
        """What to say when a round prunes at rates that have nearly decayed; nothing twice.

        A rate that is low from the start has not decayed, and one group that is not low is enough.
        """
        self.note(optimizers)
        share = max(
            (rate / highest for key, rate in _rates(optimizers) if (highest := self._highest[key])),
            default=1.0,
        )
        amount = plan.rounds[round - 1].amount
        if self._said or share >= _DECAYED or (amount is not None and amount < _LITTLE):
            return None
        self._said = True
        what = "weights" if amount is None else f"{100 * amount:.3g} % of the remaining weights"
        return (
            f"Round {round} of {len(plan.rounds)} prunes {what} when the learning rate is down to "
            f"{100 * share:.2g} % of its highest, which may be too low to regain the accuracy; use "
            'rewind="learning_rate", which restarts its schedule in every round, or let it decay '
            "after the last round"
        )


def _rates(optimizers: Sequence[Optimizer]) -> Iterator[tuple[tuple[int, int], float]]:
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            yield (i, j), float(group.get("lr", 0.0))


def swapping(optimizers: Sequence[Optimizer]) -> list[str]:
    """Which optimizers put other weights in place for evaluation, as schedule-free ones do."""
    return [type(each).__name__ for each in optimizers if callable(getattr(each, "eval", None))]


def check_averages(trainer: L.Trainer, masking: Masking | None) -> None:
    """Refuse averages of the weights beside a masking that they do not go with.

    Raises:
        ValueError: Naming the callback that averages.
    """
    averaging = [name for name, _ in averaged_models(trainer)]
    if averaging and isinstance(masking, Reparametrize):
        raise ValueError(
            f"`masking` Reparametrize is expected without {averaging[0]}, which averages "
            "parameters by their order; use masking=InPlace()"
        )


def check_disjoint(pruners: Sequence[Pruner]) -> None:
    """Refuse several that prune one tensor, or may once it is no longer frozen.

    What goes along with channels is pruned as well.

    Raises:
        ValueError: Naming the tensors.
    """
    for pair in combinations(pruners, 2):
        one, other = ({*pruner.names, *pruner.frozen} for pruner in pair)
        both = sorted(one & other)
        along = {name: writers for name in both if (writers := _writers(name, pair))}
        if along:
            reads = [f"{name} (those of {', '.join(found)})" for name, found in along.items()]
            raise ValueError(
                "several PruningCallbacks are expected to prune different tensors, but one removes "
                f"channels that are read or held by what another prunes, {'; '.join(reads)}; "
                "`exclude` one of the two, or prune both in one callback"
            )
        if both:
            raise ValueError(
                "`include`/`exclude` of several PruningCallbacks are expected to select different "
                f"tensors, but two select {', '.join(both)}; exclude them in one"
            )


def _writers(name: str, pruners: Sequence[Pruner]) -> list[str]:
    """What those that do not select a tensor prune so that it loses entries along with that."""
    others = [pruner for pruner in pruners if name not in (*pruner.scored, *pruner.frozen)]
    return sorted({writer for pruner in others for writer in pruner.writers(name)})
