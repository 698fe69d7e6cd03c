"""Blocks of a weight seen as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruneflow.pruning.granularity.units import Units
from pruneflow.pruning.schedules import whole_number


@dataclass(frozen=True)
class Block:
    """Keep or remove blocks of a weight seen as a matrix, outputs x everything else.

    Rounds remove the blocks with the lowest mean score, as few as reach the target. As with single
    weights, nothing keeps the last one: a tensor with low scores may lose all of them to a high
    target, and with scope `"layer"` one that is a single block goes at any target. The report names
    what nothing is left of; `exclude` such tensors, or take smaller blocks.

    Args:
        rows: Rows of a block; at the edges of a matrix blocks may be smaller.
        columns: Columns of a block; None for whole rows, which are filters.

    Raises:
        ValueError: If a size is less than 1.

    Example:
        >>> from pruneflow import compute_masks, magnitude
        >>> weights = {"weight": torch.tensor([[4.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]])}
        >>> compute_masks(weights, 0.5, importance=magnitude, granularity=Block(1, 2))["weight"]
        tensor([[ True,  True,  True,  True],
                [False, False, False, False]])
    """

    rows: int = 1
    columns: int | None = None

    def __post_init__(self) -> None:
        rows, columns = whole_number(self.rows), whole_number(self.columns)
        if (rows or 0) < 1 or (self.columns is not None and (columns or 0) < 1):
            raise ValueError(
                f"`rows` and `columns` must be whole numbers of at least 1, got {self}; give "
                "columns=None for whole rows"
            )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    def units(self, shapes: Mapping[str, torch.Size]) -> Units:
        """The blocks of tensors of these shapes."""
        return Blocks(self.rows, self.columns, shapes)


class Blocks:
    """The blocks of some tensors.

    Args:
        rows: Of a block.
        columns: Of a block; None for whole rows.
        shapes: Of the tensors.
    """

    relative = False
    step = 1

    def __init__(self, rows: int, columns: int | None, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._block: dict[str, Tensor] = {}
        count = 0
        for name, shape in shapes.items():
            height, width = shape[:1].numel(), shape[1:].numel()
            wide = width if columns is None else columns
            row, column = torch.arange(height) // rows, torch.arange(width) // wide
            self._block[name] = count + row[:, None] * -(-width // wide) + column
            count += -(-height // rows) * -(-width // wide)
        self._count = count

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Per block the sum over its weights."""
        sums = torch.zeros(self._count, dtype=torch.float64)
        for name, block in self._block.items():
            values = entries(name).to("cpu", torch.float64)
            sums.index_add_(0, block.flatten(), values.flatten())
        return sums

    def order(self, scores: Tensor, scope: object) -> Tensor:
        """Lowest score first."""
        return scores.argsort(stable=True)

    def kept(self, order: Tensor, count: int) -> Tensor:
        """All but the first `count`."""
        kept = torch.ones(self._count, dtype=torch.bool)
        kept[order[:count]] = False
        return kept

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors."""
        return {name: kept[self._block[name]].reshape(s) for name, s in self._shapes.items()}
