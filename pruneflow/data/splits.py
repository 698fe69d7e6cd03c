"""Parts of a labelled set that have each class in proportion."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_split(labels: Tensor, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the indices of `labels` in two, each class in proportion to within one image.

    Args:
        labels: int64 (N,).
        size: What to hold out: a fraction in (0, 1), or a number of images.
        seed: Determines the split; no other random state is used.

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
    if not 0 < count < total:
        raise ValueError(
            f"`val_size` is expected to hold out between 1 and {total - 1} of the {total} images, "
            f"as a number or a fraction, but {size!r} came, which is {count}; 0.1 is usual"
        )
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    held_out = torch.zeros(total, dtype=torch.bool)
    held_out[by_class[(torch.arange(count) * total + total // 2) // count]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def spread(labels: Tensor) -> Tensor:
    """An order in which the first so many images, however many, have each class in proportion.

    Args:
        labels: int64 (N,).

    Returns:
        All indices of `labels`, int64; within a class they are shuffled, always alike.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[spread(labels)].tolist()
        [0, 1, 0, 0, 1, 0]
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first, own = counts.cumsum(0) - counts, labels[by_class]
    place = (torch.arange(len(labels)) - first[own] + 0.5) / counts[own]  # in its class, in (0, 1)
    return by_class[place.argsort(stable=True)]
