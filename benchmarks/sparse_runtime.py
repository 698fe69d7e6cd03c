"""The sparse CPU runtime beside dense runtimes: PyTorch, torch.compile, ONNX Runtime, OpenVINO.

    python benchmarks/sparse_runtime.py --checkpoint model.safetensors
    python benchmarks/sparse_runtime.py --networks resnet50 --batches 1 4 --only sparse OpenVINO

With `--checkpoint`, the state_dict of a trained torchvision ResNet-18 of 10 classes, whose layers
are as sparse as the pruning left them; a ResNet-18 of random weights that is 98 % sparse in each
layer, both on pictures of 32x32; and others, 90 % but for depthwise convolutions, of 224x224.

All run the same network on the same pictures in one process and take turns, so that whatever else
the machine does touches them alike; the median of the turns is printed, in milliseconds for a
batch. The dense runtimes are given the model as it is, zeros in place.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from pruneflow import sparsity_report
from pruneflow.deploy.extras import require
from pruneflow.deploy.runtime import sparse_compile
from pruneflow.deploy.shrink import shrink

Run = Callable[[Tensor], object]


def pruned(name: str, sparsity: float) -> nn.Module:
    """Random weights, equally sparse in each layer."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) == 1:
            module.weight.data[torch.rand_like(module.weight) < sparsity] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def trained(checkpoint: str) -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(load_file(checkpoint))
    return model


def eager(model: nn.Module, _: Tensor, threads: int) -> Run:
    torch.set_num_threads(threads)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return lambda batch: channels_last(batch.to(memory_format=torch.channels_last))


def compiled(model: nn.Module, example: Tensor, threads: int) -> Run:
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64  # once for each batch size
    run = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last), dynamic=False)
    run(example)
    return lambda batch: run(batch.to(memory_format=torch.channels_last))


@functools.cache  # ONNX Runtime and OpenVINO run the same
def to_onnx(model: nn.Module, size: int) -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        # A batch of one would be taken for a constant.
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=(batch,),
            verbose=False,
        )
        program.save(written)
    return written.getvalue()


def onnx_runtime(model: nn.Module, example: Tensor, threads: int) -> Run:
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        to_onnx(model, example.shape[-1]), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch.numpy()})


def open_vino(model: nn.Module, example: Tensor, threads: int) -> Run:
    openvino = require("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(
        openvino.convert_model(io.BytesIO(to_onnx(model, example.shape[-1]))), "CPU", settings
    )
    return lambda batch: compiled(batch.numpy())


def sparse(model: nn.Module, example: Tensor, threads: int) -> Run:
    return sparse_compile(model, example, threads=threads)


def shrunk(model: nn.Module, example: Tensor, threads: int) -> Run:
    return sparse_compile(shrink(model, example), example, threads=threads)


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "eager channels_last": eager,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": open_vino,
    "sparse": sparse,
    "sparse, shrunk first": shrunk,
}
DENSE = list(RUNTIMES)[:4]
OTHERS = ("resnet50", "mobilenet_v3_large", "efficientnet_b0")
SECONDS = 15.0  # for a batch size, unless three turns take longer


REST = 0.04  # seconds, for threads of ONNX Runtime go on spinning for 30 ms
BURST = 0.03  # seconds of one turn, after half as many in which the caches become its own


def burst(run: Run, batch: Tensor, seconds: float) -> float:
    """Milliseconds of a call, of as many as fill the time."""
    calls, began = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - began < seconds:
        run(batch)
        calls += 1
    return (time.perf_counter() - began) / calls * 1000


def milliseconds(runs: dict[str, Run], batch: Tensor, turns: int) -> dict[str, float]:
    for run in runs.values():  # compiles, where a batch of a new size is compiled for
        run(batch)
    passed: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            time.sleep(REST)
            burst(run, batch, BURST / 2)
            passed[name].append(burst(run, batch, BURST))
    return {name: statistics.median(times) for name, times in passed.items()}


def compare(model: nn.Module, size: int, arguments: argparse.Namespace) -> None:
    picture = torch.randn(1, 3, size, size)
    print(str(sparsity_report(model, picture)).splitlines()[-1])
    names = arguments.only
    ours = [name for name in names if name not in DENSE]
    # Each of ours has a column: the better of two would flatter itself with the noise.
    headings = ["batch", *names, *(f"{name}: times the fastest dense" for name in ours)]
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    runs = {}
    for name in names:
        runs[name] = RUNTIMES[name](model, picture, arguments.threads)
    for batch_size in arguments.batches:
        if size > 32 and batch_size > 16:
            continue
        batch = torch.randn(batch_size, 3, size, size)
        times = milliseconds(runs, batch, arguments.turns)
        fastest = min((times[name] for name in names if name in DENSE), default=float("nan"))
        row = [f"{batch_size}", *(f"{times[name]:.2f}" for name in names)]
        row += [f"{fastest / times[name]:.2f}" for name in ours]
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="of a trained ResNet-18, safetensors")
    parser.add_argument("--networks", nargs="+", default=["trained", "resnet18", *OTHERS])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=[*DENSE, "sparse"])
    arguments = parser.parse_args()
    began = time.perf_counter()
    with torch.inference_mode():
        if "trained" in arguments.networks and arguments.checkpoint:
            print(f"ResNet-18, {arguments.checkpoint}")
            compare(trained(arguments.checkpoint).eval(), 32, arguments)
        if "resnet18" in arguments.networks:
            print("ResNet-18, each layer 98 %")
            compare(pruned("resnet18", 0.98).eval(), 32, arguments)
        for name in OTHERS:
            if name in arguments.networks:
                print(f"{name}, 224x224, each layer 90 %")
                compare(pruned(name, 0.9).eval(), 224, arguments)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
