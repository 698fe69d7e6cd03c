"""What a run found, in plain builtins: the contents of report.json."""

from __future__ import annotations

from typing import TypedDict

from pruneflow.deploy.forms import Form


class PlannedRound(TypedDict):
    """One line of the plan; None where the sparsity is not known ahead."""

    round: int
    at: int  # the epoch at whose start it prunes, from 0 over the whole run
    amount: float | None  # of the remaining weights
    sparsity: float | None  # cumulative
    kept: int | None


class DensePhase(TypedDict):
    """The network before the first round."""

    epochs: int
    val_accuracy: float
    test_accuracy: float


class FinishedRound(TypedDict):
    """What one round did; accuracies are validation accuracies."""

    round: int
    epoch: int  # at whose start it pruned
    sparsity: float
    kept: int
    pruned_accuracy: float  # right after pruning
    fine_tuned_accuracy: float  # at the end of the round


class Final(TypedDict):
    """The network that the run hands over."""

    sparsity: float
    removed: float  # fraction of what the target counts: of the weights, or of their costs
    val_accuracy: float
    test_accuracy: float
    test_per_class: list[float]


class Size(TypedDict):
    """Counts over all parameters; multiply-adds for one sample; bytes of the files."""

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


class Facts(TypedDict):
    """All that a report says about a run, in plain builtins; accuracies are fractions of 1."""

    recipe: str
    command: str
    seed: int
    versions: dict[str, str]
    commit: str | None
    machine: str
    target: float | None  # None: not known ahead
    scope: str
    schedule: str
    importance: str
    granularity: str
    costs: str | None  # None: targets count weights
    classes: list[str]
    plan: list[PlannedRound]
    dense: DensePhase
    dense_cached: bool
    rounds: list[FinishedRound]
    final: Final
    size: Size
    layers: list[Layer]
    forms: list[Form]  # empty where none were asked for
    seconds: dict[str, float]  # stage -> wall time
    frozen: list[str]  # tensors left out because they do not train
