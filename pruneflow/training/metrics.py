"""What a PruningCallback logs: sparsity per tensor and in total, and the round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.pruner import Pruner

# Of what is logged in one epoch the last counts, and masks only grow; processes agree on it.
_PER_EPOCH: Any = {
    "on_step": False,
    "on_epoch": True,
    "reduce_fx": "max",
    "sync_dist": True,
    "batch_size": 1,
}


class Logged:
    """The figures of one callback, measured when they change and logged in every epoch.

    Attributes:
        epoch: In which they were logged last; None if not in this fit.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._round, self._pruned, self._weights = 0, 0, 0
        self._per_tensor: dict[str, float] = {}

    def measure(self, pruner: Pruner, round: int) -> None:
        """Note what is pruned by now."""
        masks = pruner.weight_masks
        self._round, self._pruned, self._weights = round, masks.pruned, pruner.weights
        self._per_tensor = {
            f"sparsity/{name}": MaskSet({name: mask}).sparsity for name, mask in masks.items()
        }

    def log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, every: Sequence[Logged]
    ) -> None:
        """Log all of it, with totals of `every` callback: the last of these logs counts."""
        self.epoch = trainer.current_epoch
        if not trainer.barebones:  # which logs nothing, and warns of every log
            pl_module.log_dict(self._per_tensor, **_PER_EPOCH)
            self.log_totals(pl_module, every)

    def log_totals(
        self, pl_module: L.LightningModule, every: Sequence[Logged], logger: bool | None = None
    ) -> None:
        """Log the sparsity of what all of these callbacks prune, and the round reached."""
        pruned = sum(logged._pruned for logged in every)
        weights = sum(logged._weights for logged in every)
        reached = max(logged._round for logged in every)
        totals = {"sparsity": pruned / weights, "round": float(reached)}
        pl_module.log_dict(totals, prog_bar=True, logger=logger, **_PER_EPOCH)
