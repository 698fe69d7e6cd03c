"""Pack the surviving weights of a layer as the kernels read them; see kernels/runtime.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import Convolution, Integers


class Survivors:
    """Weights that are not zero and whose tap is ever on a pixel of the input.

    Attributes:
        output: Output channel of each.
        channel: Input channel of each, of all groups.
        tap: Of each.
        weight: The values.
    """

    def __init__(self, layer: Convolution) -> None:
        output, channel, tap = layer.weight.coordinates
        reached: npt.NDArray[Any] = np.any(layer.window.table >= 0, axis=1)[tap]
        outputs, inputs = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
        self.output, self.tap = output[reached], tap[reached]
        self.channel = channel[reached] + self.output // outputs * inputs
        self.weight = layer.weight.values[reached]

    def select(self, index: npt.NDArray[Any], chosen: npt.NDArray[Any]) -> tuple[Any, ...]:
        """Output channel, index and value of those that are chosen, a list for `pack`."""
        return self.output[chosen], index[chosen], self.weight[chosen]


def pack(
    lists: Sequence[tuple[Any, ...]], group: int, order: Integers, cuts: npt.NDArray[Any]
) -> tuple[Integers, Integers]:
    """Pack lists of weights by groups of output channels.

    Args:
        lists: Output channels, indices and values of the weights, of each list.
        group: Channels in a group.
        order: Of the groups.
        cuts: Where the second and each following range of the indices begins.

    Returns:
        Entries, which are an index and the bits of `group` weights each; and where the entries of a
        group begin, `[list][range][group]`.
    """
    blocks, groups = len(cuts) + 1, len(order)
    rank = np.argsort(order)
    entries, pointers, begin = [], [], 0
    for output, index, weight in lists:
        span = int(index.max(initial=0)) + 1
        segment = np.searchsorted(cuts, index, side="right") * groups + rank[output // group]
        keys, entry = np.unique(segment * span + index, return_inverse=True)
        packed = np.zeros((len(keys), 1 + group), np.float32)
        packed[entry, 1 + output % group] = weight
        packed = packed.view(np.int32)
        packed[:, 0] = keys % span
        starts = np.arange(blocks)[:, None] * groups + np.arange(groups + 1)
        pointers.append(begin + np.searchsorted(keys // span, starts))
        entries.append(packed)
        begin += len(packed)
    return np.concatenate(entries), np.stack(pointers).astype(np.int32)


def pack_matrix(
    row: npt.NDArray[Any],
    address: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    order: npt.NDArray[Any],
    lanes: int,
) -> tuple[Integers, Integers]:
    """Pack a sparse matrix by groups of rows that are about as long.

    Args:
        row: Of each weight.
        address: Of the input that each weight is multiplied by.
        weight: The values.
        order: Of the rows, such that within a group of them no longer one follows a shorter one.
        lanes: Rows in a group.

    Returns:
        Entries; and where those of each group begin, and the last end.

    Example:
        >>> row, address, weight = np.array([0, 1, 1]), np.array([7, 8, 9]), np.zeros(3)
        >>> entries, pointer = pack_matrix(row, address, weight, np.array([1, 0, 2]), lanes=2)
        >>> entries.tolist(), pointer.tolist()
        ([2, 8, 7, 0, 0, 1, 9, 0], [0, 8, 8])
    """
    rows = len(order)
    rank = np.empty_like(order)
    rank[order] = np.arange(rows)
    by_row = np.lexsort((address, row))
    row, address, weight = row[by_row], address[by_row], weight[by_row]
    turn = np.arange(len(row)) - np.searchsorted(row, row)  # 0 for the first of its row, and so on
    group, lane = np.divmod(rank[row], lanes)
    # In each turn of a group, the rows that are long enough take part: its first ones.
    turns, part, present = np.unique(
        group * (turn.max(initial=0) + 1) + turn, return_inverse=True, return_counts=True
    )
    begin = np.append(0, np.cumsum(1 + 2 * present))
    entries = np.zeros(begin[-1], np.int32)
    entries[begin[:-1]] = present
    entries[begin[part] + 1 + lane] = address
    entries[begin[part] + 1 + present[part] + lane] = weight.astype(np.float32).view(np.int32)
    groups = np.arange(-(-rows // lanes) + 1)
    pointer = begin[np.searchsorted(turns // (turn.max(initial=0) + 1), groups)]
    return entries, pointer.astype(np.int32)


def order_in_shares(
    sizes: npt.NDArray[Any], shares: int, unit: int
) -> tuple[npt.NDArray[np.int64], Integers]:
    """Share out neighbours between threads, and sort each share by size.

    Args:
        sizes: Of what is shared out, or all negative: then the largest come first.
        shares: How many.
        unit: How many neighbours stay together.

    Returns:
        The order; and where in it each share begins, and the last ends.

    Example:
        >>> order, split = order_in_shares(np.array([9, 1, 5, 6, 2, 3]), shares=2, unit=1)
        >>> order.tolist(), split.tolist()
        ([1, 2, 0, 4, 5, 3], [0, 3, 6])
    """
    loads = np.append(0, np.cumsum(np.abs(sizes) + 4))  # those that are empty take time as well
    ends = np.searchsorted(loads, np.arange(1, shares) * loads[-1] / shares)
    split = np.array([0, *((ends + unit // 2) // unit * unit), len(sizes)]).clip(max=len(sizes))
    share = np.searchsorted(split[1:-1], np.arange(len(sizes)), side="right")
    return np.lexsort((sizes, share)), split.astype(np.int32)
