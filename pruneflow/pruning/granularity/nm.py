"""N:M sparsity: at least n of every m consecutive weights are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruneflow.errors import expect
from pruneflow.pruning.distribution import Groups
from pruneflow.pruning.granularity.units import Competition, Granularity
from pruneflow.pruning.granularity.weights import threshold_masks
from pruneflow.pruning.schedules import whole_number
from pruneflow.structure.costs import Costs
from pruneflow.structure.layer_types import input_dim
from pruneflow.structure.parameters import locate


@dataclass(frozen=True)
class NM(Granularity):
    """N:M sparsity: keep the `n` highest scores of every `m` consecutive weights along the input.

    NVIDIA's sparse tensor cores accelerate 2:4. The maximum sparsity is 1 - n/m; rounds below it
    only prune weights that are not among the `n` highest of their group. Pruned weights stay
    pruned, so a group may keep fewer than `n`, and the last round may end slightly above 1 - n/m.

    Args:
        n: Number of weights that a round keeps in each group.
        m: Group size; the number of input channels or features must be a multiple of it.
        dims: Qualified name -> input dimension of that weight, if it is not 1. A Pruner knows that
            of PyTorch's layers and of those registered with `register_layer`.

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
        valid = n is not None and m is not None and 0 < n < m
        expect(valid, "n` and `m", "be whole numbers, 0 < n < m", self, "try NM(2, 4)")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @property
    def max_sparsity(self) -> float:
        """The sparsity if every group keeps `n`."""
        return 1 - self.n / self.m

    def bind(self, model: nn.Module, names: Collection[str], example: object = None) -> NM:
        """The granularity with the input dimensions of the tensors `names` of a model.

        Raises:
            ValueError: Names the tensors whose input dimension is not known.
        """
        slots = {name: slot for name, slot in locate(model).items() if name in names}
        dims = {name: input_dim(slot.module, slot.attribute) for name, slot in slots.items()}
        dims |= self.dims
        unknown = [
            f"{name} ({type(slots[name].module).__name__})" for name in slots if dims[name] is None
        ]
        expect(
            not unknown,
            "granularity",
            f"know the input dimension of each weight for {self}",
            ", ".join(unknown),
            "call `register_layer(type, name, input_dim=...)`, or `exclude` them",
        )
        return replace(self, dims={name: dim for name, dim in dims.items() if dim is not None})

    def check(self, tensors: Mapping[str, Tensor], groups: Groups, costs: Costs) -> None:
        """Check that tensors have whole groups, and that no sparsity is above the maximum.

        Raises:
            ValueError: Names the tensors or the sparsity.
        """
        uneven = [
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if self._uneven(name, tensor.shape)
        ]
        expect(
            not uneven,
            "granularity",
            f"divide each weight into groups of {self.m} inputs",
            ", ".join(uneven),
            "`exclude` them",
        )
        sparsity = max(sparsity for _, sparsity in groups)
        expect(
            sparsity <= self.max_sparsity,
            "sparsity",
            f"be at most {self.max_sparsity:.6g} with {self}",
            repr(sparsity),
            f"lower it, or keep fewer of each {self.m} weights",
        )

    def masks(self, competition: Competition) -> dict[str, Tensor]:
        """The masks of the tensors."""
        return threshold_masks(competition, self.protect, self.max_sparsity)

    def protect(self, name: str, scores: Tensor) -> Tensor:
        """Set the `n` highest scores of each group to infinity; of ties, the last are kept.

        Scores of -inf, which mark pruned weights, stay.

        Raises:
            ValueError: If a shard does not hold whole groups.
        """
        expect(
            not self._uneven(name, scores.shape),
            "granularity",
            f"have whole groups of {self.m} in each shard",
            f"{name} with shape {tuple(scores.shape)} in one process",
            "`exclude` it, or use another number of processes",
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
