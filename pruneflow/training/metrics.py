"""Metrics of a PruningCallback: sparsity per tensor and in total, and the round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.pruner import Pruner

# Sparsity and round never decrease, so the maximum of an epoch is the last value.
_PER_EPOCH: Any = {
    "on_step": False,
    "on_epoch": True,
    "reduce_fx": "max",
    "sync_dist": True,
    "batch_size": 1,
}


class SparsityMetrics:
    """Metrics of one callback, measured when they change and logged in every epoch.

    Attributes:
        epoch: Epoch in which they were last logged; None if not in this fit.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._round, self._pruned, self._weights = 0, 0, 0
        self._per_tensor: dict[str, float] = {}

    def measure(self, pruner: Pruner, round: int) -> None:
        """Measure the current sparsity."""
        masks = pruner.weight_masks
        self._round, self._pruned, self._weights = round, masks.pruned, pruner.weights
        self._per_tensor = {
            f"sparsity/{name}": MaskSet({name: mask}).sparsity for name, mask in masks.items()
        }

    def log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, every: Sequence[SparsityMetrics]
    ) -> None:
        """Log the sparsity per tensor of this callback, and the totals of `every` callback."""
        self.epoch = trainer.current_epoch
        if not trainer.barebones:  # a barebones Trainer logs nothing and warns
            pl_module.log_dict(self._per_tensor, **_PER_EPOCH)
            self.log_totals(pl_module, every)

    def log_totals(
        self,
        pl_module: L.LightningModule,
        every: Sequence[SparsityMetrics],
        logger: bool | None = None,
    ) -> None:
        """Log the total sparsity of all callbacks, and the latest round."""
        pruned = sum(metrics._pruned for metrics in every)
        weights = sum(metrics._weights for metrics in every)
        latest = max(metrics._round for metrics in every)
        totals = {"sparsity": pruned / weights, "round": float(latest)}
        pl_module.log_dict(totals, prog_bar=True, logger=logger, **_PER_EPOCH)
