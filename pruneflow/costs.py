"""Cost: what each weight costs, so that a target counts multiply-adds or time, not weights."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruneflow.channels.analysis import evaluating
from pruneflow.parameters import locate
from pruneflow.sparsity import COUNTED, multiply_adds_per_module

Costs = Callable[[nn.Module, Tensor], Mapping[str, float]]


def multiply_adds(model: nn.Module, example_input: Tensor) -> dict[str, float]:
    """How many multiply-adds each weight of a convolution or Linear takes part in.

    That is how often it is used in one forward pass, on as many places of an image: in early layers
    often, in late ones rarely.

    Args:
        model: The model; run once in evaluation mode.
        example_input: A batch of what it takes.

    Returns:
        Qualified name -> multiply-adds of each weight of that tensor.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> multiply_adds(model, torch.zeros(1, 1, 4, 4))
        {'0.weight': 16.0, '2.weight': 1.0}
    """
    return _per_weight(model, multiply_adds_per_module(model, example_input))


def latency(model: nn.Module, example_input: Tensor, *, repeats: int = 20) -> dict[str, float]:
    """How many seconds each weight of a convolution or Linear takes, measured here and now.

    A layer's time, the median of its runs in the dense model as PyTorch executes it, is shared out
    among its weights. It stands for what the layer would save, not for what is saved: measure that
    on the result.

    Args:
        model: The model; run in evaluation mode.
        example_input: A batch of what it takes, of the size and on the device to be fast on.
        repeats: Runs, after two that do not count.

    Returns:
        Qualified name -> seconds per weight of that tensor.

    Example:
        >>> costs = latency(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(8, 64))
        >>> list(costs), costs["0.weight"] > 0
        (['0.weight'], True)
    """
    model = getattr(model, "_orig_mod", model)  # hooks would make torch.compile start over
    seconds: dict[str, list[float]] = defaultdict(list)
    began: dict[str, float] = {}

    def now() -> float:
        if example_input.is_cuda:
            torch.cuda.synchronize(example_input.device)
        return time.perf_counter()

    def begin(name: str, *_: Any) -> None:
        began[name] = now()

    def end(name: str, *_: Any) -> None:
        seconds[name].append(now() - began[name])

    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, COUNTED):
                handles.append(module.register_forward_pre_hook(partial(begin, name)))
                handles.append(module.register_forward_hook(partial(end, name)))
        with evaluating(model, example_input):
            for _ in range(2 + repeats):
                model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    runs = {name: len(times) // (2 + repeats) for name, times in seconds.items()}
    medians = {name: statistics.median(t[2 * runs[name] :]) for name, t in seconds.items()}
    return _per_weight(model, {name: runs[name] * median for name, median in medians.items()})


def _per_weight(model: nn.Module, per_module: Mapping[str, float]) -> dict[str, float]:
    prefixes = {module: name for name, module in model.named_modules()}
    costs = {}
    for name, slot in locate(model).items():
        if isinstance(slot.module, COUNTED) and slot.attribute == "weight":
            modules = [slot.module, *(module for _, module, _ in slot.others)]
            total = sum(per_module.get(prefixes[module], 0) for module in modules)
            costs[name] = total / slot.parameter.numel()
    return costs
