"""Datamodules that augment whole batches on the training device."""

from pruneflow.data.datamodule import ImageData, Labelled
from pruneflow.data.datasets import CIFAR10, Digits, ImageFolder

__all__ = ["CIFAR10", "Digits", "ImageData", "ImageFolder", "Labelled"]
