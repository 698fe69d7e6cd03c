"""The layers of a captured network: one record for each kind, and how they are fused.

Convolutions, pooling and `Linear` are sums over the taps of a kernel: a table says which pixel of
the input a tap reads for each pixel of the output, or that it falls on the padding.

A new kind of layer is a record here and a method of `lowering` that turns it into steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Pair = tuple[int, int]
Shape = tuple[int, int, int]  # channels, height, width; features are (features, 1, 1)
Bounds = tuple[float, float]  # the result is clamped to them: (0, inf) is ReLU, (0, 6) ReLU6

INFINITY = float("inf")
UNBOUNDED = (-INFINITY, INFINITY)


@dataclass(frozen=True)
class Weight:
    """The nonzero values of a weight.

    Args:
        shape: `(outputs, inputs / groups, taps)`.
        indices: Of the values in the flattened weight.
        values: As many.
    """

    shape: tuple[int, int, int]
    indices: npt.NDArray[np.int64]
    values: Floats

    @classmethod
    def from_dense(cls, dense: Floats) -> Weight:
        """Leave out the zeros."""
        indices = np.flatnonzero(dense)
        return cls(dense.shape, indices, dense.ravel()[indices])

    @property
    def coordinates(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Output, input and tap of each value."""
        return np.unravel_index(self.indices, self.shape)

    @property
    def density(self) -> float:
        """Fraction of the weight that is not zero."""
        return len(self.values) / max(1, prod(self.shape))

    def scaled(self, factor: npt.NDArray[np.float64]) -> Weight:
        """The weight with each output multiplied by its factor."""
        values = (self.values * factor[self.coordinates[0]]).astype(np.float32)
        return replace(self, values=values)


@dataclass(frozen=True)
class Window:
    """Which pixel of the input each tap of a kernel reads, for each pixel of the output.

    Args:
        size: Height and width of the input.
        kernel: Height and width of the kernel.
        output: Height and width of the output.
        stride: Down and to the right.
        padding: Above and to the left.
        dilation: Down and to the right.

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

        Elsewhere it is `offsets[:, None] + corner`.
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
        """The pixel that the first tap reads for each pixel of the output, even on the padding."""
        rows, columns = (
            np.arange(self.output[axis]) * self.stride[axis] - self.padding[axis] for axis in (0, 1)
        )
        return np.add.outer(rows * self.size[1], columns).ravel()

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """How many pixels after the first tap each tap reads."""
        rows, columns = (np.arange(self.kernel[axis]) * self.dilation[axis] for axis in (0, 1))
        return np.add.outer(rows * self.size[1], columns).ravel()

    def padded(self) -> tuple[Window, Integers]:
        """The same window over an input that holds the padding.

        Returns:
            The window, and for each pixel of its input that of the unpadded input, or -1.
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
    """Windows of adaptive pooling: floor(i * size / output) to ceil((i + 1) * size / output).

    Args:
        size: Height and width of the input.
        output: Height and width of the output.

    Returns:
        A table like that of `Window`, and for each pixel of the output one over its taps.
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
    """What all layers have: the values of the network that they read and write, by number.

    Args:
        inputs: The values it reads.
        output: The value it writes.
    """

    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Convolution(Layer):
    """A sum over weights, and perhaps a residual; a `Linear` is one of a single pixel.

    Its inputs are what it convolves and, if there is one, the residual, which is added before the
    result is clamped.

    Args:
        window: What its taps read.
        weight: Of shape `(outputs, inputs / groups, taps)`.
        bias: `(outputs,)`.
        groups: As those of `nn.Conv2d`.
        bounds: Of the result.
    """

    window: Window
    weight: Weight
    bias: Floats
    groups: int = 1
    bounds: Bounds = UNBOUNDED

    @property
    def residual(self) -> int | None:
        """The value that is added, if any."""
        return self.inputs[1] if len(self.inputs) > 1 else None

    @property
    def depthwise(self) -> bool:
        """Whether it convolves each channel alone."""
        return self.weight.shape[:2] == (self.groups, 1)


@dataclass(frozen=True)
class Scale(Layer):
    """Each channel times its factor, plus its offset, as BatchNorm is; only until layers are fused.

    Args:
        size: Height and width.
        factor: `(channels,)`.
        offset: `(channels,)`.
    """

    size: Pair
    factor: Floats
    offset: Floats

    def as_convolution(self) -> Convolution:
        """A depthwise 1x1 convolution that computes the same."""
        window = Window(self.size, kernel=(1, 1), output=self.size)
        weight = Weight.from_dense(self.factor[:, None, None])
        return Convolution(
            self.inputs, self.output, window, weight, self.offset, groups=len(self.factor)
        )


@dataclass(frozen=True)
class Pool(Layer):
    """The maximum or the mean over a window of each channel.

    Args:
        table: What its taps read, like that of `Window`.
        mean: For each pixel of the output what turns the sum into the mean; None takes the maximum.
    """

    table: Integers
    mean: Floats | None = None


@dataclass(frozen=True)
class Add(Layer):
    """The sum of two values of one shape.

    Args:
        bounds: Of the result.
    """

    bounds: Bounds = UNBOUNDED


@dataclass(frozen=True)
class Clamp(Layer):
    """A value clamped to bounds, as by ReLU.

    Args:
        bounds: Of the result.
    """

    bounds: Bounds


@dataclass(frozen=True)
class Multiply(Layer):
    """A value times a second one of its shape, or of one pixel: a factor for each channel."""


@dataclass(frozen=True)
class Activation(Layer):
    """A smooth function of each float.

    Args:
        function: `"sigmoid"`, `"hardsigmoid"`, `"silu"` or `"hardswish"`.
    """

    function: str


@dataclass(frozen=True)
class Flatten(Layer):
    """All pixels of all channels as features."""


@dataclass(frozen=True)
class Concatenate(Layer):
    """The channels of all inputs, one after the other."""


@dataclass(frozen=True)
class Network:
    """Layers in the order they run.

    Args:
        layers: They read value 0, which is the input, and what earlier layers wrote.
        shapes: Of each value, for one sample.
        output: The value that is the result.
        input_shape: Of one sample, as it is given.
        output_shape: Of one sample, as it is returned.
    """

    layers: tuple[Layer, ...]
    shapes: tuple[Shape, ...]
    output: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def fuse(layers: list[Layer], output: int) -> list[Layer]:
    """Merge scales, additions and clamps into the layers that make their inputs.

    Args:
        layers: In the order they run.
        output: The value that is the result.
    """
    while (fused := _fuse_once(layers, output)) is not None:
        layers = fused
    return [layer.as_convolution() if isinstance(layer, Scale) else layer for layer in layers]


def _fuse_once(layers: list[Layer], output: int) -> list[Layer] | None:
    """Merge one layer with the one that makes its input; None when there is nothing to merge."""
    made_by = {layer.output: layer for layer in layers}
    uses = [value for layer in layers for value in layer.inputs] + [output]
    for at, layer in enumerate(layers):
        for value in layer.inputs:
            before = made_by.get(value)
            if before is None or uses.count(value) > 1:
                continue
            if (merged := _merge(before, layer)) is not None:
                # It runs where the later one did: by then all that it reads is there.
                rest = (*layers[:at], merged, *layers[at + 1 :])
                return [each for each in rest if each is not before]
    return None


def _merge(before: Layer, layer: Layer) -> Layer | None:
    """One layer that computes what two do, one after the other; None if there is none."""
    if not isinstance(before, Convolution | Add) or before.bounds != UNBOUNDED:
        return None
    if isinstance(layer, Clamp):
        return replace(before, output=layer.output, bounds=layer.bounds)
    if not isinstance(before, Convolution) or before.residual is not None:
        return None
    if isinstance(layer, Scale):
        factor = layer.factor.astype(np.float64)
        bias = (before.bias * factor + layer.offset).astype(np.float32)
        weight = before.weight.scaled(factor)
        return replace(before, output=layer.output, weight=weight, bias=bias)
    if isinstance(layer, Add):
        (residual,) = set(layer.inputs) - {before.output}
        inputs = (*before.inputs, residual)
        return replace(before, inputs=inputs, output=layer.output, bounds=layer.bounds)
    return None
