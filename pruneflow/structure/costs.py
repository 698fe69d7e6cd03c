"""Cost: what each weight costs, so that a target counts multiply-adds or time, not weights."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pruneflow.structure.parameters import Slot, locate, unwrap
from pruneflow.structure.running import Example, call, evaluating, tensors_in
from pruneflow.structure.sparsity import COUNTED, multiply_adds_by_weight

Costs = Callable[[nn.Module, Example], Mapping[str, float]]


def multiply_adds(model: nn.Module, example_input: Example) -> dict[str, float]:
    """How many multiply-adds each weight takes part in: of convolutions, Linear, or other layers.

    That is how often it is used in one forward pass, on as many places of an image: in early layers
    often, in late ones rarely.

    Args:
        model: The model; run once in evaluation mode.
        example_input: A batch of what it takes: a tensor, a tuple of positional arguments or a dict
            of keyword arguments.

    Returns:
        Qualified name -> multiply-adds of each weight of that tensor.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> multiply_adds(model, torch.zeros(1, 1, 4, 4))
        {'0.weight': 16.0, '2.weight': 1.0}
    """
    _, counts = multiply_adds_by_weight(model, example_input)
    return {
        name: counts.get(name, 0) / slot.parameter.numel()
        for name, slot in locate(model).items()
        if name in counts or _is_counted(slot)
    }


def latency(model: nn.Module, example_input: Example, *, repeats: int = 20) -> dict[str, float]:
    """How many seconds each weight of a convolution or Linear takes, measured here and now.

    A layer's time, the median of its runs in the dense model as PyTorch executes it, is shared out
    among its weights. It stands for what the layer would save, not for what is saved: measure that
    on the result.

    Args:
        model: The model; run in evaluation mode.
        example_input: A batch of what it takes, of the size and on the device to be fast on: a
            tensor, a tuple of positional arguments or a dict of keyword arguments.
        repeats: Runs, after two that do not count.

    Returns:
        Qualified name -> seconds per weight of that tensor.

    Example:
        >>> costs = latency(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(8, 64))
        >>> list(costs), costs["0.weight"] > 0
        (['0.weight'], True)
    """
    model = unwrap(model)  # hooks would make torch.compile start over
    devices = {tensor.device for tensor in tensors_in(example_input) if tensor.is_cuda}
    seconds: dict[nn.Module, list[float]] = defaultdict(list)
    began: dict[nn.Module, float] = {}

    def now() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(module: nn.Module, *_: Any) -> None:
        began[module] = now()

    def end(module: nn.Module, *_: Any) -> None:
        seconds[module].append(now() - began[module])

    with evaluating(model, example_input):  # at the end of which the hooks are gone
        for module in model.modules():
            if isinstance(module, COUNTED):
                module.register_forward_pre_hook(begin)
                module.register_forward_hook(end)
        for _ in range(2 + repeats):
            call(model, example_input)
    costs = {}
    for name, slot in locate(model).items():
        if _is_counted(slot):
            modules = [slot.module, *(module for _, module, _ in slot.others)]
            total = sum(_median(seconds[module], 2 + repeats) for module in modules)
            costs[name] = total / slot.parameter.numel()
    return costs


def _median(seconds: Sequence[float], passes: int) -> float:
    """Of all passes but two, the seconds of a layer that is called as often in each."""
    calls = len(seconds) // passes
    return calls * statistics.median(seconds[2 * calls :]) if calls else 0.0


def _is_counted(slot: Slot) -> bool:
    return isinstance(slot.module, COUNTED) and slot.attribute == "weight"
