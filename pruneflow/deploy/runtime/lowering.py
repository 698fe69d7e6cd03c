"""Lower a captured network to plans of the native runtime: steps over one arena of floats.

A plan is made for a number of samples that run at once and one of two layouts, which
kernels/runtime.h explains: `lanes` puts samples side by side in a vector, `pixels` pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import Integers, Layer, Network
from pruneflow.deploy.runtime.packing import Survivors, order_in_shares, pack, pack_matrix
from pruneflow.deploy.runtime.plans import (
    ARRAYS,
    FUNCTIONS,
    KINDS,
    MOST_POSITIONS,
    MOST_ROWS,
    SIZES,
    STEP,
    Choice,
    Layout,
    Machine,
    Plan,
)
from pruneflow.deploy.runtime.tiles import bases, best_shape, cut, cut_rectangle, identity, runs


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
        machine: What it is made for.
        samples: At once; for `lanes` a multiple of the vector's lanes.
        lanes: The layout.
        choices: By the number of the value that a convolution writes; others take the default.
    """
    width = machine.lanes
    if lanes and samples % width:
        raise ValueError(f"`samples` is expected to be a multiple of {width}, but {samples} came")
    lowering = _Lowering(network, machine, Layout(samples, lanes, width))
    lowering.move("load", 0)
    for layer in network.layers:
        lowering.take(layer, choices.get(layer.output, Choice()))
    lowering.move("store", network.output)
    return lowering.plan()


def activations(network: Network, machine: Machine, samples: int, *, lanes: bool) -> int:
    """Floats that the activations of a plan need."""
    return _Lowering(network, machine, Layout(samples, lanes, machine.lanes)).floats


# Output, index and weight of the survivors for each list; floats of the input that a tile reads;
# the end of the indices; settings of the step.
_Lowered = tuple[list[tuple[Any, ...]], int, int, dict[str, Any]]


class _Lowering:
    def __init__(self, network: Network, machine: Machine, layout: Layout) -> None:
        self.network, self.machine, self.layout = network, machine, layout
        self.pixels = [height * width for _, height, width in network.shapes]
        self.strides = [layout.stride(pixels) for pixels in self.pixels]
        self.steps: list[dict[str, Any]] = []
        self.made: list[int] = []
        # Picking pixels reads, and cuts off, up to four vectors from the last pixel on.
        self.guard = 0 if layout.lanes else 4 * self.machine.lanes
        self.panel_floats = 0
        self.places, self.floats = self.place()

    def place(self) -> tuple[list[int], int]:
        """Give each value a place in the arena, that of one no longer read where it fits."""
        network = self.network
        last = [0] * len(network.shapes)
        for at, layer in enumerate(network.layers):
            for value in layer.reads:
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
        return self.layout.blocks * self.network.shapes[value][0] * self.strides[value]

    def step(self, kind: str, value: int, **settings: Any) -> None:
        layout = self.layout
        common = {"lanes": int(layout.lanes), "samples": layout.samples, "extra": -1}
        self.steps.append({"kind": KINDS[kind], **common, **settings})
        self.made.append(value)

    def move(self, kind: str, value: int) -> None:
        self.step(
            kind,
            value,
            **{"in": self.places[value], "out": self.places[value]},
            in_stride=self.strides[value],
            out_stride=self.strides[value],
            channels=self.network.shapes[value][0],
            pixels=self.pixels[value],
        )

    def take(self, layer: Layer, choice: Choice) -> None:
        source, made = layer.inputs[0], layer.output
        settings: dict[str, Any] = {
            "in": self.places[source],
            "out": self.places[layer.output],
            "in_stride": self.strides[source],
            "out_stride": self.strides[layer.output],
            "channels": self.network.shapes[layer.output][0],
            "pixels": self.pixels[layer.output],
            "low": layer.low,
            "high": layer.high,
        }
        if layer.kind == "convolution":
            if layer.residual is not None:
                settings["extra"] = self.places[layer.residual]
            if layer.depthwise and not self.layout.lanes:
                self.step("depthwise", made, **settings, **self.depthwise(layer))
            elif choice.matrix and self.positions(layer):
                self.step("matrix", made, **settings, **self.matrix(layer))
            else:
                self.step("convolution", made, **settings, **self.convolution(layer, choice))
        elif layer.kind == "pool":
            self.step("pool", made, **(settings | self.pool(layer)))
        elif layer.kind in ("add", "multiply", "activate"):
            self.step(layer.kind, made, **(settings | self.elementwise(layer)))
        elif layer.kind == "flatten":
            settings["channels"] = self.network.shapes[source][0]
            settings["pixels"] = self.pixels[source]
            if self.layout.lanes:  # the same floats in the same order
                settings["channels"] *= self.layout.blocks
                self.step("add", made, **(settings | {"out_stride": self.strides[source]}))
            else:
                self.step("flatten", made, **settings)
        else:
            self.concatenate(layer, settings)

    def taps(self, layer: Layer, table: Integers) -> dict[str, Any]:
        """What a step that goes over the taps of each channel alone is told of them."""
        table = self.layout.table(table, self.pixels[layer.inputs[0]])
        settings: dict[str, Any] = {"table": table, "taps": len(table)}
        if not self.layout.lanes:
            settings["base"] = bases(table, self.vector(layer), self.machine.lanes)
        return settings

    def pool(self, layer: Layer) -> dict[str, Any]:
        assert layer.table is not None
        mean, pixels = layer.mean, self.pixels[layer.inputs[0]]
        if mean is not None and not self.layout.lanes:
            mean = np.tile(mean, self.layout.samples)
            mean = np.pad(mean, (0, self.strides[layer.output] + self.machine.lanes - len(mean)))
        return self.taps(layer, layer.table) | {
            "channels": self.network.shapes[layer.output][0] * self.layout.blocks,
            "whole": int(mean is not None and np.array_equal(layer.table, np.c_[:pixels])),
            "scale": mean,
        }

    def depthwise(self, layer: Layer) -> dict[str, Any]:
        assert layer.weight is not None and layer.window is not None and layer.bias is not None
        output, _, tap = layer.weight.places
        weight = np.zeros((layer.weight.shape[2], len(layer.bias)), np.float32)
        weight[tap, output] = layer.weight.value
        settings = self.taps(layer, layer.window.table)
        return settings | {"entries": weight.view(np.int32), "bias": layer.bias}

    def elementwise(self, layer: Layer) -> dict[str, Any]:
        channels = self.network.shapes[layer.output][0] * self.layout.blocks
        settings: dict[str, Any] = {"channels": channels}
        if layer.function is not None:
            settings["function"] = FUNCTIONS[layer.function]
        for other in layer.inputs[1:]:
            settings["extra"] = self.places[other]
            if self.pixels[other] < self.pixels[layer.output]:  # a factor for each channel
                settings["extra_stride"] = self.strides[other]
        return settings

    def concatenate(self, layer: Layer, settings: dict[str, Any]) -> None:
        at = self.places[layer.output]
        for block in range(self.layout.blocks):
            for value in layer.inputs:
                channels = self.network.shapes[value][0]
                size = channels * self.strides[value]
                part = {"in": self.places[value] + block * size, "out": at, "channels": channels}
                self.step("add", layer.output, **(settings | part))
                at += size

    def convolution(self, layer: Layer, choice: Choice) -> dict[str, Any]:
        assert layer.weight is not None and layer.bias is not None and layer.window is not None
        positions = self.positions(layer) if choice.group == self.machine.lanes else 0
        if choice.group == self.machine.lanes:
            choice = replace(choice, group=choice.group if positions else 1, reach=0)
        group, groups = choice.group, -(-len(layer.bias) // choice.group)
        survivors = Survivors(layer)
        lower_to = self.to_lanes if self.layout.lanes else self.to_pixels
        lists, reach, limit, settings = lower_to(layer, survivors, choice)
        blocks = max(1, -(-reach // choice.reach)) if choice.reach else 1
        cuts = np.arange(blocks + 1) * limit // blocks
        if not self.layout.lanes and settings.get("rows"):
            panel = int(np.diff(cuts).max()) * reach // max(1, limit)
            self.panel_floats = max(self.panel_floats, panel)
        sizes = np.bincount(survivors.output // group, minlength=groups)
        order, split = order_in_shares(sizes, self.machine.threads, self.line(layer, group))
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

    def matrix(self, layer: Layer) -> dict[str, Any]:
        assert layer.bias is not None and layer.window is not None
        survivors, (source,) = Survivors(layer), layer.inputs
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

    def line(self, layer: Layer, group: int) -> int:
        """Groups whose outputs share a cache line, which only one thread had better write to."""
        floats = group * self.strides[layer.output]
        return max(1, self.machine.lanes // floats)

    def positions(self, layer: Layer) -> int:
        """How many there are, if so few that vectors had better hold something else; or 0."""
        count = self.pixels[layer.output] * self.layout.samples
        most = min(MOST_POSITIONS, self.machine.lanes)  # they are read as one vector
        return count if count <= most and not self.layout.lanes else 0

    def to_lanes(self, layer: Layer, survivors: Survivors, choice: Choice) -> _Lowered:
        """Tiles are pixels whose kernels overlap the padding alike, of some vectors of samples."""
        assert layer.window is not None
        width, (source,) = self.machine.lanes, layer.inputs
        channels, columns = self.network.shapes[source][0], self.network.shapes[layer.output][2]
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
        block_out = self.network.shapes[layer.output][0] * self.strides[layer.output]
        # With panels a tile is of one vector of samples, as a panel is.
        turns = [[block] for block in range(blocks)] if choice.padded else [[*range(blocks)]]
        tiles: list[list[int]] = []
        reach = 0
        for turn in turns:
            for down, across in product(runs(grid), runs(grid.T)):
                kind = int(grid[down[0], across[0]])
                rows = [(block, int(row)) for block in turn for row in down]
                sums = self.machine.sums(choice.group)
                shape = best_shape(len(rows), len(across), sums, side_by_side=step <= 2)
                for chosen, first, tile_columns in cut_rectangle(rows, len(across), shape):
                    tile = [len(chosen), tile_columns, kind] + [0] * (2 * MOST_ROWS)
                    for i, (block, row) in enumerate(chosen):
                        pixel = row * columns + across[0] + first
                        tile[3 + i] = reads.corner[pixel] * width + block * block_in
                        tile[3 + MOST_ROWS + i] = pixel * width + block * block_out
                    tiles.append(tile)
                first_rows = down[: shape[0]] * columns
                inside = np.add.outer(first_rows, across[: shape[1]]).ravel()
                reach = max(reach, channels * np.unique(reads.table[:, inside]).size * width)
        index = survivors.channel * pixels + reads.steps[survivors.tap]
        lists = [survivors.where(index, pattern[survivors.tap]) for pattern in patterns.T]
        settings |= {"tile": np.array(tiles, np.int32), "column_step": step}
        settings["tiles_per_panel"] = len(tiles) // len(turns)
        return lists, reach, channels * pixels, settings

    def to_pixels(self, layer: Layer, survivors: Survivors, choice: Choice) -> _Lowered:
        """Tiles are vectors of neighbouring pixels; what their kernels read becomes a panel."""
        assert layer.window is not None
        width, (source,) = self.vector(layer), layer.inputs
        reads, strides = layer.window, (self.strides[source], self.strides[layer.output])
        table = self.layout.table(reads.table, self.pixels[source])
        used = table[np.unique(survivors.tap), : reads.table.shape[1] * self.layout.samples]
        direct = strides[0] == strides[1] and identity(used)
        if direct:
            index, rows = survivors.channel, self.network.shapes[source][0]
            settings: dict[str, Any] = {"unit": strides[0]}
        else:
            taps = len(reads.table)
            channels = self.network.shapes[source][0]
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
        threads, most = self.machine.threads, max(1, self.machine.sums(choice.group))
        # Threads that share out channels each fill the whole panel, those that share out tiles each
        # go through all weights; to fill a vector takes about as long as two weights.
        shared = not direct and vectors >= threads and len(index) < 2 * rows * vectors
        if shared:
            most = min(most, -(-vectors // threads))
        for size in cut(vectors, min(max(SIZES), most)):
            tile = [1, size, 0] + [0] * (2 * MOST_ROWS)
            tile[3], tile[3 + MOST_ROWS] = start if direct else 0, start
            tiles.append(tile)
            start += size * width
        settings |= {"tile": np.array(tiles, np.int32), "column_step": 1, "panel_lanes": width}
        settings["by_tile"] = shared or len(tiles) >= 4 * threads
        lists = [survivors.where(index, np.ones(len(index), bool))]
        return lists, rows * tiles[0][1] * width, rows, settings

    def vector(self, layer: Layer) -> int:
        return self.layout.vector(self.pixels[layer.output])

    def plan(self) -> Plan:
        steps = np.zeros(len(self.steps), STEP)
        kept: list[npt.NDArray[Any]] = []
        for row, settings in zip(steps, self.steps, strict=True):
            for name, value in settings.items():
                if name in ARRAYS:
                    if value is not None:
                        array = np.ascontiguousarray(value)
                        kept.append(array)
                        row[name] = array.ctypes.data
                else:
                    row[name] = value
        panel = -(-self.panel_floats // self.machine.lanes) * self.machine.lanes
        return Plan(steps, self.layout.samples, self.floats, panel, self.made, kept)
