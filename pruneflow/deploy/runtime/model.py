"""Run a pruned model on the CPU without multiplying by its zeros."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pruneflow.deploy.runtime import toolchain
from pruneflow.deploy.runtime.graph import capture
from pruneflow.deploy.runtime.layers import Network
from pruneflow.deploy.runtime.lowering import activations, lower
from pruneflow.deploy.runtime.plans import Call, Machine, Plan
from pruneflow.deploy.runtime.tuning import Choices, aligned, choose, race
from pruneflow.structure.running import copied

_TOLERANCE = 1e-4  # of the check at the end of compiling, relative in norm
_MAX_ACTIVATIONS = 2**23  # floats for a thread, beyond which several samples at once do not pay
_MAX_THREADS = 1024
PlanKind = tuple[bool, int]  # whether the layout is `lanes`, and samples at once


def sparse_compile(
    model: nn.Module, example_input: Tensor, *, threads: int | None = None
) -> nn.Module:
    """Compile a pruned model for this machine's CPU, where weights that are zero cost nothing.

    The whole network runs in one native call: BatchNorm is folded, ReLU and residual additions are
    part of the convolutions, and each convolution multiplies only by the weights that survived.
    Which of several ways is fastest for a layer and for a batch size is found by timing them while
    compiling, so the last bits of the result may differ from one compilation to the next. Weights
    whose taps only ever read padding are left out too. Shrinking the model first (`shrink`) helps
    only where whole channels or branches are gone.

    It knows Conv2d, Linear, BatchNorm, ReLU, ReLU6, Hardtanh, Sigmoid, Hardsigmoid, SiLU,
    Hardswish, additions, products (squeeze-and-excitation), scales and offsets of channels, max,
    average and adaptive average pooling, zero padding, concatenation, flattening and dropout, as
    modules or functions, and subclasses that add some of these to a layer. The result takes batches
    of any size, and images of the size of the example; compile once for each image size.

    Args:
        model: A float32 model on the CPU. It is not changed, and compiled in evaluation mode.
        example_input: A batch of any size, `(batch, channels, height, width)` or
            `(batch, features)`.
        threads: How many threads work; None takes `torch.get_num_threads()`.

    Returns:
        A module for inference, without parameters or gradients. Where there is no C++ compiler it
        is a copy of the dense model, and a warning says so.

    Raises:
        ValueError: If the model cannot be traced or has an operation that the runtime does not
            know, which is named; or if `threads` or the types of the tensors do not fit.
        RuntimeError: If the compiled model does not give what `model` gives, which is checked once
            it is compiled; or if the system does not let this process start so many threads.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
        >>> _ = nn.functional.dropout(model[0].weight.data, 0.9, inplace=True)
        >>> images = torch.randn(5, 3, 8, 8)
        >>> fast = sparse_compile(model, images)
        >>> torch.allclose(fast(images), model(images), atol=1e-5)
        True
    """
    if threads is None:
        threads = torch.get_num_threads()
    if not 1 <= threads <= _MAX_THREADS:
        raise ValueError(
            f"`threads` must be 1 to {_MAX_THREADS}, got {threads}; try {os.cpu_count()}, the "
            "number of processors"
        )
    if not isinstance(example_input, Tensor) or example_input.dim() == 0:
        came = "one number" if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(
            "`example_input` must be one tensor, (batch, channels, height, width) or (batch, "
            f"features), got {came}; the sparse runtime takes one input: use `shrink` or "
            "`export_onnx` for this model"
        )
    for name, tensor in (("example_input", example_input), *model.named_parameters()):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"`{name}` must be float32 on the CPU, got {tensor.dtype} on {tensor.device}; "
                "convert the model and its input with .float().cpu()"
            )
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            raise ValueError(
                f"`model` must have no hooks, which would not run, got some on {name!r}; remove "
                "them, those of torch.nn.utils.prune with prune.remove or fold_model"
            )
    dense = copied(model).eval().requires_grad_(False)
    network = capture(dense, example_input)
    try:
        kernels = toolchain.load(toolchain.FLAGS)
    except toolchain.NoCompilerError as error:
        warnings.warn(
            f"the model stays dense, as its kernels cannot be built: {error}. Install g++ or "
            "clang++, or set CXX to a C++17 compiler",
            stacklevel=2,
        )
        return dense
    if kernels.pruneflow_threads(threads):
        raise _too_many(threads)
    machine = toolchain.machine(kernels, threads)
    choices = {
        lanes: choose(network, machine, kernels, samples=samples, lanes=lanes)
        for lanes, samples in ((False, 1), (True, machine.lanes))
        if _pays(network, machine, (lanes, samples))
    }
    compiled = SparseModel(network, machine, choices)
    with torch.no_grad():
        batch = torch.empty(2, *example_input.shape[1:], dtype=torch.float32, device="cpu")
        batch.normal_(generator=torch.Generator("cpu").manual_seed(0))
        difference = compiled.difference(batch, dense(batch.clone()))
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            "the compiled model must give what `model` gives, got a difference of "
            f"{difference:.2g} relative in norm; please report this model"
        )
    compiled._tune()
    return compiled


_models: weakref.WeakSet[SparseModel] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child, nobody would ever release a lock that another thread held."""
    for model in _models:
        model._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class SparseModel(nn.Module):
    """What `sparse_compile` returns: a network and plans for several numbers of samples at once.

    It can be copied and pickled; unpickling needs a C++ compiler.

    Args:
        network: From `graph.capture`.
        machine: What plans are made for.
        choices: How convolutions are computed, for the layouts `lanes` (True) and `pixels`.
        flags: Of the compiler that builds the kernels.

    Attributes:
        costs: Seconds that a plan of each kind takes, with threads that work each on its own
            samples, and with threads that work on the same samples.
    """

    def __init__(
        self,
        network: Network,
        machine: Machine,
        choices: Mapping[bool, Choices],
        flags: Sequence[str] = toolchain.FLAGS,
    ) -> None:
        super().__init__()
        self.network, self.machine, self.choices, self.flags = network, machine, choices, flags
        self.costs = _plan_kinds(network, machine)
        self._prepare()

    def _prepare(self) -> None:
        _models.add(self)
        self._native = toolchain.load(self.flags).pruneflow_run
        self._lock = threading.Lock()
        self._arena = np.empty(0, np.float32)
        self._arena_at = 0
        self._calls: dict[torch.Size, _Prepared] = {}
        self._plans = {
            (lanes, samples): lower(
                self.network,
                self.machine,
                samples=samples,
                lanes=lanes,
                choices=self.choices[lanes],
            )
            for lanes, samples in self.costs
        }

    def __getstate__(self) -> dict[str, Any]:
        own = ("_native", "_lock", "_arena", "_arena_at", "_calls", "_plans")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        here = toolchain.machine(toolchain.load(self.flags), self.machine.threads)
        if here == self.machine:
            self._prepare()
        else:  # such as vectors of another size: what was fastest there says nothing
            self.machine, self.choices = here, {False: {}, True: {}}
            self.costs = _plan_kinds(self.network, here)
            self._prepare()
            self._tune()

    def extra_repr(self) -> str:
        """Layers, threads and the numbers of samples that plans are made for."""
        samples = sorted({samples for _, samples in self.costs})
        return f"layers={len(self.network.layers)}, threads={self.machine.threads}, {samples=}"

    def forward(self, batch: Tensor) -> Tensor:
        """Compute a batch of any size.

        Args:
            batch: float32 on the CPU, `(batch, ...)`, the rest as in the example.

        Raises:
            ValueError: If it is another type or shape, or does not lie in memory as it looks.
        """
        prepared = self._calls.get(batch.shape)
        # As little as can be: what Python does here took a quarter of a small call.
        plain = type(batch) is Tensor and batch.is_cpu and not batch.is_neg()
        if prepared is None or batch.dtype is not torch.float32 or not plain:
            prepared = self._calls[batch.shape] = self._prepared_for(batch)
        return self._run(batch, prepared)

    def _prepared_for(self, batch: Tensor) -> _Prepared:
        shape = self.network.input_shape
        if batch.dtype != torch.float32 or batch.device.type != "cpu" or batch.shape[1:] != shape:
            raise ValueError(
                f"`batch` must be float32 on the CPU of shape (any, {', '.join(map(str, shape))}), "
                f"got {batch.dtype} on {batch.device} of shape {tuple(batch.shape)}; convert it "
                "with .float().cpu(), or call sparse_compile again for another shape"
            )
        if type(batch) not in (Tensor, nn.Parameter) or batch.is_neg():
            what = "a negative view" if batch.is_neg() else f"a {type(batch).__name__}"
            raise ValueError(
                f"`batch` must be a plain tensor, got {what}, which may not lie in memory as it "
                "looks; try batch.as_subclass(torch.Tensor).resolve_neg()"
            )
        key, together = self._best(len(batch))
        return self._prepared(len(batch), self._plans[key], together)

    def difference(self, batch: Tensor, expected: Tensor) -> float:
        """The largest difference of a plan's result from `expected`, relative in norm.

        Args:
            batch: See `forward`.
            expected: What the dense model returns for it.
        """
        errors = [
            float((self._run(batch, self._prepared(len(batch), plan, together)) - expected).norm())
            for plan in self._plans.values()
            for together in (False, True)
        ]
        worst = max(errors, key=lambda error: (math.isnan(error), error))
        return worst / max(float(expected.norm()), 1e-30) if worst else 0.0

    def _tune(self) -> None:
        """Time the plans, and keep those that are the fastest for some batch size.

        The model must not be called meanwhile.
        """
        threads = self.machine.threads
        runs = {}
        for key, plan in self._plans.items():
            for together, samples in ((False, threads * plan.samples), (True, plan.samples)):
                shape = (samples, *self.network.input_shape)
                batch = torch.zeros(shape, dtype=torch.float32, device="cpu")
                prepared = self._prepared(samples, plan, together)
                runs[key, together] = partial(self._run, batch, prepared)
        seconds = race(runs, 0.1)
        self.costs = {key: (seconds[key, False], seconds[key, True]) for key in self._plans}
        sizes = range(1, 2 * threads * max(samples for _, samples in self.costs) + 1)
        best = {self._best(size)[0] for size in sizes}
        self.costs = {key: self.costs[key] for key in best}
        self._plans = {key: self._plans[key] for key in best}
        self._calls.clear()
        self._arena = np.empty(0, np.float32)

    def _best(self, count: int) -> tuple[PlanKind, bool]:
        """The fastest kind of plan for so many samples, and whether threads work together."""

        def seconds(option: tuple[PlanKind, bool]) -> float:
            key, together = option
            pieces = math.ceil(count / key[1])
            alone = math.ceil(pieces / self.machine.threads)
            return pieces * self.costs[key][1] if together else alone * self.costs[key][0]

        return min(((key, mode) for key in self.costs for mode in (False, True)), key=seconds)

    def _prepared(self, count: int, plan: Plan, together: bool) -> _Prepared:
        threads = self.machine.threads
        with self._lock:
            if self._arena.size < plan.arena(threads):
                self._arena = aligned(plan.arena(threads))
                self._arena_at = self._arena.ctypes.data
        call = plan.call(count, threads=threads, together=together)
        shape = (count, *self.network.output_shape)
        return _Prepared(ctypes.addressof(call), shape, kept=(call, plan))

    def _run(self, batch: Tensor, prepared: _Prepared) -> Tensor:
        if not batch.is_contiguous():
            batch = batch.contiguous()
        out = torch.empty(prepared.shape, dtype=torch.float32, device="cpu")
        with self._lock:
            failed = self._native(
                prepared.address, batch.data_ptr(), out.data_ptr(), self._arena_at
            )
        if failed:
            raise _too_many(self.machine.threads)
        return out


def _too_many(threads: int) -> RuntimeError:
    return RuntimeError(
        f"`threads` must be as few as the system lets this process start, got {threads}; try "
        f"{os.cpu_count()}, the number of processors"
    )


class _Prepared(NamedTuple):
    address: int  # of the call
    shape: tuple[int, ...]  # of the output
    kept: tuple[Call, Plan]


def _plan_kinds(network: Network, machine: Machine) -> dict[PlanKind, tuple[float, float]]:
    """The kinds of plans that may pay, not timed yet: see `SparseModel.costs`."""
    kinds = [(False, 1), (False, 2), (False, 4)]
    kinds += [(True, machine.lanes * vectors) for vectors in (1, 2, 4)]
    return {kind: (0.0, 0.0) for kind in kinds if _pays(network, machine, kind)}


def _pays(network: Network, machine: Machine, kind: PlanKind) -> bool:
    """Whether a kind of plan may pay: for big images, only one of a single sample."""
    lanes, samples = kind
    floats = activations(network, machine, samples, lanes=lanes)
    return samples == 1 or floats <= _MAX_ACTIVATIONS
