"""Lower a captured network to a plan of the native runtime: steps over one arena of floats.

A plan is made for a number of samples that run at once and one of two layouts, which
kernels/runtime.h explains: in `lanes` a vector holds samples of one pixel, in `pixels` pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatchmethod
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import (
    UNBOUNDED,
    Activation,
    Add,
    Bounds,
    Clamp,
    Concatenate,
    Convolution,
    Flatten,
    Integers,
    Layer,
    Multiply,
    Network,
    Pool,
)
from pruneflow.deploy.runtime.packing import Survivors, order_in_shares, pack, pack_matrix
from pruneflow.deploy.runtime.plans import (
    ARRAYS,
    FUNCTIONS,
    KINDS,
    MAX_POSITIONS,
    STEP,
    TILE,
    TILE_SIZES,
    Choice,
    Layout,
    Machine,
    Plan,
)
from pruneflow.deploy.runtime.tiles import (
    bases,
    best_shape,
    cut,
    cut_rectangle,
    is_identity,
    runs,
    tile,
)


def lower(
    network: Network,
    machine: Machine,
    *,
    samples: int,
    lanes: bool,
    choices: Mapping[int, Choice],
) -> Plan:
    """Make the plan of a network.

    Args:
        network: From `graph.capture`.
        machine: What the plan is made for.
        samples: How many run at once; for `lanes` a multiple of the lanes of a vector.
        lanes: Whether the layout is `lanes`; otherwise it is `pixels`.
        choices: By the number of the value that a convolution writes; others take the default.
    """
    if lanes and samples % machine.lanes:
        raise ValueError(
            f"`samples` must be a multiple of {machine.lanes} for `lanes`, got {samples}; try "
            f"{-(-samples // machine.lanes) * machine.lanes}"
        )
    lowering = _Lowering(network, machine, Layout(samples, lanes, machine.lanes), choices)
    lowering.step("load", 0, 0)
    for layer in network.layers:
        lowering.take(layer)
    lowering.step("store", network.output, network.output)
    return lowering.plan()


def activations(network: Network, machine: Machine, samples: int, *, lanes: bool) -> int:
    """Floats that the activations of a plan need."""
    return _Lowering(network, machine, Layout(samples, lanes, machine.lanes), {}).floats


class _Tiling(NamedTuple):
    """How a convolution is cut into tiles.

    Args:
        lists: Output channel, index and value of the weights, for each list that tiles refer to.
        reach: Floats of the input that a tile reads.
        end: Of the indices.
        settings: Of the step.
    """

    lists: list[tuple[Any, ...]]
    reach: int
    end: int
    settings: dict[str, Any]


class _Lowering:
    """Turns the layers of a network into steps, one by one."""

    def __init__(
        self,
        network: Network,
        machine: Machine,
        layout: Layout,
        choices: Mapping[int, Choice],
    ) -> None:
        self.network, self.machine, self.layout = network, machine, layout
        self.choices = choices
        self.pixels = [height * width for _, height, width in network.shapes]
        self.strides = [layout.stride(pixels) for pixels in self.pixels]
        self.steps: list[dict[str, Any]] = []
        self.outputs: list[int] = []
        # Picking pixels reads, and cuts off, up to four vectors from the last pixel on.
        self.guard = 0 if layout.lanes else 4 * machine.lanes
        self.panel_floats = 0
        self.places, self.floats = self.place()

    def place(self) -> tuple[list[int], int]:
        """Where each value begins in the arena, and how many floats the arena has.

        A value takes the place of others that are no longer read, where it fits.
        """
        network = self.network
        last = [0] * len(network.shapes)
        for at, layer in enumerate(network.layers):
            for value in layer.inputs:
                last[value] = at
        last[network.output] = len(network.layers)
        # Each begins, and ends, with a whole vector.
        width = self.machine.lanes
        sizes = [-(-self.size(value) // width) * width for value in range(len(network.shapes))]
        places = [-1] * len(sizes)
        living: list[int] = []
        end = 0
        for at, value in enumerate([0, *(layer.output for layer in network.layers)]):
            # What the layer that writes this value reads is still there while it does.
            living = [other for other in living if last[other] >= at - 1]
            start = 0
            for other in sorted(living, key=places.__getitem__):
                if places[other] - start >= sizes[value]:
                    break
                start = max(start, places[other] + sizes[other])
            places[value] = start
            living.append(value)
            end = max(end, start + sizes[value])
        return places, end + self.guard

    def size(self, value: int) -> int:
        """Floats of a value."""
        return self.all_channels(value) * self.strides[value]

    def channels(self, value: int) -> int:
        """Channels of a value."""
        return self.network.shapes[value][0]

    def all_channels(self, value: int) -> int:
        """Channels of a value, counted for each block of samples."""
        return self.channels(value) * self.layout.blocks

    def step(
        self, kind: str, source: int, output: int, bounds: Bounds = UNBOUNDED, **settings: Any
    ) -> None:
        """Append a step that reads one value and writes another.

        Args:
            kind: One of `KINDS`.
            source: The value it reads.
            output: The value it writes.
            bounds: Of the result.
            settings: Further fields of `STEP`, or other values than the usual.
        """
        step = {
            "kind": KINDS[kind],
            "lanes": int(self.layout.lanes),
            "samples": self.layout.samples,
            "in": self.places[source],
            "extra": -1,
            "out": self.places[output],
            "in_stride": self.strides[source],
            "out_stride": self.strides[output],
            "channels": self.channels(output),
            "pixels": self.pixels[output],
            "low": bounds[0],
            "high": bounds[1],
        }
        self.steps.append(step | settings)
        self.outputs.append(output)

    @singledispatchmethod
    def take(self, layer: Layer) -> None:
        """Append the steps of a layer; each kind has a method below."""
        raise NotImplementedError(type(layer).__name__)

    @take.register
    def pool(self, layer: Pool) -> None:
        (source,), mean = layer.inputs, layer.mean
        whole = mean is not None and np.array_equal(layer.table, np.c_[: self.pixels[source]])
        if mean is not None and not self.layout.lanes:
            mean = np.tile(mean, self.layout.samples)
            mean = np.pad(mean, (0, self.strides[layer.output] + self.machine.lanes - len(mean)))
        settings = self.taps(layer, layer.table)
        settings |= {"channels": self.all_channels(layer.output), "whole": whole, "scale": mean}
        self.step("pool", source, layer.output, **settings)

    @take.register
    def add(self, layer: Add) -> None:
        one, other = layer.inputs
        settings = {"channels": self.all_channels(layer.output), "extra": self.places[other]}
        self.step("add", one, layer.output, layer.bounds, **settings)

    @take.register
    def clamp(self, layer: Clamp) -> None:
        (source,), channels = layer.inputs, self.all_channels(layer.output)
        self.step("add", source, layer.output, layer.bounds, channels=channels)

    @take.register
    def multiply(self, layer: Multiply) -> None:
        source, factor = layer.inputs
        by_channel = self.pixels[factor] < self.pixels[source]
        self.step(
            "multiply",
            source,
            layer.output,
            channels=self.all_channels(layer.output),
            extra=self.places[factor],
            extra_stride=self.strides[factor] if by_channel else 0,
        )

    @take.register
    def activate(self, layer: Activation) -> None:
        (source,), channels = layer.inputs, self.all_channels(layer.output)
        function = FUNCTIONS[layer.function]
        self.step("activate", source, layer.output, channels=channels, function=function)

    @take.register
    def flatten(self, layer: Flatten) -> None:
        (source,) = layer.inputs
        settings: dict[str, Any] = {
            "channels": self.all_channels(source),
            "pixels": self.pixels[source],
        }
        if self.layout.lanes:  # the same floats in the same order
            self.step("add", source, layer.output, out_stride=self.strides[source], **settings)
        else:
            self.step("flatten", source, layer.output, **settings)

    @take.register
    def concatenate(self, layer: Concatenate) -> None:
        at = self.places[layer.output]
        for block in range(self.layout.blocks):
            for value in layer.inputs:
                channels = self.channels(value)
                size = channels * self.strides[value]
                begin: dict[str, Any] = {"in": self.places[value] + block * size, "out": at}
                self.step("add", value, layer.output, channels=channels, **begin)
                at += size

    @take.register
    def convolution(self, layer: Convolution) -> None:
        choice = self.choices.get(layer.output, Choice())
        if layer.depthwise and not self.layout.lanes:
            kind, settings = "depthwise", self.depthwise(layer)
        elif choice.matrix and self.positions(layer):
            kind, settings = "matrix", self.matrix(layer)
        else:
            kind, settings = "convolution", self.tiled(layer, choice)
        if layer.residual is not None:
            settings["extra"] = self.places[layer.residual]
        self.step(kind, layer.inputs[0], layer.output, layer.bounds, **settings)

    def taps(self, layer: Convolution | Pool, table: Integers) -> dict[str, Any]:
        """Settings of a step that goes over the taps of each channel alone."""
        table = self.layout.table(table, self.pixels[layer.inputs[0]])
        settings: dict[str, Any] = {"table": table, "taps": len(table)}
        if not self.layout.lanes:
            settings["base"] = bases(table, self.vector(layer), self.machine.lanes)
        return settings

    def depthwise(self, layer: Convolution) -> dict[str, Any]:
        output, _, tap = layer.weight.coordinates
        weight = np.zeros((layer.weight.shape[2], len(layer.bias)), np.float32)
        weight[tap, output] = layer.weight.values
        settings = self.taps(layer, layer.window.table)
        return settings | {"entries": weight.view(np.int32), "bias": layer.bias}

    def tiled(self, layer: Convolution, choice: Choice) -> dict[str, Any]:
        positions = self.positions(layer) if choice.group == self.machine.lanes else 0
        if choice.group == self.machine.lanes:
            choice = replace(choice, group=choice.group if positions else 1, reach=0)
        group, groups = choice.group, -(-len(layer.bias) // choice.group)
        survivors = Survivors(layer)
        cut_up = self.tile_lanes if self.layout.lanes else self.tile_pixels
        lists, reach, end, settings = cut_up(layer, survivors, choice)
        blocks = max(1, -(-reach // choice.reach)) if choice.reach else 1
        cuts = np.arange(blocks + 1) * end // blocks
        if not self.layout.lanes and settings.get("rows"):
            panel = int(np.diff(cuts).max()) * reach // max(1, end)
            self.panel_floats = max(self.panel_floats, panel)
        sizes = np.bincount(survivors.output // group, minlength=groups)
        order, split = order_in_shares(sizes, self.machine.threads, self.per_line(layer, group))
        entries, pointer = pack(lists, group, order.astype(np.int32), cuts[1:-1])
        return settings | {
            "group": group,
            "groups": groups,
            "positions": positions,
            "blocks": blocks,
            "order": order.astype(np.int32),
            "cut": cuts.astype(np.int32),
            "bias": np.pad(layer.bias, (0, groups * group - len(layer.bias))).astype(np.float32),
            "tiles": len(settings["tile"]),
            "pointer": pointer,
            "entries": entries,
            "split": split,
        }

    def matrix(self, layer: Convolution) -> dict[str, Any]:
        survivors, source = Survivors(layer), layer.inputs[0]
        positions, width = self.positions(layer), self.machine.lanes
        table = self.layout.table(layer.window.table, self.pixels[source])[:, :positions]
        reads = table[survivors.tap]
        entry, position = np.nonzero(reads >= 0)
        address = survivors.channel[entry] * self.strides[source] + reads[entry, position]
        row = survivors.output[entry] * positions + position
        sizes = np.bincount(row, minlength=len(layer.bias) * positions)
        order, split = order_in_shares(-sizes, self.machine.threads, width)
        entries, pointer = pack_matrix(row, address, survivors.weight[entry], order, width)
        channel, position = np.divmod(order, positions)
        to = channel * self.strides[layer.output] + position
        rest = (0, -len(order) % width)
        return {
            "groups": len(pointer) - 1,
            "order": np.pad(to, rest, constant_values=-1).astype(np.int32),
            "bias": np.pad(layer.bias[channel], rest).astype(np.float32),
            "pointer": pointer,
            "entries": entries,
            "split": -(-split // width),
        }

    def per_line(self, layer: Convolution, group: int) -> int:
        """Groups whose outputs share a cache line, which only one thread had better write to."""
        floats = group * self.strides[layer.output]
        return max(1, self.machine.lanes // floats)

    def positions(self, layer: Convolution) -> int:
        """How many there are, if so few that vectors had better hold something else; or 0."""
        count = self.pixels[layer.output] * self.layout.samples
        most = min(MAX_POSITIONS, self.machine.lanes)  # they are read as one vector
        return count if count <= most and not self.layout.lanes else 0

    def tile_lanes(self, layer: Convolution, survivors: Survivors, choice: Choice) -> _Tiling:
        """Tiles are pixels whose kernels overlap the padding alike, of some vectors of samples."""
        width, source = self.machine.lanes, layer.inputs[0]
        channels, columns = self.channels(source), self.network.shapes[layer.output][2]
        reads, pixels, blocks = layer.window, self.pixels[source], self.layout.blocks
        settings: dict[str, Any] = {"unit": width, "panel_lanes": width}
        block_in = channels * self.strides[source]
        if choice.padded:
            reads, table = reads.padded()
            pixels, block_in = len(table), 0
            self.panel_floats = max(self.panel_floats, channels * pixels * width)
            settings |= {"rows": channels, "panel_pixels": pixels, "table": table}
        step = int(reads.corner[1] - reads.corner[0]) if columns > 1 else 1
        patterns, kinds = np.unique(reads.table >= 0, axis=1, return_inverse=True)
        grid = kinds.reshape(-1, columns)
        block_out = self.channels(layer.output) * self.strides[layer.output]
        # With panels a tile is of one vector of samples, as a panel is.
        turns = [[block] for block in range(blocks)] if choice.padded else [[*range(blocks)]]
        tiles: list[tuple[Any, ...]] = []
        reach = 0
        for turn in turns:
            for down, across in product(runs(grid), runs(grid.T)):
                kind = int(grid[down[0], across[0]])
                rows = [(block, int(row)) for block in turn for row in down]
                sums = self.machine.max_sums(choice.group)
                shape = best_shape(len(rows), len(across), sums, side_by_side=step <= 2)
                for chosen, first, tile_columns in cut_rectangle(rows, len(across), shape):
                    starts = []
                    for block, row in chosen:
                        pixel = row * columns + across[0] + first
                        read = reads.corner[pixel] * width + block * block_in
                        starts.append((read, pixel * width + block * block_out))
                    tiles.append(tile(tile_columns, kind, starts))
                first_rows = down[: shape[0]] * columns
                inside = np.add.outer(first_rows, across[: shape[1]]).ravel()
                reach = max(reach, channels * np.unique(reads.table[:, inside]).size * width)
        index = survivors.channel * pixels + reads.offsets[survivors.tap]
        lists = [survivors.select(index, pattern[survivors.tap]) for pattern in patterns.T]
        settings |= {"tile": np.array(tiles, TILE), "column_step": step}
        settings["tiles_per_panel"] = len(tiles) // len(turns)
        return _Tiling(lists, reach, channels * pixels, settings)

    def tile_pixels(self, layer: Convolution, survivors: Survivors, choice: Choice) -> _Tiling:
        """Tiles are vectors of neighbouring pixels; what their kernels read becomes a panel."""
        width, source = self.vector(layer), layer.inputs[0]
        reads, strides = layer.window, (self.strides[source], self.strides[layer.output])
        table = self.layout.table(reads.table, self.pixels[source])
        used = table[np.unique(survivors.tap), : reads.table.shape[1] * self.layout.samples]
        direct = strides[0] == strides[1] and is_identity(used)
        if direct:
            index, rows = survivors.channel, self.channels(source)
            settings: dict[str, Any] = {"unit": strides[0]}
        else:
            taps = len(reads.table)
            channels = self.channels(source)
            pairs, index = np.unique(
                survivors.tap * channels + survivors.channel, return_inverse=True
            )
            rows = len(pairs)
            settings = {
                "rows": rows,
                "taps": taps,
                "row_source": (pairs % channels * strides[0]).astype(np.int32),
                "tap_row": np.searchsorted(pairs, np.arange(taps + 1) * channels).astype(np.int32),
                "table": table,
                "base": bases(table, width, self.machine.lanes),
            }
        tiles, start, vectors = [], 0, strides[1] // width
        threads, most = self.machine.threads, max(1, self.machine.max_sums(choice.group))
        # Threads that share out channels each fill the whole panel, those that share out tiles each
        # go through all weights; to fill a vector takes about as long as two weights.
        shared = not direct and vectors >= threads and len(index) < 2 * rows * vectors
        if shared:
            most = min(most, -(-vectors // threads))
        sizes = cut(vectors, min(max(TILE_SIZES), most))
        for size in sizes:
            tiles.append(tile(size, 0, [(start if direct else 0, start)]))
            start += size * width
        settings |= {"tile": np.array(tiles, TILE), "column_step": 1, "panel_lanes": width}
        settings["by_tile"] = shared or len(tiles) >= 4 * threads
        lists = [(survivors.output, index, survivors.weight)]
        return _Tiling(lists, rows * sizes[0] * width, rows, settings)

    def vector(self, layer: Layer) -> int:
        """Floats of the vectors that the output's channels are held in."""
        return self.layout.vector(self.pixels[layer.output])

    def plan(self) -> Plan:
        """The plan of the steps so far."""
        steps = np.zeros(len(self.steps), STEP)
        arrays: list[npt.NDArray[Any]] = []
        for row, settings in zip(steps, self.steps, strict=True):
            for name, value in settings.items():
                if name not in ARRAYS:
                    row[name] = value
                elif value is not None:
                    array = np.ascontiguousarray(value)
                    arrays.append(array)
                    row[name] = array.ctypes.data
        panel = -(-self.panel_floats // self.machine.lanes) * self.machine.lanes
        return Plan(steps, self.layout.samples, self.floats, panel, self.outputs, arrays)
