"""The exact k-th lowest score over many tensors, without joining them in one vector.

A sample brackets the k-th score, one pass over the tensors counts what lies below the bracket and
collects the few scores inside it, and the k-th of all is selected among those. A bracket that
missed is widened, so the answer is exact for any data; the sample only decides how long it takes.
Scores are made tensor by tensor, up to three times: to sample, to count and to make the masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Scores = Callable[[], Tensor]
"""Computes one tensor's scores afresh, on one CPU thread; pure, for it is called a few times."""

Gather = Callable[[Tensor], Tensor]
"""Joins a tensor of every process along the first dimension, always in the same order."""

_STRIDE = 512  # one entry of so many is sampled: about 3 * sqrt(total * _STRIDE) are collected
_CPU_CHUNK = 2**19  # entries worked on at once: what the caches hold
_CHUNK = 2**24  # on other devices: few launches, and float32 still counts exactly up to here
_COLUMNS = 16  # entries looked at together when few of them are wanted


class Elementwise(partial[Tensor]):
    """Scores that a function computes entry by entry from tensors of one shape.

    A `functools.partial` that may be computed piece by piece: no whole tensor of scores is held,
    and on a CPU it is several times faster.

    Args:
        func: Maps pieces of `args`, alike in shape, to their scores, of the same shape.
        args: Tensors of one shape: the weight and, say, its gradient or the mask held so far.

    Example:
        >>> find_threshold([Elementwise(torch.abs, torch.tensor([3.0, -1.0, 2.0]))], k=1)
        Threshold(value=2.0, ties=0)
    """


@dataclass(frozen=True)
class Threshold:
    """Where the scores to prune end.

    Args:
        value: The lowest score kept (inf if none is): every score below it is pruned.
        ties: How many scores equal to `value` are pruned as well, in the order (tensor, row-major
            flat index).
    """

    value: float
    ties: int


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold PyTorch to one CPU thread.

    The pieces are so small that a second thread gains little, and beside a busy process (data
    loaders, say) the threads' many short meetings take many times as long as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_process(tensor: Tensor) -> Tensor:
    """Join the tensors of one process: there is only this one."""
    return tensor


@torch.no_grad()
@_one_thread()
def find_threshold(scores: Sequence[Scores], k: int, gather: Gather = one_process) -> Threshold:
    """Find which k of all scores are the lowest, exactly.

    Beside one tensor's scores a few times sqrt(512 * total) entries are held. No random state is
    used up, and the result depends on neither device nor memory layout.

    Args:
        scores: One function per tensor; any floating dtypes and devices, mixed as they come, any
            shape. -inf is pruned first, inf last; +0.0 and -0.0 are equal.
        k: How many entries to prune, from 0 to the total number of entries.
        gather: Where each process holds a part of every tensor, and gives the scores of its parts,
            joins what all of them found: a sample, counts and the few scores in the bracket.

    Raises:
        ValueError: If `k` is out of range, or a score is NaN (not looked for when `k` is 0).

    Example:
        >>> a, b = torch.tensor([0.3, 0.1, 0.4]), torch.tensor([[0.2, 0.4]])
        >>> find_threshold([lambda: a, lambda: b], k=2).ties
        0
        >>> find_threshold([lambda: a, lambda: b], k=4).ties  # of the two 0.4, the first goes too
        1
    """
    if k == 0:
        return Threshold(-math.inf, 0)
    generator = torch.Generator().manual_seed(0)  # private: the user's random state stays
    drawn = [_sample(score, generator) for score in scores]
    total = int(gather(_integers(sum(numel for _, numel in drawn))).sum())
    if not 0 < k <= total:
        raise ValueError(
            f"`k` is expected to be from 0 to {total}, the number of scores, but {k} came; "
            "prune no more entries than there are"
        )
    sample = gather(_join([sample for sample, _ in drawn]))
    rank = k / total * sample.numel()
    slack = 3 * math.sqrt(rank * (1 - k / total)) + 3  # three standard deviations

    # The value sought, the score number k counted from 0, is in [floor, ceil] throughout; `below`
    # scores are less than floor.
    floor, ceil, below = -math.inf, math.inf, 0
    while True:
        lo = max(floor, _order_statistic(sample, math.floor(rank - slack)))
        hi = min(ceil, _order_statistic(sample, math.ceil(rank + slack)))
        at_most_lo, at_least_hi, inside = _count(scores, lo, hi, gather)
        if inside.isnan().any():
            raise ValueError("`scores` are expected without NaN, but NaN came; find its weights")
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
def keep_masks(scores: Sequence[Scores], threshold: Threshold) -> Iterator[Tensor]:
    """Make the masks, one tensor at a time, that prune what `threshold` says.

    Args:
        scores: The functions `threshold` was found for, in the same order.
        threshold: What `find_threshold` returned.

    Yields:
        For each tensor a bool tensor of its shape, device and memory layout, True = keep.

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
def keep_parts(
    scores: Sequence[Scores], threshold: Threshold, gather: Gather, rank: int
) -> Iterator[Tensor]:
    """Do `keep_masks` where each process holds a part of every tensor.

    Args:
        scores: The functions `threshold` was found for: those of this process's parts.
        threshold: What `find_threshold` returned.
        gather: What `find_threshold` got, joining in the order of the parts in the whole tensor.
        rank: Where this process stands in that order, from 0.

    Yields:
        For each part a bool tensor, True = keep.
    """
    value, left = threshold.value, threshold.ties
    for score in scores:
        function, tensors = _parts(score)
        score = Elementwise(function, *tensors)  # so that whole scores are made once
        mine = 0
        if left:
            at_most, at_least, _ = _count_one(score, value, value)
            ties = gather(_integers(at_most + at_least - tensors[0].numel()))
            mine = max(0, left - int(ties[:rank].sum()))
            left = max(0, left - int(ties.sum()))
        yield _keep(score, value, mine)[0]


def _sample(score: Scores, generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw one random entry of every `_STRIDE`; also say how many entries there are in all."""
    function, tensors = _parts(score)
    numel = tensors[0].numel()
    drawn = torch.arange(0, numel, _STRIDE, device="cpu")
    drawn += torch.randint(_STRIDE, drawn.shape, generator=generator, device="cpu")
    drawn = drawn[drawn < numel]  # so that a small tensor counts no more than its share
    return _wide(function(*(t.take(drawn.to(t.device)) for t in tensors))), numel


def _count(
    scores: Sequence[Scores], lo: float, hi: float, gather: Gather
) -> tuple[int, int, Tensor]:
    """Count the scores <= lo and those >= hi, and collect the others, NaN among them."""
    at_most_lo = at_least_hi = 0
    inside = []
    for score in scores:
        lows, highs, between = _count_one(score, lo, hi)
        at_most_lo += lows
        at_least_hi += highs
        inside += between
    counts = gather(_integers(at_most_lo, at_least_hi)).view(-1, 2).sum(0).tolist()
    return counts[0], counts[1], gather(_join(inside))


def _count_one(score: Scores, lo: float, hi: float) -> tuple[int, int, list[Tensor]]:
    """Do `_count` for one tensor, whose scores are let go of before the next are made."""
    at_most_lo, at_least_hi, inside, flags = 0, 0, [], None
    function, tensors = _parts(score)
    for pieces in _cut(*tensors):
        x = _wide(function(*pieces)).reshape(-1)
        if flags is None:  # once, for the first piece is the largest: fresh memory is slow
            flags = x.new_empty(2, x.numel())
        outside, above = flags[:, : x.numel()].unbind()
        # Comparing into floats is four times as fast on a CPU as comparing into bools.
        torch.le(x, _round_down(lo, x.dtype), out=outside)
        torch.ge(x, _round_up(hi, x.dtype), out=above)
        at_most_lo += int(outside.sum())
        at_least_hi += int(above.sum())
        inside.append(_where_zero(outside.add_(above), x))
    return at_most_lo, at_least_hi, inside


def _where_zero(flags: Tensor, x: Tensor) -> Tensor:
    """Select the entries of `x`, few, where `flags`, none negative, is zero."""
    if x.numel() % _COLUMNS == 0:  # most columns have no zero: drop them before the slow selection
        flags, x = flags.view(_COLUMNS, -1), x.view(_COLUMNS, -1)
        columns = (flags.amin(0) == 0).nonzero().squeeze(1)
        flags, x = flags.index_select(1, columns), x.index_select(1, columns)
    return x[flags == 0]


@_one_thread()
def _keep(score: Scores, value: float, ties: int) -> tuple[Tensor, int]:
    """Mask one tensor, pruning the first `ties` of its ties; also say how many ties are left."""
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
    """Split into an elementwise function and the tensors it is to be applied to."""
    if isinstance(score, Elementwise):
        return partial(score.func, **score.keywords), score.args
    return (lambda x: x), (score(),)


def _cut(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike into views of at most a chunk, in row-major order."""
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
    """Widen half precision to float32, exactly: it is compared faster, and counts further."""
    return scores.float() if scores.itemsize < 4 else scores


def _integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device="cpu")


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Join a few collected scores on one device, in the widest dtype among them."""
    return torch.cat([t.to(tensors[0].device) for t in tensors])


def _order_statistic(values: Tensor, index: int) -> float:
    """Return the value that stands at `index` once sorted; infinite beyond either end."""
    if index < 0:
        return -math.inf
    if index >= values.numel():
        return math.inf
    # Not kthvalue, which takes quadratic time on descending values, and on CUDA is slow on any.
    return float(values.topk(index + 1, largest=False, sorted=False).values.max())


def _round_down(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of `dtype` that is at most `value`.

    A float32 tensor compared with a number is compared with the nearest float32, which may lie on
    the wrong side of it. Of float32 scores s, s <= value is exactly s <= _round_down(value).
    """
    near = torch.tensor(value, dtype=dtype)
    if float(near) > value:
        near = torch.nextafter(near, torch.tensor(-math.inf, dtype=dtype))
    return float(near)


def _round_up(value: float, dtype: torch.dtype) -> float:
    """Return the smallest number of `dtype` that is at least `value`."""
    return -_round_down(-value, dtype)
