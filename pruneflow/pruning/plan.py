"""Plans: when the rounds of a schedule happen in a training."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pruneflow.errors import expect
from pruneflow.pruning.schedules import (
    ScheduleLike,
    pruned_count,
    sparsity_per_round,
    whole_number,
)


@dataclass(frozen=True)
class Clock:
    """The times of rounds: at the start of epoch (or step) `start`, and of every `every` after it.

    Args:
        start: Epoch or optimizer step, counted from 0, at the start of which round 1 prunes.
        every: Epochs or steps per round.
        unit: `"epoch"`, or `"step"` as in Lightning's `global_step`.

    Raises:
        ValueError: If `start` is negative, or `every` is less than 1.
    """

    start: int = 0
    every: int = 1
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("every", 1)):
            value = getattr(self, name)
            number = whole_number(value)
            argument = f"start_{self.unit}" if name == "start" else f"{self.unit}s_per_round"
            expect(
                number is not None and number >= least,
                argument,
                f"be a whole number of at least {least}",
                repr(value),
                f"{self.unit}s are counted from 0",
            )
            object.__setattr__(self, name, number)

    @classmethod
    def counting(
        cls,
        start_epoch: int | None,
        epochs_per_round: int | None,
        start_step: int | None,
        steps_per_round: int | None,
        clock: Clock | None = None,
    ) -> Clock:
        """The clock for these arguments: epochs, steps or `clock`; every epoch if none is given.

        Raises:
            TypeError: If `clock` is not a clock.
            ValueError: If they contradict or are out of range.
        """
        if clock is not None:
            is_clock, remedy = isinstance(clock, Clock), "try Epochs(10, every=5)"
            expect(is_clock, "clock", "be a clock", repr(clock), remedy, error=TypeError)
            expect(
                {start_epoch, epochs_per_round, start_step, steps_per_round} == {None},
                "clock",
                "be given alone",
                f"{clock} with `start_epoch`, `epochs_per_round`, `start_step` or "
                "`steps_per_round`",
                "leave those out",
            )
            return clock
        by_epoch = start_epoch is not None or epochs_per_round is not None
        by_step = start_step is not None or steps_per_round is not None
        expect(
            not (by_epoch and by_step),
            "start_step` and `steps_per_round",
            "be left out with `start_epoch` or `epochs_per_round`",
            "both",
            "count either epochs or steps",
        )
        start, every = start_epoch, epochs_per_round
        if by_step:
            start, every = start_step, steps_per_round
        kind = Steps if by_step else Epochs
        return kind(0 if start is None else start, every=1 if every is None else every)


def Epochs(start: int = 0, *, every: int = 1) -> Clock:  # noqa: N802  # named like a class
    """A clock in epochs: prune at the start of epoch `start`, counted from 0, and of every `every`.

    Example:
        >>> Epochs(10, every=5)
        Clock(start=10, every=5, unit='epoch')
    """
    return Clock(start, every, "epoch")


def Steps(start: int = 0, *, every: int = 1) -> Clock:  # noqa: N802
    """A clock in optimizer steps, as in Lightning's `global_step`; see `Epochs`.

    Example:
        >>> Steps(1000, every=100)
        Clock(start=1000, every=100, unit='step')
    """
    return Clock(start, every, "step")


class Controller(Protocol):
    """Decides when a round runs."""

    def next(self, position: float, done: int) -> Round | None:
        """The round to run at the start of epoch or step `position`, after `done` rounds, if any.

        If several are due, it is the last of them, which reaches the sparsity of all.
        """


@dataclass(frozen=True)
class Round:
    """One prune-then-fine-tune cycle of a plan.

    Args:
        number: The round, counted from 1.
        at: The epoch or step, counted from 0, at the start of which it prunes.
        sparsity: Cumulative sparsity after it, in [0, 1); None if not known in advance.
        amount: Fraction of the remaining weights that it removes; None if not known in advance.
    """

    number: int
    at: int
    sparsity: float | None
    amount: float | None


@dataclass(frozen=True)
class Plan:
    """The rounds of a training, and when they happen.

    Args:
        rounds: The rounds, in order.
        unit: `"epoch"` or `"step"`.
        length: Epochs or steps of the whole training; None if it has no end.

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
    def lay(cls, schedule: ScheduleLike, clock: Clock = Clock(), length: int | None = None) -> Plan:
        """Plan a schedule on a clock in a training of `length` epochs or steps.

        Args:
            schedule: A schedule, or a number of rounds for a method that keeps its own amount. A
                plain function gets as many rounds as fit; None is no rounds.
            clock: When the rounds happen.
            length: Epochs or steps of the training; None if it has no end.

        Raises:
            ValueError: If no epoch or step would follow the last round.
        """
        # At least one round of a plain function, so that one that does not fit is refused below.
        most = None if length is None else max(1, -(-(length - clock.start) // clock.every))
        sparsities = sparsity_per_round(schedule, most)
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
                f"`schedule` must fit in the training (`max_{clock.unit}s`={length}), got a plan "
                f"whose last round, {last.number}, would prune at the start of {clock.unit} "
                f"{last.at} (`start_{clock.unit}`={clock.start}, `{clock.unit}s_per_round`="
                f"{clock.every}); raise `max_{clock.unit}s` to {last.at + clock.every}, or use "
                f"fewer rounds or fewer {clock.unit}s per round"
            )
        return cls(tuple(rounds), clock.unit, length)

    def due(self, position: float) -> int:
        """Number of rounds due by the start of epoch or step `position`."""
        return bisect_right(self.rounds, position, key=lambda planned: planned.at)

    def next(self, position: float, done: int) -> Round | None:
        """The round to run at the start of epoch or step `position`; see `Controller`."""
        due = self.due(position)
        return self.rounds[due - 1] if due > done else None

    def check_start(self, present: float) -> None:
        """Check that no round is below the present sparsity of the model.

        Raises:
            ValueError: Names the round.
        """
        below = [
            f"{planned.sparsity:.6g} in round {planned.number}"
            for planned in self.rounds
            if planned.sparsity is not None and planned.sparsity < present
        ]
        expect(
            not below,
            "schedule",
            f"start at or above the present sparsity of the model, {present:.6g}",
            ", ".join(below),
            "pruned weights stay pruned, so raise the sparsity of the first round",
        )

    def table(self, weights: int | None) -> str:
        """The plan as a table.

        Args:
            weights: Number of prunable weights; None if targets count costs.
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
            lines.append("The sparsity is not known in advance: the method keeps its own amount.")
        if self.rounds and self.length is not None:
            left = self.length - self.rounds[-1].at
            units = self.unit if left == 1 else f"{self.unit}s"
            follow = "follows" if left == 1 else "follow"
            lines.append(f"{left} {units} of fine-tuning {follow} the last round.")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Schedule and clock as builtins, which are stored and compared on resume."""
        return {"unit": self.unit, "rounds": [[r.at, r.sparsity] for r in self.rounds]}


def _percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{100 * fraction:.2f} %"
