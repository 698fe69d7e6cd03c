"""Measure: exact zeros per tensor, compression ratio, theoretical speed-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruneflow.channels.analysis import evaluating
from pruneflow.parameters import Pattern, Slot, select
from pruneflow.processes import whole

COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers whose multiply-adds are those of their weights."""


@dataclass(frozen=True)
class LayerSparsity:
    """Exact zeros of one tensor.

    Args:
        name: Qualified name.
        shape: Its shape.
        weights: Number of entries.
        zeros: How many of them are exactly zero.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsity_report` measured; printing it gives a table.

    Args:
        layers: The prunable tensors.
        dense: Other trained tensors of two or more dimensions, which are not counted.
        parameters: All parameters of the model, biases and normalisation included.
        multiply_adds: Those of one forward pass of the dense model; None without an input.
        remaining_multiply_adds: Those that do not multiply by a pruned weight.
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int
    multiply_adds: int | None = None
    remaining_multiply_adds: int | None = None
    dense: tuple[LayerSparsity, ...] = ()

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Exact zeros among the prunable weights."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros among the prunable weights."""
        return self.zeros / self.weights

    @property
    def remaining(self) -> int:
        """All parameters but the zeros among the prunable weights and the other trained tensors."""
        return self.parameters - self.zeros - sum(layer.zeros for layer in self.dense)

    @property
    def compression_ratio(self) -> float:
        """Original / remaining parameters, of the whole model."""
        return self.parameters / self.remaining if self.remaining else float("inf")

    @property
    def theoretical_speedup(self) -> float | None:
        """Original / remaining multiply-adds; None without an input."""
        if self.multiply_adds is None or not self.remaining_multiply_adds:
            return None
        return self.multiply_adds / self.remaining_multiply_adds

    def __str__(self) -> str:
        rows = [("tensor", "shape", "weights", "kept", "sparsity")]
        for layer in (*self.layers, LayerSparsity("total", (), self.weights, self.zeros)):
            shape = "x".join(map(str, layer.shape))
            kept = f"{layer.weights - layer.zeros:,}"
            rows.append((layer.name, shape, f"{layer.weights:,}", kept, f"{layer.sparsity:.2%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if self.dense:
            others = ", ".join(
                f"{layer.name} ({layer.weights / self.parameters:.1%} of all parameters, "
                f"{layer.sparsity:.2%} zeros)"
                for layer in self.dense
            )
            lines.append(f"Not counted: {others}")
        lines.append(
            f"{self.remaining:,} of {self.parameters:,} parameters remain: "
            f"compression ratio {self.compression_ratio:.2f}"
        )
        if self.theoretical_speedup is not None:
            lines.append(
                f"{self.remaining_multiply_adds:,} of {self.multiply_adds:,} multiply-adds remain: "
                f"theoretical speed-up {self.theoretical_speedup:.2f}"
            )
        return "\n".join(lines)


def sparsity(
    model: nn.Module,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> float:
    """Fraction of exact zeros among the prunable weights.

    Args:
        model: The model.
        include: See `parameters.select`.
        exclude: See `parameters.select`.

    Warns:
        UserWarning: If more than a tenth of all parameters is not counted, though neither `include`
            nor `exclude` speaks of it.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))
        >>> sparsity(layer)
        0.5
    """
    return sparsity_report(model, include=include, exclude=exclude).sparsity


@torch.no_grad()
def sparsity_report(
    model: nn.Module,
    example_input: Tensor | None = None,
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> SparsityReport:
    """Count exact zeros, and with an input the multiply-adds, as Blalock et al. ask.

    Frozen tensors, such as a teacher's, do not count, unless everything is frozen. Trained tensors
    of two or more dimensions that are not prunable are listed as not counted, in `dense`.

    A multiply-add is saved where a `Linear` or convolution multiplies by a zero weight; those of
    recurrent and attention layers' own kernels are counted as dense.

    Args:
        model: The model; run once in evaluation mode when there is an input.
        example_input: A batch of one, to count multiply-adds with.
        include: See `parameters.select`.
        exclude: See `parameters.select`.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))
        >>> print(sparsity_report(layer, torch.ones(1, 4)))
        tensor  shape  weights  kept  sparsity
        weight    1x4        4     2    50.00%
        total                4     2    50.00%
        3 of 5 parameters remain: compression ratio 1.67
        2 of 4 multiply-adds remain: theoretical speed-up 2.00

    References:
        Blalock et al. 2020, "What is the State of Neural Network Pruning?",
        https://arxiv.org/abs/2003.03033.
    """
    selection = select(model, include, exclude)
    selection.warn_overlooked()
    slots = selection.slots or selection.frozen
    layers, dense = _count_zeros(slots), _count_zeros(selection.dense)
    if example_input is None:
        return SparsityReport(layers, selection.parameters, dense=dense)
    per_module = multiply_adds_per_module(model, example_input)
    prefixes = {module: name for name, module in model.named_modules()}
    saved = 0.0
    for layer, slot in zip(layers, slots.values(), strict=True):
        if isinstance(slot.module, COUNTED) and slot.attribute == "weight":
            saved += layer.sparsity * per_module.get(prefixes[slot.module], 0)
    total = per_module[""]
    return SparsityReport(layers, selection.parameters, total, total - round(saved), dense)


def _count_zeros(slots: Mapping[str, Slot]) -> tuple[LayerSparsity, ...]:
    return tuple(
        LayerSparsity(name, tuple(weight.shape), weight.numel(), int(whole((weight == 0).sum())))
        for name, weight in ((name, slot.weight) for name, slot in slots.items())
    )


def multiply_adds_per_module(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Multiply-adds of one forward pass by module; those of the whole model under `""`.

    Example:
        >>> multiply_adds_per_module(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
        {'0': 6, '': 6}
    """
    with evaluating(model, example_input), FlopCounterMode(display=False) as counter:
        model(example_input)
    # PyTorch names modules from the class of the root ("ResNet.layer1.0.conv1") and counts a
    # multiply-add as two operations.
    root = type(model).__name__
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    modules = {
        name.removeprefix(root).removeprefix("."): count
        for name, count in counts.items()
        if name not in ("Global", root)
    }
    return {**modules, "": counts.get("Global", 0)}
