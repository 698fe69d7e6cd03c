"""Schedules: the cumulative sparsity after each round.

A schedule is a function `round -> cumulative sparsity`. Rounds are counted from 1; round 0 is the
dense phase. The classes in this module are frozen dataclasses with an attribute `rounds`; a list of
sparsities or any callable can be used as well.

A round that removes the fraction γ (the amount) of the remaining weights multiplies the density by
1-γ. So n rounds give a sparsity of 1-(1-γ₁)(1-γ₂)…(1-γₙ), or 1-(1-γ)^n if all amounts are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Protocol, TypeGuard, runtime_checkable

from pruneflow.errors import expect


@runtime_checkable
class Schedule(Protocol):
    """A schedule with a number of rounds."""

    @property
    def rounds(self) -> int | None:
        """Number of rounds; None for as many as fit in the training."""

    def __call__(self, round: int) -> float | None:
        """Cumulative sparsity, in [0, 1), after `round`; None if it is not known in advance."""


ScheduleLike = Schedule | Sequence[float] | Callable[[int], float] | int | None


@dataclass(frozen=True)
class OneShot:
    """One-shot pruning: prune to the target in a single round.

    Args:
        target: Cumulative sparsity to reach, in [0, 1).
        rounds: 1 or None; accepted so that all schedules take the same two arguments.

    Raises:
        ValueError: If `target` or `rounds` is out of range.

    Example:
        >>> OneShot(0.98)(1)
        0.98
    """

    target: float
    rounds: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", check_fraction("target", self.target))
        expect(
            self.rounds is None or whole_number(self.rounds) == 1,
            "rounds",
            "be 1 (or null) for OneShot",
            repr(self.rounds),
            "use Compounding, Linear or Cubic for several rounds",
        )
        object.__setattr__(self, "rounds", 1)

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        return self.target * _progress(round, self.rounds)


@dataclass(frozen=True)
class Compounding:
    """Remove the same fraction γ of the remaining weights in every round: s(k) = 1-(1-γ)^k.

    Give any two of the three arguments; the third follows from `target` = 1-(1-`amount`)^`rounds`.
    Target and amount give ceil(log(1-target) / log(1-amount)) rounds; then the amount is lowered so
    that the last round reaches the target exactly.

    Args:
        target: Cumulative sparsity after the last round, in [0, 1).
        amount: γ, the fraction of the remaining weights to remove in each round, in [0, 1).
        rounds: Number of rounds, at least 1.

    Raises:
        ValueError: If fewer than two are given, one is out of range, or all three contradict.

    Example:
        >>> Compounding(target=0.875, rounds=3).amount
        0.5
        >>> Compounding(target=0.98, amount=0.3).rounds
        11
        >>> round(Compounding(amount=0.3, rounds=11).target, 4)
        0.9802
        >>> [round(Compounding(target=0.98, rounds=4)(k), 3) for k in range(5)]
        [0.0, 0.624, 0.859, 0.947, 0.98]

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
        https://arxiv.org/abs/1506.02626; Frankle & Carbin 2019, https://arxiv.org/abs/1803.03635.
    """

    target: float = None  # type: ignore[assignment]  # None only until __post_init__ solves it
    amount: float = None  # type: ignore[assignment]
    rounds: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        target, amount, rounds = self.target, self.amount, self.rounds
        expect(
            (target is None) + (amount is None) + (rounds is None) <= 1,
            "Compounding",
            "have two of `target`, `amount` and `rounds`",
            f"target={target!r}, amount={amount!r}, rounds={rounds!r}",
            "give one more",
        )
        if target is not None:
            target = check_fraction("target", target)
        if amount is not None:
            amount = check_fraction("amount", amount)
        if rounds is not None:
            rounds = _check_rounds(rounds)
        if target is None:
            target = -math.expm1(rounds * math.log1p(-amount))
            check_fraction("target", target)  # 1-(1-γ)^n rounds up to 1.0 for large n
        elif rounds is None:
            rounds = _rounds_to(target, amount)
        # expm1 and log1p are accurate for small sparsities, unlike 1-(1-γ)^n.
        solved = -math.expm1(math.log1p(-target) / rounds)
        if amount is not None and self.target is not None and self.rounds is not None:
            expect(
                math.isclose(amount, solved, rel_tol=1e-6, abs_tol=1e-12),
                "amount",
                f"be {solved:.6g} for target={target!r} and rounds={rounds!r}",
                repr(amount),
                "leave out (null) one of the three",
            )
            solved = amount
        elif amount is not None and self.target is None:
            solved = amount
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "amount", solved)
        object.__setattr__(self, "rounds", rounds)

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        _progress(round, self.rounds)
        # The last round returns the target itself, as the power may differ in the last bit.
        if round == self.rounds:
            return self.target
        return min(self.target, -math.expm1(round * math.log1p(-self.amount)))


@dataclass(frozen=True)
class Linear:
    """Remove the same number of weights in every round: s(k) = target · k / rounds.

    Args:
        target: Cumulative sparsity after the last round, in [0, 1).
        rounds: Number of rounds, at least 1.

    Raises:
        ValueError: If `target` or `rounds` is out of range.

    Example:
        >>> [Linear(target=0.75, rounds=3)(k) for k in range(4)]
        [0.0, 0.25, 0.5, 0.75]
    """

    target: float
    rounds: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", check_fraction("target", self.target))
        object.__setattr__(self, "rounds", _check_rounds(self.rounds))

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        return self.target * _progress(round, self.rounds)


@dataclass(frozen=True)
class Cubic:
    """Prune more in early than in late rounds: s(k) = target · (1-(1-k/rounds)³).

    Args:
        target: Cumulative sparsity after the last round, in [0, 1).
        rounds: Number of rounds, at least 1.

    Raises:
        ValueError: If `target` or `rounds` is out of range.

    Example:
        >>> [Cubic(target=0.5, rounds=2)(k) for k in range(3)]
        [0.0, 0.4375, 0.5]

    References:
        Zhu & Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878.
    """

    target: float
    rounds: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", check_fraction("target", self.target))
        object.__setattr__(self, "rounds", _check_rounds(self.rounds))

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        return self.target * (1 - (1 - _progress(round, self.rounds)) ** 3)


@dataclass(frozen=True)
class Explicit:
    """A list of cumulative sparsities, one per round.

    Args:
        sparsities: Cumulative sparsity after each round, in [0, 1), non-decreasing.
        target: If given, the sparsities are scaled so that the last one is `target`, for example to
            sweep over targets.
        rounds: If given, the expected number of sparsities.

    Raises:
        ValueError: If the sparsities are empty, out of range or decreasing, or their number is not
            `rounds`.

    Example:
        >>> Explicit([0.5, 0.8, 0.9])(2)
        0.8
        >>> Explicit([0.4, 0.8], target=0.5).sparsities
        (0.25, 0.5)
        >>> Explicit.from_amounts([0.5, 0.2]).sparsities
        (0.5, 0.6)
    """

    sparsities: Sequence[float]
    target: float = None  # type: ignore[assignment]  # None only until __post_init__ fills it
    rounds: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        sparsities = tuple(self.sparsities)
        remedy = "give at least one, such as [0.5, 0.8, 0.9]"
        expect(bool(sparsities), "sparsities", "have one value per round", "none", remedy)
        sparsities = tuple(check_fraction("sparsities", value) for value in sparsities)
        for before, after in pairwise(sparsities):
            expect(
                after >= before,
                "sparsities",
                "be cumulative and not decrease",
                f"{after!r} after {before!r}",
                "use Explicit.from_amounts for fractions of the remaining weights",
            )
        expect(
            self.rounds is None or self.rounds == len(sparsities),
            "rounds",
            f"be the number of `sparsities`, {len(sparsities)}",
            repr(self.rounds),
            "leave it out",
        )
        last = sparsities[-1]
        target = last if self.target is None else check_fraction("target", self.target)
        if target != last:
            remedy = "give sparsities that increase"
            expect(last > 0, "target", "be 0 if `sparsities` end at 0", repr(target), remedy)
            scale = target / last
            # Rounding may lift a product above the target.
            sparsities = (*(min(target, value * scale) for value in sparsities[:-1]), target)
        object.__setattr__(self, "sparsities", sparsities)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "rounds", len(sparsities))

    @classmethod
    def from_amounts(
        cls, amounts: Iterable[float], target: float | None = None, rounds: int | None = None
    ) -> Explicit:
        """The schedule for the amounts γ of the rounds: s(k) = 1-Π(1-γ_j), j ≤ k."""
        sparsities: list[float] = []
        density = 1.0
        for amount in amounts:
            density *= 1 - check_fraction("amounts", amount)
            sparsities.append(1 - density)
        return cls(sparsities, target, rounds)  # type: ignore[arg-type]

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        _progress(round, self.rounds)
        return self.sparsities[round - 1] if round else 0.0


@dataclass(frozen=True)
class Rounds:
    """A number of rounds for methods that keep their own amount.

    The sparsity is not known in advance.

    Args:
        rounds: Number of rounds; 0 to prune nothing and only hold weights that are already zero.

    Raises:
        ValueError: If `rounds` is not a whole number of at least 0.

    Example:
        >>> Rounds(3)(1) is None
        True
    """

    rounds: int

    def __post_init__(self) -> None:
        number = whole_number(self.rounds)
        expect(
            number is not None and number >= 0,
            "rounds",
            "be a whole number of at least 0",
            repr(self.rounds),
            "try a schedule such as Compounding(target=0.98, rounds=8)",
        )
        object.__setattr__(self, "rounds", number)

    def __call__(self, round: int) -> None:
        """None, as the sparsity is not known in advance."""


@dataclass(frozen=True)
class _Fitting:
    """A plain function of the round, with as many rounds as fit in the training."""

    function: Callable[[int], float]
    rounds = None

    def __call__(self, round: int) -> float:
        return self.function(round)


def as_schedule(schedule: ScheduleLike) -> Schedule:
    """Convert to a schedule.

    Args:
        schedule: A schedule, a sequence of cumulative sparsities, a plain function `round ->
            cumulative sparsity`, a number of rounds, or None for no rounds.

    Raises:
        TypeError: If `schedule` is none of these.
        ValueError: If values are out of range.

    Example:
        >>> as_schedule([0.5, 0.9]).rounds, as_schedule(3), as_schedule(None)
        (2, Rounds(rounds=3), Rounds(rounds=0))
    """
    if isinstance(schedule, Schedule):
        return schedule
    if schedule is None:
        return Rounds(0)
    if _is_list(schedule):
        return Explicit(schedule)
    if whole_number(schedule) is not None:
        return Rounds(_check_rounds(schedule))
    if callable(schedule) and not isinstance(schedule, type):
        return _Fitting(schedule)
    raise TypeError(
        "`schedule` must be a schedule, a list of cumulative sparsities or a function of the "
        f"round, got {schedule!r}; try Compounding(target=0.98, rounds=8)"
    )


def sparsity_per_round(
    schedule: ScheduleLike, rounds: int | None = None
) -> tuple[float | None, ...]:
    """Evaluate a schedule for each round, and check it.

    Args:
        schedule: Anything that `as_schedule` accepts.
        rounds: Number of rounds for a plain function, which has none of its own.

    Returns:
        The cumulative sparsity after round 1, 2, …; None if it is not known in advance.

    Raises:
        ValueError: If values are out of [0, 1) or decrease, or `rounds` is missing for a plain
            function.
        TypeError: If `schedule` is none of these.

    Example:
        >>> sparsity_per_round(lambda round: 1 - 0.5**round, rounds=3)
        (0.5, 0.75, 0.875)
        >>> sparsity_per_round([0.5, 0.9])
        (0.5, 0.9)
    """
    schedule = as_schedule(schedule)
    if isinstance(schedule, Rounds):
        return (None,) * schedule.rounds
    rounds = rounds if schedule.rounds is None else schedule.rounds
    if rounds is None:
        raise ValueError(
            "`schedule` must have a number of rounds if the training has no end, got a plain "
            "function; give a list of sparsities, or set `max_epochs` or `max_steps`"
        )
    values: Any = [schedule(k) for k in range(1, rounds + 1)]
    return tuple(Explicit(values).sparsities)


def _rounds_to(target: float, amount: float) -> int:
    if target == 0:
        return 1
    rounds = math.log1p(-target) / math.log1p(-amount) if amount else math.inf
    remedy = "give the fraction of the remaining weights to remove in each round, such as 0.2"
    expect(rounds < math.inf, "amount", f"be above 0 for target={target!r}", repr(amount), remedy)
    # The tolerance keeps 1-(1-0.5)^3 = 0.875 at 3 rounds in spite of rounding in the logarithms.
    return max(1, math.ceil(rounds - 1e-9))


def _progress(round: int, rounds: int) -> float:
    valid, remedy = 0 <= round <= rounds, "round 0 is the dense phase"
    expect(valid, "round", f"be from 0 to {rounds}", repr(round), remedy)
    return round / rounds


def check_fraction(name: str, value: Any) -> float:
    """Convert a number in [0, 1) to a plain float, which any checkpoint can store.

    Raises:
        ValueError: If it is not a number in [0, 1); names the argument `name`.
    """
    number = plain_number(value)
    real = isinstance(number, Real) and not isinstance(number, bool)
    valid = real and 0 <= number < 1 and float(number) < 1  # a fraction may round to 1.0
    expect(valid, name, "be a number in [0, 1)", repr(value), "write 98 % as 0.98")
    return float(number)


def pruned_count(sparsity: float, weights: int) -> int:
    """Number of weights pruned at a cumulative sparsity, given the number of all weights.

    It does not depend on the remaining weights, so rounding errors do not add up over rounds.

    Raises:
        ValueError: If `sparsity` is not a number in [0, 1).

    Example:
        >>> pruned_count(0.98, 1001)
        981
    """
    return round(check_fraction("sparsity", sparsity) * weights)


def plain_number(value: Any) -> Any:
    """Convert a scalar of NumPy or PyTorch to a Python number; return anything else unchanged.

    Example:
        >>> import numpy as np
        >>> plain_number(np.float64(0.5)), plain_number([0.5])
        (0.5, [0.5])
    """
    return value.item() if getattr(value, "ndim", None) == 0 else value


def whole_number(value: Any) -> int | None:
    """Convert a whole number of any type to an int; None for anything else, including bools."""
    number = plain_number(value)
    whole = isinstance(number, Integral) and not isinstance(number, bool)
    return int(number) if whole else None


def _check_rounds(rounds: Any) -> int:
    number = whole_number(rounds)
    if number is None or number < 1:
        raise ValueError(
            f"`rounds` must be a whole number of at least 1, got {rounds!r}; round 0, the dense "
            "phase, is not counted"
        )
    return number


def _is_list(schedule: Any) -> TypeGuard[Sequence[float]]:
    if isinstance(schedule, Sequence):
        return not isinstance(schedule, str)
    return getattr(schedule, "ndim", None) == 1  # an array or tensor
