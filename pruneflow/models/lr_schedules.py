"""PyTorch's learning-rate schedules over a number of epochs, stepped after each optimizer step.

The optimizer's own `lr` is never exceeded. All that a schedule goes by is in its
`state_dict`, as builtins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)


def constant(optimizer: Optimizer, epochs: int, steps_per_epoch: int = 1) -> LRScheduler:
    """Keep the learning rate.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule; there so that every schedule takes it.
        steps_per_epoch: Optimizer steps in an epoch; 1 for a schedule that is stepped once an
            epoch.
    """
    _steps(epochs, steps_per_epoch)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def multistep(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: int = 1,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LRScheduler:
    """Multiply the learning rate by `gamma` at each milestone.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps in an epoch.
        milestones: Fractions of the schedule, in (0, 1).
        gamma: Factor at each.

    Raises:
        ValueError: If a milestone is not a fraction.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
        >>> scheduler = multistep(optimizer, epochs=2, steps_per_epoch=2, gamma=0.5)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates += scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.8, 0.8, 0.4, 0.2]
    """
    steps = _steps(epochs, steps_per_epoch)
    for milestone in milestones:
        if not 0 < milestone < 1:
            raise ValueError(
                f"`milestones` are expected to be fractions of the schedule in (0, 1), but "
                f"{milestone} came; divide it by the number of epochs"
            )
    return MultiStepLR(optimizer, [math.ceil(m * steps) for m in milestones], float(gamma))


def cosine(
    optimizer: Optimizer, epochs: int, steps_per_epoch: int = 1, warmup_epochs: int = 0
) -> LRScheduler:
    """Warm up linearly, then fall as half a cosine (Loshchilov & Hutter 2017, without restarts).

    The rate of step t is `lr` times (t+1)/(w+1) for t < w, then (1 + cos(π (t-w)/(n-w)))/2, for a
    warm-up of w steps in a schedule of n.

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps in an epoch.
        warmup_epochs: How many of the epochs warm up.

    Raises:
        ValueError: If the warm-up takes all epochs.
    """
    steps = _steps(epochs, steps_per_epoch)
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"`warmup_epochs` is expected in [0, {epochs}), as there are {epochs} epochs, but "
            f"{warmup_epochs} came; warm up less or train longer"
        )
    warmup = int(float(warmup_epochs) * steps_per_epoch)
    if not warmup:
        return CosineAnnealingLR(optimizer, steps)
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, steps - warmup)
    return SequentialLR(optimizer, [rise, fall], [warmup])


def one_cycle(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: int = 1,
    peak: float = 0.3,
    cycle_momentum: bool = False,
) -> LRScheduler:
    """Rise from 1/25 of the learning rate to all of it, then fall to nought (Smith & Topin 2018).

    Args:
        optimizer: Whose learning rate.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps in an epoch.
        peak: Fraction of the schedule after which the learning rate is highest, in [0, 1).
        cycle_momentum: Let momentum (or Adam's first beta) fall from 0.95 to 0.85 while the
            learning rate rises, and rise again; otherwise it stays as it is.

    Raises:
        ValueError: If `peak` is out of range.
    """
    steps = _steps(epochs, steps_per_epoch)
    if not 0 <= peak < 1:
        raise ValueError(
            f"`peak` is expected to be a fraction of the schedule in [0, 1), but {peak} came; "
            "0.3 is usual"
        )
    peak = float(peak)
    if peak * steps == 1:  # PyTorch then divides by the steps before the peak, of which are none
        peak = 0.0
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=peak,
        cycle_momentum=cycle_momentum,
    )


def _steps(epochs: int, steps_per_epoch: int) -> int:
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value < 1:
            raise ValueError(
                f"`{name}` is expected to be at least 1, but {value} came; give that of the phase"
            )
    return int(epochs) * int(steps_per_epoch)
