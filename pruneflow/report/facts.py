"""The results of a run, in plain builtins: the contents of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from pruneflow.deploy.classifying import Description
from pruneflow.deploy.forms import Form
from pruneflow.pruning.plan import Plan
from pruneflow.pruning.schedules import pruned_count
from pruneflow.structure.sparsity import SparsityReport


class PlannedRound(TypedDict):
    """One line of the plan; None if the sparsity is not known in advance."""

    round: int
    at: int  # the epoch at whose start it prunes, counted from 0 over the whole run
    amount: float | None  # of the remaining weights
    sparsity: float | None  # cumulative
    kept: int | None


class DensePhase(TypedDict):
    """The network before the first round."""

    epochs: int
    val_accuracy: float
    test_accuracy: float


class FinishedRound(TypedDict):
    """The result of one round; accuracies are validation accuracies."""

    round: int
    epoch: int  # at whose start it pruned
    sparsity: float
    kept: int
    pruned_accuracy: float  # right after pruning
    fine_tuned_accuracy: float  # at the end of the round


class Final(TypedDict):
    """The final network."""

    sparsity: float
    removed: float  # fraction of the weights, or of their costs if the target counts those
    val_accuracy: float
    test_accuracy: float
    test_per_class: list[float | None]  # None: no test image of that class
    tested: int  # number of images tested, out of `test_pictures`
    test_pictures: int | None  # None: not known


class Size(TypedDict):
    """Number of parameters, multiply-adds for one sample, and file sizes in bytes."""

    parameters: int
    remaining: int
    compression_ratio: float
    multiply_adds: int
    remaining_multiply_adds: int
    theoretical_speedup: float
    dense_bytes: int
    model_bytes: int
    packed_bytes: int


class Layer(TypedDict):
    """One prunable tensor at the end of the run."""

    name: str
    shape: list[int]
    weights: int
    zeros: int


class Setup(TypedDict):
    """What is known of a run before any training."""

    recipe: str
    command: str
    seed: int
    versions: dict[str, str]
    commit: str | None
    machine: str
    target: float | None  # None: not known in advance
    scope: str
    schedule: str
    importance: str
    granularity: str
    costs: str | None  # None: targets count weights
    classes: list[str]
    plan: list[PlannedRound]
    classifier: Description  # what predicting takes beside the weights
    frozen: list[str]  # tensors left out because they do not train
    stay_dense: str  # the trained tensors that are not pruned, in words; empty if there are none


class Facts(Setup):
    """All that a report says about a run, in plain builtins; accuracies are fractions of 1."""

    dense: DensePhase
    dense_cached: bool
    rounds: list[FinishedRound]
    final: Final
    size: Size
    layers: list[Layer]
    example: str | None  # the class of example.png; None: there is no such file
    forms: list[Form]  # empty unless requested
    seconds: dict[str, float]  # stage -> wall time


def planned_rounds(plan: Plan, weights: int | None) -> list[PlannedRound]:
    """The rounds of a plan.

    Args:
        plan: The plan.
        weights: Number of prunable weights; None if targets count something else.
    """
    return [
        {
            "round": planned.number,
            "at": planned.at,
            "amount": planned.amount,
            "sparsity": planned.sparsity,
            "kept": None
            if planned.sparsity is None or weights is None
            else weights - pruned_count(planned.sparsity, weights),
        }
        for planned in plan.rounds
    ]


def size(report: SparsityReport, folder: Path) -> Size:
    """Remaining parameters and multiply-adds, and the file sizes in a run folder."""
    return {
        "parameters": report.parameters,
        "remaining": report.remaining,
        "compression_ratio": report.compression_ratio,
        "multiply_adds": report.multiply_adds or 0,
        "remaining_multiply_adds": report.remaining_multiply_adds or 0,
        "theoretical_speedup": report.theoretical_speedup or 1.0,
        "dense_bytes": (folder / "checkpoints/dense.safetensors").stat().st_size,
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "packed_bytes": (folder / "model.packed").stat().st_size,
    }


def removed(report: SparsityReport, costs: Mapping[str, float] | None) -> float:
    """The fraction that is gone of what the target counts.

    Args:
        report: Of the prunable weights.
        costs: Name -> cost of each weight of that tensor; None to count weights.
    """
    price = {layer.name: 1.0 if costs is None else costs[layer.name] for layer in report.layers}
    gone = sum(price[layer.name] * layer.zeros for layer in report.layers)
    return gone / sum(price[layer.name] * layer.weights for layer in report.layers)


def layers(report: SparsityReport) -> list[Layer]:
    """The prunable tensors."""
    return [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "weights": layer.weights,
            "zeros": layer.zeros,
        }
        for layer in report.layers
    ]
