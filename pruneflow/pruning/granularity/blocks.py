"""Blocks of a weight seen as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruneflow.errors import expect
from pruneflow.pruning.distribution import Groups
from pruneflow.pruning.granularity.units import (
    Competition,
    Granularity,
    check_not_sharded,
    unit_masks,
)
from pruneflow.pruning.schedules import whole_number
from pruneflow.structure.costs import Costs


@dataclass(frozen=True)
class Block(Granularity):
    """Block pruning: keep or prune blocks of each weight as a matrix, outputs x everything else.

    A round prunes the fewest blocks, by mean score, that reach the target. As with single weights,
    all blocks of a tensor may be pruned: those of a tensor with low scores at a high target, or the
    only block of a tensor at any target with scope `"layer"`. The report lists such tensors;
    `exclude` them, or use smaller blocks.

    Args:
        rows: Rows of a block; blocks at the edges of a matrix may be smaller.
        columns: Columns of a block; None for whole rows, i.e. filters.

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
        expect(
            (rows or 0) >= 1 and (self.columns is None or (columns or 0) >= 1),
            "rows` and `columns",
            "be whole numbers of at least 1",
            self,
            "give columns=None for whole rows",
        )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    def check(self, tensors: Mapping[str, Tensor], groups: Groups, costs: Costs) -> None:
        """Check that no tensor is sharded.

        Raises:
            ValueError: Names the granularity.
        """
        check_not_sharded(self, tensors)

    def masks(self, competition: Competition) -> dict[str, Tensor]:
        """The masks of the tensors."""
        masks: dict[str, Tensor] = {}
        for names, sparsity in competition.groups:
            shapes = {name: competition.tensors[name].shape for name in names}
            blocks = _Blocks(self.rows, self.columns, shapes)
            masks |= unit_masks(blocks, competition, names, sparsity)
        return {name: masks[name] for name in competition.tensors}


class _Blocks:
    """The blocks of the tensors of a group.

    Args:
        rows: Rows of a block.
        columns: Columns of a block; None for whole rows.
        shapes: Shapes of the tensors.
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
        """Sum over the weights of each block."""
        sums = torch.zeros(self._count, dtype=torch.float64)
        for name, block in self._block.items():
            values = entries(name).to("cpu", torch.float64)
            sums.index_add_(0, block.flatten(), values.flatten())
        return sums

    def kept(self, order: Tensor, count: int) -> Tensor:
        """All blocks but the first `count`."""
        kept = torch.ones(self._count, dtype=torch.bool)
        kept[order[:count]] = False
        return kept

    def to_masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors."""
        return {name: kept[self._block[name]].reshape(s) for name, s in self._shapes.items()}
