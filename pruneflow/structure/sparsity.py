"""Measure exact zeros per tensor, compression ratio and theoretical speed-up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pruneflow.distributed import gather_full
from pruneflow.structure.parameters import Pattern, Slot, locate, select, unwrap
from pruneflow.structure.running import Example, call, evaluating

COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers whose multiply-adds are all with their weight."""


@dataclass(frozen=True)
class LayerSparsity:
    """Exact zeros of one tensor.

    Args:
        name: Qualified name.
        shape: Its shape.
        weights: Number of entries.
        zeros: Number of entries that are exactly zero.
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
    """The result of `sparsity_report`; printing it gives a table.

    Args:
        layers: The prunable tensors.
        parameters: Number of parameters of the model, including biases and normalisation.
        multiply_adds: Multiply-adds of one forward pass of the dense model; None without an input.
        remaining_multiply_adds: Those whose weight is not zero.
        dense: Other trained tensors of two or more dimensions, which are not counted.
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
        """Number of parameters without the zeros in `layers` and `dense`."""
        return self.parameters - self.zeros - sum(layer.zeros for layer in self.dense)

    @property
    def compression_ratio(self) -> float:
        """Original / remaining parameters of the whole model."""
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
        UserWarning: If more than a tenth of all parameters are not counted by default.

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
    example_input: Example | None = None,
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> SparsityReport:
    """Count exact zeros, and with an input also multiply-adds, as Blalock et al. recommend.

    Frozen tensors, such as a teacher's, are not counted unless all are frozen. Other trained
    tensors of two or more dimensions are not counted either, but listed in `dense`.

    A multiply-add is saved where an operation multiplies by a zero weight. Operations that PyTorch
    does not count, such as the kernels of recurrent layers, are left out.

    Args:
        model: The model; with an input it is run once in evaluation mode.
        example_input: A batch of one, to count multiply-adds: a tensor, a tuple of positional
            arguments or a dict of keyword arguments.
        include: See `parameters.select`.
        exclude: See `parameters.select`.

    Warns:
        UserWarning: If more than a tenth of all parameters are not counted by default.

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
    total, counts = multiply_adds_by_weight(model, example_input)
    saved = round(sum(layer.sparsity * counts.get(layer.name, 0) for layer in (*layers, *dense)))
    return SparsityReport(layers, selection.parameters, total, total - saved, dense)


def _count_zeros(slots: Mapping[str, Slot]) -> tuple[LayerSparsity, ...]:
    return tuple(
        LayerSparsity(
            name, tuple(weight.shape), weight.numel(), int(gather_full((weight == 0).sum()))
        )
        for name, weight in ((name, slot.weight) for name, slot in slots.items())
    )


def multiply_adds_by_weight(
    model: nn.Module, example_input: Example
) -> tuple[int, dict[str, float]]:
    """Multiply-adds of one forward pass, in total and by weight.

    Those of an operation are attributed to the parameters among its inputs. If it has none, as
    under `torch.nn.utils.prune`, they are attributed to the weight of the convolution or `Linear`
    layer that is running.

    Example:
        >>> multiply_adds_by_weight(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
        (6, {'0.weight': 6.0})
    """
    model = unwrap(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model, example_input), FlopCounterMode(display=False) as counter:
        torch.backends.mha.set_fastpath_enabled(False)  # its operations are not counted
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:  # the counter fails on views that require grad
                parameter.requires_grad_(False)
        try:
            with _Attributing(model, counter) as attributing:
                call(model, example_input)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2, dict(attributing.counts)


class _Attributing(TorchDispatchMode):
    """Attributes multiply-adds to weights.

    Args:
        model: The model; the caller must remove the hooks added to it.
        counter: Counts multiply-adds; it must already be active.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: defaultdict[str, float] = defaultdict(float)
        self._counter = counter
        self._by_memory: defaultdict[int, list[str]] = defaultdict(list)
        self._running: list[str] = []
        for name, slot in locate(model).items():
            if slot.parameter.dim() > 1:
                self._by_memory[_memory(slot.parameter)].append(name)
            for _, module, attribute in ((name, slot.module, slot.attribute), *slot.others):
                if isinstance(module, COUNTED) and attribute == "weight":
                    module.register_forward_pre_hook(partial(self._enter, name))
                    module.register_forward_hook(self._leave, prepend=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        count = (self._counter.get_total_flops() - before) / 2  # FLOPs: a multiply and an add
        if count:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            names = {name for tensor in given for name in self._by_memory.get(_memory(tensor), ())}
            for name in names or self._running[-1:]:
                self.counts[name] += count / max(len(names), 1)
        return result

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()


def _memory(tensor: Tensor) -> int:
    """Identifies the storage of a tensor, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)
