"""Iterative pruning with fine-tuning between rounds, on PyTorch Lightning and Hydra."""

from typing import TYPE_CHECKING

from pruneflow.channels.coupling import remove_channels
from pruneflow.costs import latency, multiply_adds
from pruneflow.granularity import NM, Block, Channels
from pruneflow.importance import Context, Given, Random, magnitude, taylor
from pruneflow.importers import fold, fold_model
from pruneflow.layer_types import register_layer
from pruneflow.masking import InPlace, Reparametrize
from pruneflow.masks import MaskSet, compute_masks
from pruneflow.plan import Clock, Plan
from pruneflow.pruner import Pruner
from pruneflow.schedules import Compounding, Cubic, Explicit, Linear, OneShot
from pruneflow.sparsity import SparsityReport, sparsity, sparsity_report

if TYPE_CHECKING:
    from pruneflow.callback import PruningCallback
    from pruneflow.checkpoint import SparsityCheckpoint
    from pruneflow.checkpoint_io import AtomicCheckpointIO
    from pruneflow.classifying import load_classifier
    from pruneflow.gradients import Gradients
else:
    from importlib import import_module as _import_module

    # Lightning takes seconds to import: what needs it is looked up when it is first asked for.
    _IN_LIGHTNING = {
        "AtomicCheckpointIO": "checkpoint_io",
        "Gradients": "gradients",
        "PruningCallback": "callback",
        "SparsityCheckpoint": "checkpoint",
        "load_classifier": "classifying",
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
    "Channels",
    "Clock",
    "Compounding",
    "Context",
    "Cubic",
    "Explicit",
    "Given",
    "Gradients",
    "InPlace",
    "Linear",
    "MaskSet",
    "OneShot",
    "Plan",
    "Pruner",
    "PruningCallback",
    "Random",
    "Reparametrize",
    "SparsityCheckpoint",
    "SparsityReport",
    "compute_masks",
    "fold",
    "fold_model",
    "latency",
    "load_classifier",
    "magnitude",
    "multiply_adds",
    "register_layer",
    "remove_channels",
    "sparsity",
    "sparsity_report",
    "taylor",
]
