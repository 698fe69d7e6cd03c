"""Learning-rate schedules over a given number of epochs, stepped once an epoch.

Each is a closed form: the learning rate in epoch t, counted from 0, is the optimizer's own times
factor(t). So the optimizer's `lr` is always the highest rate, and a scheduler can be put at any
epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def constant(optimizer: Optimizer, epochs: int) -> LRScheduler:
    """Keep the learning rate.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule; there so that every schedule takes it.
    """
    _check_epochs(epochs)
    return LambdaLR(optimizer, lambda epoch: 1.0)


def multistep(
    optimizer: Optimizer,
    epochs: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LRScheduler:
    """Multiply the learning rate by gamma at each milestone: gamma^(milestones passed).

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        milestones: Fractions of `epochs` in (0, 1).
        gamma: Factor at each.

    Raises:
        ValueError: If a milestone is not a fraction.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
        >>> scheduler = multistep(optimizer, epochs=4, gamma=0.5)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates += scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.8, 0.8, 0.4, 0.2]
    """
    _check_epochs(epochs)
    for milestone in milestones:
        if not 0 < milestone < 1:
            raise ValueError(
                f"`milestones` are expected to be fractions of the epochs in (0, 1), but "
                f"{milestone} came; divide it by the number of epochs"
            )
    return LambdaLR(optimizer, lambda epoch: gamma ** sum(epoch >= m * epochs for m in milestones))


def cosine(optimizer: Optimizer, epochs: int, warmup_epochs: int = 0) -> LRScheduler:
    """Warm up linearly, then fall as half a cosine (Loshchilov & Hutter 2017, without restarts).

    factor(t) = (t+1)/(w+1) for t < w, then (1 + cos(π (t-w)/(epochs-w)))/2, with w `warmup_epochs`.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        warmup_epochs: How many of them warm up.

    Raises:
        ValueError: If the warm-up takes all epochs.
    """
    _check_epochs(epochs)
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"`warmup_epochs` is expected in [0, {epochs}), as there are {epochs} epochs, but "
            f"{warmup_epochs} came; warm up less or train longer"
        )

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        return _half_cosine((epoch - warmup_epochs) / (epochs - warmup_epochs))

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: Optimizer, epochs: int, peak: float = 0.3) -> LRScheduler:
    """Rise from 1/25 of the learning rate to all of it, then fall to nought (Smith & Topin 2018).

    Both ways are half cosines and meet in epoch floor(`peak` epochs); momentum is left alone.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        peak: Fraction of the epochs after which the learning rate is highest, in [0, 1).

    Raises:
        ValueError: If `peak` is out of range.
    """
    _check_epochs(epochs)
    if not 0 <= peak < 1:
        raise ValueError(
            f"`peak` is expected to be a fraction of the epochs in [0, 1), but {peak} came; "
            "0.3 is usual"
        )
    top = math.floor(peak * epochs)

    def factor(epoch: int) -> float:
        if epoch < top:
            return 1 - 24 / 25 * _half_cosine(epoch / top)
        return _half_cosine((epoch - top) / (epochs - top))

    return LambdaLR(optimizer, factor)


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1 and beyond."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise ValueError(
            f"`epochs` is expected to be at least 1, but {epochs} came; give the phase's epochs"
        )
