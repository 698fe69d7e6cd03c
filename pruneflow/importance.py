"""Score: how important each weight is. Higher scores are kept.

An importance is a pure function `(name, tensor, context) -> scores` of the tensor's shape, called
tensor by tensor and more than once a round, so that a round never holds all scores. One that scores
each weight by itself, like `magnitude`, may say so by an attribute `elementwise = True`; it is then
called with flat pieces of the tensor, which is faster and takes less memory. One that looks at the
gradients of the loss, like `taylor`, has to say so by `needs_gradients = True`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruneflow.schedules import plain_number


@dataclass(frozen=True)
class Context:
    """What an importance may know beside the tensor.

    Args:
        round: The round that is about to prune, counted from 1.
        gradients: Qualified name -> gradient of the loss, of the tensor's shape; empty unless the
            importance says that it `needs_gradients`.
    """

    round: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


Importance = Callable[[str, Tensor, Context], Tensor]


def magnitude(name: str, tensor: Tensor, context: Context) -> Tensor:
    """Absolute value of each weight (L1).

    Args:
        name: Qualified name of the tensor; not used.
        tensor: The live weights, of any shape.
        context: Not used.

    Returns:
        Scores of the tensor's shape and dtype.

    Example:
        >>> magnitude("weight", torch.tensor([-3.0, 1.0]), Context(round=1))
        tensor([3., 1.])

    References:
        Han et al. 2015, https://arxiv.org/abs/1506.02626.
    """
    return tensor.abs()


magnitude.elementwise = True  # type: ignore[attr-defined]


def taylor(name: str, tensor: Tensor, context: Context) -> Tensor:
    """How much the loss changes, to first order, when a weight becomes zero: |weight x gradient|.

    Before any training this is the connection sensitivity of SNIP.

    Args:
        name: Qualified name of the tensor.
        tensor: The live weights, of any shape.
        context: With the gradient of the tensor.

    Returns:
        Scores of the tensor's shape, at least float32, as products of halves would vanish.

    Example:
        >>> context = Context(round=1, gradients={"weight": torch.tensor([0.1, -2.0])})
        >>> taylor("weight", torch.tensor([-3.0, 1.0]), context)
        tensor([0.3000, 2.0000])

    References:
        Molchanov et al. 2019, https://arxiv.org/abs/1906.10771; Lee et al. 2019 (SNIP),
        https://arxiv.org/abs/1810.02340.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * context.gradients[name]).abs()


taylor.needs_gradients = True  # type: ignore[attr-defined]


def needs_gradients(importance: object) -> bool:
    """Whether an importance looks at the gradients of the loss.

    Example:
        >>> needs_gradients(taylor), needs_gradients(magnitude)
        (True, False)
    """
    return getattr(importance, "needs_gradients", False)


@dataclass(frozen=True)
class Random:
    """Uniform random scores: the baseline that every criterion has to beat.

    The scores are a function of (seed, round, name, flat index) alone, whatever the device, the
    process or the state of PyTorch's own random numbers.

    Args:
        seed: Seed of the scores.

    Example:
        >>> scores = Random(seed=1)("weight", torch.zeros(2, 3), Context(round=1))
        >>> scores.shape
        torch.Size([2, 3])
        >>> torch.equal(scores, Random(seed=1)("weight", torch.ones(2, 3), Context(round=1)))
        True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", plain_number(self.seed))

    def __call__(self, name: str, tensor: Tensor, context: Context) -> Tensor:
        """Scores in [0, 1), float32, of the tensor's shape."""
        key = hashlib.sha256(f"{self.seed}/{context.round}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        return torch.rand(tensor.shape, generator=generator).to(tensor.device)


@dataclass(frozen=True, eq=False)
class Given:
    """Scores computed elsewhere (torch: `importance_scores`).

    Args:
        scores: Qualified name -> scores of that tensor's shape.

    Raises:
        ValueError: When called for a tensor without scores, or with scores of another shape.

    Example:
        >>> given = Given({"weight": torch.tensor([0.2, 0.9])})
        >>> given("weight", torch.zeros(2), Context(round=1))
        tensor([0.2000, 0.9000])
    """

    scores: Mapping[str, Tensor]

    def __call__(self, name: str, tensor: Tensor, context: Context) -> Tensor:
        """The scores given for `name`."""
        if name not in self.scores:
            raise ValueError(
                f"`scores` is expected to hold scores for every prunable tensor, but {name!r} is "
                f"missing; add it, or `exclude` the tensor (given: {', '.join(self.scores)})"
            )
        scores = self.scores[name]
        if scores.shape != tensor.shape:
            raise ValueError(
                f"`scores` of {name!r} are expected to have the shape {tuple(tensor.shape)}, but "
                f"{tuple(scores.shape)} came; give one score for each weight"
            )
        return scores.to(tensor.device)
