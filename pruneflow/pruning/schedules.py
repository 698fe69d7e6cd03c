"""How much: the cumulative sparsity after each round.

A schedule is a function `round -> cumulative sparsity`, rounds counted from 1; round 0 is the dense
phase. The classes here are frozen dataclasses with `rounds` beside the function; a list of
sparsities serves as well, and so does any callable.

A round that removes the fraction γ (the amount) of the weights that remain keeps 1-γ of them, so
rounds multiply densities: n rounds give 1-(1-γ₁)(1-γ₂)…(1-γₙ), and 1-(1-γ)^n when all are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Protocol, TypeGuard, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """A schedule that knows its number of rounds."""

    @property
    def rounds(self) -> int:
        """Number of rounds."""

    def __call__(self, round: int) -> float:
        """Cumulative sparsity, in [0, 1), after `round`; 0.0 after round 0."""


ScheduleLike = Schedule | Sequence[float] | Callable[[int], float]


@dataclass(frozen=True)
class OneShot:
    """Prune once, straight to the target.

    Args:
        target: Cumulative sparsity to reach, in [0, 1).
        rounds: 1 or None; there so that every schedule takes the same two arguments.

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
        if self.rounds is not None and whole_number(self.rounds) != 1:
            raise ValueError(
                f"`rounds` of OneShot is expected to be 1 (or null), but {self.rounds!r} came; "
                "use Compounding, Linear or Cubic for several rounds"
            )
        object.__setattr__(self, "rounds", 1)

    def __call__(self, round: int) -> float:
        """Cumulative sparsity after `round`."""
        return self.target * _progress(round, self.rounds)


@dataclass(frozen=True)
class Compounding:
    """Remove the same fraction γ of the remaining weights in every round: s(k) = 1-(1-γ)^k.

    Give any two of the three; the third is solved from `target` = 1-(1-`amount`)^`rounds`. From
    target and amount come ceil(log(1-target) / log(1-amount)) rounds, and then the amount is solved
    again, so that the last round lands on the target.

    Args:
        target: Cumulative sparsity after the last round, in [0, 1).
        amount: γ, the fraction of the remaining weights that one round removes, in [0, 1).
        rounds: Number of rounds, at least 1.

    Raises:
        ValueError: If fewer than two are given, one is out of range, or the three disagree.

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
        if (target is None) + (amount is None) + (rounds is None) > 1:
            raise ValueError(
                "Compounding expects two of `target`, `amount` and `rounds`, but "
                f"target={target!r}, amount={amount!r}, rounds={rounds!r} came; give one more"
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
        # expm1 and log1p: 1-(1-γ)^n itself loses digits where sparsities are small.
        solved = -math.expm1(math.log1p(-target) / rounds)
        if amount is not None and self.target is not None and self.rounds is not None:
            if not math.isclose(amount, solved, rel_tol=1e-6, abs_tol=1e-12):
                raise ValueError(
                    f"`amount` is expected to be {solved:.6g} for target={target!r} and "
                    f"rounds={rounds!r}, but {amount!r} came; leave out (null) one of the three"
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
        # The last round is the target itself, not a power that may differ in the last bit.
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
    """Prune fast while much is redundant, slowly at the end: s(k) = target · (1-(1-k/rounds)³).

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
    """The cumulative sparsities themselves, one a round.

    Args:
        sparsities: Cumulative sparsity after each round, in [0, 1), never falling.
        target: When given, the sparsities are scaled so that the last one is `target`; so a shape
            can be swept over targets.
        rounds: When given, the expected number of sparsities.

    Raises:
        ValueError: If the sparsities are empty, out of range or falling, or not `rounds` many.

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
        if not sparsities:
            raise ValueError(
                "`sparsities` is expected to hold one cumulative sparsity a round, but it is "
                "empty; give at least one, such as [0.5, 0.8, 0.9]"
            )
        sparsities = tuple(check_fraction("sparsities", value) for value in sparsities)
        for before, after in pairwise(sparsities):
            if after < before:
                raise ValueError(
                    "`sparsities` are cumulative and expected never to fall, but "
                    f"{after!r} follows {before!r}; amounts of the remaining weights go through "
                    "Explicit.from_amounts"
                )
        if self.rounds is not None and self.rounds != len(sparsities):
            raise ValueError(
                f"`rounds` is expected to be the number of `sparsities`, {len(sparsities)}, but "
                f"{self.rounds!r} came; leave it out"
            )
        last = sparsities[-1]
        target = last if self.target is None else check_fraction("target", self.target)
        if target != last:
            if last == 0:
                raise ValueError(
                    f"`target` is {target!r}, but `sparsities` that end at 0 cannot be "
                    "scaled to it; give sparsities that rise"
                )
            scale = target / last
            # A product may be rounded up, past the target itself.
            sparsities = (*(min(target, value * scale) for value in sparsities[:-1]), target)
        object.__setattr__(self, "sparsities", sparsities)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "rounds", len(sparsities))

    @classmethod
    def from_amounts(
        cls, amounts: Iterable[float], target: float | None = None, rounds: int | None = None
    ) -> Explicit:
        """Compose amounts of the remaining weights, one a round: s(k) = 1-Π(1-γ_j), j ≤ k."""
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


def sparsity_per_round(schedule: ScheduleLike, rounds: int | None = None) -> tuple[float, ...]:
    """Evaluate anything that serves as a schedule, and check it.

    Args:
        schedule: A schedule, a sequence of cumulative sparsities, or a plain callable
            `round -> cumulative sparsity`.
        rounds: Number of rounds to evaluate a plain callable for, which does not know its own.

    Returns:
        The cumulative sparsity after round 1, 2, …

    Raises:
        ValueError: If the values are out of [0, 1) or fall, or a plain callable comes without
            `rounds`.
        TypeError: If `schedule` is none of these.

    Example:
        >>> sparsity_per_round(lambda round: 1 - 0.5**round, rounds=3)
        (0.5, 0.75, 0.875)
        >>> sparsity_per_round([0.5, 0.9])
        (0.5, 0.9)
    """
    if isinstance(schedule, Schedule):
        rounds = schedule.rounds
    elif _is_list(schedule):
        return tuple(Explicit(schedule).sparsities)
    elif not callable(schedule):
        raise TypeError(
            "`schedule` is expected to be a schedule such as Compounding(target=0.98, rounds=8), a "
            f"list of cumulative sparsities or a function of the round, but {schedule!r} came"
        )
    if rounds is None:
        raise ValueError(
            "`schedule` is a plain function, which does not say how many rounds it has, and the "
            "training has no end to fit them in; give a list of sparsities or a finite training"
        )
    return tuple(Explicit([schedule(k) for k in range(1, rounds + 1)]).sparsities)


def _rounds_to(target: float, amount: float) -> int:
    if target == 0:
        return 1
    rounds = math.log1p(-target) / math.log1p(-amount) if amount else math.inf
    if rounds == math.inf:
        raise ValueError(
            f"`amount` is expected to be above 0 to reach target={target!r}, but {amount!r} came; "
            "give the fraction of the remaining weights that one round removes, such as 0.2"
        )
    # The small number keeps 1-(1-0.5)^3 = 0.875 at 3 rounds although the logarithms are rounded.
    return max(1, math.ceil(rounds - 1e-9))


def _progress(round: int, rounds: int) -> float:
    if not 0 <= round <= rounds:
        raise ValueError(
            f"`round` is expected to be within 0..{rounds} (0 is the dense phase), "
            f"but {round!r} came; ask for a round that the schedule has"
        )
    return round / rounds


def check_fraction(name: str, value: Any) -> float:
    """A number in [0, 1) as a plain float, which every checkpoint can hold; refuse anything else.

    Raises:
        ValueError: Naming `name`, the argument it is for.
    """
    number = plain_number(value)
    real = isinstance(number, Real) and not isinstance(number, bool)
    if not real or not 0 <= number < 1 or float(number) == 1:  # the float nearest to a fraction
        raise ValueError(
            f"`{name}` is expected to be a number in [0, 1), but {value!r} came; "
            "98 % is written 0.98"
        )
    return float(number)


def plain_number(value: Any) -> Any:
    """What a scalar of NumPy or PyTorch holds, as Python's own number; anything else as it is.

    Example:
        >>> import numpy as np
        >>> plain_number(np.float64(0.5)), plain_number([0.5])
        (0.5, [0.5])
    """
    return value.item() if getattr(value, "ndim", None) == 0 else value


def whole_number(value: Any) -> int | None:
    """A whole number of any type as a plain int; None of anything else, `True` included."""
    number = plain_number(value)
    whole = isinstance(number, Integral) and not isinstance(number, bool)
    return int(number) if whole else None


def _check_rounds(rounds: Any) -> int:
    number = whole_number(rounds)
    if number is None or number < 1:
        raise ValueError(
            f"`rounds` is expected to be a whole number of at least 1, but {rounds!r} came; "
            "round 0, the dense phase, does not count"
        )
    return number


def _is_list(schedule: Any) -> TypeGuard[Sequence[float]]:
    if isinstance(schedule, Sequence):
        return not isinstance(schedule, str)
    return getattr(schedule, "ndim", None) == 1  # an array or tensor
