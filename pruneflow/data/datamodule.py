"""The base class of all datamodules; `datasets` has the subclasses that load images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import LightningDataModule
from lightning.fabric.utilities import suggested_max_num_workers
from torch import Tensor

from pruneflow.data.batches import (
    AugmentedImages,
    EpochDraws,
    EpochLoader,
    fixed_draws,
    training_draws,
)
from pruneflow.data.images import Images, channel_statistics
from pruneflow.data.splits import spread, stratified_split
from pruneflow.errors import expect

_log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Images
    labels: Tensor


class ImageData(LightningDataModule):
    """Images as one uint8 tensor on the training device, where whole batches are augmented.

    Order and augmentation depend on (seed, epoch) only, so a resumed run gets the same batches; no
    global random state is used. A dataset larger than `memory_limit` gives the same batches from
    worker processes, but more slowly.

    Subclasses implement `load`. After `prepare_data()` and `setup()`, the attributes `classes`
    (names), `num_classes` and `image_shape` (C, H, W) are available.

    Args:
        root: Folder of the data; `Digits` needs none.
        batch_size: Maximum batch size in each process.
        seed: Seed of order and augmentation.
        val_size: Training images to hold out for validation, stratified by class: a fraction in
            (0, 1), or a number of images.
        split_seed: Seed of that split; separate from `seed`, so that runs with different seeds
            share it.
        crop_padding: Zero padding on each side before a random crop to the original size; 0 for no
            random crops.
        flip: Whether to flip half of the training images horizontally.
        image_size: Height and width in pixels to resize to; None keeps the original size.
        mean: Mean of each channel, for pixels in [0, 1]; if None, `setup` measures it on training
            images and sets it.
        std: Standard deviation of each channel; None as for `mean`.
        memory_limit: Maximum bytes of padded images to hold on the device.
        num_workers: Number of worker processes if `memory_limit` is exceeded; None for all cores
            but one.

    Raises:
        ValueError: If an argument is out of range.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        val_size: float = 0.1,
        split_seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        memory_limit: int = 4 * 2**30,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("split_seed", split_seed, 0),
            ("crop_padding", crop_padding, 0),
            ("image_size", image_size, 1),
            ("memory_limit", memory_limit, 0),
            ("num_workers", num_workers, 0),
        ):
            valid = value is None or value >= least
            expect(valid, name, f"be at least {least}", value, f"set {name}={least} or more")
        self.root = None if root is None else Path(root)
        self.batch_size = batch_size
        self.seed = seed
        self.val_size = val_size
        self.split_seed = split_seed
        self.crop_padding = crop_padding
        self.flip = flip
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.memory_limit = memory_limit
        self.num_workers = num_workers
        self._ready = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """Return training images, test images and class names; called once, by `setup`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the images, split off the validation set and measure mean and std, once.

        Args:
            stage: Ignored, as every stage needs the mean of the training images.
        """
        if self._ready:
            return
        _log.info(
            "Loading images: %s%s", type(self).__name__, f", {self.root}" if self.root else ""
        )
        train, test, classes = self.load()
        self.classes = tuple(classes)
        self.image_shape = _shape(train.images)
        self.train_indices, self.val_indices = stratified_split(
            train.labels, self.val_size, self.split_seed
        )
        needed = _nbytes(train.images, self.crop_padding) + _nbytes(test.images, 0)
        self._in_memory = needed <= self.memory_limit
        if self._in_memory:
            train, test = _read(train), _read(test)
        else:
            _log.warning(
                "%s: %d bytes of images exceed `memory_limit`=%d: worker processes create the "
                "batches, which is slower",
                type(self).__name__,
                needed,
                self.memory_limit,
            )
        mean, std = self._mean_and_std(train.images)
        self._train = AugmentedImages(*train, padding=self.crop_padding, mean=mean, std=std)
        self._test = AugmentedImages(*test, padding=0, mean=mean, std=std)
        self.mean, self.std = mean.tolist(), std.tolist()
        self._val_order = self.val_indices[spread(train.labels[self.val_indices])]
        self._test_order = spread(test.labels)
        _log.info(
            "Images: %d for training, %d for validation, %d for testing",
            len(self.train_indices),
            len(self.val_indices),
            len(self._test_order),
        )
        self._ready = True

    def fingerprint(self) -> str:
        """A hash of the training labels, and of the images unless they are in files."""
        return self._train.fingerprint()

    def train_dataloader(self) -> EpochLoader:
        """Shuffled, augmented batches, different in each epoch."""
        draw = partial(
            training_draws,
            self.train_indices,
            seed=self.seed,
            padding=self.crop_padding,
            flip=self.flip,
        )
        return self._loader(self._train, draw, len(self.train_indices))

    def val_dataloader(self) -> EpochLoader:
        """The validation images, not augmented; each class is spread over all batches."""
        draws = fixed_draws(self._val_order, padding=self.crop_padding)
        return self._loader(self._train, lambda epoch: draws, len(draws))

    def test_dataloader(self) -> EpochLoader:
        """The test images, not augmented; each class is spread over all batches."""
        draws = fixed_draws(self._test_order, padding=0)
        return self._loader(self._test, lambda epoch: draws, len(draws))

    def _loader(
        self, images: AugmentedImages, draw: Callable[[int], Tensor], count: int
    ) -> EpochLoader:
        device, rank, world_size = torch.device("cpu"), 0, 1
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if self._in_memory:
            images.to(device)
            workers = 0
        elif self.num_workers is None:
            workers = suggested_max_num_workers(world_size)
        else:
            workers = self.num_workers
        sampler = EpochDraws(
            draw,
            count=count,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            device=device if self._in_memory else "cpu",
        )
        pin_memory = device.type == "cuda"
        return EpochLoader(images, sampler, num_workers=workers, pin_memory=pin_memory)

    def _mean_and_std(self, images: Images) -> tuple[Tensor, Tensor]:
        channels = images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            valid = values is None or len(values) == channels
            expected = f"have one value for each of {channels} channels"
            expect(valid, name, expected, values, "leave it out to have it measured")
        positive = self.std is None or min(self.std) > 0
        expect(positive, "std", "be positive", self.std, "leave it out to have it measured")
        if self.mean is not None and self.std is not None:
            return torch.tensor(list(self.mean)), torch.tensor(list(self.std))
        mean, std = channel_statistics(images, self.train_indices)
        if self.mean is not None:
            mean = torch.tensor(list(self.mean))
        if self.std is not None:
            std = torch.tensor(list(self.std))
        return mean, std


def _shape(images: Images) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _nbytes(images: Images, padding: int) -> int:
    count, channels, height, width = images.shape
    return count * channels * (height + 2 * padding) * (width + 2 * padding)


def _read(data: Labelled) -> Labelled:
    """Decode images that are in files."""
    if isinstance(data.images, Tensor):
        return data
    return Labelled(data.images[torch.arange(len(data.images))], data.labels)
