"""Collect evidence for importance scores from the training batches of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor

from pruneflow.errors import expect
from pruneflow.pruning.evidence import Evidence, Loss
from pruneflow.pruning.schedules import whole_number
from pruneflow.training.trainer import training_batches


@dataclass(frozen=True)
class Calibration:
    """A loss and a number of training batches, for importances that need more than weights.

    Each round runs a forward pass per batch, and a backward pass if gradients are needed, in the
    precision of the weights. It does not change the model, its buffers (such as running means),
    existing gradients, random numbers or the order of the training batches. All processes get the
    same evidence.

    Args:
        loss: `(module, batch) -> loss`: the mean loss of a batch, a scalar. The module is the
            LightningModule; its `training_step` cannot be used, as it logs.
        batches: Number of batches; more batches make scores less noisy.

    Raises:
        ValueError: If `batches` is not at least 1.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> Calibration(lambda module, batch: cross_entropy(module(batch[0]), batch[1])).batches
        8
    """

    loss: Loss
    batches: int = 8

    def __post_init__(self) -> None:
        batches = whole_number(self.batches)
        valid = batches is not None and batches >= 1
        expected = "be a whole number of at least 1"
        expect(valid, "batches", expected, repr(self.batches), "8 is usual")
        object.__setattr__(self, "batches", batches)

    def collect(self, trainer: L.Trainer, evidence: Evidence) -> dict[str, Tensor]:
        """Collect evidence while a Trainer is fitting.

        Returns:
            Qualified name -> evidence for that tensor.

        Raises:
            ValueError: If there are no batches, or the evidence does not accept the loss.
        """
        return evidence(
            trainer.lightning_module, training_batches(trainer, self.batches), self.loss
        )

    def check(
        self, trainer: L.Trainer, evidence: Evidence, check: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Check before training that the loss accepts the batches.

        Args:
            trainer: The Trainer that is about to train.
            evidence: The evidence to collect.
            check: Raises a ValueError if the evidence is incomplete.

        Raises:
            ValueError: If the loss fails, or `check` does.
        """
        found = Calibration(self._checked_loss, 1).collect(trainer, evidence)
        try:
            check(found)
        except ValueError:  # other batches may reach tensors that the first one does not
            check(self.collect(trainer, evidence))

    def _checked_loss(self, module: Any, batch: Any) -> Tensor:
        try:
            return self.loss(module, batch)
        except Exception as error:
            raise ValueError(
                "`calibration` must have a loss that accepts the module and a training batch, got "
                f"{type(error).__name__}: {error}; try lambda module, batch: "
                "cross_entropy(module(batch[0]), batch[1])"
            ) from error


Gradients = Calibration  # former name
