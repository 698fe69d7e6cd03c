"""What each way to hold masks costs, side by side: time, memory, checkpoints and the prune itself.

    python benchmarks/masking.py [--write] [--sparsity 0.98] [--rounds 5] [--blocks 21] [--steps 3]
                                 [--batch 128] [--device cpu]

All ways stay alive in one process and take turns in random order, a block of steps (or one round)
each, so that whatever else the machine does touches them alike. A step warms each block up, as the
way before has filled the caches with weights of its own. Medians over the blocks are printed, of
ratios to the dense block of the same turn; of time on the clock, and of the process's time on CPUs,
which says more where others use them too. `--write` puts the tables into README.md. `ModelPruning`
is Lightning's callback, driven by hand but for checkpoints.

Peak memory is what PyTorch's allocator has given out at most within one training step, weights,
momentum and masks included, as `torch.profiler` records it; a checkpoint is what
`Trainer.save_checkpoint` writes once all rounds have pruned, with the momentum of SGD.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelPruning
from tables import write_between
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from pruneflow import Compounding, InPlace, Pruner, PruningCallback, Reparametrize
from pruneflow.pruning.masking import Masking

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin: benchmarks/masking.py --write -->", "<!-- end -->"


class Training(L.LightningModule):
    """A network, one batch that it trains on, and the layers that every way prunes."""

    def __init__(self, network: nn.Module, batch: Tensor, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate
        self.register_buffer("batch", batch, persistent=False)
        self.register_buffer("labels", torch.arange(len(batch)) % 10, persistent=False)
        # By exact type: not the projections of MultiheadAttention, on which torch breaks.
        layers = {n: m for n, m in self.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
        self.names = [f"{name}.weight" for name in layers]
        self.slots = [(layer, "weight") for layer in layers.values()]

    def training_step(self, *_: Any) -> Tensor:
        return nn.functional.cross_entropy(self.network(self.batch), self.labels)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)

    def train_dataloader(self) -> list[int]:
        return [0]  # one step an epoch, on the batch above


def resnet18(batch: int) -> Training:
    return Training(
        torchvision.models.resnet18(num_classes=10), torch.randn(batch, 3, 32, 32), 1e-2
    )


def transformer(batch: int) -> Training:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(256, 10)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(tokens).mean(1))

    return Training(Tokens(), torch.randn(batch, 32, 256), 1e-3)


NETWORKS = {
    "ResNet-18 of torchvision on 32x32 pictures": resnet18,
    "A 4-layer transformer of width 256 on 32 tokens, attention's weights left out": transformer,
}
PruneRound = Callable[[int], object]


@dataclass(frozen=True)
class Way:
    """A way to hold masks.

    Args:
        rounds: Makes the function that prunes round 1, 2, … by hand.
        callbacks: Makes the callbacks that do the same in a Trainer, a round an epoch.
    """

    rounds: Callable[[Training, Optimizer, Compounding], PruneRound]
    callbacks: Callable[[Training, Compounding], list[L.Callback]]


def ours(masking: Callable[[], Masking]) -> Way:
    def rounds(model: Training, optimizer: Optimizer, schedule: Compounding) -> PruneRound:
        pruner = Pruner(model, include=model.names, optimizers=[optimizer], masking=masking())
        return lambda k: pruner.prune_to(schedule(k))

    return Way(
        rounds,
        lambda model, schedule: [PruningCallback(schedule, include=model.names, masking=masking())],
    )


def model_pruning(model: Training, schedule: Compounding) -> ModelPruning:
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=model.slots,
        amount=schedule.amount,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


def model_pruning_rounds(model: Training, _: Optimizer, schedule: Compounding) -> PruneRound:
    callback = model_pruning(model, schedule)
    callback.setup(L.Trainer(logger=False, enable_checkpointing=False), model, "fit")
    return lambda k: callback.apply_pruning(schedule.amount)


def prune_all(model: Training, schedule: Compounding) -> None:
    prune.global_unstructured(model.slots, prune.L1Unstructured, amount=schedule.amount)


class PruneAll(L.Callback):
    def __init__(self, schedule: Compounding) -> None:
        self.schedule = schedule

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < self.schedule.rounds:
            prune_all(pl_module, self.schedule)


WAYS = {
    "dense": Way(lambda *_: lambda k: None, lambda *_: []),
    "pruneflow InPlace": ours(InPlace),
    "pruneflow Reparametrize": ours(Reparametrize),
    "Lightning ModelPruning": Way(model_pruning_rounds, lambda *given: [model_pruning(*given)]),
    "torch.nn.utils.prune": Way(
        lambda model, _, schedule: lambda k: prune_all(model, schedule),
        lambda model, schedule: [PruneAll(schedule)],
    ),
}


@dataclass(frozen=True)
class Case:
    """What is measured: a network, the rounds, and where."""

    make: Callable[[int], Training]
    schedule: Compounding
    batch: int
    device: str

    def build(self, way: Way) -> tuple[Training, Optimizer, PruneRound]:
        torch.manual_seed(0)
        model = self.make(self.batch).to(self.device)
        optimizer = model.configure_optimizers()
        return model, optimizer, way.rounds(model, optimizer, self.schedule)


def step(model: Training, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model.training_step().backward()
    optimizer.step()


@dataclass(frozen=True)
class Seconds:
    """How long something took on the clock, and on CPUs."""

    clock: float
    cpu: float


def seconds(run: Callable[[], object]) -> Seconds:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return Seconds(time.perf_counter() - began, time.process_time() - cpu_began)


def times(
    case: Case, blocks: int, size: int
) -> tuple[dict[str, list[Seconds]], dict[str, list[Seconds]]]:
    """Each block of training steps at full sparsity, and each round."""
    built = {name: case.build(way) for name, way in WAYS.items()}
    steps: dict[str, list[Seconds]] = {name: [] for name in WAYS}
    rounds: dict[str, list[Seconds]] = {name: [] for name in WAYS}
    for model, optimizer, _ in built.values():
        step(model, optimizer)  # so that there is momentum to be pruned
    for k in range(1, case.schedule.rounds + 1):
        for name, (_, _, prune_round) in built.items():
            rounds[name].append(seconds(partial(prune_round, k)))
    order = random.Random(0)
    for _ in range(blocks):
        for name in order.sample(list(WAYS), len(WAYS)):
            model, optimizer, _ = built[name]
            step(model, optimizer)
            steps[name].append(
                seconds(lambda m=model, o=optimizer: [step(m, o) for _ in range(size)])
            )
    return steps, rounds


def peak_bytes(way: Way, case: Case) -> int:
    """The most that is allocated within a step, profiled from the start to know all that lives."""
    gc.collect()  # what an earlier profile saw made, this one would see freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model, optimizer, prune_round = case.build(way)
        for k in range(1, case.schedule.rounds + 1):
            prune_round(k)
        step(model, optimizer)
        with record_function("measured step"):
            step(model, optimizer)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "measured step")
    live = most = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live) if event.start_ns() >= began else live
    return most


def checkpoint_bytes(way: Way, case: Case) -> int:
    """Size of a checkpoint that a training writes in the epoch after the last round."""
    torch.manual_seed(0)
    model = case.make(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "training.ckpt")

        class Save(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.current_epoch == case.schedule.rounds:
                    trainer.save_checkpoint(path)

        L.Trainer(
            max_epochs=case.schedule.rounds + 1,
            callbacks=[*way.callbacks(model, case.schedule), Save()],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(model)
        return path.stat().st_size


def table(case: Case, blocks: int, size: int) -> str:
    sizes = {name: checkpoint_bytes(way, case) for name, way in WAYS.items()}
    peaks = {name: peak_bytes(way, case) for name, way in WAYS.items()}
    steps, rounds = times(case, blocks, size)
    rows = [
        "| | step, ms | to dense | CPU time | peak, MB | to dense | checkpoint, MB | to dense "
        "| s a round |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in WAYS:
        pairs = list(zip(steps[name], steps["dense"], strict=True))
        cells = [
            name,
            f"{1000 * statistics.median(block.clock for block in steps[name]) / size:.1f}",
            f"{statistics.median(block.clock / dense.clock for block, dense in pairs):.3f}",
            f"{statistics.median(block.cpu / dense.cpu for block, dense in pairs):.3f}",
            f"{peaks[name] / 1e6:.1f}",
            f"{peaks[name] / peaks['dense']:.3f}",
            f"{sizes[name] / 1e6:.1f}",
            f"{sizes[name] / sizes['dense']:.3f}",
            "-" if name == "dense" else f"{statistics.median(r.clock for r in rounds[name]):.3f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that lead to it")
    parser.add_argument("--blocks", type=int, default=21, help="blocks of training steps")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured in a block")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, batch "
        f"{arguments.batch}, {100 * arguments.sparsity:g} % sparse after {arguments.rounds} "
        f"rounds, medians of {arguments.blocks} blocks of {arguments.steps} steps.\n"
    )
    schedule = Compounding(target=arguments.sparsity, rounds=arguments.rounds)
    for title, make in NETWORKS.items():
        case = Case(make, schedule, arguments.batch, arguments.device)
        text += f"\n{title}:\n\n{table(case, arguments.blocks, arguments.steps)}\n"
    print(text)
    if arguments.write:
        write_between(README, BEGIN, END, text)


if __name__ == "__main__":
    main()
