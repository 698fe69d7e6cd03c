"""The training step of image classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from pruneflow.errors import expect
from pruneflow.models.losses import CrossEntropy, Loss


class Classifier(LightningModule):
    """Image classification with any network.

    Logs loss and accuracy of each epoch: `train_loss`, `train_accuracy`, and the same with `val_`
    and `test_`, for which the loss is always plain cross-entropy. Metrics are not part of the
    state_dict: its keys are those of the network, prefixed by "network.".

    Args:
        network: Maps images, float32 (B, C, H, W), to logits (B, `num_classes`).
        num_classes: Number of classes.
        optimizer: Called with the parameters, such as `partial(torch.optim.SGD, lr=0.1)`.
        lr_scheduler: Called with the optimizer and `steps_per_epoch`, such as
            `partial(multistep, epochs=100)`, and stepped after each optimizer step; None for a
            constant learning rate.
        loss: Training loss: `(logits, labels, images) -> loss`. Not part of the model, unless it is
            an `nn.Module`.
        channels_last: Use PyTorch's channels-last memory format, which is faster for convolutions
            on GPUs in 16 bits.

    Attributes:
        wraps: Attribute of the network; names of prunable tensors omit it.
        test_per_class: Accuracy of each class, in [0, 1], after a test; 0 if nothing was tested.
        test_counts: Number of test images of each class.
    """

    wraps: ClassVar[str] = "network"
    test_per_class: list[float]
    test_counts: list[int]

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        lr_scheduler: Callable[..., LRScheduler] | None = None,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008  immutable
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self._memory_format)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._loss = loss
        self._train, self._val, self._test = (
            _metrics(stage, num_classes) for stage in ("train", "val", "test")
        )
        self._test.add_metrics({"per_class": _accuracy(num_classes, average=None)})

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of `images` (B, C, H, W)."""
        logits: Tensor = self.network(images.contiguous(memory_format=self._memory_format))
        return logits

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Training loss of a batch, without logging."""
        images, labels = batch
        return self._loss(self(images), labels, images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Training loss of a batch."""
        loss = self._step(self._train, batch, batch_idx)
        # on_train_epoch_end would be too late for callbacks that read the metrics.
        if self.trainer.is_last_batch:
            self.log_dict(self._train.compute(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._step(self._val, batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._step(self._test, batch, batch_idx)

    # Metrics are logged once per epoch, as `self.log` in each step costs more than the metrics.

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log_dict(self._val.compute(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and store the accuracy of each class."""
        values = self._test.compute()
        self.test_per_class = values.pop("test_per_class").tolist()
        counted: Any = self._test["per_class"]
        self.test_counts = (counted.tp + counted.fn).tolist()
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer and its learning-rate scheduler, if any, stepped after each step."""
        optimizer = self._optimizer(self.network.parameters())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer, steps_per_epoch=self._steps_per_epoch())
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # sets `num_training_batches`
        batches = self.trainer.num_training_batches
        expect(
            batches != math.inf,
            "limit_train_batches",
            "be a number of batches if the training data has no length",
            self.trainer.limit_train_batches,
            "set it, or leave out `lr_scheduler`, which needs the number of steps per epoch",
        )
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _step(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        if metrics is self._train:
            loss = self._loss(logits, labels, images)
        else:
            loss = cross_entropy(logits, labels)
        if index == 0:  # not at the end of an epoch, which an interrupted epoch never reaches
            metrics.reset()
        predictions = logits.detach().argmax(1)
        # One loss per image, as MeanMetric ignores its weights with nan_strategy="disable".
        losses = loss.detach().expand(len(labels))
        metrics.update(value=losses, preds=predictions, target=labels)
        return loss


def _metrics(stage: str, num_classes: int) -> MetricCollection:
    # Checking for NaN would synchronise with the GPU at every step, and hide the NaN.
    loss = MeanMetric(nan_strategy="disable")
    accuracy = _accuracy(num_classes, average="micro")
    return MetricCollection(
        {"loss": loss, "accuracy": accuracy}, prefix=f"{stage}_", compute_groups=False
    )


def _accuracy(num_classes: int, average: Literal["micro"] | None) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average=average, validate_args=False)
