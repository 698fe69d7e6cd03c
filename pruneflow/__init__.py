"""Iterative pruning with fine-tuning between rounds, on PyTorch Lightning and Hydra."""

from pruneflow.callback import PruningCallback
from pruneflow.importance import Context, Given, Random, magnitude
from pruneflow.masking import InPlace, Reparametrize
from pruneflow.masks import MaskSet, compute_masks
from pruneflow.plan import Clock, Plan
from pruneflow.pruner import Pruner
from pruneflow.schedules import Compounding, Cubic, Explicit, Linear, OneShot
from pruneflow.sparsity import SparsityReport, sparsity, sparsity_report

__all__ = [
    "Clock",
    "Compounding",
    "Context",
    "Cubic",
    "Explicit",
    "Given",
    "InPlace",
    "Linear",
    "MaskSet",
    "OneShot",
    "Plan",
    "Pruner",
    "PruningCallback",
    "Random",
    "Reparametrize",
    "SparsityReport",
    "compute_masks",
    "magnitude",
    "sparsity",
    "sparsity_report",
]
