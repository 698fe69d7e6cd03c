"""MaskSet, the value object; and scores + sparsity -> masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import get_rank

from pruneflow.importance import Context, Importance, needs_gradients
from pruneflow.plan import pruned_count
from pruneflow.processes import assemble, gather, is_sharded, local, own, whole
from pruneflow.threshold import Elementwise, find_threshold, keep_masks, keep_parts, one_process

Scope = str | Mapping[str, Sequence[str]]


class MaskSet(Mapping[str, Tensor]):
    """Masks by qualified name: bool tensors of the weights' shapes, True = keep.

    Those of sharded weights are `DTensor`s, sharded alike; then every process has to ask for their
    `pruned`, `sparsity` and `state`, and all get the same.

    Args:
        masks: Qualified name -> mask.

    Raises:
        TypeError: If a mask is not a bool tensor.

    Example:
        >>> masks = MaskSet({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.weights, masks.pruned, masks.sparsity
        (4, 1, 0.25)
        >>> MaskSet.from_state(masks.state())["weight"]
        tensor([[ True, False],
                [ True,  True]])
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"mask {name!r} is expected to be a bool tensor, True = keep, but {came} came; "
                    "convert it, for example by `mask != 0`"
                )
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_state, (self.state(),)  # eight times smaller on its way elsewhere

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.pruned:,} of {self.weights:,} weights pruned)"

    @property
    def weights(self) -> int:
        """Number of weights under the masks."""
        return sum(mask.numel() for mask in self.values())

    @property
    def pruned(self) -> int:
        """Number of pruned weights."""
        return self.weights - sum(int(whole(mask.sum())) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Pruned fraction, in [0, 1]; 0.0 for no weights at all."""
        return self.pruned / self.weights if self.weights else 0.0

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse masks that do not fit these tensors.

        Raises:
            ValueError: If a name is unknown, or shapes differ.
        """
        unknown = [name for name in self if name not in tensors]
        if unknown:
            raise ValueError(
                f"masks are expected for tensors of this model, but it has no {unknown[0]!r}"
                f"{_and_more(unknown)}; masks of another model do not fit"
            )
        differing = [name for name in self if self[name].shape != tensors[name].shape]
        if differing:
            name = differing[0]
            raise ValueError(
                f"mask {name!r} is expected to have the shape {tuple(tensors[name].shape)} of its "
                f"tensor, but has {tuple(self[name].shape)}{_and_more(differing)}; "
                "masks of another model do not fit"
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """The masks bit-packed (one bit a weight), as builtins and tensors."""
        return {
            name: {
                "shape": list(mask.shape),
                "bits": torch.from_numpy(np.packbits(whole(mask).cpu().numpy().reshape(-1))),
            }
            for name, mask in self.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Any]]) -> MaskSet:
        """Unpack what `state` packed.

        Raises:
            ValueError: If the bits of a mask are fewer or more than its shape takes.
        """
        masks = {}
        for name, packed in state.items():
            count = math.prod(packed["shape"])
            if len(packed["bits"]) != -(-count // 8):
                raise ValueError(
                    f"packed mask {name!r} of shape {packed['shape']} is expected to take "
                    f"{-(-count // 8)} bytes, but {len(packed['bits'])} came; the file is damaged"
                )
            bits = np.unpackbits(packed["bits"].cpu().numpy(), count=count)
            masks[name] = torch.from_numpy(bits.astype(bool)).reshape(packed["shape"])
        return cls(masks)


def resolve_scope(scope: Scope, names: Sequence[str]) -> list[list[str]]:
    """Split the names of the prunable tensors into the groups that compete together.

    Args:
        scope: `"global"` (all together), `"layer"` (each tensor by itself), or group name ->
            globs over qualified names, which have to cover every tensor exactly once.
        names: Qualified names of the prunable tensors.

    Raises:
        ValueError: If `scope` is unknown, or its groups do not cover each tensor exactly once.

    Example:
        >>> resolve_scope({"early": ["conv*"], "late": ["fc.*"]}, ["conv1.weight", "fc.weight"])
        [['conv1.weight'], ['fc.weight']]
    """
    if scope == "global":
        return [list(names)]
    if scope == "layer":
        return [[name] for name in names]
    if not isinstance(scope, Mapping) or not all(map(_are_globs, scope.values())):
        raise ValueError(
            "`scope` is expected to be 'global', 'layer' or a mapping of group name to a list of "
            f"globs, but {scope!r} came"
        )
    groups = {
        group: [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
        for group, globs in scope.items()
    }
    empty = [group for group, members in groups.items() if not members]
    times = {name: sum(name in members for members in groups.values()) for name in names}
    wrong = [name for name, count in times.items() if count != 1]
    if empty or wrong:
        raise ValueError(
            "`scope` groups are expected to match every prunable tensor exactly once, but "
            + "; ".join(
                [f"group {group!r} matches none" for group in empty]
                + [f"{name!r} is in {times[name]} groups" for name in wrong[:5]]
            )
            + f"; the tensors are: {', '.join(names)}"
        )
    return list(groups.values())


@torch.no_grad()
def compute_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    importance: Importance,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    round: int = 1,
    gradients: Mapping[str, Tensor | None] | None = None,
) -> MaskSet:
    """Masks that keep the most important weights, exactly `round(sparsity * n)` pruned per group.

    The count is of all n weights of a group, never of what remains. Pruned weights stay pruned; of
    equal scores, the lowest (tensor order, flat index) goes first. Scores are computed tensor by
    tensor and never held together.

    Sharded weights (`DTensor`s) stay where they are and get the masks that the whole ones would;
    every process has to call this. An elementwise importance is called with pieces of shards, any
    other with the `DTensor`, and returns scores of its shape, as a `DTensor` or a plain tensor.

    Args:
        tensors: Qualified name -> live weights, of any shape; need not belong to a module.
        sparsity: Cumulative sparsity to reach, in [0, 1).
        importance: Scores, higher = keep.
        scope: What competes together; see `resolve_scope`.
        masks: The masks so far, of any dtype, zero = pruned; None for none.
        round: The round, for importances that depend on it.
        gradients: Qualified name -> gradient of the loss, for importances that need them.

    Returns:
        A mask for every tensor.

    Raises:
        ValueError: If `sparsity` is out of range or below what is already pruned, or weights are
            not finite, or scores are NaN or of another shape than their weights, or gradients are
            needed that are not there.

    Example:
        >>> from pruneflow import magnitude
        >>> weights = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([-3.0, 2.0])}
        >>> masks = compute_masks(weights, 0.5, importance=magnitude)
        >>> masks["a"], masks["b"]
        (tensor([ True, False]), tensor([ True, False]))
    """
    before = masks or {}
    context = Context(round, _gradients(importance, gradients or {}, tensors))
    check_finite(tensors)
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    join = gather if sharded else one_process
    new: dict[str, Tensor] = {}
    for group in resolve_scope(scope, list(tensors)):
        weights = sum(tensors[name].numel() for name in group)
        count = pruned_count(sparsity, weights)
        kept = [own(before[name], tensors[name]) for name in group if name in before]
        pruned = int(join(torch.tensor([sum(int((keep == 0).sum()) for keep in kept)])).sum())
        if count < pruned:
            raise ValueError(
                f"`sparsity` is expected to be at least the present one, {pruned / weights:.6g}, "
                f"but {sparsity!r} came for {group[0]!r}{_and_more(group)}; pruned weights stay "
                "pruned, so ask for more, or start from the dense model"
            )
        scores = [
            _scores(importance, name, context, tensors[name].detach(), before.get(name))
            for name in group
        ]
        try:
            threshold = find_threshold(scores, count, join)
        except ValueError as error:
            found = [join(score().isnan().any().view(1)).any() for score in scores]
            nan = [repr(name) for name, any_nan in zip(group, found, strict=True) if any_nan]
            raise ValueError(
                "`importance` is expected to return numbers, but NaN came for "
                f"{', '.join(nan)}; nothing was changed"
            ) from error
        if sharded:
            parts = keep_parts(scores, threshold, gather, get_rank())
        else:
            parts = keep_masks(scores, threshold)
        for name, part in zip(group, parts, strict=True):
            new[name] = assemble(part, tensors[name])
    return MaskSet({name: new[name] for name in tensors})


def _gradients(
    importance: Importance, found: Mapping[str, Tensor | None], names: Iterable[str]
) -> dict[str, Tensor]:
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


def _scores(
    importance: Importance, name: str, context: Context, tensor: Tensor, keep: Tensor | None
) -> partial[Tensor]:
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
        if keep is None:
            return scores
        # Pruned weights stay pruned: they go first, whatever their score. The smaller of the score
        # and ±inf is what `where` says as well, in a fraction of its time on a CPU.
        lowest = torch.finfo(scores.dtype).min  # of weights that are still there
        keep = (own(keep, tensor) != 0).to(scores.dtype)
        return torch.minimum(scores.clamp(min=lowest), (keep - 0.5) * math.inf)

    tensors = (tensor,) if keep is None else (tensor, keep)
    if getattr(importance, "elementwise", False):
        return Elementwise(score, *(own(each, tensor) for each in tensors))
    return partial(score, *tensors)


def _are_globs(globs: object) -> bool:
    return (
        isinstance(globs, Sequence)
        and not isinstance(globs, str)
        and all(isinstance(glob, str) for glob in globs)
    )


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
    # One pass without a temporary of the tensor's size: the extremes carry NaN and infinity along.
    return tensor.numel() == 0 or all(math.isfinite(x) for x in torch.aminmax(tensor))


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
