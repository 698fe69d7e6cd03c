"""N of M: the most important of each few neighbouring weights stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pruneflow.pruning.schedules import whole_number
from pruneflow.structure.layer_types import input_dim
from pruneflow.structure.parameters import Slot


@dataclass(frozen=True)
class NM:
    """Keep the `n` most important of each `m` neighbouring weights along the input.

    2 of 4 is what NVIDIA's sparse tensor cores compute with. Rounds below the sparsity 1 - n/m,
    which is the most there can be, prune from what is not among the `n` of its group. What was
    pruned before stays pruned, so that a group that has less than `n` left keeps those, and the
    last round ends a little above 1 - n/m.

    Args:
        n: How many of a group stay at least.
        m: Size of a group; the number of input channels or features has to be a multiple of it.
        dims: Qualified name -> the dimension of that weight along which its layer multiplies, where
            it is not 1. A Pruner knows it of PyTorch's layers and of those that `register_layer`
            was told of.

    Raises:
        ValueError: If not 0 < n < m.

    Example:
        >>> from pruneflow import compute_masks, magnitude
        >>> weights = {"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.1, 0.4, 0.3, 0.2]])}
        >>> compute_masks(weights, 0.5, importance=magnitude, granularity=NM(2, 4))["weight"]
        tensor([[ True,  True, False, False, False,  True,  True, False]])

    References:
        Mishra et al. 2021, https://arxiv.org/abs/2104.08378.
    """

    n: int
    m: int
    dims: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        n, m = whole_number(self.n), whole_number(self.m)
        if n is None or m is None or not 0 < n < m:
            raise ValueError(
                f"`n` and `m` must be whole numbers, 0 < n < m, got {self}; NM(2, 4) is usual"
            )
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @property
    def most(self) -> float:
        """The sparsity at which all groups keep `n`."""
        return 1 - self.n / self.m

    def bind(self, slots: Mapping[str, Slot]) -> NM:
        """The same with the dimensions along which these layers multiply.

        Raises:
            ValueError: Naming the tensors of layers of which that is not known.
        """
        dims = {name: input_dim(slot.module, slot.attribute) for name, slot in slots.items()}
        dims |= self.dims
        unknown = [
            f"{name} ({type(slots[name].module).__name__})" for name in slots if dims[name] is None
        ]
        if unknown:
            raise ValueError(
                f"`granularity` {self} must know along which dimension a layer multiplies, got "
                f"{', '.join(unknown)}; call `register_layer(type, name, input_dim=...)`, or "
                "`exclude` them"
            )
        return replace(self, dims={name: dim for name, dim in dims.items() if dim is not None})

    def check(self, shapes: Mapping[str, torch.Size], sparsity: float) -> None:
        """Refuse tensors without whole groups, and what would take more than m - n of a group.

        Raises:
            ValueError: Naming the tensors, or the sparsity.
        """
        uneven = [
            f"{name} {tuple(shape)}" for name, shape in shapes.items() if self._uneven(name, shape)
        ]
        if uneven:
            raise ValueError(
                f"`granularity` {self} is expected to get weights with a multiple of {self.m} "
                f"inputs, but {', '.join(uneven)} came; `exclude` them"
            )
        if sparsity > self.most:
            raise ValueError(
                f"`sparsity` is expected to be at most {self.most:.6g} with {self}, but "
                f"{sparsity!r} came; lower it, or keep fewer of each {self.m}"
            )

    def protect(self, name: str, scores: Tensor) -> Tensor:
        """Raise the `n` highest scores of each group, of equal ones the last, to infinity.

        A score of -inf, which marks what is pruned already, is left alone.

        Raises:
            ValueError: If scores of a shard do not hold whole groups.
        """
        if self._uneven(name, scores.shape):
            raise ValueError(
                f"`granularity` {self} must find whole groups in each shard, got {name} with "
                f"{tuple(scores.shape)} in one process; `exclude` it, or take another number of "
                "processes"
            )
        dim = self.dims.get(name, 1)
        groups = scores.movedim(dim, -1).unflatten(-1, (-1, self.m))
        best = groups.argsort(dim=-1, stable=True)[..., self.m - self.n :]
        protected = groups.scatter(-1, best, torch.inf).where(groups > -torch.inf, groups)
        result: Tensor = protected.flatten(-2).movedim(-1, dim)
        return result

    def _uneven(self, name: str, shape: torch.Size) -> bool:
        dim = self.dims.get(name, 1)
        return len(shape) < 2 or len(shape) <= dim or shape[dim] % self.m != 0
