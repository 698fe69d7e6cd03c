"""The sparse CPU runtime beside dense runtimes: PyTorch, torch.compile, ONNX Runtime, OpenVINO.

    python benchmarks/sparse_runtime.py [--checkpoint model.safetensors] [--network resnet18]
                                        [--size 32] [--sparsity 0.98] [--batches 1 16 64 128]
                                        [--threads 2] [--turns 21] [--only sparse OpenVINO]

All run the same network on the same pictures in one process and take turns, so that whatever else
the machine does touches them alike; the median of the turns is printed, in milliseconds for a
batch. The dense runtimes are given the model as it is, zeros in place. With `--checkpoint`, the
state_dict of a trained model; without it, random weights pruned to the same sparsity in each layer.
"""

from __future__ import annotations

import argparse
import copy
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


def network(name: str, checkpoint: str | None, sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint))
        return model.eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data[torch.rand_like(module.weight) < sparsity] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def eager(model: nn.Module, _: Tensor, threads: int) -> Run:
    torch.set_num_threads(threads)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return lambda batch: channels_last(batch.to(memory_format=torch.channels_last))


def compiled(model: nn.Module, example: Tensor, threads: int) -> Run:
    torch.set_num_threads(threads)
    run = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last), dynamic=False)
    run(example)
    return lambda batch: run(batch.to(memory_format=torch.channels_last))


def to_onnx(model: nn.Module, example: Tensor) -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        # A batch of one would be taken for a constant.
        program = torch.onnx.export(
            model, (example.expand(2, -1, -1, -1),), dynamo=True, dynamic_shapes=(batch,)
        )
        program.save(written)
    return written.getvalue()


def onnx_runtime(model: nn.Module, example: Tensor, threads: int) -> Run:
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        to_onnx(model, example[:1]), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch.numpy()})


def open_vino(model: nn.Module, example: Tensor, threads: int) -> Run:
    openvino = require("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(
        openvino.convert_model(io.BytesIO(to_onnx(model, example[:1]))), "CPU", settings
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
DENSE = 4


def milliseconds(runs: dict[str, Run], batch: Tensor, turns: int) -> dict[str, float]:
    passed: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 2):
        for name, run in runs.items():
            time.sleep(0.003)  # until the threads of the one before have stopped to spin
            run(batch)
            repeats = 1 if len(batch) > 8 else 10
            began = time.perf_counter()
            for _ in range(repeats):
                run(batch)
            if turn >= 2:
                passed[name].append((time.perf_counter() - began) / repeats * 1000)
    return {name: statistics.median(times) for name, times in passed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    arguments = parser.parse_args()
    model = network(arguments.network, arguments.checkpoint, arguments.sparsity)
    picture = torch.randn(1, 3, arguments.size, arguments.size)
    print(str(sparsity_report(model, picture)).splitlines()[-1])
    dense_names = [name for name in arguments.only if name in list(RUNTIMES)[:DENSE]]
    ours = [name for name in arguments.only if name not in dense_names]
    # Each of ours has a column: the better of two would flatter itself with the noise.
    headings = [*arguments.only, *(f"{name}: times the fastest dense" for name in ours)]
    print(f"| {'batch':>6} | " + " | ".join(headings) + " |")
    print("|---" * (len(headings) + 1) + "|")
    with torch.inference_mode():
        runs = {}
        for name in arguments.only:
            runs[name] = RUNTIMES[name](model, picture, arguments.threads)
        for size in arguments.batches:
            batch = torch.randn(size, *picture.shape[1:])
            times = milliseconds(runs, batch, arguments.turns)
            fastest = min((times[name] for name in dense_names), default=float("nan"))
            row = [f"{times[name]:.2f}" for name in arguments.only]
            row += [f"{fastest / times[name]:.2f}" for name in ours]
            print(f"| {size:>6} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
