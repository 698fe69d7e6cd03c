"""Iterative pruning with fine-tuning between rounds, on PyTorch Lightning and Hydra."""

from pruneflow.callback import PruningCallback
from pruneflow.checkpoint import SparsityCheckpoint
from pruneflow.checkpoint_io import AtomicCheckpointIO
from pruneflow.gradients import Gradients
from pruneflow.importance import Context, Given, Random, magnitude, taylor
from pruneflow.importers import fold, fold_model
from pruneflow.masking import InPlace, Reparametrize
from pruneflow.masks import MaskSet, compute_masks
from pruneflow.plan import Clock, Plan
from pruneflow.pruner import Pruner
from pruneflow.schedules import Compounding, Cubic, Explicit, Linear, OneShot
from pruneflow.sparsity import SparsityReport, sparsity, sparsity_report

__all__ = [
    "AtomicCheckpointIO",
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
    "magnitude",
    "sparsity",
    "sparsity_report",
    "taylor",
]
