"""Importance: a score for each weight. The weights with the highest scores are kept.

An importance is a pure function `(name, tensor, context) -> scores` of the tensor's shape. It is
called tensor by tensor, several times per round, so that a round never holds all scores in memory.
If each score depends on its weight only, as in `magnitude`, set the attribute `elementwise = True`;
it is then called with flat pieces of the tensor, which is faster and takes less memory. If scores
depend on more than the weights, such as gradients in `taylor`, set the attribute `needs` to that
evidence.

A new importance is a function in this module or, with settings, a frozen dataclass, whose `repr` is
compared on resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruneflow.distributed import gather_full, local_part, to_local
from pruneflow.errors import expect
from pruneflow.pruning.evidence import Evidence, gradients, input_norms, resolve_evidence
from pruneflow.pruning.schedules import plain_number
from pruneflow.pruning.threshold import Elementwise


class _Undeclared(dict[str, Tensor]):
    """The evidence for an importance without `needs`."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            "`importance` must declare the evidence that it reads, got one without `needs` that "
            f"reads the evidence of {name!r}; set its attribute `needs`, such as to "
            "pruneflow.gradients"
        )


@dataclass(frozen=True)
class Context:
    """What an importance can use besides the tensor.

    Args:
        round: The round, counted from 1.
        evidence: Qualified name -> the evidence that the importance `needs`, such as the tensor's
            gradient; empty if it needs none.
    """

    round: int
    evidence: Mapping[str, Tensor] = field(default_factory=_Undeclared)

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The evidence, if that is `pruneflow.gradients`."""
        return self.evidence


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
    """First-order change of the loss if a weight is set to zero: |weight x gradient|.

    At initialization, this is the connection sensitivity of SNIP.

    Args:
        name: Qualified name of the tensor.
        tensor: The live weights, of any shape.
        context: Its evidence is the gradient of the tensor.

    Returns:
        Scores of the tensor's shape, at least float32, as products of float16 may underflow.

    Example:
        >>> context = Context(round=1, evidence={"weight": torch.tensor([0.1, -2.0])})
        >>> taylor("weight", torch.tensor([-3.0, 1.0]), context)
        tensor([0.3000, 2.0000])

    References:
        Molchanov et al. 2019, https://arxiv.org/abs/1906.10771; Lee et al. 2019 (SNIP),
        https://arxiv.org/abs/1810.02340.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * context.evidence[name]).abs()


taylor.needs = gradients  # type: ignore[attr-defined]


def wanda(name: str, tensor: Tensor, context: Context) -> Tensor:
    """|weight| x norm of its input, compared within each output.

    The score is the rank of that product among the weights of the same output (row of a `Linear`,
    filter of a convolution), divided by their number. So all outputs get the same sparsity,
    whatever the scope.

    Args:
        name: Qualified name of the tensor, the weight of a `Linear` or convolution.
        tensor: The live weights, of shape (outputs, inputs, ...).
        context: Its evidence is the `input_norms` of the tensor.

    Returns:
        Scores in (0, 1], float32, of the tensor's shape.

    Example:
        >>> context = Context(round=1, evidence={"weight": torch.tensor([[10.0, 1.0]])})
        >>> wanda("weight", torch.tensor([[-1.0, 3.0], [0.1, 2.0]]), context)
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])

    References:
        Sun et al. 2024, https://arxiv.org/abs/2306.11695.
    """
    products = gather_full(tensor).abs() * context.evidence[name]
    order = products.flatten(1).argsort(dim=1, stable=True)
    ranks = torch.arange(1.0, order.shape[1] + 1, device=order.device).expand(order.shape)
    scores = torch.empty_like(ranks).scatter_(1, order, ranks / order.shape[1])
    return scores.reshape(tensor.shape)


wanda.needs = input_norms  # type: ignore[attr-defined]


@dataclass(frozen=True)
class lamp:  # noqa: N801  # named like the other importances
    """Layer-adaptive scores (LAMP), which make layers comparable.

    score = s² / (sum of s² over the weights of the same tensor whose s is at least as high),

    for each score s of an importance. The highest score of each tensor is 1. With scope `"global"`,
    each layer gets the sparsity that suits it.

    Args:
        importance: The importance that returns s.

    Example:
        >>> lamp()("weight", torch.tensor([1.0, -3.0, 2.0]), Context(round=1))
        tensor([0.0714, 1.0000, 0.3077])

    References:
        Lee et al. 2021, https://arxiv.org/abs/2010.07611.
    """

    importance: Importance = magnitude

    def __post_init__(self) -> None:
        valid = callable(self.importance) and not isinstance(self.importance, type)
        expect(
            valid,
            "importance",
            "be a function such as magnitude",
            self.importance,
            "try lamp(magnitude)",
            error=TypeError,
        )

    @property
    def needs(self) -> Evidence | None:
        """The evidence that `importance` needs."""
        return needs_of(self.importance)

    def __call__(self, name: str, tensor: Tensor, context: Context) -> Tensor:
        """The scores, at least float32, of the tensor's shape."""
        scores = gather_full(self.importance(name, tensor, context))
        squares, order = scores.flatten().double().square().sort(stable=True)
        at_least = squares.flip(0).cumsum(0).flip(0)
        ratios = torch.empty_like(squares)
        ratios[order] = (squares / at_least).where(squares > 0, 0)
        return ratios.to(torch.promote_types(scores.dtype, torch.float32)).reshape(scores.shape)


def needs_of(importance: object) -> Evidence | None:
    """The evidence that an importance needs; None if it scores weights alone.

    Example:
        >>> needs_of(partial(taylor)) is gradients, needs_of(magnitude)
        (True, None)
    """
    if _declared(importance, "needs_gradients"):  # the attribute of earlier versions
        return gradients
    needs = _declared(importance, "needs")
    return None if needs is None else resolve_evidence(needs)


def _declared(importance: object, attribute: str) -> Any:
    """An attribute of an importance, or of the function that it wraps."""
    while importance is not None:
        if hasattr(importance, attribute):
            return getattr(importance, attribute)
        importance = getattr(importance, "func", getattr(importance, "__wrapped__", None))
    return None


@dataclass(frozen=True)
class Random:
    """Uniform random scores, a baseline.

    The scores depend on (seed, round, name, flat index) only, not on the device, the process or
    PyTorch's global random state.

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
    """Precomputed scores (`importance_scores` in `torch.nn.utils.prune`).

    Args:
        scores: Qualified name -> scores of that tensor's shape.

    Raises:
        ValueError: When called, if the tensor has no scores, or scores of another shape.

    Example:
        >>> given = Given({"weight": torch.tensor([0.2, 0.9])})
        >>> given("weight", torch.zeros(2), Context(round=1))
        tensor([0.2000, 0.9000])
    """

    scores: Mapping[str, Tensor]

    def __call__(self, name: str, tensor: Tensor, context: Context) -> Tensor:
        """The scores given for `name`."""
        expect(
            name in self.scores,
            "scores",
            f"have an entry for each tensor to prune, such as {name}",
            f"entries for {', '.join(self.scores) or 'none'}",
            "add it, or `exclude` the tensor",
        )
        scores = self.scores[name]
        expect(
            scores.shape == tensor.shape,
            "scores",
            f"have the shape {tuple(tensor.shape)} for {name}",
            tuple(scores.shape),
            "give one score per weight",
        )
        return scores.to(tensor.device)


def score_function(
    importance: Importance,
    name: str,
    context: Context,
    tensor: Tensor,
    scale: float = 1.0,
    keep: Tensor | None = None,
    protect: Callable[[Tensor], Tensor] | None = None,
) -> partial[Tensor]:
    """The function that computes the scores of a tensor and checks them.

    Args:
        importance: The importance.
        name: Qualified name of the tensor.
        context: The context for the importance.
        tensor: The weights; for a sharded tensor, the function returns the local scores.
        scale: Scores are divided by this.
        keep: The present mask, zero = pruned; scores of pruned weights become -inf.
        protect: Applied to the scores of the whole tensor at the end.

    Raises:
        TypeError: When called, if the scores are not floating point.
        ValueError: When called, if they do not have the tensor's shape.
    """

    def score(tensor: Tensor, keep: Tensor | None = None) -> Tensor:
        scores = importance(name, tensor, context)
        expect(
            isinstance(scores, Tensor) and scores.is_floating_point(),
            "importance",
            f"return a floating-point tensor for {name}",
            getattr(scores, "dtype", type(scores).__name__),
            "convert it, for example with `scores.float()`",
            error=TypeError,
        )
        expect(
            scores.shape == tensor.shape,
            "importance",
            f"return scores of shape {tuple(tensor.shape)} for {name}",
            tuple(scores.shape),
            "return one score per weight",
        )
        scores = local_part(scores, tensor)
        if scale != 1:
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / scale
        if keep is not None:
            scores = _pruned_first(scores, local_part(keep, tensor))
        return scores if protect is None else protect(scores)

    tensors = (tensor,) if keep is None else (tensor, keep)
    if _declared(importance, "elementwise") and protect is None:
        return Elementwise(score, *(local_part(each, tensor) for each in tensors))
    return partial(score, *tensors)


def _pruned_first(scores: Tensor, keep: Tensor) -> Tensor:
    # Pruned weights stay pruned: they come first, whatever their score. The minimum of score and
    # ±inf gives the same as `where`, several times faster on a CPU.
    lowest = torch.finfo(scores.dtype).min  # of weights that are not pruned
    keep = (keep != 0).to(scores.dtype)
    return torch.minimum(scores.clamp(min=lowest), (keep - 0.5) * math.inf)


def check_evidence(evidence: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Check that all tensors to prune have evidence, of a matching shape.

    Raises:
        ValueError: Names the tensors.
    """
    missing = ", ".join(name for name in shapes if name not in evidence)
    expect(
        not missing,
        "evidence",
        "have an entry for each tensor to prune",
        f"none for {missing}",
        "`exclude` tensors that the loss does not depend on, or whose layer is not called; "
        "gradients are read from `.grad`, so prune after `loss.backward()` and before "
        "`zero_grad()`",
    )
    other = [
        f"{tuple(evidence[name].shape)} for {name} {tuple(shape)}"
        for name, shape in shapes.items()
        if not _broadcasts(evidence[name].shape, shape)
    ]
    expect(
        not other,
        "evidence",
        "have the shapes of the tensors to prune",
        ", ".join(other),
        "collect it from this model",
    )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: Names the tensors that are not.
    """
    bad = [name for name, tensor in tensors.items() if not _finite(to_local(tensor.detach()))]
    expect(
        not bad,
        "model",
        "have finite weights",
        f"NaN or infinity in {', '.join(bad)}",
        "nothing was changed. Training has diverged: lower the learning rate or clip gradients",
    )


def _finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # One pass without a temporary of the tensor's size: NaN and infinity propagate to the extremes.
    return tensor.numel() == 0 or all(math.isfinite(x) for x in torch.aminmax(tensor))
