"""Iterative pruning with fine-tuning between rounds, on PyTorch Lightning and Hydra."""

from typing import TYPE_CHECKING

from pruneflow.pruning.distribution import PerLayer, erk, uniform_plus
from pruneflow.pruning.evidence import gradients, input_norms
from pruneflow.pruning.granularity import NM, Block, Channels, Granularity, Weights
from pruneflow.pruning.importance import Context, Given, Random, lamp, magnitude, taylor, wanda
from pruneflow.pruning.masking import InPlace, Reparametrize
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.plan import Clock, Epochs, Plan, Steps
from pruneflow.pruning.pruner import Pruner
from pruneflow.pruning.schedules import Compounding, Cubic, Explicit, Linear, OneShot, Rounds
from pruneflow.pruning.selection import compute_masks
from pruneflow.structure.channels.removal import remove_channels
from pruneflow.structure.costs import Costs, latency, multiply_adds
from pruneflow.structure.folding import fold, fold_model
from pruneflow.structure.layer_types import register_layer
from pruneflow.structure.sparsity import SparsityReport, sparsity, sparsity_report

if TYPE_CHECKING:
    from pruneflow.deploy.classifying import load_classifier
    from pruneflow.training.calibration import Calibration, Gradients
    from pruneflow.training.callback import PruningCallback
    from pruneflow.training.checkpoint import SparsityCheckpoint
    from pruneflow.training.checkpoint_io import AtomicCheckpointIO
else:
    from importlib import import_module as _import_module

    # Lightning takes seconds to import: what needs it is looked up when it is first asked for.
    _IN_LIGHTNING = {
        "AtomicCheckpointIO": "training.checkpoint_io",
        "Calibration": "training.calibration",
        "Gradients": "training.calibration",
        "PruningCallback": "training.callback",
        "SparsityCheckpoint": "training.checkpoint",
        "load_classifier": "deploy.classifying",
    }

    def __getattr__(name):
        if name not in _IN_LIGHTNING:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_import_module(f"{__name__}.{_IN_LIGHTNING[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_IN_LIGHTNING})


__all__ = [
    "NM",
    "AtomicCheckpointIO",
    "Block",
    "Calibration",
    "Channels",
    "Clock",
    "Compounding",
    "Context",
    "Costs",
    "Cubic",
    "Epochs",
    "Explicit",
    "Given",
    "Gradients",
    "Granularity",
    "InPlace",
    "Linear",
    "MaskSet",
    "OneShot",
    "PerLayer",
    "Plan",
    "Pruner",
    "PruningCallback",
    "Random",
    "Reparametrize",
    "Rounds",
    "SparsityCheckpoint",
    "SparsityReport",
    "Steps",
    "Weights",
    "compute_masks",
    "erk",
    "fold",
    "fold_model",
    "gradients",
    "input_norms",
    "lamp",
    "latency",
    "load_classifier",
    "magnitude",
    "multiply_adds",
    "register_layer",
    "remove_channels",
    "sparsity",
    "sparsity_report",
    "taylor",
    "uniform_plus",
    "wanda",
]
