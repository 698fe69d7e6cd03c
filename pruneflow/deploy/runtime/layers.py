"""The layers of a captured network, as the sparse runtime knows them, and how they are fused.

Convolutions, pooling and `Linear` all become sums over taps: a table says which pixel of the input
a tap reads for each pixel of the output, or that it falls on the padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Pair = tuple[int, int]
Shape = tuple[int, int, int]  # channels, height, width; features are (features, 1, 1)

INFINITY = float("inf")


@dataclass(frozen=True)
class Weight:
    """What is not zero of a weight.

    Args:
        shape: `(outputs, inputs of one, taps)`.
        index: Where the values are, as if it were flat.
        value: They themselves.
    """

    shape: tuple[int, int, int]
    index: npt.NDArray[np.int64]
    value: Floats

    @classmethod
    def of(cls, dense: Floats) -> Weight:
        """Leave out the zeros."""
        index = np.flatnonzero(dense)
        return cls(dense.shape, index, dense.ravel()[index])

    @property
    def places(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Output, input and tap of each value."""
        return np.unravel_index(self.index, self.shape)

    @property
    def density(self) -> float:
        """Fraction that is not zero."""
        return len(self.value) / max(1, prod(self.shape))

    def scaled(self, factor: npt.NDArray[np.float64]) -> Weight:
        """Each output times its factor."""
        value = (self.value * factor[self.places[0]]).astype(np.float32)
        return replace(self, value=value)


@dataclass(frozen=True)
class Window:
    """Which pixel of the input each tap of a kernel reads, for each pixel of the output.

    Args:
        size: Height and width of the input.
        kernel: Of the kernel.
        output: Of the output.
        stride: Of the kernel.
        padding: Above and to the left.
        dilation: Of the kernel.

    Example:
        >>> Window((1, 2), kernel=(1, 3), output=(1, 2), padding=(0, 1)).table.tolist()
        [[-1, 0], [0, 1], [1, -1]]
    """

    size: Pair
    kernel: Pair
    output: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @cached_property
    def table(self) -> Integers:
        """int32 `(taps, pixels of the output)`; -1 where a tap falls on the padding.

        Elsewhere it is `steps[:, None] + corner`.
        """
        rows, columns = (
            np.add.outer(
                np.arange(self.kernel[axis]) * self.dilation[axis],
                np.arange(self.output[axis]) * self.stride[axis] - self.padding[axis],
            )
            for axis in (0, 1)
        )
        rows, columns = rows[:, None, :, None], columns[None, :, None, :]
        height, width = self.size
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        table = np.where(inside, rows * width + columns, -1)
        return table.reshape(prod(self.kernel), prod(self.output)).astype(np.int32)

    @cached_property
    def corner(self) -> npt.NDArray[np.int64]:
        """The pixel that the first tap reads for each pixel of the output, be it on the padding."""
        rows, columns = (
            np.arange(self.output[axis]) * self.stride[axis] - self.padding[axis] for axis in (0, 1)
        )
        return np.add.outer(rows * self.size[1], columns).ravel()

    @cached_property
    def steps(self) -> npt.NDArray[np.int64]:
        """How many pixels each tap is from the first."""
        rows, columns = (np.arange(self.kernel[axis]) * self.dilation[axis] for axis in (0, 1))
        return np.add.outer(rows * self.size[1], columns).ravel()

    def padded(self) -> tuple[Window, Integers]:
        """The same over an input with the padding in place, and what that input is filled with.

        Returns:
            The window, and for each of its input's pixels that of this one's or -1.
        """
        height, width = (
            (self.output[axis] - 1) * self.stride[axis]
            + (self.kernel[axis] - 1) * self.dilation[axis]
            + 1
            for axis in (0, 1)
        )
        filled = Window(self.size, kernel=(height, width), output=(1, 1), padding=self.padding)
        inner = replace(self, size=(height, width), padding=(0, 0))
        return inner, filled.table[:, 0]


def adaptive_windows(size: Pair, output: Pair) -> tuple[Integers, Floats]:
    """Windows from floor(i * size / output) to ceil((i + 1) * size / output).

    Returns:
        A table as that of a `Window`, and a factor that makes the mean for each pixel.
    """
    rows, columns = (
        [
            range(i * size[axis] // output[axis], -(-(i + 1) * size[axis] // output[axis]))
            for i in range(output[axis])
        ]
        for axis in (0, 1)
    )
    pixels = [[r * size[1] + c for r in rs for c in cs] for rs in rows for cs in columns]
    taps = max(map(len, pixels))
    table = np.array([each + [-1] * (taps - len(each)) for each in pixels], np.int32).T
    mean = np.array([1 / len(each) for each in pixels], np.float32)
    return np.ascontiguousarray(table), mean


@dataclass(frozen=True)
class Layer:
    """One operation on values of the network, which are numbered.

    Args:
        kind: `"convolution"`, `"scale"`, `"pool"`, `"add"`, `"multiply"`, `"activate"`, `"flatten"`
            or `"concatenate"`.
        name: Of the operation in the traced model, for messages.
        inputs: Values it reads: of an `add` one or two, of a `multiply` two, the second perhaps of
            one pixel, of a `concatenate` any number.
        output: The value it writes.
        window: Of a convolution or `scale`: what its taps read.
        table: Of a `pool`, as that of a `Window`.
        weight: Of shape `(outputs, inputs / groups, taps)`; of a `scale` `(channels, 1, 1)`.
        bias: `(outputs,)`.
        groups: Of the convolution.
        mean: Of a `pool`, one factor per pixel of the output; None takes the maximum.
        function: Of an `activate`: `"sigmoid"`, `"hardsigmoid"`, `"silu"` or `"hardswish"`.
        residual: A value that is added to the convolution before the clamp.
        low: The result is clamped from below; 0 is ReLU.
        high: The result is clamped from above; 6, with `low` 0, is ReLU6.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    window: Window | None = None
    table: Integers | None = None
    weight: Weight | None = None
    bias: Floats | None = None
    groups: int = 1
    mean: Floats | None = None
    function: str | None = None
    residual: int | None = None
    low: float = -INFINITY
    high: float = INFINITY

    @property
    def reads(self) -> tuple[int, ...]:
        """All values that it reads."""
        return self.inputs if self.residual is None else (*self.inputs, self.residual)

    @property
    def depthwise(self) -> bool:
        """Whether it is a convolution of each channel alone."""
        return self.weight is not None and self.weight.shape[:2] == (self.groups, 1)

    @property
    def clamped(self) -> bool:
        """Whether an activation has been fused into it."""
        return self.low != -INFINITY or self.high != INFINITY


@dataclass(frozen=True)
class Network:
    """Layers in the order they run.

    Args:
        layers: They read value 0, the input, and what earlier ones wrote.
        shapes: Of each value, for one sample.
        output: The value that is the result.
        input_shape: Of one sample, as it comes.
        output_shape: Of one sample, as it is given back.
    """

    layers: tuple[Layer, ...]
    shapes: tuple[Shape, ...]
    output: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def fuse(layers: list[Layer], output: int) -> list[Layer]:
    """Merge BatchNorm, additions and activations into the convolutions that make their input.

    Args:
        layers: In the order they run.
        output: The value that is the result.
    """
    while (fused := _fuse_once(layers, output)) is not None:
        layers = fused
    return [_convolution(layer) if layer.kind == "scale" else layer for layer in layers]


def _convolution(layer: Layer) -> Layer:
    """A scale that nothing took in, as a depthwise 1x1 convolution."""
    assert layer.weight is not None
    return replace(layer, kind="convolution", groups=layer.weight.shape[0])


def _fuse_once(layers: list[Layer], output: int) -> list[Layer] | None:
    """Merge one layer with the one that makes its input; None when there is nothing to merge."""
    made_by = {layer.output: layer for layer in layers}
    uses = [value for layer in layers for value in layer.reads] + [output]
    for at, layer in enumerate(layers):
        for value in layer.inputs:
            before = made_by.get(value)
            if before is None or uses.count(value) > 1 or before.clamped:
                continue
            if (fused := _fused(before, layer)) is not None:
                # It runs where the later one did: by then all that it reads is there.
                merged = (*layers[:at], fused, *layers[at + 1 :])
                return [each for each in merged if each is not before]
    return None


def _fused(before: Layer, layer: Layer) -> Layer | None:
    changes: dict[str, Any] = {"output": layer.output, "low": layer.low, "high": layer.high}
    if layer.kind == "add" and len(layer.inputs) == 1 and before.kind in ("convolution", "add"):
        return replace(before, **changes)
    if before.kind != "convolution" or before.residual is not None:
        return None
    if layer.kind == "scale":
        assert before.weight is not None and before.bias is not None
        assert layer.weight is not None and layer.bias is not None
        factor = np.zeros(len(layer.bias))
        factor[layer.weight.index] = layer.weight.value
        bias = (before.bias * factor + layer.bias).astype(np.float32)
        return replace(before, weight=before.weight.scaled(factor), bias=bias, **changes)
    if layer.kind == "add":
        (residual,) = set(layer.inputs) - {before.output}
        return replace(before, residual=residual, **changes)
    return None
