"""Stratified splits and orders of a labelled dataset."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneflow.errors import expect


def stratified_split(labels: Tensor, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the indices of `labels` in two, stratified by class to within one image.

    Args:
        labels: int64 (N,).
        size: Images to hold out: a fraction in (0, 1), or a number.
        seed: Seed of the split; no global random state is used.

    Returns:
        The indices kept and the indices held out, int64, both ascending.

    Raises:
        ValueError: If nothing or everything would be held out.

    Example:
        >>> kept, held_out = stratified_split(torch.tensor([0, 1] * 5), size=0.2, seed=0)
        >>> len(kept), torch.tensor([0, 1] * 5)[held_out].sort().values
        (8, tensor([0, 1]))
    """
    total = len(labels)
    count = round(size * total) if isinstance(size, float) else size
    expected = f"hold out between 1 and {total - 1} of {total} images, as a number or a fraction"
    expect(0 < count < total, "val_size", expected, f"{size} ({count} images)", "try 0.1")
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    held_out = torch.zeros(total, dtype=torch.bool)
    held_out[by_class[(torch.arange(count) * total + total // 2) // count]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def spread(labels: Tensor) -> Tensor:
    """Order images so that each class is spread evenly.

    Args:
        labels: int64 (N,).

    Returns:
        All indices of `labels`, int64, shuffled within each class in a fixed way.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[spread(labels)].tolist()
        [0, 1, 0, 0, 1, 0]
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first, label = counts.cumsum(0) - counts, labels[by_class]
    position = (torch.arange(len(labels)) - first[label] + 0.5) / counts[label]  # in its class
    return by_class[position.argsort(stable=True)]
