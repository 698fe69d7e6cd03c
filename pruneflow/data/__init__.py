"""Datamodules that hand out whole augmented batches; they know nothing of pruning."""

from pruneflow.data.datamodule import ImageData, Labelled
from pruneflow.data.datasets import CIFAR10, Digits, ImageFolder

__all__ = ["CIFAR10", "Digits", "ImageData", "ImageFolder", "Labelled"]
