"""Rewind the learning-rate schedule to an earlier point."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Schedulers = Sequence[LRScheduler | ReduceLROnPlateau]
T = TypeVar("T")


class LearningRateSnapshot:
    """The state of the learning-rate schedule at one moment, to restart from it.

    It consists of the state of the schedulers and the hyperparameters of each parameter group
    (learning rate, momentum, ...), without weights or optimizer state.

    Args:
        optimizers: The optimizers.
        schedulers: Their learning-rate schedulers.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
        >>> snapshot = LearningRateSnapshot([optimizer], [scheduler])
        >>> optimizer.step(); scheduler.step(); round(optimizer.param_groups[0]["lr"], 6)
        0.01
        >>> snapshot.restore([optimizer], [scheduler]); optimizer.param_groups[0]["lr"]
        0.1

    References:
        Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning",
        https://arxiv.org/abs/2003.02389.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Schedulers) -> None:
        # By optimizer, first parameter of the group, and scheduler; after loading a checkpoint by
        # index, until `update` replaces it.
        self._groups: dict[Any, dict[Any, dict[str, Any]]] = {}
        self._schedulers: dict[Any, _SchedulerState] = {}
        self.update(optimizers, schedulers)

    def update(self, optimizers: Sequence[Optimizer], schedulers: Schedulers) -> None:
        """Add the current state of new groups and schedulers, and drop those that are gone."""
        self._groups = {
            optimizer: _match(_group_keys(optimizer), saved, partial(_hyperparameters, optimizer))
            for optimizer, saved in _match(optimizers, self._groups, lambda _: {}).items()
        }
        self._schedulers = _match(
            schedulers,
            self._schedulers,
            lambda index: _SchedulerState(schedulers[index].state_dict()),
        )
        for scheduler, saved in self._schedulers.items():
            saved.groups = saved.groups or _group_keys(_optimizer(scheduler))

    def restore(self, optimizers: Sequence[Optimizer], schedulers: Schedulers) -> None:
        """Restore the learning rates and schedulers."""
        self.update(optimizers, schedulers)
        for scheduler, known in self._schedulers.items():
            scheduler.load_state_dict(known.for_groups_of(scheduler))
        for optimizer, groups in self._groups.items():
            for group, saved in zip(optimizer.param_groups, groups.values(), strict=True):
                for key, value in saved.items():
                    if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                        group[key].copy_(value)  # in place, for compiled and captured steps
                    else:
                        group[key] = copy.deepcopy(value)

    def release(self) -> None:
        """Release the optimizers and schedulers, and thereby the model."""
        released = self.from_state(self._values())
        self._groups, self._schedulers = released._groups, released._schedulers

    def state(self) -> dict[str, Any]:
        """The snapshot as builtins and tensors.

        Raises:
            ValueError: If a scheduler or parameter group contains unsupported objects.
        """
        return {name: _loadable(values, name) for name, values in self._values().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LearningRateSnapshot:
        """The snapshot with this `state()`."""
        snapshot = cls([], [])
        snapshot._groups = dict(enumerate(dict(enumerate(groups)) for groups in state["groups"]))
        snapshot._schedulers = dict(enumerate(map(_SchedulerState, state["schedulers"])))
        return snapshot

    def _values(self) -> dict[str, list[Any]]:
        schedulers = self._schedulers.items()
        return {
            "groups": [list(groups.values()) for groups in self._groups.values()],
            "schedulers": [saved.for_groups_of(scheduler) for scheduler, saved in schedulers],
        }


class _SchedulerState:
    """The state of a scheduler, and the parameter groups it belongs to."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        self.groups: list[Any] | None = None  # not known when loaded from a checkpoint

    def for_groups_of(self, scheduler: Any) -> Any:
        """The state for `scheduler` to load, whose parameter groups may have changed."""
        state = copy.deepcopy(self.state)
        if self.groups is None:
            return state
        indices = {id(key): index for index, key in enumerate(self.groups)}
        order = [indices.get(id(key)) for key in _group_keys(_optimizer(scheduler))]
        return _reorder(state, scheduler.state_dict(), order, len(self.groups))


def _match(keys: Sequence[Any], saved: Mapping[Any, T], new: Callable[[int], T]) -> dict[Any, T]:
    """The saved value for each key or its index, and `new(index)` if there is none."""
    found = {}
    for index, key in enumerate(keys):
        saved_key = key if key in saved else index
        found[key] = saved[saved_key] if saved_key in saved else new(index)
    return found


def _group_keys(optimizer: Optimizer | None) -> list[Any]:
    """The first parameter of each group, which identifies it when groups are added or removed."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [next(iter(group["params"]), object()) for group in groups]


def _optimizer(scheduler: Any) -> Optimizer | None:
    return getattr(scheduler, "optimizer", None)  # custom schedulers may not have it


def _hyperparameters(optimizer: Optimizer, index: int) -> dict[str, Any]:
    group = optimizer.param_groups[index]
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _reorder(saved: Any, current: Any, order: Sequence[int | None], groups: int) -> Any:
    """Adapt a value of a scheduler's state to the current parameter groups.

    Args:
        saved: The saved value.
        current: The current value, used for new groups in lists with an entry per group.
        order: For each current group, its index among the saved ones; None for a new group.
        groups: Number of saved groups.
    """
    if isinstance(current, deque) and isinstance(saved, list):  # checkpoints have no deques
        return deque(saved, current.maxlen)
    if isinstance(current, np.ndarray) and isinstance(saved, list):
        return np.asarray(saved, current.dtype)
    if isinstance(saved, dict) and isinstance(current, dict):
        for key, value in saved.items():
            saved[key] = _reorder(value, current.get(key), order, groups)
    elif isinstance(saved, list) and isinstance(current, list):
        if (len(saved), len(current)) == (groups, len(order)) and order != list(range(groups)):
            return [current[i] if at is None else saved[at] for i, at in enumerate(order)]
        if len(saved) == len(current):
            return [_reorder(*pair, order, groups) for pair in zip(saved, current, strict=True)]
    return saved


_SCALARS = (bool, int, float, complex, str, bytes)  # without subclasses


def _loadable(value: Any, name: str) -> Any:
    """Convert a value to builtins and tensors, which `torch.load` reads with `weights_only`.

    Functions in a dict are left out, as each scheduler has its own.

    Raises:
        ValueError: If it contains other objects.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, Tensor) or type(value) in _SCALARS:
        return value
    if isinstance(value, dict):
        parts = {
            _loadable(key, name): _loadable(part, f"{name}[{key!r}]")
            for key, part in value.items()
            if not callable(part)
        }
        return type(value)(parts) if type(value) in (Counter, OrderedDict) else parts
    if isinstance(value, list | tuple | set | deque):
        members = [_loadable(part, f"{name}[{i}]") for i, part in enumerate(value)]
        kind = next((kind for kind in (tuple, set) if isinstance(value, kind)), list)
        return kind(members)
    raise ValueError(
        "`rewind` must find only numbers, strings, tensors and containers of them in schedulers "
        f"and parameter groups, got {type(value).__name__} for {name}; leave it out of the "
        "scheduler's `state_dict()`, or use rewind=None"
    )
