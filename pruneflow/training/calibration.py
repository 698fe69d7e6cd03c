"""Gradients of the loss in a Trainer, for importances that need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from pruneflow.distributed import average_gradients
from pruneflow.pruning.schedules import whole_number
from pruneflow.structure.parameters import locate
from pruneflow.training.trainer import training_batches


@dataclass(frozen=True)
class Gradients:
    """The gradient of a loss over some batches of the training data, as each round needs it.

    It takes a forward and a backward pass for each batch, in the precision of the weights. The
    model, its buffers (such as running means), the gradients that were there, random numbers and
    the training's own batches are afterwards as they were before. Of several processes all get the
    mean gradient.

    Args:
        loss: `(module, batch) -> loss`: the mean loss of a batch, a scalar. The module is the
            LightningModule; `training_step` will not do, as it logs.
        batches: How many batches; the more, the less a score depends on which they are.

    Raises:
        ValueError: If `batches` is not at least 1.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> Gradients(lambda module, batch: cross_entropy(module(batch[0]), batch[1])).batches
        8
    """

    loss: Callable[[Any, Any], Tensor]
    batches: int = 8

    def __post_init__(self) -> None:
        batches = whole_number(self.batches)
        if batches is None or batches < 1:
            raise ValueError(
                f"`batches` is expected to be a whole number of at least 1, but {self.batches!r} "
                "came; 8 is usual"
            )
        object.__setattr__(self, "batches", batches)

    def compute(self, trainer: L.Trainer) -> dict[str, Tensor | None]:
        """The mean gradient for every parameter, by qualified name; None where there is none.

        Raises:
            ValueError: If there are no batches, or `loss` returns no scalar to differentiate.
        """
        pl_module = trainer.lightning_module
        parameters = list(pl_module.parameters())
        gradients = [parameter.grad for parameter in parameters]
        buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        try:
            with isolate_rng():
                self._differentiate(trainer)
            average_gradients(parameters)
            return {name: slot.parameter.grad for name, slot in locate(pl_module).items()}
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def _differentiate(self, trainer: L.Trainer) -> None:
        pl_module = trainer.lightning_module
        pl_module.zero_grad(set_to_none=True)
        count = 0
        for batch in training_batches(trainer, self.batches):
            loss = self.loss(pl_module, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(
                    "`loss` is expected to return a scalar that depends on the weights, but "
                    f"{loss!r} came; return the mean over the batch"
                )
            loss.backward()
            count += 1
        if not count:
            raise ValueError(
                "`gradients` are expected to come from training data, but there are no batches"
            )
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
