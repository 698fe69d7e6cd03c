"""The state of a PruningCallback in checkpoints, and whether it fits the training that resumes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from pruneflow.errors import expect
from pruneflow.pruning.schedules import plain_number
from pruneflow.pruning.selection import MaskRule
from pruneflow.structure.costs import Costs

VERSION = 5


@dataclass
class PruningState:
    """State of a PruningCallback in checkpoints and between fits.

    Args:
        round: Number of rounds done.
        method: See `method_state`.
        plan: `Plan.state()`; None before the first fit.
        masks: Qualified name -> bit-packed mask; `MaskSet.state()`.
        names: Tensors selected for pruning, without those that are coupled with them.
        costs: Qualified name -> measured cost of each weight; None if costs are not measured.
        learning_rate: `LearningRateSnapshot.state()`; None without rewinding.
        version: Version of this format.
    """

    round: int = 0
    method: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    masks: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    costs: dict[str, float] | None = None
    learning_rate: dict[str, Any] | None = None
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """The state as tensors and builtins."""
        costs = None if self.costs is None else dict(self.costs)
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"costs": costs}

    @classmethod
    def read(cls, state: Any, method: Mapping[str, str]) -> PruningState:
        """Read the result of `as_dict`, of this version or the previous one.

        Args:
            state: The state in a checkpoint.
            method: The method of this training, to upgrade the previous version.

        Raises:
            ValueError: If it has another version, or is incomplete or invalid.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        supported, expected = version in (4, VERSION), f"have a pruning state of version {VERSION}"
        remedy = "load it with the version of pruneflow that saved it"
        expect(supported, "ckpt_path", expected, f"version {version!r}", remedy)
        _check_valid(_malformed(state))
        if version == 4:
            state = {**state, "version": VERSION, "method": _upgrade(state["method"], method)}
        return cls(**{each.name: state[each.name] for each in fields(cls)})


def check_state(
    state: PruningState,
    plan: Mapping[str, Any],
    method: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    same_length: bool,
) -> None:
    """Check that a state is consistent and has the plan, method and model of this training.

    Args:
        state: The state in a checkpoint.
        plan: `Plan.state()` of this training.
        method: `method_state` of this training.
        tensors: The parameters of the model, by qualified name.
        same_length: Whether plans must have the same number of rounds. A function of the round runs
            as many as fit the training.

    Raises:
        ValueError: If something is inconsistent or differs.
    """
    _check_valid(list(_inconsistencies(state, tensors)))
    if state.plan is not None:
        expect(
            _same_plan(state.plan, plan, same_length),
            "ckpt_path",
            f"have the same plan as this training, with rounds at {_rounds(plan)}",
            f"rounds at {_rounds(state.plan)}",
            "resume with the same schedule and clock, or load only its weights",
        )
    expect(
        state.method == method,
        "ckpt_path",
        f"have the same method as this training, {method}",
        state.method,
        "resume with the same settings, or start from its weights with `from_zeros=True`",
    )


def method_state(rule: MaskRule, rewind: str | None) -> dict[str, str]:
    """The settings of the method as strings, to store and compare.

    Example:
        >>> from pruneflow.pruning.torch_methods import rule_for
        >>> method_state(rule_for(prune.L1Unstructured(amount=0.2), "layer"), None)
        {'rule': 'TorchPruning', 'importance': 'L1Unstructured(amount=0.2)', 'scope': 'layer', \
'rewind': 'None'}
    """
    settings = {name: stable_repr(value) for name, value in _fields(rule).items()}
    return {"rule": type(rule).__name__, **settings, "rewind": str(rewind)}


def stable_repr(value: Any) -> str:
    """Name and settings of an object, without addresses and other parts that differ between runs.

    Example:
        >>> stable_repr(partial(round, ndigits=2))
        'round(ndigits=2)'
    """
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, Mapping) and not isinstance(value, Costs):
        return f"{{{', '.join(f'{key!r}: {_quoted(part)}' for key, part in value.items())}}}"
    if hasattr(value, "__qualname__"):  # a function or class
        return str(value.__qualname__)
    kind: Any = type(value)
    name = kind.__qualname__
    if isinstance(value, partial):
        arguments: dict[Any, Any] = {**dict(enumerate(value.args)), **value.keywords}
        name, settings = stable_repr(value.func), _settings(arguments) if arguments else ""
    elif is_dataclass(value):
        settings = _settings(_fields(value))
    elif isinstance(value, prune.BasePruningMethod) or kind.__repr__ is object.__repr__:
        public = {key: part for key, part in vars(value).items() if not key.startswith("_")}
        settings = _settings(public) if public else ""
    else:
        return str(value)
    return f"{name}{settings}"


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) else stable_repr(plain_number(value))


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value) if each.repr}


def _settings(settings: Mapping[Any, Any]) -> str:
    return f"({', '.join(f'{key}={_quoted(value)}' for key, value in settings.items())})"


def _upgrade(old: Mapping[str, str], method: Mapping[str, str]) -> dict[str, str]:
    """The method of a state of version 4, which has no rule and no settings of objects."""
    upgraded = dict(method)
    for key in method.keys() & old.keys():
        new = {
            "None": "Weights()" if key == "granularity" else "None",
            method[key].partition("(")[0]: method[key],
        }
        costs = key == "costs" and old[key].startswith("{")
        upgraded[key] = f"Costs({old[key]}, power=0.25)" if costs else new.get(old[key], old[key])
    return upgraded


def _check_valid(problems: list[str]) -> None:
    expect(
        not problems,
        "ckpt_path",
        "have a complete and consistent pruning state of this model",
        "; ".join(problems),
        "resume from another checkpoint, or start from its weights with `from_zeros=True`",
    )


def _same_plan(one: Mapping[str, Any], other: Mapping[str, Any], same_length: bool) -> bool:
    rounds = [plan["rounds"] for plan in (one, other)]
    if not same_length:
        shorter = min(map(len, rounds))
        rounds = [some[:shorter] for some in rounds]
    return bool(rounds[0] == rounds[1] and one["unit"] == other["unit"])


def _rounds(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{sparsity} at {plan['unit']} {at}" for at, sparsity in plan["rounds"])


def _malformed(state: Mapping[str, Any]) -> list[str]:
    """Entries of a state that are missing or have the wrong type or value."""
    return [
        f"{reprlib.repr(state[key])} for `{key}`" if key in state else f"no `{key}`"
        for key, valid in _VALID.items()
        if key not in state or not valid(state[key])
    ]


def _inconsistencies(state: PruningState, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Entries that contradict each other, or the model."""
    planned = len(state.plan["rounds"]) if state.plan else 0
    if state.round > planned:
        yield f"round {state.round} of a plan of {planned} rounds"
    if state.round and not state.masks:
        yield f"no masks at round {state.round}"
    if state.round and state.method.get("rewind") == "learning_rate" and not state.learning_rate:
        yield f"no learning rate to rewind to at round {state.round}"
    for name, mask in state.masks.items():
        if name not in tensors:
            yield f"a mask for {name!r}, which the model does not have"
        elif mask["shape"] != (shape := list(tensors[name].shape)):
            yield f"a mask of shape {mask['shape']} for {name!r} of shape {shape}"
    yield from (f"no mask for {name!r}" for name in state.names if name not in state.masks)
    if state.masks and not state.names:
        yield "masks, but no `names` of pruned tensors"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(valid, value))


def _dict_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) and valid(part) for key, part in value.items())
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


_VALID: dict[str, Callable[[Any], bool]] = {
    "round": _is_count,
    "method": _dict_of(_is_text),
    "costs": lambda costs: costs is None or _dict_of(_is_number)(costs),
    "plan": lambda plan: plan is None or _is_plan(plan),
    "masks": _dict_of(_is_mask),
    "names": _list_of(_is_text),
    "learning_rate": lambda state: state is None or _is_learning_rate(state),
}
