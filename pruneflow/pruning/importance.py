"""Score: how important each weight is. Higher scores are kept.

An importance is a pure function `(name, tensor, context) -> scores` of the tensor's shape, called
tensor by tensor and more than once a round, so that a round never holds all scores. One that scores
each weight by itself, like `magnitude`, may say so by an attribute `elementwise = True`; it is then
called with flat pieces of the tensor, which is faster and takes less memory. One that looks at the
gradients of the loss, like `taylor`, has to say so by `needs_gradients = True`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pruneflow.distributed import local, own
from pruneflow.pruning.schedules import plain_number
from pruneflow.pruning.threshold import Elementwise


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


def scores_of(
    importance: Importance,
    name: str,
    context: Context,
    tensor: Tensor,
    scale: float = 1.0,
    keep: Tensor | None = None,
    protect: Callable[[Tensor], Tensor] | None = None,
) -> partial[Tensor]:
    """How to compute the scores of one tensor, checked.

    Args:
        importance: Scores, higher = keep.
        name: Qualified name of the tensor.
        context: What else the importance may know.
        tensor: The weights; of a sharded one the scores are those of this process's part.
        scale: What to divide the scores by.
        keep: The mask so far, zero = pruned: -inf there.
        protect: What to do with all scores of the tensor in the end.

    Raises:
        TypeError: When called, if the scores are no floats.
        ValueError: When called, if they are of another shape than the tensor.
    """

    def score(tensor: Tensor, keep: Tensor | None = None) -> Tensor:
        scores = importance(name, tensor, context)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            came = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(
                f"`importance` is expected to return a tensor of floats for {name!r}, but {came} "
                "came; convert it, for example by `scores.float()`"
            )
        if scores.shape != tensor.shape:
            raise ValueError(
                f"`importance` is expected to return scores of the shape {tuple(tensor.shape)} for "
                f"{name!r}, but {tuple(scores.shape)} came; return one score for each weight"
            )
        scores = own(scores, tensor)
        if scale != 1:
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / scale
        if keep is not None:
            scores = _pruned_first(scores, own(keep, tensor))
        return scores if protect is None else protect(scores)

    tensors = (tensor,) if keep is None else (tensor, keep)
    if getattr(importance, "elementwise", False) and protect is None:
        return Elementwise(score, *(own(each, tensor) for each in tensors))
    return partial(score, *tensors)


def _pruned_first(scores: Tensor, keep: Tensor) -> Tensor:
    # Pruned weights stay pruned: they go first, whatever their score. The smaller of the score and
    # ±inf is what `where` says as well, in a fraction of its time on a CPU.
    lowest = torch.finfo(scores.dtype).min  # of weights that are still there
    keep = (keep != 0).to(scores.dtype)
    return torch.minimum(scores.clamp(min=lowest), (keep - 0.5) * math.inf)


def gradients_of(
    importance: Importance, found: Mapping[str, Tensor | None], names: Iterable[str]
) -> dict[str, Tensor]:
    """The gradients that an importance needs; none if it needs none.

    Raises:
        ValueError: Naming the tensors that have none.
    """
    if not needs_gradients(importance):
        return {}
    gradients = {name: gradient for name in names if (gradient := found.get(name)) is not None}
    missing = [name for name in names if name not in gradients]
    if missing:
        raise ValueError(
            "`importance` needs the gradient of the loss for every tensor to prune, but there is "
            f"none for {', '.join(missing)}; prune after `loss.backward()` before they are "
            "set to None, or `exclude` what the loss does not depend on"
        )
    return gradients


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ValueError: Naming each such tensor.
    """
    bad = [name for name, tensor in tensors.items() if not _finite(local(tensor.detach()))]
    if bad:
        raise ValueError(
            "weights are expected to be finite when they are pruned, but NaN or infinity is in "
            f"{', '.join(repr(name) for name in bad)}; nothing was changed: the training has "
            "diverged, so lower the learning rate or clip gradients"
        )


def _finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # One pass without a temporary of the tensor's size: the extremes carry NaN and infinity along.
    return tensor.numel() == 0 or all(math.isfinite(x) for x in torch.aminmax(tensor))
