"""Cut what a convolution computes into tiles that there are kernels for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import Integers
from pruneflow.deploy.runtime.plans import MAX_ROWS, TILE_SIZES


def best_shape(rows: int, columns: int, max_sums: int, *, side_by_side: bool) -> tuple[int, int]:
    """The size of tiles that a rectangle is best cut into.

    Args:
        rows: Of the rectangle.
        columns: Of the rectangle.
        max_sums: The most that a tile may have of rows times columns.
        side_by_side: Whether a tile may have more than one column.
    """
    shapes = [
        (height, width)
        for height in TILE_SIZES
        for width in (TILE_SIZES if side_by_side else (1,))
        if height * width <= max_sums
    ]
    return min(shapes, key=lambda each: _cycles(rows, columns, each))


def cut_rectangle(
    rows: list[tuple[int, int]], columns: int, shape: tuple[int, int]
) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """Rows, the first column and the number of columns of each tile of a rectangle."""
    at = 0
    for height in cut(len(rows), shape[0]):
        left = 0
        for width in cut(columns, shape[1]):
            yield rows[at : at + height], left, width
            left += width
        at += height


def cut(count: int, most: int) -> list[int]:
    """Parts of sizes that there are kernels for.

    Example:
        >>> cut(12, most=6), cut(5, most=8)
        ([6, 6], [4, 1])
    """
    parts = []
    for size in TILE_SIZES:
        if size <= most:
            parts += [size] * (count // size)
            count %= size
    return parts


def tile(columns: int, weights: int, rows: list[tuple[int, int]]) -> tuple[Any, ...]:
    """The fields of `TILE`.

    Args:
        columns: Vectors side by side.
        weights: Number of the list of weights that it multiplies by.
        rows: For each, where its first column begins in the input and in the output.
    """
    rest = [0] * (MAX_ROWS - len(rows))
    reads, writes = zip(*rows, strict=True)
    return len(rows), columns, weights, [*reads, *rest], [*writes, *rest]


def runs(grid: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Indices of neighbouring rows that are equal."""
    changes = 1 + np.flatnonzero(np.any(grid[1:] != grid[:-1], axis=1))
    return np.split(np.arange(len(grid)), changes)


def is_identity(table: Integers) -> bool:
    """Whether each position reads just its own pixel, hence needs no panel."""
    return len(table) <= 1 and bool(np.all(table == np.arange(table.shape[1])))


def bases(table: Integers, vector: int, lanes: int) -> Integers:
    """For each tap and vector of positions, the least pixel; -1 if the others lie far from it."""
    vectors = table.reshape(len(table), -1, vector)
    last = vectors.max(2)
    first = np.where(vectors < 0, np.iinfo(np.int32).max, vectors).min(2)
    first = np.minimum(first, last)  # -1 where all is padding
    return np.where(last - first < 4 * lanes, first, -1).astype(np.int32)


def _cycles(rows: int, columns: int, shape: tuple[int, int]) -> float:
    """Of one weight: half a cycle for each vector of a tile, and what each weight costs besides."""
    return sum(
        height * width / 2 + 1.5
        for height in cut(rows, shape[0])
        for width in cut(columns, shape[1])
    )
