"""Find the fastest way to compute each convolution by timing whole networks, step by step.

A layer that is run alone, over and over, has the cache to itself; in the network it shares it with
all others. So plans of the whole network are run, one for each way, and each of their steps is
timed. The least of several turns counts, which other load on the machine hardly changes.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pruneflow.deploy.runtime.layers import Convolution, Network
from pruneflow.deploy.runtime.lowering import lower
from pruneflow.deploy.runtime.plans import KINDS, MAX_POSITIONS, Choice, Machine, Plan

_REACH = 9216  # floats; 48 KiB of L1 are 12288
_DENSE = 0.2  # from what density on channels computed together may gain by sharing their inputs
Choices = Mapping[int, Choice]
Key = TypeVar("Key")


def choose(
    network: Network, machine: Machine, kernels: ctypes.CDLL, *, samples: int, lanes: bool
) -> Choices:
    """The fastest choice for each convolution in a layout, by the number of the value it writes.

    Args:
        network: From `graph.capture`.
        machine: What plans are made for. Its threads are timed together for the layout `pixels`,
            and one of them for `lanes`, as that is how they mostly run.
        kernels: From `toolchain.load`.
        samples: How many run at once while they are timed.
        lanes: Whether the layout is `lanes`; otherwise it is `pixels`.
    """
    options = {
        layer.output: _options(layer, machine, samples, lanes=lanes)
        for layer in network.layers
        if isinstance(layer, Convolution)
    }
    best = {output: each[0] for output, each in options.items()}
    tried = [
        {output: each[turn % len(each)] for output, each in options.items()}
        for turn in range(max(map(len, options.values()), default=0))
    ]
    plans = [
        lower(network, machine, samples=samples, lanes=lanes, choices=choices) for choices in tried
    ]
    if not plans:
        return best
    least = _step_seconds(plans, kernels, threads=1 if lanes else machine.threads)
    fastest = least.argmin(0)
    kinds = plans[0].steps["kind"]
    for kind, output, way in zip(kinds, plans[0].outputs, fastest, strict=True):
        if kind == KINDS["convolution"]:
            best[output] = tried[way][output]
    return best


def _options(layer: Convolution, machine: Machine, samples: int, *, lanes: bool) -> list[Choice]:
    if layer.depthwise and not lanes:
        return [Choice()]
    options = [Choice(reach=_REACH), Choice()]
    if lanes and (layer.window.table < 0).any():
        options += [Choice(reach=_REACH, padded=True), Choice(padded=True)]
    if layer.groups == 1 and layer.weight.density > _DENSE:
        options += [Choice(4, _REACH), Choice(2, _REACH)]
    if not lanes and len(layer.window.corner) * samples <= MAX_POSITIONS:
        options.append(Choice(matrix=True))
        if layer.groups == 1:
            options.append(Choice(machine.lanes))
    return options


def _step_seconds(
    plans: Sequence[Plan], kernels: ctypes.CDLL, *, threads: int
) -> npt.NDArray[np.float64]:
    """The least seconds of each step, `(plans, steps)`, of plans of the same layers."""
    arena = aligned(max(plan.arena(threads) for plan in plans))
    samples = plans[0].samples
    batch, out = (
        np.zeros(samples * int(step["channels"] * step["pixels"]), np.float32)
        for step in plans[0].steps[[0, -1]]
    )
    taken = np.empty(len(plans[0].steps))
    calls = [
        plan.call(samples, threads=threads, together=True, seconds=taken.ctypes.data)
        for plan in plans
    ]
    addresses = batch.ctypes.data, out.ctypes.data, arena.ctypes.data
    least = np.full((len(plans), len(taken)), math.inf)
    end = time.perf_counter() + 0.03 * len(plans)
    turn = 0
    while turn < 2 or (turn < 50 and time.perf_counter() < end):
        for way, call in enumerate(calls):
            for _ in range(2):  # the first with the caches of another plan
                kernels.pruneflow_run(ctypes.addressof(call), *addresses)
                np.minimum(least[way], taken, out=least[way])
        turn += 1
    return least


def race(runs: Mapping[Key, Callable[[], object]], budget: float) -> dict[Key, float]:
    """The least seconds of each run, taken in turns so that other load touches all alike.

    Args:
        runs: What to time.
        budget: Seconds for each run; there are three turns at least.
    """
    least = dict.fromkeys(runs, math.inf)
    end = time.perf_counter() + budget * len(runs)
    turn = 0
    while turn < 3 or time.perf_counter() < end:
        for key, run in runs.items():
            run()  # with caches as they are when it alone runs
            began = time.perf_counter()
            run()
            least[key] = min(least[key], time.perf_counter() - began)
        turn += 1
    return least


def aligned(floats: int) -> npt.NDArray[np.float32]:
    """So many floats from a cache line's start; zeros, as vectors that are not full are read."""
    whole = np.zeros(floats + 16, np.float32)
    start = -whole.ctypes.data % 64 // 4
    return whole[start : start + floats]
