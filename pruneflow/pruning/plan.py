"""When: a schedule laid on the training clock, before the training starts."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

from pruneflow.pruning.schedules import (
    ScheduleLike,
    check_fraction,
    plain_number,
    sparsity_per_round,
    whole_number,
)


@dataclass(frozen=True)
class Clock:
    """When rounds happen: the first at the start of epoch (or step) `start`, then every `every`.

    Args:
        start: Zero-based epoch or optimizer step at whose start round 1 prunes.
        every: Epochs or steps per round.
        unit: `"epoch"`, or `"step"` as Lightning's `global_step` counts.

    Raises:
        ValueError: If `start` is negative or `every` is not at least 1.
    """

    start: int = 0
    every: int = 1
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("every", 1)):
            value = getattr(self, name)
            number = whole_number(value)
            if number is None or number < least:
                argument = f"start_{self.unit}" if name == "start" else f"{self.unit}s_per_round"
                raise ValueError(
                    f"`{argument}` is expected to be a whole number of at least {least}, "
                    f"but {value!r} came; {self.unit}s are counted from 0"
                )
            object.__setattr__(self, name, number)

    @classmethod
    def counting(
        cls,
        start_epoch: int | None,
        epochs_per_round: int | None,
        start_step: int | None,
        steps_per_round: int | None,
    ) -> Clock:
        """The clock that counts epochs or steps, whichever pair is given; epochs from 0 if none.

        Raises:
            ValueError: If epochs and steps are given together, or are out of range.
        """
        by_step = start_step is not None or steps_per_round is not None
        if by_step and (start_epoch is not None or epochs_per_round is not None):
            raise ValueError(
                "`start_epoch`/`epochs_per_round` and `start_step`/`steps_per_round` are expected "
                "one pair at a time, but both came; count either epochs or steps"
            )
        start, every = start_epoch, epochs_per_round
        if by_step:
            start, every = start_step, steps_per_round
        return cls(
            0 if start is None else start,
            1 if every is None else every,
            "step" if by_step else "epoch",
        )


@dataclass(frozen=True)
class Round:
    """One prune-then-fine-tune cycle of a plan.

    Args:
        number: The round, counted from 1.
        at: The zero-based epoch or step at whose start it prunes.
        sparsity: Cumulative sparsity after it, in [0, 1); None when not known ahead.
        amount: Fraction of the remaining weights that it removes; None when not known ahead.
    """

    number: int
    at: int
    sparsity: float | None
    amount: float | None


@dataclass(frozen=True)
class Plan:
    """The rounds of one training, laid on its clock.

    Args:
        rounds: The rounds, in order.
        unit: `"epoch"` or `"step"`.
        length: Epochs or steps of the whole training; None when it has no end.

    Example:
        >>> from pruneflow import Compounding
        >>> plan = Plan.lay(Compounding(target=0.875, rounds=3), Clock(start=2, every=3), length=12)
        >>> print(plan.table(weights=1000))
        round  at epoch  amount of the remaining  sparsity  weights kept
            0         0                        -    0.00 %         1,000
            1         2                  50.00 %   50.00 %           500
            2         5                  50.00 %   75.00 %           250
            3         8                  50.00 %   87.50 %           125
        4 epochs of fine-tuning follow the last round.
        >>> plan.due(5)
        2
    """

    rounds: tuple[Round, ...]
    unit: Literal["epoch", "step"]
    length: int | None

    @classmethod
    def lay(
        cls, schedule: ScheduleLike | int | None, clock: Clock = Clock(), length: int | None = None
    ) -> Plan:
        """Lay a schedule on a clock within a training of `length` epochs or steps.

        Args:
            schedule: A schedule; or the number of rounds where a method keeps its own amount and
                sparsity is not known ahead. A plain callable gets as many rounds as fit, and None
                is no rounds at all.
            clock: When the rounds happen.
            length: Epochs or steps of the training; None when it has no end.

        Raises:
            ValueError: If the last round would not be followed by at least one epoch or step.
        """
        schedule = plain_number(schedule)
        fitting = None if length is None else max(1, -(-(length - clock.start) // clock.every))
        sparsities: tuple[float | None, ...]
        if schedule is None:
            sparsities = ()
        elif isinstance(schedule, int):
            if schedule < 1:
                raise ValueError(
                    f"`schedule`, as a number of rounds, is expected to be at least 1, but "
                    f"{schedule!r} came"
                )
            sparsities = (None,) * schedule
        else:
            # Of a plain callable that does not fit at all, one round, to be refused below.
            sparsities = sparsity_per_round(schedule, fitting)
        rounds = []
        before: float | None = 0.0
        for number, sparsity in enumerate(sparsities, start=1):
            amount = None
            if sparsity is not None and before is not None:
                amount = 1 - (1 - sparsity) / (1 - before)
            at = clock.start + (number - 1) * clock.every
            rounds.append(Round(number, at, sparsity, amount))
            before = sparsity
        if length is not None and rounds and rounds[-1].at >= length:
            last = rounds[-1]
            raise ValueError(
                f"The plan is expected to fit the training (`max_{clock.unit}s`={length}), but its "
                f"last round, {last.number}, would prune at the start of {clock.unit} {last.at} "
                f"(`start_{clock.unit}`={clock.start}, `{clock.unit}s_per_round`={clock.every}); "
                f"raise `max_{clock.unit}s` to {last.at + clock.every}, or take fewer rounds or "
                f"fewer {clock.unit}s a round"
            )
        return cls(tuple(rounds), clock.unit, length)

    def due(self, position: int) -> int:
        """Number of rounds that have to be done once epoch or step `position` starts."""
        return bisect_right(self.rounds, position, key=lambda planned: planned.at)

    def check_start(self, present: float) -> None:
        """Refuse to start from a sparsity that a round does not reach.

        Raises:
            ValueError: Naming the round.
        """
        for planned in self.rounds:
            if planned.sparsity is not None and planned.sparsity < present:
                raise ValueError(
                    f"`schedule` is expected to start from the sparsity {present:.6g} that the "
                    f"model has already, but round {planned.number} asks for {planned.sparsity:.6g}"
                    "; pruned weights stay pruned, so let the first round ask for more"
                )

    def table(self, weights: int | None) -> str:
        """Print the plan for a model with `weights` prunable weights.

        Args:
            weights: How many there are; None where not weights are counted, but what they cost.
        """
        header = ["round", f"at {self.unit}", "amount of the remaining", "sparsity", "weights kept"]
        rows = [["0", "0", "-", _percent(0.0), f"{weights or 0:,}"]]
        for planned in self.rounds:
            kept = "?"
            if weights is not None and planned.sparsity is not None:
                kept = f"{weights - pruned_count(planned.sparsity, weights):,}"
            fractions = [_percent(planned.amount), _percent(planned.sparsity)]
            rows.append([str(planned.number), str(planned.at), *fractions, kept])
        if weights is None:
            header, rows = header[:-1], [row[:-1] for row in rows]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (header, *rows)
        ]
        if any(planned.sparsity is None for planned in self.rounds):
            lines.append("The sparsity is not known ahead: the method keeps its own amount.")
        if self.rounds and self.length is not None:
            left = self.length - self.rounds[-1].at
            units = self.unit if left == 1 else f"{self.unit}s"
            follow = "follows" if left == 1 else "follow"
            lines.append(f"{left} {units} of fine-tuning {follow} the last round.")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Schedule and clock as builtins, to be stored and compared on resume."""
        return {"unit": self.unit, "rounds": [[r.at, r.sparsity] for r in self.rounds]}


def has_rounds(schedule: ScheduleLike | int | None) -> bool:
    """Whether a schedule says how many rounds there are; a plain function gets as many as fit."""
    return not callable(schedule) or hasattr(schedule, "rounds")


def pruned_count(sparsity: float, weights: int) -> int:
    """How many of `weights` are pruned at a cumulative sparsity: always from the dense count.

    Counting from the dense total, never from what remains, keeps rounding from adding up over
    rounds.

    Raises:
        ValueError: If `sparsity` is no number in [0, 1).

    Example:
        >>> pruned_count(0.98, 1001)
        981
    """
    return round(check_fraction("sparsity", sparsity) * weights)


def _percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{100 * fraction:.2f} %"
