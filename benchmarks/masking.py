"""Time of one training step under each way to hold masks, as a ratio to dense training.

    python benchmarks/masking.py [--sparsity 0.98] [--rounds 15] [--batch 128] [--device cpu]

All variants stay alive in one process and take turns, one step each, so that whatever else the
machine does touches them alike; the median over the turns is printed. `ModelPruning` is Lightning's
callback, driven by hand; its three rounds leave what a training leaves: one hook and one mask.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

from pruneflow import InPlace, Pruner, Reparametrize

Network = Callable[[], tuple[nn.Module, Callable[[int, str], Tensor], float]]
ROUNDS = (0.5, 0.8)


def resnet18() -> tuple[nn.Module, Callable[[int, str], Tensor], float]:
    network = torchvision.models.resnet18(num_classes=10)
    return network, lambda batch, device: torch.randn(batch, 3, 32, 32, device=device), 1e-2


def transformer() -> tuple[nn.Module, Callable[[int, str], Tensor], float]:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(256, 10)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(tokens).mean(1))

    return Tokens(), lambda batch, device: torch.randn(batch, 32, 256, device=device), 1e-3


def linears(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """What every variant prunes: not MultiheadAttention, on which torch breaks."""
    return [
        (module, "weight") for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)
    ]


def ours(masking: type) -> Callable[[nn.Module, torch.optim.Optimizer, float], None]:
    def hold(network: nn.Module, optimizer: torch.optim.Optimizer, sparsity: float) -> None:
        names = {id(module): name for name, module in network.named_modules()}
        include = [f"{names[id(module)]}.weight" for module, _ in linears(network)]
        pruner = Pruner(network, include=include, optimizers=[optimizer], masking=masking())
        for target in (*ROUNDS, sparsity):
            pruner.prune_to(target)

    return hold


def model_pruning(network: nn.Module, optimizer: torch.optim.Optimizer, sparsity: float) -> None:
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=linears(network),
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )
    module = L.LightningModule()
    module.network = network
    callback.setup(L.Trainer(logger=False, enable_checkpointing=False), module, "fit")
    for amount in amounts(sparsity):
        callback.apply_pruning(amount)


def torch_prune(network: nn.Module, optimizer: torch.optim.Optimizer, sparsity: float) -> None:
    for amount in amounts(sparsity):
        prune.global_unstructured(linears(network), prune.L1Unstructured, amount=amount)


def amounts(sparsity: float) -> list[float]:
    targets = (0.0, *ROUNDS, sparsity)
    return [1 - (1 - b) / (1 - a) for a, b in pairwise(targets)]


VARIANTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, float], None]] = {
    "dense": lambda network, optimizer, sparsity: None,
    "pruneflow InPlace": ours(InPlace),
    "pruneflow Reparametrize": ours(Reparametrize),
    "Lightning ModelPruning": model_pruning,
    "torch.nn.utils.prune": torch_prune,
}


def measure(make: Network, arguments: argparse.Namespace) -> dict[str, list[float]]:
    steps = {}
    for name, hold in VARIANTS.items():
        torch.manual_seed(0)
        network, batch_of, rate = make()
        network.to(arguments.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        hold(network, optimizer, arguments.sparsity)
        batch = batch_of(arguments.batch, arguments.device)
        labels = torch.arange(arguments.batch, device=arguments.device) % 10
        steps[name] = (network, optimizer, batch, labels)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(arguments.rounds + 2):
        for name, (network, optimizer, batch, labels) in steps.items():
            began = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), labels).backward()
            optimizer.step()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first two warm caches and allocators up
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=15, help="turns that are measured")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    for make in (resnet18, transformer):
        times = measure(make, arguments)
        dense = times["dense"]
        print(f"\n{make.__name__}, one training step\n")
        print("| variant | median ms | ratio to dense (median of turns) |")
        print("|---|---:|---:|")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, dense, strict=True))
            print(f"| {name} | {1000 * statistics.median(values):.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
