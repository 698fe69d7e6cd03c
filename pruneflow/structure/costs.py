"""Costs per weight, so that targets can count multiply-adds or time instead of weights."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from pruneflow.errors import expect
from pruneflow.structure.parameters import Slot, locate, unwrap
from pruneflow.structure.running import Example, call, evaluating, tensors_in
from pruneflow.structure.sparsity import COUNTED, multiply_adds_by_weight


class Costs(dict[str, float]):
    """Cost per weight of each tensor, by qualified name.

    Args:
        costs: Qualified name -> cost of one weight of that tensor, in any unit.
        power: Penalty for expensive weights: single weights and blocks are ranked by
            score / cost^power. Of 0, 0.15, 0.25, 0.35, 0.5 and 0.75, the value 0.25 gave the best
            accuracy for ResNet-18 on CIFAR-10 at 5 % and 10 % of its multiply-adds
            (`recipes/results/resnet18_cifar10_compute_aware`); from 0.5 on the first layers
            collapse.

    Raises:
        TypeError: If `costs` is not a mapping.
        ValueError: If a cost is not a number, or `power` is negative.

    Example:
        >>> Costs({"conv.weight": 64, "fc.weight": 1})
        Costs({'conv.weight': 64.0, 'fc.weight': 1.0}, power=0.25)
    """

    def __init__(self, costs: Mapping[str, float], power: float | None = None) -> None:
        mapped = isinstance(costs, Mapping)
        remedy = "try multiply_adds"
        expect(
            mapped, "costs", "map qualified names to numbers", repr(costs), remedy, error=TypeError
        )
        numbers = {str(name): _to_float(cost) for name, cost in costs.items()}
        wrong = ", ".join(f"{costs[n]!r} for {n}" for n, c in numbers.items() if math.isnan(c))
        remedy = "give the cost of one weight of the tensor, such as 9.0"
        expect(not wrong, "costs", "be numbers", wrong, remedy)
        super().__init__(numbers)
        if power is None:
            power = getattr(costs, "power", 0.25)
        valid = 0 <= _to_float(power) < math.inf
        expect(valid, "power", "be a number of at least 0", repr(power), "try 0.25")
        self.power = _to_float(power)

    def __repr__(self) -> str:
        return f"Costs({super().__repr__()}, power={self.power})"

    def of(self, names: Iterable[str]) -> Costs:
        """The costs of these tensors.

        Raises:
            ValueError: Names the tensors without a cost.
        """
        missing = ", ".join(name for name in names if not 0 < self.get(name, 0) < math.inf)
        expect(
            not missing,
            "costs",
            "have a number above 0 for each tensor to prune",
            f"none for {missing}",
            "add them, or `exclude` the tensors",
        )
        return Costs({name: self[name] for name in names}, self.power)


CostFunction = Callable[[nn.Module, Example], Mapping[str, float]]


def _to_float(number: Any) -> float:
    scalar = isinstance(number, Real) or getattr(number, "ndim", None) == 0  # NumPy or PyTorch
    return float(number) if scalar else math.nan


def multiply_adds(model: nn.Module, example_input: Example, *, power: float = 0.25) -> Costs:
    """Multiply-adds per weight in one forward pass.

    A convolution uses each weight once per output position, so weights of early layers, with large
    feature maps, cost the most.

    Args:
        model: The model; it is run once in evaluation mode.
        example_input: An input batch: a tensor, a tuple of positional arguments or a dict of
            keyword arguments.
        power: See `Costs`.

    Returns:
        Qualified name -> multiply-adds per weight of that tensor.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> multiply_adds(model, torch.zeros(1, 1, 4, 4))
        Costs({'0.weight': 16.0, '2.weight': 1.0}, power=0.25)
    """
    _, counts = multiply_adds_by_weight(model, example_input)
    return Costs(
        {
            name: counts.get(name, 0) / slot.parameter.numel()
            for name, slot in locate(model).items()
            if name in counts or _is_counted(slot)
        },
        power,
    )


def latency(
    model: nn.Module, example_input: Example, *, repeats: int = 20, power: float = 0.25
) -> Costs:
    """Seconds per weight of each convolution and Linear layer, measured on this machine.

    The time of a layer is its median over several runs of the dense model in PyTorch, divided
    evenly among its weights. This is an estimate of what pruning the layer could save; measure the
    pruned model to see what it did save.

    Args:
        model: The model; it is run in evaluation mode.
        example_input: An input batch of the size and on the device to optimise for: a tensor, a
            tuple of positional arguments or a dict of keyword arguments.
        repeats: Number of timed runs, after two warm-up runs.
        power: See `Costs`.

    Returns:
        Qualified name -> seconds per weight of that tensor.

    Example:
        >>> costs = latency(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(8, 64))
        >>> list(costs), costs["0.weight"] > 0
        (['0.weight'], True)
    """
    model = unwrap(model)  # hooks would make torch.compile recompile
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

    with evaluating(model, example_input):  # removes the hooks at the end
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
    return Costs(costs, power)


def _median(seconds: Sequence[float], passes: int) -> float:
    """Median seconds of a call, without those of the first two passes."""
    calls = len(seconds) // passes
    return calls * statistics.median(seconds[2 * calls :]) if calls else 0.0


def _is_counted(slot: Slot) -> bool:
    return isinstance(slot.module, COUNTED) and slot.attribute == "weight"
