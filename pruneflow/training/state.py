"""Whether a checkpoint's pruning state belongs to the training that is to go on from it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from pruneflow.pruning.granularity.blocks import Block
from pruneflow.pruning.granularity.channels import Channels
from pruneflow.pruning.granularity.nm import NM
from pruneflow.pruning.importance import Random
from pruneflow.pruning.schedules import plain_number

VERSION = 4
"""Of the state that PruningCallback stores."""


def check_state(
    state: Mapping[str, Any],
    plan: Mapping[str, Any],
    method: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    longer_is_other: bool,
) -> None:
    """Refuse the state of another plan, method, model or version, and one that contradicts itself.

    Args:
        state: What a PruningCallback stored.
        plan: `Plan.state()` of this training.
        method: What `method_state` says of it.
        tensors: The parameters of the model, by qualified name.
        longer_is_other: Whether more rounds make another plan; not where a function gets as many
            as fit the training.

    Raises:
        ValueError: Saying what differs, or what is wrong.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != VERSION:
        raise ValueError(
            f"the checkpoint's pruning state is expected to have version {VERSION}, but "
            f"{version!r} came; read it with the pruneflow that wrote it"
        )
    if wrong := _misshapen(state) or list(_contradictions(state, tensors)):
        raise ValueError(
            "the checkpoint's pruning state must be whole, fit together and fit the model, got "
            f"{'; '.join(wrong)}; resume from another checkpoint, or start from its weights with "
            "`from_zeros=True`"
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


def _misshapen(state: Mapping[str, Any]) -> list[str]:
    """Entries of a state that are missing, or of another form than `PruningCallback` stores."""
    return [
        f"{reprlib.repr(state[key])} for `{key}`" if key in state else f"no `{key}`"
        for key, fits in _FORMS.items()
        if key not in state or not fits(state[key])
    ]


def _contradictions(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What contradicts the rest of a state, or the model."""
    round, masks, names = state["round"], state["masks"], state["names"]
    planned = len(state["plan"]["rounds"]) if state["plan"] else 0
    if round > planned:
        yield f"round {round} of a plan of {planned} rounds"
    if round and not masks:
        yield f"no masks at round {round}"
    if round and state["method"].get("rewind") == "learning_rate" and not state["learning_rate"]:
        yield f"no learning rate to go back to at round {round}"
    for name, mask in masks.items():
        if name not in tensors:
            yield f"a mask for {name!r}, which the model does not have"
        elif mask["shape"] != (shape := list(tensors[name].shape)):
            yield f"a mask of shape {mask['shape']} for {name!r} of shape {shape}"
    yield from (f"no mask for {name!r}" for name in names if name not in masks)
    if masks and not names:
        yield "masks, but no `names` of what is pruned"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) and fits(part) for key, part in value.items())
    )


def _is_plan(plan: Any) -> bool:
    def is_round(planned: Any) -> bool:
        if not isinstance(planned, list) or len(planned) != 2:
            return False
        at, sparsity = planned
        return _is_count(at) and (sparsity is None or (_is_number(sparsity) and 0 <= sparsity < 1))

    return (
        isinstance(plan, dict)
        and plan.get("unit") in ("epoch", "step")
        and _list_of(is_round)(plan.get("rounds"))
    )


def _is_mask(packed: Any) -> bool:
    if not isinstance(packed, dict) or not _list_of(_is_count)(packed.get("shape")):
        return False
    bits = packed.get("bits")
    size = -(-math.prod(packed["shape"]) // 8)
    return isinstance(bits, Tensor) and bits.dtype == torch.uint8 and bits.shape == (size,)


def _is_learning_rate(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and _list_of(_list_of(_is_dict))(state.get("groups"))
        and _list_of(_is_dict)(state.get("schedulers"))
    )


_FORMS: dict[str, Callable[[Any], bool]] = {
    "round": _is_count,
    "method": _dict_of(_is_text),
    "costs": lambda costs: costs is None or _dict_of(_is_number)(costs),
    "plan": lambda plan: plan is None or _is_plan(plan),
    "masks": _dict_of(_is_mask),
    "names": _list_of(_is_text),
    "learning_rate": lambda state: state is None or _is_learning_rate(state),
}
