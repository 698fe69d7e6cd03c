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

from pruneflow.models.losses import CrossEntropy, Loss


class Classifier(LightningModule):
    """A network trained to tell classes apart.

    Logs loss and accuracy over each epoch: `train_loss`, `train_accuracy`, and the same with `val_`
    and `test_`, where the loss is plain cross-entropy, whatever is trained on. The metrics are kept
    out of the state_dict, so its keys are the network's, after "network.".

    Args:
        network: Images, float32 (B, C, H, W), to logits (B, `num_classes`).
        num_classes: Number of classes.
        optimizer: Takes the parameters, such as `partial(torch.optim.SGD, lr=0.1)`.
        lr_scheduler: Takes the optimizer and `steps_per_epoch`, how many of its steps make an
            epoch, and is stepped after each, such as `partial(multistep, epochs=100)`; None keeps
            the learning rate.
        loss: What is trained on: `(logits, labels, images) -> loss`. It is no part of the model,
            unless it is an `nn.Module`.
        channels_last: Keep network and images in PyTorch's channels-last memory format, which
            convolutions on GPUs in 16 bits prefer.

    Attributes:
        wraps: Where the network is; names of its parameters go without it.
        test_per_class: Accuracy in each class, in [0, 1], after a test; 0 where nothing was tested.
        test_counts: How many images of each class were tested.
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
        loss: Loss = CrossEntropy(),  # noqa: B008  it is frozen
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
        """The loss that is trained, of one batch, without logging or counting it."""
        images, labels = batch
        return self._loss(self(images), labels, images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self._step(self._train, batch, batch_idx)
        # Not in on_train_epoch_end, which comes after the callbacks that look for it.
        if self.trainer.is_last_batch:
            self.log_dict(self._train.compute(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        self._step(self._val, batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        self._step(self._test, batch, batch_idx)

    # Logged once an epoch: `self.log` at each step costs more than the metrics do.

    def on_validation_epoch_end(self) -> None:
        """Log the epoch."""
        self.log_dict(self._val.compute(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the test and keep the accuracy in each class."""
        values = self._test.compute()
        self.test_per_class = values.pop("test_per_class").tolist()
        counted: Any = self._test["per_class"]
        self.test_counts = (counted.tp + counted.fn).tolist()
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer and, if there is one, its scheduler, stepped after each of its steps."""
        optimizer = self._optimizer(self.network.parameters())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer, steps_per_epoch=self._steps_per_epoch())
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # which counts its batches
        batches = self.trainer.num_training_batches
        if batches == math.inf:
            raise ValueError(
                "`limit_train_batches` must be a number of batches where the training data have no "
                f"length, got {self.trainer.limit_train_batches}; the learning rate is scheduled "
                "over the steps of an epoch, so set it, or leave `lr_scheduler` out"
            )
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _step(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        if metrics is self._train:
            loss = self._loss(logits, labels, images)
        else:
            loss = cross_entropy(logits, labels)
        if index == 0:  # not at an epoch's end, which an interrupted epoch never reaches
            metrics.reset()
        predictions = logits.detach().argmax(1)
        # One loss an image, since a MeanMetric that does not look for nan forgets its weights.
        losses = loss.detach().expand(len(labels))
        metrics.update(value=losses, preds=predictions, target=labels)
        return loss


def _metrics(stage: str, num_classes: int) -> MetricCollection:
    # Values are not checked for nan: that would wait for the GPU at every step, and hide it.
    loss = MeanMetric(nan_strategy="disable")
    accuracy = _accuracy(num_classes, average="micro")
    return MetricCollection(
        {"loss": loss, "accuracy": accuracy}, prefix=f"{stage}_", compute_groups=False
    )


def _accuracy(num_classes: int, average: Literal["micro"] | None) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average=average, validate_args=False)
