"""Put the learning-rate schedule back to an earlier point."""

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
    """The learning-rate schedule as it stood at one moment, to be started again from there.

    Holds what the schedulers know and the hyperparameters of each parameter group (learning rate,
    momentum, …), and nothing of the weights or the optimizer's state.

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
        # By whose it is; what came from a checkpoint, by its place until `follow` sees whose.
        self._groups: dict[Any, dict[Any, dict[str, Any]]] = {}
        self._schedulers: dict[Any, _Scheduler] = {}
        self.follow(optimizers, schedulers)

    def follow(self, optimizers: Sequence[Optimizer], schedulers: Schedulers) -> None:
        """Take in what came since, as it stands now, and forget what is gone."""
        self._groups = {
            optimizer: _of_each(_owners(optimizer), kept, partial(_hyperparameters, optimizer))
            for optimizer, kept in _of_each(optimizers, self._groups, lambda _: {}).items()
        }
        self._schedulers = _of_each(
            schedulers, self._schedulers, lambda place: _Scheduler(schedulers[place].state_dict())
        )
        for scheduler, known in self._schedulers.items():
            known.owners = known.owners or _owners(_optimizer(scheduler))

    def restore(self, optimizers: Sequence[Optimizer], schedulers: Schedulers) -> None:
        """Put the learning rates and schedulers back as they were."""
        self.follow(optimizers, schedulers)
        for scheduler, known in self._schedulers.items():
            scheduler.load_state_dict(known.fit(scheduler))
        for optimizer, kept in self._groups.items():
            for group, saved in zip(optimizer.param_groups, kept.values(), strict=True):
                for key, value in saved.items():
                    if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                        group[key].copy_(value)  # a compiled or captured step reads this tensor
                    else:
                        group[key] = copy.deepcopy(value)

    def release(self) -> None:
        """Let go of the optimizers and schedulers, and with them of the model."""
        released = self.from_state(self._values())
        self._groups, self._schedulers = released._groups, released._schedulers

    def state(self) -> dict[str, Any]:
        """The snapshot as builtins and tensors.

        Raises:
            ValueError: If a scheduler or parameter group holds what no checkpoint should.
        """
        return {name: _loadable(values, name) for name, values in self._values().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LearningRateSnapshot:
        """The snapshot that `state` was taken from."""
        snapshot = cls([], [])
        snapshot._groups = dict(enumerate(dict(enumerate(groups)) for groups in state["groups"]))
        snapshot._schedulers = dict(enumerate(map(_Scheduler, state["schedulers"])))
        return snapshot

    def _values(self) -> dict[str, list[Any]]:
        return {
            "groups": [list(kept.values()) for kept in self._groups.values()],
            "schedulers": [known.fit(scheduler) for scheduler, known in self._schedulers.items()],
        }


class _Scheduler:
    """What a scheduler knew, and for which groups."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        self.owners: list[Any] | None = None

    def fit(self, scheduler: Any) -> Any:
        """The state for `scheduler` to load, whose groups may be others by now."""
        state = copy.deepcopy(self.state)
        if self.owners is None:  # known by its place alone
            return state
        places = {id(owner): place for place, owner in enumerate(self.owners)}
        order = [places.get(id(owner)) for owner in _owners(_optimizer(scheduler))]
        return _fit(state, scheduler.state_dict(), order, len(self.owners))


def _of_each(
    owners: Sequence[Any], kept: Mapping[Any, T], take: Callable[[int], T]
) -> dict[Any, T]:
    """What is kept of each owner, or of its place; of one that came since, what `take` finds."""
    found = {}
    for place, owner in enumerate(owners):
        key = owner if owner in kept else place
        found[owner] = kept[key] if key in kept else take(place)
    return found


def _owners(optimizer: Optimizer | None) -> list[Any]:
    """What tells the groups apart, some of which may come or go: the first parameter of each."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [next(iter(group["params"]), object()) for group in groups]


def _optimizer(scheduler: Any) -> Optimizer | None:
    return getattr(scheduler, "optimizer", None)  # a user's own may go without


def _hyperparameters(optimizer: Optimizer, place: int) -> dict[str, Any]:
    group = optimizer.param_groups[place]
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _fit(saved: Any, present: Any, order: Sequence[int | None], then: int) -> Any:
    """What a scheduler knew of `then` groups, for those that there are now.

    Args:
        saved: A value of its state.
        present: What is there now; of lists with an entry a group it gives those of new groups.
        order: For each group of now which it was then; None for a new one.
        then: How many groups there were.
    """
    if isinstance(present, deque) and isinstance(saved, list):  # as a checkpoint has it
        return deque(saved, present.maxlen)
    if isinstance(present, np.ndarray) and isinstance(saved, list):
        return np.asarray(saved, present.dtype)
    if isinstance(saved, dict) and isinstance(present, dict):
        for key, value in saved.items():
            saved[key] = _fit(value, present.get(key), order, then)
    elif isinstance(saved, list) and isinstance(present, list):
        if (len(saved), len(present)) == (then, len(order)) and order != list(range(then)):
            return [present[i] if at is None else saved[at] for i, at in enumerate(order)]
        if len(saved) == len(present):
            return [_fit(*pair, order, then) for pair in zip(saved, present, strict=True)]
    return saved


_SCALARS = (bool, int, float, complex, str, bytes)  # and nothing derived from them


def _loadable(value: Any, name: str) -> Any:
    """A value in what `torch.load` reads with `weights_only`: builtins and tensors.

    Functions in a dict are left out: a scheduler's own are those of the training that goes on.

    Raises:
        ValueError: If it cannot be put so, naming it.
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
        "`rewind` must be able to store what schedulers and parameter groups hold: numbers, text, "
        f"tensors and containers of them, got {type(value).__name__} for {name}; leave it out of "
        "the scheduler's `state_dict()`, or use rewind=None"
    )
