"""Time of the exact global threshold beside a plain copy and beside PyTorch's own ways.

    python benchmarks/threshold.py [--weights 200e6] [--tensors 20] [--amount 0.5]
                                    [--joined 70e6] [--seconds 10]

Magnitude pruning of `--tensors` equal tensors. Each row is the median of five runs, or of as many
as fit in `--seconds` when five do not. PyTorch's ways take up to 60 bytes a weight, so they run on
the first tensors only, `--joined` weights of them, and their times are scaled up in proportion,
which flatters them, for they sort.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruneflow.pruning.threshold import Elementwise, find_cost_threshold, find_threshold, keep_masks

COPY = "copy into touched memory"
GLOBAL = "prune.global_unstructured"


def median_seconds(run: Callable[[], object], seconds: float, device: str) -> tuple[float, int]:
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < seconds):
        gc.collect()
        synchronize(device)
        start = time.perf_counter()
        held = run()
        synchronize(device)
        times.append(time.perf_counter() - start)
        del held
    return statistics.median(times), len(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copying(weights: list[Tensor], seconds: float, device: str) -> tuple[float, int]:
    targets = [weight.clone() for weight in weights]  # first touched here: that is the slow part

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)

    return median_seconds(copy, seconds, device)


def torch_global(weights: list[Tensor], k: int) -> list[nn.Module]:
    modules = []
    for weight in weights:
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        modules.append(module)
    prune.global_unstructured(
        [(module, "weight") for module in modules], prune.L1Unstructured, amount=k
    )
    return modules


def rows(weights: list[Tensor], k: int) -> dict[str, Callable[[], object]]:
    whole = [lambda weight=weight: weight.abs() for weight in weights]
    pieces = [Elementwise(torch.abs, weight) for weight in weights]
    costs = [10.0 ** (i % 3) for i in range(len(weights))]  # as multiply-adds of layers differ
    total = sum(cost * weight.numel() for cost, weight in zip(costs, weights, strict=True))
    goal = k / sum(weight.numel() for weight in weights) * total
    return {
        "clone": lambda: [weight.clone() for weight in weights],
        "find_threshold": lambda: find_threshold(pieces, k),
        "find_threshold + keep_masks": lambda: list(keep_masks(pieces, find_threshold(pieces, k))),
        "the same for a target of costs": lambda: list(
            keep_masks(pieces, find_cost_threshold(pieces, costs, goal))
        ),
        "the same, scores not in pieces": lambda: list(keep_masks(whole, find_threshold(whole, k))),
    }


def joined_rows(weights: list[Tensor], k: int) -> dict[str, Callable[[], object]]:
    return {
        "kthvalue of the joined scores": lambda: torch.cat(
            [weight.abs().view(-1) for weight in weights]
        ).kthvalue(k),
        GLOBAL: lambda: torch_global(weights, k),
    }


def table(device: str, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    numel = int(arguments.weights) // arguments.tensors
    weights = [
        torch.randn(numel, device=device).mul_(0.02).to(dtype) for _ in range(arguments.tensors)
    ]
    k = round(arguments.amount * numel * arguments.tensors)
    timed = {COPY: copying(weights, arguments.seconds, device)}
    for name, run in rows(weights, k).items():
        timed[name] = median_seconds(run, arguments.seconds, device)
    part = weights[: max(1, int(arguments.joined / numel))]
    for name, run in joined_rows(part, round(arguments.amount * numel * len(part))).items():
        seconds, runs = median_seconds(run, arguments.seconds, device)
        timed[name] = seconds * len(weights) / len(part), runs
    scores = [Elementwise(torch.abs, weight) for weight in weights]
    masks = keep_masks(scores, find_threshold(scores, k))
    kept = sum(int(mask.count_nonzero()) for mask in masks)
    print(f"\n{dtype} on {device}: {numel * arguments.tensors:,} weights, {k:,} to prune")
    print(f"{'':32}{'seconds':>9}{'runs':>6}{'/ copy':>9}{'/ clone':>9}{'torch /':>9}")
    copy, clone, ours = (timed[name][0] for name in (COPY, "clone", GLOBAL))
    for name, (seconds, runs) in timed.items():
        ratios = f"{seconds / copy:9.1f}{seconds / clone:9.1f}{ours / seconds:9.1f}"
        print(f"{name:32}{seconds:9.3f}{runs:6}{ratios}")
    if len(part) < len(weights):
        print(f"the last two: {numel * len(part):,} weights, scaled up")
    print(f"kept by keep_masks: {kept:,}, expected {numel * arguments.tensors - k:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=200e6, help="in all, default 200e6")
    parser.add_argument("--tensors", type=int, default=20, help="they are spread over, default 20")
    parser.add_argument("--amount", type=float, default=0.5, help="fraction pruned, default 0.5")
    parser.add_argument("--seconds", type=float, default=10, help="time for a row, default 10")
    parser.add_argument("--joined", type=float, default=70e6, help="most weights for PyTorch")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads (ours: one)")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            table(device, dtype, arguments)


if __name__ == "__main__":
    main()
