"""Scores of tensors, checked, and what they are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from pruneflow.importance import Context, Importance, needs_gradients
from pruneflow.processes import local, own
from pruneflow.threshold import Elementwise


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
