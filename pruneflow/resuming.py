"""Whether a checkpoint's pruning state belongs to the training that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.nn.utils import prune

from pruneflow.granularity import NM, Block, Channels
from pruneflow.importance import Random
from pruneflow.schedules import plain_number

VERSION = 4
"""Of the state that PruningCallback stores."""


def check_state(
    state: Mapping[str, Any],
    plan: Mapping[str, Any],
    method: Mapping[str, str],
    *,
    longer_is_other: bool,
) -> None:
    """Refuse the state of another plan, method or version.

    Args:
        state: What a PruningCallback stored.
        plan: `Plan.state()` of this training.
        method: What `method_state` says of it.
        longer_is_other: Whether more rounds make another plan; not where a function gets as many
            as fit the training.

    Raises:
        ValueError: Saying what differs.
    """
    if state.get("version") != VERSION:
        raise ValueError(
            f"the checkpoint's pruning state is expected to have version {VERSION}, but "
            f"{state.get('version')!r} came; read it with the pruneflow that wrote it"
        )
    stored = state["plan"]
    if stored is not None and not _same_plan(stored, plan, longer_is_other):
        raise ValueError(
            f"the checkpoint is expected to come from the same plan, but its rounds are "
            f"{_rounds(stored)}, and those of this training {_rounds(plan)}; resume with the same "
            "schedule and clock, or start from its weights alone"
        )
    if state["method"] != method:
        raise ValueError(
            f"the checkpoint is expected to come from the same method, {method}, but comes from "
            f"{state['method']}; resume with that, or start from its weights with "
            "`from_zeros=True`"
        )


def method_state(**method: Any) -> dict[str, str]:
    """The method in words, to be stored and compared.

    Example:
        >>> method_state(importance=Random(seed=3), scope="global")
        {'importance': 'Random(seed=3)', 'scope': 'global'}
        >>> method_state(importance=prune.L1Unstructured(amount=0.2))
        {'importance': 'L1Unstructured(amount=0.2)'}
    """
    return {name: _named(value) for name, value in method.items()}


def _named(method: Any) -> str:
    """Its name, and those of its settings that are plain values."""
    if method is None or isinstance(method, str | Mapping | Random | NM | Block | Channels):
        return str(method)
    if isinstance(method, partial):
        settings: dict[Any, Any] = {**dict(enumerate(method.args)), **method.keywords}
        return f"{_named(method.func)}({_plain(settings)})"
    name = getattr(method, "__qualname__", None) or type(method).__qualname__
    if isinstance(method, prune.BasePruningMethod):
        settings = {k: v for k, v in vars(method).items() if not k.startswith("_")}
        return f"{name}({_plain(settings)})"
    return str(name)


def _plain(settings: Mapping[Any, Any]) -> str:
    numbers = {key: plain_number(value) for key, value in settings.items()}
    plain = {k: v for k, v in numbers.items() if isinstance(v, int | float | str)}
    return ", ".join(f"{key}={value!r}" for key, value in plain.items())


def _same_plan(one: Mapping[str, Any], other: Mapping[str, Any], longer_is_other: bool) -> bool:
    rounds = [plan["rounds"] for plan in (one, other)]
    if not longer_is_other:
        shorter = min(map(len, rounds))
        rounds = [some[:shorter] for some in rounds]
    return bool(rounds[0] == rounds[1] and one["unit"] == other["unit"])


def _rounds(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{sparsity} at {plan['unit']} {at}" for at, sparsity in plan["rounds"])
