"""Arguments of a PruningCallback: which do not go together, and numbers as plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Literal

from pruneflow.gradients import Gradients
from pruneflow.importance import Importance, needs_gradients
from pruneflow.schedules import ScheduleLike, plain_number
from pruneflow.torch_methods import TorchMethod, is_torch_method, keeps_own_amount


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
