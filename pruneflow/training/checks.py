"""Compatibility checks: arguments of a PruningCallback, other callbacks, the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from pruneflow.errors import expect
from pruneflow.pruning.masking import Masking, Reparametrize
from pruneflow.pruning.plan import Plan
from pruneflow.pruning.pruner import Pruner
from pruneflow.pruning.schedules import Rounds, Schedule
from pruneflow.pruning.selection import MaskRule
from pruneflow.training.calibration import Calibration
from pruneflow.training.state import stable_repr
from pruneflow.training.trainer import averaged_models


def check_arguments(
    schedule: Schedule,
    rule: MaskRule,
    calibration: Calibration | None,
    rewind: str | None,
    *,
    from_zeros: bool | Literal["all"],
) -> None:
    """Check arguments of `PruningCallback`.

    Raises:
        ValueError: If one is invalid or does not fit the others.
    """
    valid, remedy = from_zeros in (True, False, "all"), "use True to keep the zeros of a model"
    expect(valid, "from_zeros", "be True, False or 'all'", repr(from_zeros), remedy)
    prunes, remedy = schedule.rounds != 0, "pass a schedule, or `from_zeros=True` to keep zeros"
    expect(prunes or from_zeros, "schedule", "say how much to prune", None, remedy)
    if rule.takes_target:
        expected, remedy = "be a schedule", "try Compounding(target=0.98, rounds=8)"
    else:
        expected = f"be the number of rounds for {stable_repr(rule.importance)}"
        remedy = "pass a number, as this importance has its own amount"
    fits = rule.takes_target != isinstance(schedule, Rounds)
    expect(not prunes or fits, "schedule", expected, repr(schedule), remedy)
    collects = calibration is None or isinstance(calibration, Calibration)
    remedy = "pass Calibration(loss) with your training loss"
    expect(
        collects,
        "calibration",
        "be a Calibration",
        stable_repr(calibration),
        remedy,
        error=TypeError,
    )
    if rule.needs is not None:
        expect(
            calibration is not None,
            "calibration",
            f"be set, as {stable_repr(rule.importance)} needs {stable_repr(rule.needs)}",
            None,
            remedy,
        )
    valid, remedy = rewind in (None, "learning_rate"), "use None for no rewinding"
    expect(valid, "rewind", "be 'learning_rate' or None", repr(rewind), remedy)


# Metrics that never decrease, so that their maximum is never from an earlier round.
_NEVER_DECREASE = ("epoch", "step", "round", "sparsity")

# Fraction of the highest learning rate so far. After pruning 72 % of the remaining weights (a small
# CNN on the digits, two seeds, 3 epochs), training at the full learning rate reaches 54 and 69 %
# accuracy, at a half of it the same, at a fifth 44 and 61 %, at a tenth 34 and 54 %. A cosine
# schedule over four rounds of equal length is at 15 % when the last one starts.
_LOW_RATE = 0.15
# Of the remaining weights. Smaller rounds, such as the last ones of Cubic, do little damage.
_SMALL_AMOUNT = 0.1


def callback_warnings(trainer: L.Trainer, plan: Plan) -> list[str]:
    """Warnings about callbacks that may select, or stop at, a model from before the last round.

    Args:
        trainer: The Trainer.
        plan: The plan that is about to run.

    Returns:
        A message with a remedy for each such callback.

    Example:
        >>> best = ModelCheckpoint(monitor="val_loss")
        >>> trainer = L.Trainer(max_epochs=2, callbacks=[best], logger=False)
        >>> [message] = callback_warnings(trainer, Plan.lay([0.5, 0.8]))
        >>> message.partition(";")[2]
        " use SparsityCheckpoint(monitor='val_loss', mode='min') instead"
        >>> callback_warnings(trainer, Plan.lay([0.8]))
        []
    """
    last = plan.rounds[-1].at if plan.rounds else 0
    if last == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []  # no model before the last round is measured
    end = _end_of_fine_tuning(plan)
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
                f"{name} may stop training before the last round, at {plan.unit} {last}, has been "
                "fine-tuned, or before the target is reached, as pruning makes metrics worse; set "
                f"Trainer(min_{plan.unit}s={end})"
            )
    return messages


def _compares_rounds(callback: ModelCheckpoint) -> bool:
    """Whether it keeps the best model of all rounds; subclasses may choose differently."""
    return (
        callback.monitor is not None
        and callback.save_top_k != 0
        and not (callback.monitor in _NEVER_DECREASE and callback.mode == "max")
        and not is_overridden("check_monitor_top_k", callback, ModelCheckpoint)
    )


def _end_of_fine_tuning(plan: Plan) -> int:
    """Epoch or step at which the last round has been fine-tuned as long as the one before."""
    *others, last = (planned.at for planned in plan.rounds)
    if others:
        end = 2 * last - others[-1]
        return end if plan.length is None else min(end, plan.length)
    return plan.length or last + 1


def _waits(trainer: L.Trainer, callback: EarlyStopping, plan: Plan, end: int) -> bool:
    """Whether it cannot stop training before `end`, unless the metric is NaN."""
    least = trainer.min_epochs if plan.unit == "epoch" else trainer.min_steps
    if least is not None and least >= end:
        return True
    # The first check is an improvement, so training stops after epoch `patience` at the earliest.
    thresholds = (callback.stopping_threshold, callback.divergence_threshold)
    once_an_epoch = plan.unit == "epoch" and trainer.val_check_interval == 1.0
    return once_an_epoch and thresholds == (None, None) and callback.patience >= end - 1


class LearningRates:
    """The highest learning rates of a fit, to warn if they have decayed before the last rounds.

    Args:
        optimizers: The optimizers.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> rates, plan = LearningRates([optimizer]), Plan.lay([0.5, 0.75])
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> rates.warning(plan, 2, [optimizer]).partition("; ")[2].partition(",")[0]
        'use rewind="learning_rate"'
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._highest: dict[tuple[int, int], float] = {}
        self._warned = False
        self.update(optimizers)

    def update(self, optimizers: Sequence[Optimizer]) -> None:
        """Update the highest learning rate of each parameter group."""
        for key, rate in _rates(optimizers):
            self._highest[key] = max(rate, self._highest.get(key, rate))

    def warning(self, plan: Plan, round: int, optimizers: Sequence[Optimizer]) -> str | None:
        """Warning if a round prunes when all learning rates are low; None after the first one.

        Low means relative to the highest rate of the same parameter group.
        """
        self.update(optimizers)
        fraction = max(
            (rate / highest for key, rate in _rates(optimizers) if (highest := self._highest[key])),
            default=1.0,
        )
        amount = plan.rounds[round - 1].amount
        small = amount is not None and amount < _SMALL_AMOUNT
        if self._warned or fraction >= _LOW_RATE or small:
            return None
        self._warned = True
        what = "weights" if amount is None else f"{100 * amount:.3g} % of the remaining weights"
        return (
            f"Round {round} of {len(plan.rounds)} prunes {what} at a learning rate of only "
            f"{100 * fraction:.2g} % of its maximum, which may be too low to recover accuracy; use "
            'rewind="learning_rate", which restarts the schedule in every round, or let the '
            "learning rate decay after the last round"
        )


def _rates(optimizers: Sequence[Optimizer]) -> Iterator[tuple[tuple[int, int], float]]:
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            yield (i, j), float(group.get("lr", 0.0))


def swapping_optimizers(optimizers: Sequence[Optimizer]) -> list[str]:
    """Optimizers that use other weights for evaluation, such as schedule-free ones."""
    return [type(each).__name__ for each in optimizers if callable(getattr(each, "eval", None))]


def check_averages(trainer: L.Trainer, masking: Masking | None) -> None:
    """Check that callbacks which average weights support the masking.

    Raises:
        ValueError: If they do not.
    """
    averaging = [name for name, _ in averaged_models(trainer)]
    expect(
        not averaging or not isinstance(masking, Reparametrize),
        "masking",
        "not change the order of parameters, which averaging callbacks rely on",
        f"Reparametrize with {', '.join(averaging)}",
        "use masking=InPlace()",
    )


def check_disjoint(pruners: Sequence[Pruner]) -> None:
    """Check that no tensor is pruned by several Pruners.

    This includes frozen tensors, and tensors that are coupled by channels.

    Raises:
        ValueError: If one is.
    """
    for pair in combinations(pruners, 2):
        one, other = ({*pruner.names, *pruner.frozen} for pruner in pair)
        both = sorted(one & other)
        coupled = [
            f"{name} (coupled with {', '.join(writers)})"
            for name in both
            if (writers := _writers(name, pair))
        ]
        expect(
            not coupled,
            "include",
            "select tensors that share no channels with those of another PruningCallback",
            ", ".join(coupled),
            "`exclude` one of the two, or prune both in one callback",
        )
        expect(
            not both,
            "include",
            "select different tensors in each PruningCallback",
            f"{', '.join(both)} in two of them",
            "`exclude` them in one",
        )


def _writers(name: str, pruners: Sequence[Pruner]) -> list[str]:
    """Tensors whose channels the others prune, which prunes this tensor as well."""
    others = [pruner for pruner in pruners if name not in (*pruner.weight_names, *pruner.frozen)]
    return sorted({writer for pruner in others for writer in pruner.writers(name)})
