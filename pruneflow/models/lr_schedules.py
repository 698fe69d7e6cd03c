"""PyTorch's learning-rate schedules over a number of epochs, stepped after each optimizer step.

None of them exceeds the optimizer's `lr`. Their `state_dict`s are complete and contain builtins
only.
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

from pruneflow.errors import expect


def constant(optimizer: Optimizer, epochs: int, steps_per_epoch: int = 1) -> LRScheduler:
    """Keep the learning rate constant.

    Args:
        optimizer: The optimizer.
        epochs: Length of the schedule; not used, for a common signature.
        steps_per_epoch: Optimizer steps per epoch; 1 to step the schedule once per epoch.

    Raises:
        ValueError: If a length is below 1.
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
        optimizer: The optimizer.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps per epoch.
        milestones: Fractions of the schedule, in (0, 1).
        gamma: Factor at each milestone.

    Raises:
        ValueError: If a milestone is out of range.

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
    expected, remedy = "be fractions of the schedule in (0, 1)", "divide it by the number of epochs"
    for milestone in milestones:
        expect(0 < milestone < 1, "milestones", expected, milestone, remedy)
    return MultiStepLR(optimizer, [math.ceil(m * steps) for m in milestones], float(gamma))


def cosine(
    optimizer: Optimizer, epochs: int, steps_per_epoch: int = 1, warmup_epochs: int = 0
) -> LRScheduler:
    """Linear warm-up, then cosine annealing (Loshchilov & Hutter 2017, without restarts).

    At step t of n, with a warm-up of w steps, the learning rate is `lr` times (t+1)/(w+1) for
    t < w, and (1 + cos(π (t-w)/(n-w)))/2 afterwards.

    Args:
        optimizer: The optimizer.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps per epoch.
        warmup_epochs: Length of the warm-up, part of `epochs`.

    Raises:
        ValueError: If the warm-up takes all epochs.
    """
    steps = _steps(epochs, steps_per_epoch)
    valid, remedy = 0 <= warmup_epochs < epochs, "shorten the warm-up or train longer"
    expected = f"be in [0, {epochs}) for {epochs} epochs"
    expect(valid, "warmup_epochs", expected, warmup_epochs, remedy)
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
    """Increase the learning rate from `lr`/25 to `lr`, then decrease it to 0 (Smith & Topin 2018).

    Args:
        optimizer: The optimizer.
        epochs: Length of the schedule.
        steps_per_epoch: Optimizer steps per epoch.
        peak: Fraction of the schedule at which the learning rate is highest, in [0, 1).
        cycle_momentum: Decrease momentum (or Adam's first beta) from 0.95 to 0.85 while the
            learning rate increases, and vice versa; if False, it is constant.

    Raises:
        ValueError: If `peak` is out of range.
    """
    steps = _steps(epochs, steps_per_epoch)
    valid, expected = 0 <= peak < 1, "be a fraction of the schedule in [0, 1)"
    expect(valid, "peak", expected, peak, "0.3 is usual")
    peak = float(peak)
    if peak * steps == 1:  # PyTorch would divide by zero
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
        expect(value >= 1, name, "be at least 1", value, "use the value of the training")
    return int(epochs) * int(steps_per_epoch)
