import copy
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import operator
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from pruneflow.deploy.runtime import model as runtime
from pruneflow.deploy.runtime import toolchain, tuning
from pruneflow.deploy.runtime.graph import capture
from pruneflow.deploy.runtime.layers import Convolution
from pruneflow.deploy.runtime.lowering import lower
from pruneflow.deploy.runtime.model import SparseModel, sparse_compile
from pruneflow.deploy.runtime.plans import STRUCTS, Choice, Machine
from pruneflow.deploy.shrink import shrink

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="the kernels are built with g++ or clang++ on POSIX"
)
WAYS = [
    *(Choice(group, reach) for group in (1, 2, 4) for reach in (0, 200)),
    *(Choice(group, 300, padded=True) for group in (1, 4)),
    Choice(0),  # stands for as many as there are lanes
    Choice(matrix=True),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def prune(model, density):
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data[torch.rand_like(module.weight) >= density] = 0
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
            module.bias.data.normal_()
    return model.eval()


SPARSE = Choice()


def untimed(model, example, choice=SPARSE, threads=2, flags=toolchain.FLAGS):
    """All plans of a model, each convolution computed in the same way."""
    machine = toolchain.machine(toolchain.load(flags), threads)
    network = capture(model, example)
    choice = dataclasses.replace(choice, group=choice.group or machine.lanes)
    chosen = {layer.output: choice for layer in network.layers}
    return SparseModel(network, machine, {False: chosen, True: chosen}, flags)


def each_plan(compiled, count):
    """Functions of a batch of so many that compute it by each plan in turn."""
    for plan, together in product(compiled._plans.values(), (False, True)):
        yield partial(compiled._run, prepared=compiled._prepared(count, plan, together))


@torch.no_grad()
def difference(model, batch, *ways, **settings):
    return untimed(model, batch, *ways, **settings).difference(batch, model(batch))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    inputs = groups * draw(st.integers(1, 5))
    outputs = groups * draw(st.integers(1, 9))
    kernel, stride, dilation, padding = (
        (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for low, high in ((1, 5), (1, 3), (1, 2), (0, 3))
    )
    reach = [dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis] for axis in (0, 1)]
    size = [draw(st.integers(max(1, each), max(1, each) + 11)) for each in reach]
    bias = draw(st.booleans())
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    conv = prune(conv, draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])))
    conv.weight.data[draw(st.integers(0, outputs - 1))] = 0
    batch = draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 40]))
    return conv, torch.randn(batch, inputs, *size)


@given(convolutions(), st.sampled_from(WAYS), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_convolutions_equal_those_of_pytorch(case, way, threads):
    conv, batch = case
    assert difference(conv, batch, way, threads=threads) < 1e-5


class Block(nn.Module):
    """A residual block, written with what overwrites its input."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm1(x))  # x itself stays
        z = self.norm2(self.conv2(self.relu(self.conv1(y))))
        functional.relu(x, inplace=True)  # and now it does not
        z += x
        return self.relu(z) + y


class Dense(nn.Module):
    """Concatenates, and ends in features by `view`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 7, 3, padding="same")
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.linear = nn.Linear(12 * 16, 3)

    def forward(self, x):
        x = torch.cat([x, functional.dropout(self.conv(x), training=self.training)], 1)
        x = functional.avg_pool2d(self.pool(functional.relu6(x)), 2, 1)
        return self.linear(functional.adaptive_avg_pool2d(x, 4).view(x.size(0), -1))


class Beside(nn.Module):
    """Concatenates right before, in memory, of what is still read: 20 and 28 floats, then that."""

    def __init__(self):
        super().__init__()
        self.first, self.keep = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 8, 1)
        self.one, self.other = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 7, 1)
        self.last = nn.Conv2d(12, 8, 1)

    def forward(self, x):
        keep = self.keep(self.first(x))
        return self.last(torch.cat([self.one(keep), self.other(keep)], 1)) + keep


class Depthwise(nn.Module):
    """Convolutions of each channel alone, and of few, with what is fused into them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second = nn.Conv2d(6, 6, (2, 5), (2, 3), (1, 2), groups=6, bias=False)
        self.third = nn.Conv2d(6, 3, 1, groups=3)

    def forward(self, x):
        x = functional.relu6(self.first(x) + x)
        return functional.adaptive_avg_pool2d(self.third(self.second(x)), 1)


class Gated(nn.Module):
    """Squeeze-and-excitation, products and the smooth activations, also in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Hardsigmoid())
        self.last = nn.Sequential(nn.Conv2d(6, 5, 2, 3), nn.Hardswish(), nn.Flatten())

    def forward(self, x):
        x = self.conv(x)
        x = torchvision.ops.stochastic_depth(self.squeeze(x) * x, 0.5, "row", self.training)
        y = x * torch.sigmoid(x)
        y *= functional.hardswish(x)
        return self.last(y).sigmoid()


def resnet():
    return torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
    )


NETWORKS = {
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), Block(6), nn.AdaptiveAvgPool2d(3)),
        (3, 9, 7),
    ),
    "dense": (Dense, (5, 11, 8)),
    "activation first": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.ReLU()),
        (2, 6, 6),
    ),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Hardtanh(-0.5, 0.5), nn.Linear(30, 4)
        ),
        (20,),
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.AvgPool2d(3, 2, 1),
            nn.AvgPool2d((2, 3), ceil_mode=True, count_include_pad=False),
            nn.MaxPool2d(2, 1, dilation=2),
            nn.Flatten(),
            nn.ReLU6(),
        ),
        (4, 33, 37),
    ),
    "beside": (Beside, (3, 2, 2)),
    "depthwise": (Depthwise, (6, 9, 23)),
    "gated": (Gated, (3, 9, 7)),
    "resnet": (resnet, (3, 32, 32)),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
        (3, 40, 40),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_networks_equal_pytorch_in_every_layout(name, density):
    make, shape = NETWORKS[name]
    model = prune(make(), density)
    assert difference(model, torch.randn(19, *shape), Choice(2, 4096, padded=True)) < 1e-5


@pytest.mark.parametrize(
    "flags", [toolchain.FLAGS, ("-O1", "-msse4.2"), ("-O1", "-mavx2", "-mfma")]
)
def test_layers_of_few_pixels_as_matrices(flags):
    model, batch = prune(resnet(), 0.1), torch.randn(6, 3, 32, 32)
    assert difference(model, batch, Choice(matrix=True), threads=3, flags=flags) < 1e-5


def test_threads_write_to_cache_lines_of_their_own():
    model = prune(nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU()), 0.2)
    compiled = untimed(model, torch.randn(1, 3, 4, 4), threads=3)  # four floats a channel
    plan = compiled._plans[False, 1]
    step = plan.steps[1]
    arrays = {array.ctypes.data: array for array in plan.arrays}
    order, split = arrays[int(step["order"])], arrays[int(step["split"])]
    shares = [set(order[begin:end] // 4) for begin, end in pairwise(split)]
    assert sum(map(len, shares)) == 12 and len(set.union(*shares)) == 12
    assert all(shares)


@pytest.mark.parametrize(
    "function", [torch.sigmoid, functional.hardsigmoid, functional.silu, functional.hardswish]
)
def test_smooth_activations_far_out(function):
    class Only(nn.Module):
        def forward(self, x):
            return function(x)

    model = Only().eval()
    batch = torch.cat([torch.linspace(-100, 100, 1000), torch.tensor([math.inf, math.nan, -0.0])])
    batch = batch.repeat(2, 1)
    for run in each_plan(untimed(model, batch), len(batch)):
        torch.testing.assert_close(run(batch), model(batch), rtol=1e-6, atol=1e-35, equal_nan=True)


class Line(nn.Module):
    """Something is done to each channel by itself."""

    def __init__(self, code):
        super().__init__()
        self.code, self.a, self.b = code, nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 1)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("held", torch.rand(1, 6, 1, 1) + 0.5)
        self.number = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.b(self.code(self, self.a(x)))


def changed_in_place(model, x):
    other = x
    other -= 1
    other /= 2
    return x + other


LINES = {
    "scale": lambda m, x: x * m.gamma.view(1, -1, 1, 1) + m.held,
    "one and gamma": lambda m, x: (1 + m.gamma)[:, None, None] * x,
    "less": lambda m, x: m.held - (x - 2),
    "quotient": lambda m, x: x / m.held * m.number,
    "hardswish by hand": lambda m, x: x * functional.relu6(x + 3.0) / 6,
    "in place": changed_in_place,
    "pad": lambda m, x: functional.pad(x, (1, 0, 2, 3)) + 1,
}


@pytest.mark.parametrize("code", LINES.values(), ids=LINES)
def test_scales_and_offsets(code):
    model = Line(code)
    batch = torch.randn(7, 3, 8, 9)
    assert difference(model.eval(), batch, Choice(2, 4096, padded=True)) < 1e-5


def test_what_follows_a_convolution_becomes_part_of_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return functional.relu6(self.layers(x) + x)

    network = capture(Residual().eval(), torch.zeros(1, 3, 4, 4))
    (layer,) = network.layers
    assert isinstance(layer, Convolution) and layer.output == network.output
    assert (layer.inputs, layer.residual, layer.bounds) == ((0, 0), 0, (0, 6))


def test_frozen_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), torchvision.ops.FrozenBatchNorm2d(6), nn.ReLU())
    model[1].running_mean.normal_()
    assert difference(model.eval(), torch.randn(3, 3, 5, 5), Choice()) < 1e-5


def test_all_weights_zero():
    model = prune(resnet(), 0.0)
    assert difference(model, torch.randn(3, 3, 32, 32)) < 1e-5


@torch.no_grad()
def test_a_shrunk_model_that_chooses_channels():
    model = prune(resnet(), 0.004)
    batch = torch.randn(5, 3, 32, 32)
    shrunk = shrink(model, batch)
    assert any(node.target is torch.index_select for node in shrunk.graph.nodes)
    assert untimed(shrunk, batch).difference(batch, model(batch)) < 1e-5


def test_any_batch_size_after_compiling():
    model = prune(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), 0.2
    )
    fast = sparse_compile(model, torch.randn(1, 3, 8, 8), threads=2)
    for size in (0, 1, 2, 5, 16, 31, 64, 129):
        batch = torch.randn(size, 3, 8, 8).to(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_nan_and_infinity_stay_in_their_sample():
    model = prune(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), 1.0)
    batch = torch.randn(20, 2, 6, 6)
    batch[3, 0, 2, 2], batch[5, 1, 0, 0] = float("nan"), float("inf")
    compiled = untimed(model, batch)
    expected = model(batch)
    assert expected[3].isnan().any() and not expected[4].isnan().any()
    for run in each_plan(compiled, len(batch)):
        torch.testing.assert_close(run(batch), expected, equal_nan=True)


def test_each_layer_takes_the_way_whose_steps_were_fastest(monkeypatch):
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2)), 0.3)
    network = capture(model, torch.zeros(1, 3, 4, 4))
    first, second = (layer.output for layer in network.layers)
    seen = []

    def steps(plans, kernels, threads):
        seen.extend(plans)
        seconds = np.ones((len(plans), len(plans[0].steps)))
        seconds[2, plans[0].outputs.index(first)] = 0.5
        seconds[1, plans[0].outputs.index(second)] = 0.5
        return seconds

    monkeypatch.setattr(tuning, "_step_seconds", steps)
    machine = Machine(16, 32, 1)
    best = tuning.choose(network, machine, None, samples=1, lanes=False)
    ways = [tuning._options(layer, machine, 1, lanes=False) for layer in network.layers]
    assert best == {first: ways[0][2], second: ways[1][1]}
    assert len(seen) == max(map(len, ways))  # each way of each layer is in one


def test_steps_are_timed():
    kernels = toolchain.load()
    compiled = untimed(prune(resnet(), 0.1), torch.zeros(1, 3, 32, 32))
    seconds = tuning._step_seconds(list(compiled._plans.values())[:2], kernels, threads=2)
    assert seconds.shape == (2, len(compiled.network.layers) + 2)
    assert (seconds > 0).all() and (seconds < 10).all()


def test_big_pictures_run_one_by_one(monkeypatch):
    monkeypatch.setattr(runtime, "_MAX_ACTIVATIONS", 100)
    model = nn.Conv2d(3, 4, 1)
    batch = torch.randn(3, 3, 5, 5)
    compiled = sparse_compile(model, batch)
    assert list(compiled.costs) == [(False, 1)]
    torch.testing.assert_close(compiled(batch), model(batch))


def test_the_model_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    fast = sparse_compile(model, torch.randn(2, 3, 5, 5))
    assert model.training and model[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not fast.state_dict()


def test_copies_and_pickles():
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.3)
    batch = torch.randn(5, 3, 6, 6)
    fast = sparse_compile(model, batch)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(batch), fast(batch))


def test_threads_may_call_it_at_once():
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.3)
    fast = sparse_compile(model, torch.randn(1, 3, 6, 6), threads=2)
    batches = [torch.randn(40, 3, 6, 6) for _ in range(4)]
    wrong = []

    def call(batch):
        expected = model(batch)
        wrong.extend(not torch.allclose(fast(batch), expected, atol=1e-5) for _ in range(20))

    callers = [threading.Thread(target=call, args=(batch,)) for batch in batches]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(wrong) == 80 and not any(wrong)


def _in_child(fast, batch, queue):
    queue.put(fast(batch).numpy())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif("avx512f" not in toolchain._processor(), reason="no other vectors")
def test_a_pickle_is_read_where_vectors_are_of_another_size():
    model, batch = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.3), torch.randn(5, 3, 6, 6)
    compiled = untimed(model, batch)
    compiled.flags = ("-O1", "-mavx2", "-mfma")  # what -march=native is there
    other = pickle.loads(pickle.dumps(compiled))
    assert other.machine.lanes == 8
    torch.testing.assert_close(other(batch), model(batch))


def test_a_default_device_or_type_changes_nothing():
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).eval(), torch.randn(2, 3, 5, 5)
    expected = model(batch)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out = sparse_compile(model, batch, threads=1)(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, expected)


def test_a_pipe_in_the_cache_is_not_waited_for(tmp_path):
    tmp_path.chmod(0o700)
    os.mkfifo(tmp_path / "kernels-key-0.so", 0o600)
    with pytest.raises(FileNotFoundError):
        toolchain._kept(tmp_path, "key")


def test_compiling_draws_no_random_numbers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    state = torch.get_rng_state()
    sparse_compile(model, torch.zeros(2, 3, 5, 5), threads=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_example_nor_batch_is_overwritten():
    model = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(3, 4, 3))
    batch = torch.randn(2, 3, 5, 5)
    before = batch.clone()
    fast = sparse_compile(model, batch)
    fast(batch)
    assert torch.equal(batch, before)
    torch.testing.assert_close(fast(batch), model(batch.clone()))


def test_an_empty_example_will_do():
    model = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 0.5)
    batch = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(sparse_compile(model, batch[:0])(batch), model(batch))


def test_a_fork_while_another_thread_computes():
    fast = sparse_compile(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5), threads=1)
    child = multiprocessing.get_context("fork").Process(target=fast, args=[torch.randn(1, 3, 5, 5)])
    with fast._lock:  # as that thread has it
        child.start()
    child.join(60)
    assert child.exitcode == 0


def test_tensors_without_memory_of_their_own_are_refused():
    fast = sparse_compile(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5))
    batch = torch.randn(1, 3, 5, 5)
    assert fast(batch).shape == fast(nn.Parameter(batch)).shape
    with pytest.raises(ValueError, match="`batch` must be a plain tensor, got a "):
        fast(FakeTensorMode().from_tensor(batch))
    with pytest.raises(ValueError, match="`batch` must be a plain tensor, got a "):
        fast(torch._neg_view(batch))


@pytest.mark.parametrize("inplace", [operator.iadd, operator.imul])
def test_what_is_overwritten_is_so_for_all_who_hold_it(inplace):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.same = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity()

        def forward(self, x):
            y = self.one(x)
            z = inplace(self.same(y), self.other(x))
            return y * z

    model, batch = prune(Held(), 0.5), torch.randn(3, 3, 6, 6)
    assert difference(model, batch) < 1e-5


def test_a_forked_child_has_threads_of_its_own():
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.3)
    batch = torch.randn(40, 3, 6, 6)
    fast = sparse_compile(model, batch, threads=2)
    expected = fast(batch)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(fast, batch, queue))
    child.start()
    assert np.array_equal(queue.get(timeout=20), expected.numpy())
    child.join(20)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Gates(nn.Module):
    def forward(self, x):
        return x * torch.tanh(x)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = nn.Hardtanh(-6, 6, inplace=True)

    def forward(self, x):
        x = x + x
        return torch.cat(
            [self.clip(x.flatten(1)), functional.adaptive_avg_pool2d(x, 1).flatten(1)], 1
        )


class Rows(nn.Module):
    def forward(self, x):
        return x * functional.max_pool2d(x, (1, 4))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softmax(1)), (2, 4, 4), "'_0_1', which is a Softmax"),
        (Branches(), (3,), "traceable by torch.fx"),
        (Gates(), (3,), "'tanh', which is a call of tanh"),
        (Views(), (2, 4, 4), "'_0_clip', which is in place on what 'add' holds as well"),
        (Rows(), (2, 4, 4), "shapes, (2, 4, 4) and (2, 4, 1)"),
        (Line(lambda m, x: x * m.a.bias), (3, 8, 8), "other than one number for each channel"),
        (Line(lambda m, x: 1 / x), (3, 8, 8), "'truediv', which is not of a tensor"),
        (Line(lambda m, x: functional.pad(x, (1, 1), value=1)), (3, 8, 8), "a call of pad"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            (2, 4, 4),
            "padding_mode='reflect'",
        ),
        (nn.Conv1d(2, 2, 1), (2, 4), "(batch, 2, 4)"),
        (nn.BatchNorm2d(2, track_running_stats=False), (2, 4, 4), "statistics from the batch"),
        (nn.MaxPool2d(2, return_indices=True), (2, 4, 4), "not one tensor"),
        (nn.Linear(4, 2), (3, 4), "(batch, 3, 4)"),
        (nn.Conv2d(2, 2, 1).double(), (2, 4, 4), "float64"),
    ],
)
def test_refuses_by_name(model, shape, words):
    with pytest.raises(ValueError, match=r"^`(model|weight)` ") as refused:
        sparse_compile(model, torch.randn(1, *shape))
    assert words in str(refused.value)


def test_refuses_other_shapes_and_types():
    fast = sparse_compile(nn.Conv2d(2, 2, 1), torch.randn(1, 2, 4, 4))
    for batch in (torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 4, 4).double()):
        with pytest.raises(ValueError, match=r"shape \(any, 2, 4, 4\)"):
            fast(batch)
    with pytest.raises(ValueError, match="`threads`"):
        sparse_compile(nn.Linear(2, 2), torch.zeros(1, 2), threads=0)


def test_refuses_hooks_as_those_of_torch_prune():
    model = nn.Sequential(nn.Linear(3, 3))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"got some on '0'; .* prune\.remove"):
        sparse_compile(model, torch.zeros(1, 3))


def test_a_wrong_result_is_refused(monkeypatch):
    def broken(network, *arguments, **settings):
        layer = network.layers[0]
        layer.bias[0] += 1
        return lower(network, *arguments, **settings)

    monkeypatch.setattr(runtime, "lower", broken)
    with pytest.raises(RuntimeError, match="got a difference of"):
        sparse_compile(nn.Conv2d(2, 2, 1), torch.randn(1, 2, 4, 4))


def test_without_a_compiler_the_model_stays_dense(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PRUNEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "load", toolchain.load.__wrapped__)
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="no-such-compiler.*set CXX"):
        dense = sparse_compile(model, torch.zeros(1, 3))
    batch = torch.randn(4, 3)
    assert torch.equal(dense(batch), model(batch))


FAST = ("-O0",)  # to build


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return toolchain.build(toolchain._compiler(), FAST, tmp_path_factory.mktemp("built"))


@pytest.fixture
def cache(monkeypatch, tmp_path, kernels):
    """An empty cache, nothing loaded before, and a compiler that takes no time."""
    monkeypatch.setenv("PRUNEFLOW_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(toolchain, "load", functools.cache(toolchain.load.__wrapped__))
    monkeypatch.setattr(toolchain, "build", lambda _, __, to: Path(shutil.copy(kernels, to)))
    return tmp_path / "kernels"


def from_where(monkeypatch):
    """Note the folders that libraries are loaded from."""
    folders = []

    def opened(path, *, open_=ctypes.CDLL):
        folders.append(Path(path).parent)
        return open_(path)

    monkeypatch.setattr(ctypes, "CDLL", opened)
    return folders


def swapped(struct, one, other):
    """The fields of a NumPy dtype, two of them at each other's place."""
    names = [{one: other, other: one}.get(name, name) for name in struct.names]
    kinds, offsets = zip(*(struct.fields[name][:2] for name in struct.names), strict=True)
    return np.dtype(
        {"names": names, "formats": kinds, "offsets": offsets, "itemsize": struct.itemsize}
    )


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_whose_fields_are_swapped_are_refused(name, cache, monkeypatch):
    fields = toolchain.load(FAST).pruneflow_fields().decode()
    struct = STRUCTS[name]
    for one, other in combinations(struct.names, 2):
        if struct[one].itemsize == struct[other].itemsize:
            monkeypatch.setitem(STRUCTS, name, swapped(struct, one, other))
            with pytest.raises(RuntimeError) as refused:
                toolchain._check_structs(fields)
            assert all(f"{name}.{each}" in str(refused.value) for each in (one, other))


def test_kernels_whose_fields_are_swapped_are_not_loaded(monkeypatch, tmp_path):
    kernels = shutil.copytree(toolchain.KERNELS, tmp_path / "kernels")
    header = kernels / "runtime.h"
    text = header.read_text()
    for before, after in (
        ("int64_t channels, pixels;", "int64_t pixels, channels;"),
        ("int32_t rows, columns, list;", "int32_t list, columns, rows;"),
        ("int64_t activations, panel;", "int64_t panel, activations;"),
    ):
        assert before in text
        text = text.replace(before, after)
    header.write_text(text)
    monkeypatch.setattr(toolchain, "KERNELS", kernels)
    library = toolchain.build(toolchain._compiler(), FAST, tmp_path)
    fields = r"Step\.channels, Step\.pixels, Tile\.rows, Tile\.list, Call\.activations, Call\.panel"
    with pytest.raises(RuntimeError, match=f"`{fields}` must lie in kernels/runtime.h"):
        toolchain._opened(library)


def test_a_library_is_built_once_and_only_its_user_may_touch_it(cache, monkeypatch):
    toolchain.load(FAST)
    (library,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(toolchain, "build", None)
    toolchain.load.cache_clear()
    toolchain.load(FAST)


def test_a_build_that_fails_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEFLOW_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(toolchain.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(toolchain.NoCompilerError, match="no-such-flag"):
        toolchain.load(("-O0", "--no-such-flag"))
    assert list(tmp_path.iterdir()) == []


def truncated(library):
    library.write_bytes(library.read_bytes()[:5000])


def emptied(library):
    library.write_bytes(b"")


def foreign(library):
    library.write_bytes(b"\x7fELF and something else")


def changed(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def of_others(library):
    library.chmod(0o666)


@pytest.mark.parametrize("damage", [truncated, emptied, foreign, changed, of_others])
def test_a_damaged_library_is_built_again(cache, damage, kernels):
    # It must not be damaged where this process has it in memory.
    library = toolchain._keep(kernels, cache, toolchain._key(toolchain._compiler(), FAST))
    inode = library.stat().st_ino
    damage(library)
    assert toolchain.load(FAST).pruneflow_lanes()
    (library,) = cache.iterdir()
    assert library.stat().st_ino != inode and library.stat().st_mode & 0o777 == 0o600
    assert library.stem.endswith(toolchain._digest(library.read_bytes()))


def test_what_a_killed_build_left_goes(cache):
    cache.mkdir(mode=0o700)
    left = cache / ".kernels-1.partial.so"
    left.touch()
    os.utime(left, (0, 0))
    toolchain.load(FAST)
    assert not left.exists()


def a_file(cache):
    cache.touch()


def open_to_all(cache):
    cache.mkdir()
    cache.chmod(0o777)


def a_file_above(cache):
    cache.parent.rmdir()
    cache.parent.touch()


@pytest.mark.parametrize("prepare", [a_file, open_to_all, a_file_above])
def test_where_nothing_can_be_kept_each_process_builds_its_own(cache, monkeypatch, prepare):
    prepare(cache)
    folders = from_where(monkeypatch)
    with pytest.warns(UserWarning, match="built anew.*set PRUNEFLOW_CACHE"):
        assert toolchain.load(FAST).pruneflow_lanes()
    assert folders and cache not in folders and not folders[-1].exists()


def test_a_library_of_another_user_is_not_loaded(cache, monkeypatch):
    toolchain.load(FAST)
    folders = from_where(monkeypatch)
    other = os.geteuid() + 1
    toolchain.load.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.warns(UserWarning, match="belongs to another user"):
        toolchain.load(FAST)
    assert cache not in folders


def test_a_cache_that_nothing_can_be_run_from(cache, monkeypatch):
    def refused(path, *, open_=ctypes.CDLL):
        if Path(path).parent == cache:
            raise OSError(f"{path}: failed to map segment from shared object")
        return open_(path)

    monkeypatch.setattr(ctypes, "CDLL", refused)
    with pytest.warns(UserWarning, match="failed to map segment"):
        assert toolchain.load(FAST).pruneflow_lanes()


def test_a_model_that_is_compiled_without_a_cache_gets_one_warning(cache):
    open_to_all(cache)
    model, batch = nn.Conv2d(3, 2, 3), torch.randn(2, 3, 5, 5)
    with pytest.warns(UserWarning, match="chmod go-w") as warned:
        fast = sparse_compile(model, batch)
    assert len(warned) == 1
    torch.testing.assert_close(fast(batch), model(batch))


def test_without_any_folder_the_model_stays_dense(cache, monkeypatch):
    cache.touch()
    monkeypatch.setattr(toolchain.tempfile, "tempdir", str(cache))
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=r"stays dense.*set TMPDIR") as warned:
        dense = sparse_compile(model, torch.zeros(1, 3))
    assert len(warned) == 1 and isinstance(dense, nn.Linear)


def test_without_a_home(cache, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PRUNEFLOW_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="home directory"):
        assert toolchain.load(FAST).pruneflow_lanes()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_may_build_at_once(cache):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=toolchain.load, args=(FAST,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    (library,) = cache.iterdir()
    assert library.stem.endswith(toolchain._digest(library.read_bytes()))


def test_more_threads_than_the_system_gives_are_refused():
    code = """
import resource, torch
from torch import nn
from pruneflow.deploy.runtime import toolchain
from pruneflow.deploy.runtime.model import sparse_compile
toolchain.load()
model, batch = nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 9, 9)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
try:
    sparse_compile(model, batch, threads=800)
except RuntimeError as error:
    print(error)
sparse_compile(model, batch, threads=2)
print("goes on")
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the limit is set beside what a process uses")
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "`threads` must be as few as" in run.stdout and "got 800" in run.stdout, run.stderr
    assert run.stdout.endswith("goes on\n")


@pytest.mark.skipif("avx512f" not in toolchain._processor(), reason="no AVX-512 to leave out")
def test_with_the_vectors_of_older_processors():
    flags = ("-O1", "-mavx2", "-mfma")
    model = prune(resnet(), 0.1)
    batch = torch.randn(11, 3, 32, 32)
    assert difference(model, batch, Choice(2, 4096, padded=True), flags=flags) < 1e-5


SANITIZED = (
    "-O1",
    "-g",
    "-march=native",
    "-fsanitize=address",
    "-fsanitize=signed-integer-overflow,alignment",
)


@pytest.fixture
def sanitizer():
    """The libraries that a process must load first to run sanitized code."""

    def library(name):
        command = [*toolchain._compiler(), f"-print-file-name={name}"]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return found.stdout.strip()

    if "/" not in library("libasan.so"):
        pytest.skip("the compiler has no address sanitizer")
    # The second as the first looks for what throws exceptions, which Python loads only later.
    return f"{library('libasan.so')} {library('libstdc++.so.6')}"


def test_reads_and_writes_only_what_it_may(sanitizer):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from itertools import product
import torch, test_runtime as t
from pruneflow.deploy.runtime.plans import Choice
torch.manual_seed(0)
ways = Choice(1, 100), Choice(2, 0, padded=True), Choice(0)
small = "residual", "dense", "depthwise", "gated"
cases = [*product(small, ways), ("resnet", Choice(matrix=True))]
for name, choice in cases:
    make, shape = t.NETWORKS[name]
    batch = torch.randn(9, *shape)
    off = t.difference(t.prune(make(), 0.3), batch, choice, flags=t.SANITIZED)
    assert off < 1e-5, (name, choice, off)
print("clean")
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        # Python and PyTorch keep what they allocate; looking for a compiler takes long.
        env={
            **os.environ,
            "LD_PRELOAD": sanitizer,
            "ASAN_OPTIONS": "detect_leaks=0",
            "CXX": shlex.join(toolchain._compiler()),
        },
    )
    assert run.stdout == "clean\n", run.stderr[-3000:]


def test_runs_what_was_shrunk_for_one_size_of_images():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    model[0].weight.data[2:] = 0
    images = torch.randn(2, 3, 1, 1)
    small = shrink(model, images, fixed_size=True)
    assert not isinstance(small, nn.Sequential)  # but a graph that asserts the size
    torch.testing.assert_close(sparse_compile(small, images)(images), model(images))
