"""Every option of a method, one row each, for the shared suite of test_settings.py.

A new option is one row here. `test_nothing_is_missing` fails for a public name or a YAML option
that has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from pruneflow import (
    NM,
    Block,
    Channels,
    Compounding,
    Cubic,
    Epochs,
    Explicit,
    Given,
    InPlace,
    Linear,
    OneShot,
    PerLayer,
    Random,
    Reparametrize,
    Rounds,
    Steps,
    Weights,
    erk,
    lamp,
    latency,
    magnitude,
    multiply_adds,
    taylor,
    uniform_plus,
    wanda,
)

IMAGE = torch.zeros(1, 4, 6, 6)


@dataclass(frozen=True)
class Setting:
    """An option.

    Args:
        argument: Of PruningCallback and Pruner.
        name: The public name, or words for what has none.
        make: Makes it.
        yaml: How it is chosen on the command line, or in `pruning` of a recipe; None for what can
            be chosen in Python alone.
        other: Makes one with other settings, which is another method to a run that resumes.
        sharded: Whether `fully_shard`ed weights can be pruned so.
        beside: What it takes beside it.
    """

    argument: str
    name: str
    make: Callable[[], Any]
    yaml: str | None = None
    other: Callable[[], Any] | None = None
    sharded: bool = True
    beside: dict[str, Any] | None = None

    def __str__(self):
        return f"{self.argument}={self.name}"

    @property
    def arguments(self):
        """What PruningCallback and Pruner are given."""
        return {**(self.beside or {}), self.argument: self.make()}


def halving(round):
    return 1 - 0.7**round


def given_scores():
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) for n, p in Net().named_parameters()}


SETTINGS = [
    Setting("importance", "magnitude", lambda: magnitude, "importance=magnitude"),
    Setting("importance", "taylor", lambda: taylor, "importance=taylor"),
    Setting("importance", "wanda", lambda: wanda, "importance=wanda"),
    Setting("importance", "lamp", lamp, "importance=lamp", lambda: lamp(taylor)),
    Setting("importance", "Random", lambda: Random(3), "importance=random", lambda: Random(4)),
    Setting("importance", "Given", lambda: Given(given_scores())),
    Setting(
        "importance",
        "a method of torch",
        lambda: prune.L1Unstructured,
        other=lambda: prune.RandomUnstructured,
        sharded=False,
    ),
    Setting(
        "importance",
        "a structured method of torch",
        lambda: partial(prune.LnStructured, n=2, dim=0),
        "importance=ln_structured",
        lambda: partial(prune.LnStructured, n=1, dim=0),
        sharded=False,
        beside={"scope": "layer"},
    ),
    Setting("scope", "global", lambda: "global", "pruning.scope=global"),
    Setting("scope", "layer", lambda: "layer", "pruning.scope=layer"),
    Setting("scope", "erk", lambda: erk, "pruning.scope=erk"),
    Setting("scope", "uniform_plus", lambda: uniform_plus, "pruning.scope=uniform_plus"),
    Setting(
        "scope",
        "PerLayer",
        lambda: PerLayer({"conv1*": 0.25, "conv2*": 0.625, "fc*": 0.5}),
        "scope: {_target_: pruneflow.PerLayer, "
        "sparsities: {'conv1*': 0.25, 'conv2*': 0.625, 'fc*': 0.5}}",
        lambda: PerLayer({"*": 0.5}),
    ),
    Setting(
        "scope",
        "named groups",
        lambda: {"convolutions": ["[!f]*"], "head": ["fc*"]},
        "scope: {convolutions: ['[!f]*'], head: ['fc*']}",
        lambda: {"all": ["*"]},
    ),
    Setting("granularity", "Weights", Weights, "granularity=unstructured"),
    Setting("granularity", "NM", lambda: NM(2, 4), "granularity=two_of_four", lambda: NM(1, 4)),
    Setting(
        "granularity",
        "Block",
        lambda: Block(1, 4),
        "granularity=blocks",
        lambda: Block(2, 4),
        sharded=False,
    ),
    Setting(
        "granularity", "Channels", lambda: Channels(IMAGE), "granularity=channels", sharded=False
    ),
    Setting(
        "costs",
        "multiply_adds",
        lambda: multiply_adds,
        "costs=multiply_adds",
        lambda: partial(multiply_adds, power=0.9),
    ),
    Setting("costs", "multiply_adds and a power", lambda: partial(multiply_adds, power=0.9)),
    Setting("costs", "latency", lambda: latency, "costs=latency"),
    Setting("schedule", "OneShot", lambda: OneShot(0.5), "schedule=one_shot"),
    Setting("schedule", "Compounding", lambda: Compounding(0.5, rounds=2), "schedule=compounding"),
    Setting("schedule", "Linear", lambda: Linear(0.5, 2), "schedule=linear"),
    Setting("schedule", "Cubic", lambda: Cubic(0.5, 2), "schedule=cubic"),
    Setting("schedule", "Explicit", lambda: Explicit([0.3, 0.5]), "schedule=explicit"),
    Setting("schedule", "a list", lambda: [0.3, 0.5]),
    Setting("schedule", "a function", lambda: halving),
    Setting(
        "schedule",
        "Rounds",
        lambda: Rounds(2),
        sharded=False,
        beside={"importance": prune.L1Unstructured(0.3)},
    ),
    Setting("masking", "InPlace", InPlace, "masking=in_place"),
    Setting("masking", "Reparametrize", Reparametrize, "masking=reparametrize", sharded=False),
    Setting("clock", "Epochs", lambda: Epochs(0, every=1)),
    Setting("clock", "Steps", lambda: Steps(0, every=2)),
]

NO_OPTIONS = {
    *(
        "AtomicCheckpointIO",
        "Calibration",
        "Clock",
        "Context",
        "Costs",
        "Gradients",
        "Granularity",
        "MaskSet",
    ),
    *("Plan", "Pruner", "PruningCallback", "SparsityCheckpoint", "SparsityReport"),
    *("compute_masks", "fold", "fold_model", "gradients", "input_norms", "load_classifier"),
    *("register_layer", "remove_channels", "sparsity", "sparsity_report"),
}
"""Public names that are no options of a method."""


class Net(nn.Module):
    """A small network that every option can prune."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        hidden = self.norm(self.conv1(images)).relu()
        return self.fc(self.conv2(hidden).relu().mean((2, 3)))


def batches(count=3):
    """Pictures whose class is their brightest channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 16, 4, 6, 6, generator=generator)
    return [(each, each.mean((2, 3)).argmax(1)) for each in images]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
