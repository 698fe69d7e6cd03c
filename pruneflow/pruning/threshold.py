"""The exact k-th lowest score over many tensors, without concatenating them.

A sample brackets the k-th score. One pass over the tensors counts the scores below the bracket and
collects the few inside it, from which the k-th is selected. A bracket that misses is widened, so
the result is exact for any data; the sample only affects the run time. Scores are computed tensor
by tensor, up to three times: for the sample, the counts and the masks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pruneflow.errors import expect

Scores = Callable[[], Tensor]
"""Computes the scores of a tensor, on one CPU thread. Must be pure, as it is called repeatedly."""

Gather = Callable[[Tensor], Tensor]
"""Concatenates a tensor of all processes along the first dimension, always in the same order."""

_STRIDE = 512  # one in this many scores is sampled; about 3 * sqrt(total * _STRIDE) are collected
_CPU_CHUNK = 2**19  # entries processed at a time: they fit in the caches
_CHUNK = 2**24  # on other devices: few kernel launches, and float32 counts are exact up to here
_COLUMNS = 16  # rows of the view in which columns without selected entries are dropped


class Elementwise(partial[Tensor]):
    """Scores that a function computes elementwise from tensors of the same shape.

    A `functools.partial` that may be computed in pieces, so that no full tensor of scores is held;
    on a CPU, this is several times faster.

    Args:
        func: Maps pieces of `args`, all of the same shape, to scores of that shape.
        args: Tensors of the same shape, such as the weight and the present mask.

    Example:
        >>> find_threshold([Elementwise(torch.abs, torch.tensor([3.0, -1.0, 2.0]))], k=1)
        Threshold(value=2.0, ties=0)
    """


@dataclass(frozen=True)
class Threshold:
    """The threshold between pruned and kept scores.

    Args:
        value: Scores below it are pruned; inf if all are.
        ties: Number of scores equal to `value` that are also pruned, in the order (tensor,
            row-major flat index).
    """

    value: float
    ties: int


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch to one CPU thread.

    The pieces are so small that a second thread gains little, and next to other busy processes,
    such as data loaders, synchronizing threads takes far longer than the work itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class NaNScoresError(ValueError):
    """Scores contain NaN, which cannot be compared."""


def one_process(tensor: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return tensor


@torch.no_grad()
@_one_thread()
def find_threshold(scores: Sequence[Scores], k: int, gather: Gather = one_process) -> Threshold:
    """Find the threshold for the k lowest scores, exactly.

    Besides the scores of one tensor, a few times sqrt(512 * total) entries are held in memory. The
    global random state is not used, and the result does not depend on device or memory layout.

    Args:
        scores: One function per tensor, of any floating dtype, device and shape. -inf is pruned
            first, inf last; +0.0 and -0.0 are equal.
        k: Number of entries to prune, from 0 to the total number of entries.
        gather: If each process holds a part of every tensor, and computes the scores of its parts:
            gathers samples, counts and the few scores in the bracket.

    Raises:
        ValueError: If `k` is out of range.
        NaNScoresError: If a score is NaN (not checked if `k` is 0).

    Example:
        >>> a, b = torch.tensor([0.3, 0.1, 0.4]), torch.tensor([[0.2, 0.4]])
        >>> find_threshold([lambda: a, lambda: b], k=2).ties
        0
        >>> find_threshold([lambda: a, lambda: b], k=4).ties  # the first of the two 0.4
        1
    """
    if k == 0:
        return Threshold(-math.inf, 0)
    generator = torch.Generator().manual_seed(0)  # not the global random state
    drawn = [_sample(score, _STRIDE, generator) for score in scores]
    total = int(gather(_integers(sum(numel for _, numel in drawn))).sum())
    expect(0 < k <= total, "k", f"be from 0 to {total}, the number of scores", k, "change it")
    sample = gather(_join([sample for sample, _ in drawn]))
    rank = k / total * sample.numel()
    slack = 3 * math.sqrt(rank * (1 - k / total)) + 3  # three standard deviations

    # Invariant: the k-th score, counted from 0, is in [floor, ceil], and `below` scores are lower
    # than floor.
    floor, ceil, below = -math.inf, math.inf, 0
    while True:
        lo = max(floor, _order_statistic(sample, math.floor(rank - slack)))
        hi = min(ceil, _order_statistic(sample, math.ceil(rank + slack)))
        at_most_lo, at_least_hi, inside = _count(scores, lo, hi, gather)
        _check_nan(inside)
        less_than_hi = total - at_least_hi
        if at_most_lo <= k < less_than_hi:
            value = _order_statistic(inside, k - at_most_lo)
            return Threshold(value, k - at_most_lo - int((inside < value).sum()))
        if k < at_most_lo:
            ceil = lo
        if k >= less_than_hi:
            floor, below = hi, less_than_hi
        if floor == ceil:
            return Threshold(floor, k - below)
        slack *= 8


@torch.no_grad()
@_one_thread()
def find_cost_threshold(
    scores: Sequence[Scores], costs: Sequence[float], target: float, gather: Gather = one_process
) -> Threshold:
    """Find the threshold for the fewest lowest scores whose entries cost at least `target`.

    Like `find_threshold`, which counts entries.

    Args:
        scores: One function per tensor, as for `find_threshold`.
        costs: Cost of each entry, above 0, per tensor.
        target: Minimum total cost of the entries to prune.
        gather: As for `find_threshold`.

    Raises:
        NaNScoresError: If a score is NaN (not checked if `target` is 0).

    Example:
        >>> a, b = torch.tensor([0.3, 0.1, 0.4]), torch.tensor([[0.2, 0.4]])
        >>> scores = [lambda: a, lambda: b]
        >>> threshold = find_cost_threshold(scores, costs=[1, 3], target=4.5)
        >>> [mask.tolist() for mask in keep_masks(scores, threshold)]
        [[False, False, True], [[False, True]]]
    """
    if target <= 0:
        return Threshold(-math.inf, 0)
    entry_costs = torch.tensor(costs, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)  # not the global random state
    # Expensive entries are sampled more often, so that each sampled entry represents about the same
    # cost, and the sample is as accurate as with equal costs.
    typical = statistics.geometric_mean(costs)
    strides = [max(1, round(_STRIDE * typical / each)) for each in costs]
    drawn = [_sample(*each, generator) for each in zip(scores, strides, strict=True)]
    sizes = gather(_integers(*(numel for _, numel in drawn))[None]).sum(0)
    represented = entry_costs * torch.tensor(strides)
    sample = _cumulative_costs(gather(_with_index([values for values, _ in drawn])), represented)
    share = min(1.0, target / float(entry_costs @ sizes.double()))
    rank, largest = share * sum(sample[1][-1:].tolist()), float(represented.max())
    slack = 3 * math.sqrt(rank * (1 - share) * largest) + 3 * largest  # three standard deviations

    # Invariant: the highest score to prune is in [floor, ceil].
    floor, ceil = -math.inf, math.inf
    while True:
        lo = max(floor, _score_at_cost(rank - slack, *sample))
        hi = min(ceil, _score_at_cost(rank + slack, *sample))
        at_most_lo, at_least_hi, inside = _count_each(scores, lo, hi, gather)
        _check_nan(inside)
        cost_to_lo = float(entry_costs @ at_most_lo.double())
        if cost_to_lo >= target:
            ceil = lo
        elif float(entry_costs @ (sizes - at_least_hi).double()) < target:
            floor = hi
        else:
            left = target - cost_to_lo
            value = _score_at_cost(left, *_cumulative_costs(inside, entry_costs))
            less, equal = (
                inside[which, 1].long().bincount(minlength=len(costs))
                for which in (inside[:, 0] < value, inside[:, 0] == value)
            )
            left -= float(entry_costs @ less.double())
            return Threshold(value, _count_ties(left, costs, equal))
        if floor == ceil:
            at_most, at_least, _ = _count_each(scores, floor, floor, gather)
            left = target - float(entry_costs @ (sizes - at_least).double())
            return Threshold(floor, _count_ties(left, costs, at_most + at_least - sizes))
        slack *= 8


@torch.no_grad()
def keep_masks(scores: Sequence[Scores], threshold: Threshold) -> Iterator[Tensor]:
    """Compute the masks for a threshold, one tensor at a time.

    Args:
        scores: The score functions that `threshold` was found for, in the same order.
        threshold: The result of `find_threshold`.

    Yields:
        For each tensor, a bool tensor of its shape, device and memory layout, True = keep.

    Example:
        >>> scores = [lambda: torch.tensor([0.3, 0.1, 0.4]), lambda: torch.tensor([[0.2, 0.4]])]
        >>> [mask.tolist() for mask in keep_masks(scores, find_threshold(scores, k=4))]
        [[False, False, False], [[False, True]]]
    """
    ties = threshold.ties
    for score in scores:
        mask, ties = _keep(score, threshold.value, ties)
        yield mask


@torch.no_grad()
def local_keep_masks(
    scores: Sequence[Scores], threshold: Threshold, gather: Gather, rank: int
) -> Iterator[Tensor]:
    """Compute the masks of the local parts, if each process holds a part of every tensor.

    Args:
        scores: The score functions of the local parts.
        threshold: The result of `find_threshold`.
        gather: The same as for `find_threshold`, in the order of the parts in the full tensor.
        rank: Position of this process in that order, from 0.

    Yields:
        For each part, a bool tensor, True = keep.
    """
    value, left = threshold.value, threshold.ties
    for score in scores:
        function, tensors = _parts(score)
        score = Elementwise(function, *tensors)  # computes scores that are not elementwise once
        mine = 0
        if left:
            at_most, at_least, _ = _count_one(score, value, value)
            ties = gather(_integers(at_most + at_least - tensors[0].numel()))
            mine = max(0, left - int(ties[:rank].sum()))
            left = max(0, left - int(ties.sum()))
        yield _keep(score, value, mine)[0]


def _check_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise NaNScoresError("`scores` must not be NaN, got NaN; check the importance")


def _sample(score: Scores, stride: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Sample one random entry of every `stride`; also return the number of entries."""
    function, tensors = _parts(score)
    numel = tensors[0].numel()
    drawn = torch.arange(0, numel, stride, device="cpu")
    drawn += torch.randint(stride, drawn.shape, generator=generator, device="cpu")
    drawn = drawn[drawn < numel]  # so that small tensors are not overrepresented
    return _wide(function(*(t.take(drawn.to(t.device)) for t in tensors))), numel


def _count(
    scores: Sequence[Scores], lo: float, hi: float, gather: Gather
) -> tuple[int, int, Tensor]:
    """Count the scores <= lo and those >= hi, and collect the others, including NaN."""
    at_most_lo = at_least_hi = 0
    inside = []
    for score in scores:
        lows, highs, between = _count_one(score, lo, hi)
        at_most_lo += lows
        at_least_hi += highs
        inside += between
    counts = gather(_integers(at_most_lo, at_least_hi)).view(-1, 2).sum(0).tolist()
    return counts[0], counts[1], gather(_join(inside))


def _count_each(
    scores: Sequence[Scores], lo: float, hi: float, gather: Gather
) -> tuple[Tensor, Tensor, Tensor]:
    """`_count` for each tensor; the collected scores are rows (score, index of its tensor)."""
    found = [_count_one(score, lo, hi) for score in scores]
    counts = gather(torch.tensor([[(lows, highs) for lows, highs, _ in found]])).sum(0)
    return counts[:, 0], counts[:, 1], gather(_with_index([_join(inside) for *_, inside in found]))


def _count_ties(left: float, costs: Sequence[float], equal: Tensor) -> int:
    """How many of the equal scores, counted for each tensor, have to go to cost `left`."""
    ties = 0
    for cost, found in zip(costs, equal.tolist(), strict=True):
        count = min(found, math.ceil(max(left, 0) / cost))
        left, ties = left - count * cost, ties + count
    return ties


def _with_index(scores: Sequence[Tensor]) -> Tensor:
    """Rows (score, index of its tensor) for a few scores of each tensor."""
    columns = [
        torch.stack([values.cpu().double(), torch.full((len(values),), i, dtype=torch.float64)], 1)
        for i, values in enumerate(scores)
    ]
    return torch.cat(columns)


def _cumulative_costs(rows: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of `_with_index` in order, and their cumulative costs."""
    values, order = rows[:, 0].sort()
    return values, costs[rows[order, 1].long()].cumsum(0)


def _score_at_cost(target: float, values: Tensor, costs: Tensor) -> float:
    """The score at which the cumulative cost reaches `target`; infinite beyond either end."""
    if target <= 0:
        return -math.inf
    index = int(torch.searchsorted(costs, target))
    return float(values[index]) if index < len(values) else math.inf


def _count_one(score: Scores, lo: float, hi: float) -> tuple[int, int, list[Tensor]]:
    """`_count` for one tensor; its scores are freed before those of the next are computed."""
    at_most_lo, at_least_hi, inside, flags = 0, 0, [], None
    function, tensors = _parts(score)
    for pieces in _cut(*tensors):
        x = _wide(function(*pieces)).reshape(-1)
        if flags is None:  # once, as allocation is slow and the first piece is the largest
            flags = x.new_empty(2, x.numel())
        outside, above = flags[:, : x.numel()].unbind()
        # On a CPU, comparing into floats is four times as fast as comparing into bools.
        torch.le(x, _round_down(lo, x.dtype), out=outside)
        torch.ge(x, _round_up(hi, x.dtype), out=above)
        at_most_lo += int(outside.sum())
        at_least_hi += int(above.sum())
        inside.append(_where_zero(outside.add_(above), x))
    return at_most_lo, at_least_hi, inside


def _where_zero(flags: Tensor, x: Tensor) -> Tensor:
    """Select the few entries of `x` where the non-negative `flags` are zero."""
    if x.numel() % _COLUMNS == 0:  # most columns have no zero: drop them before the slow indexing
        flags, x = flags.view(_COLUMNS, -1), x.view(_COLUMNS, -1)
        columns = (flags.amin(0) == 0).nonzero().squeeze(1)
        flags, x = flags.index_select(1, columns), x.index_select(1, columns)
    return x[flags == 0]


@_one_thread()
def _keep(score: Scores, value: float, ties: int) -> tuple[Tensor, int]:
    """The mask of one tensor, without its first `ties` ties; also return how many ties are left."""
    function, tensors = _parts(score)
    mask = torch.empty_like(tensors[0], dtype=torch.bool)
    for *pieces, keep in _cut(*tensors, mask):
        x = _wide(function(*pieces))
        keep.copy_(torch.ge(x, _round_up(value, x.dtype), out=torch.empty_like(x)))
        if ties:
            equal = keep & (x <= _round_down(value, x.dtype))
            found = int(equal.count_nonzero())
            if found > ties:
                equal[equal.nonzero()[ties:].unbind(1)] = False
            keep.bitwise_xor_(equal)
            ties -= min(ties, found)
    return mask, ties


def _parts(score: Scores) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Split scores into an elementwise function and its tensors."""
    if isinstance(score, Elementwise):
        return partial(score.func, **score.keywords), score.args
    return (lambda x: x), (score(),)


def _cut(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of the same shape into views of at most a chunk, in row-major order."""
    if all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.view(-1) for t in tensors)
    chunk = _CPU_CHUNK if tensors[0].device.type == "cpu" else _CHUNK
    row = max(1, tensors[0].shape[1:].numel())
    if row > chunk:
        for rows in zip(*tensors, strict=True):
            yield from _cut(*rows)
    else:
        yield from zip(*(t.split(chunk // row) for t in tensors), strict=True)


def _wide(scores: Tensor) -> Tensor:
    """Convert half precision to float32, which is exact, faster to compare and counts higher."""
    return scores.float() if scores.itemsize < 4 else scores


def _integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device="cpu")


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate a few collected scores on one device, promoting their dtypes."""
    return torch.cat([t.to(tensors[0].device) for t in tensors])


def _order_statistic(values: Tensor, index: int) -> float:
    """Return the value at `index` in sorted order; infinite beyond either end."""
    if index < 0:
        return -math.inf
    if index >= values.numel():
        return math.inf
    # kthvalue takes quadratic time on descending values, and is slow on CUDA.
    return float(values.topk(index + 1, largest=False, sorted=False).values.max())


def _round_down(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of `dtype` that is at most `value`.

    A float32 tensor is compared with the float32 nearest to a number, which may be on the wrong
    side of it. For float32 scores s, s <= value is equivalent to s <= _round_down(value).
    """
    near = torch.tensor(value, dtype=dtype)
    if float(near) > value:
        near = torch.nextafter(near, torch.tensor(-math.inf, dtype=dtype))
    return float(near)


def _round_up(value: float, dtype: torch.dtype) -> float:
    """Return the smallest number of `dtype` that is at least `value`."""
    return -_round_down(-value, dtype)
