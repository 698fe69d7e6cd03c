"""What the native code of the sparse runtime is given: plans, and what determines them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import Integers

MAX_ROWS = 8  # of a tile
MAX_POSITIONS = 8  # of layers whose vectors hold output channels, or rows of a matrix
TILE_SIZES = (8, 6, 4, 3, 2, 1)  # rows and columns of tiles that there are kernels for
KINDS = {
    **{"load": 0, "store": 1, "convolution": 2, "pool": 3, "add": 4, "flatten": 5},
    **{"matrix": 6, "activate": 7, "multiply": 8, "depthwise": 9},
}
FUNCTIONS = {"sigmoid": 0, "hardsigmoid": 1, "silu": 2, "hardswish": 3}
_NUMBERS = (
    *("kind", "lanes", "samples", "in", "extra", "out", "in_stride", "out_stride"),
    *("channels", "pixels", "function", "whole", "extra_stride"),
    *("group", "groups", "blocks", "positions", "unit", "column_step"),
    *("rows", "panel_pixels", "panel_lanes", "by_tile", "tiles", "tiles_per_panel", "taps"),
)
ARRAYS = (
    *("tile", "pointer", "entries", "order", "bias", "split", "cut", "row_source", "tap_row"),
    *("table", "base", "scale"),
)
# The structs of kernels/runtime.h, which says what their fields are.
STEP = np.dtype(
    [(name, np.int64) for name in _NUMBERS]
    + [(name, np.uintp) for name in ARRAYS]
    + [("low", np.float32), ("high", np.float32)]
)
TILE = np.dtype(
    [(name, np.int32) for name in ("rows", "columns", "list")]
    + [(name, np.int32, MAX_ROWS) for name in ("in", "out")]
)


class Call(ctypes.Structure):
    """How a batch is computed, made by `Plan.call`; it is valid as long as that plan lives."""

    _fields_ = (
        ("steps", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("step_count", "count", "activations", "panel")),
        *((name, ctypes.c_int64) for name in ("threads", "together")),
        ("seconds", ctypes.c_void_p),
    )


STRUCTS = {"Step": STEP, "Tile": TILE, "Call": np.dtype(Call)}


@dataclass(frozen=True)
class Machine:
    """What plans are made for.

    Args:
        lanes: Floats in a vector.
        registers: Vectors that the processor holds.
        threads: How many work together.
    """

    lanes: int
    registers: int
    threads: int

    def max_sums(self, group: int) -> int:
        """The most vectors of a tile whose sums, for `group` channels, stay in the registers."""
        return (24 if self.registers == 32 else 12) // group


@dataclass(frozen=True)
class Choice:
    """How a convolution is computed; which choice is fastest is found by timing.

    Args:
        group: Output channels computed together, reading a weight of each wherever one of them
            survived: 1 is fully sparse, 4 with no zeros left is a dense kernel. A whole vector of
            them is for layers of few pixels in the layout `pixels`; elsewhere it stands for 1.
        reach: Floats of the input that a tile may read for all output channels before it goes on
            to the next range of the input, so that they stay in the cache; 0 takes all.
        padded: In the layout `lanes`, whether the input is copied with zeros for the padding, which
            are then multiplied by; otherwise pixels at the border have weights of their own.
        matrix: Whether a layer of few pixels in the layout `pixels` is a sparse matrix with a row
            for each float of its output; elsewhere it stands for False.
    """

    group: int = 1
    reach: int = 0
    padded: bool = False
    matrix: bool = False


@dataclass(frozen=True)
class Plan:
    """The steps that compute a network for a number of samples at once.

    Args:
        steps: An array of `STEP`.
        samples: How many at once.
        activations: Floats that the activations need.
        panel: Floats that each thread needs besides.
        outputs: The value of the network that each step writes.
        arrays: What the steps point to, kept alive.
    """

    steps: npt.NDArray[Any]
    samples: int
    activations: int
    panel: int
    outputs: list[int]
    arrays: list[npt.NDArray[Any]]

    def arena(self, threads: int) -> int:
        """Floats that so many threads need, on the same samples or each on its own."""
        return (self.activations + self.panel) * threads

    def call(self, count: int, *, threads: int, together: bool, seconds: int | None = None) -> Call:
        """What `pruneflow_run` is given, beside the addresses of input, output and arena.

        Args:
            count: Samples in the batch.
            threads: How many work.
            together: Whether all threads work on the same samples, or each on its own.
            seconds: Address of a float64 for each step that takes how long it ran, or None.
        """
        return Call(
            *(self.steps.ctypes.data, len(self.steps), count, self.activations, self.panel),
            *(threads, together, seconds),
        )


@dataclass(frozen=True)
class Layout:
    """How the floats of an activation are laid out.

    Args:
        samples: How many at once.
        lanes: Whether a vector holds samples of one pixel; otherwise it holds pixels.
        width: Floats of a vector.
    """

    samples: int
    lanes: bool
    width: int

    @property
    def blocks(self) -> int:
        """How often the channels are there, each time for a vector of samples."""
        return self.samples // self.width if self.lanes else 1

    def stride(self, pixels: int) -> int:
        """Floats from one channel to the next."""
        if self.lanes:
            return pixels * self.width
        vector = self.vector(pixels)
        return -(-pixels * self.samples // vector) * vector

    def vector(self, pixels: int) -> int:
        """Floats of the vectors that a channel is held in: 4 or 8 if there are so few."""
        if self.lanes:
            return self.width
        floats = min(pixels * self.samples, self.width)
        return min(size for size in (4, 8, self.width) if size >= floats)

    def table(self, table: Integers, pixels: int) -> Integers:
        """The table of taps for all samples, padded to whole vectors.

        Args:
            table: Of one sample, see `Window`.
            pixels: Of the input.
        """
        if self.lanes:
            return table
        sample = np.arange(self.samples, dtype=np.int32)[None, :, None] * pixels
        every = np.where(table[:, None] >= 0, table[:, None] + sample, -1).reshape(len(table), -1)
        rest = self.stride(table.shape[1]) - every.shape[1]
        return np.ascontiguousarray(np.pad(every, ((0, 0), (0, rest)), constant_values=-1))
