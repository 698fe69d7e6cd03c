"""Batches as a pure function of (seed, epoch).

A *draw* is four int64 numbers: image, top, left, mirrored. An epoch is a tensor of draws, split
into batches; `AugmentedImages` turns each into images, on the device of the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from pruneflow.data.images import Images

Batch = tuple[Tensor, Tensor]


def training_draws(indices: Tensor, epoch: int, *, seed: int, padding: int, flip: bool) -> Tensor:
    """Shuffle `indices` and draw a random crop and flip for each, with a separate generator.

    Args:
        indices: int64 (N,), the images of the epoch.
        epoch: Counted from 0; together with `seed` it determines the result.
        seed: Any non-negative integer.
        padding: Pixels of padding on each side of the images; corners are in [0, 2 padding].
        flip: Whether to flip half of the images horizontally.

    Returns:
        int64 (N, 4): image, top, left, mirrored.

    Example:
        >>> first = training_draws(torch.arange(5), 3, seed=0, padding=4, flip=True)
        >>> again = training_draws(torch.arange(5), 3, seed=0, padding=4, flip=True)
        >>> torch.equal(first, again), first[:, 0].sort().values
        (True, tensor([0, 1, 2, 3, 4]))
    """
    # PyTorch's CPU generator uses 32 bits of its seed, so hash the pair to 32 bits.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    count = len(indices)
    order = torch.randperm(count, generator=generator)
    corners = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    mirrored = torch.randint(2 if flip else 1, (count, 1), generator=generator)
    return torch.cat([indices[order, None], corners, mirrored], dim=1)


def fixed_draws(indices: Tensor, *, padding: int) -> Tensor:
    """Draws of the images at `indices`, in order and without augmentation.

    Example:
        >>> fixed_draws(torch.tensor([7, 8]), padding=4)
        tensor([[7, 4, 4, 0],
                [8, 4, 4, 0]])
    """
    draws = torch.full((len(indices), 4), padding)
    draws[:, 0], draws[:, 3] = indices, 0
    return draws


class AugmentedImages(Dataset[Batch]):
    """A dataset indexed by draws that returns normalised batches.

    Args:
        images: uint8 (N, C, H, W). A tensor is padded once; files are decoded batch by batch.
        labels: int64 (N,).
        padding: Zero padding on each side before a crop of size (H, W).
        mean: float32 (C,), for pixels in [0, 1].
        std: float32 (C,).
    """

    def __init__(
        self, images: Images, labels: Tensor, *, padding: int, mean: Tensor, std: Tensor
    ) -> None:
        self._crop = tuple(images.shape[2:])
        self._padding = (padding,) * 4
        self._images = pad(images, self._padding) if isinstance(images, Tensor) else images
        self._labels = labels
        self._scale = (1 / (255 * std)).reshape(-1, 1, 1)
        self._shift = (-mean / std).reshape(-1, 1, 1)

    def to(self, device: torch.device) -> None:
        """Move the images to `device`, where batches are then created."""
        if isinstance(self._images, Tensor):
            self._images = self._images.to(device)
        self._labels = self._labels.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    def fingerprint(self) -> str:
        """A hash of images (if in memory), labels and normalisation."""
        digest = hashlib.sha256()
        for tensor in (self._images, self._labels, self._scale, self._shift):
            if isinstance(tensor, Tensor):
                digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()

    def __getitem__(self, draws: Tensor) -> Batch:
        """The batch of `draws`, int64 (B, 4): float32 (B, C, H, W) and labels int64 (B,)."""
        index, top, left, mirrored = draws.unbind(1)
        labels = self._labels[index]
        images = self._images
        if not isinstance(images, Tensor):
            images, index = pad(images[index], self._padding), torch.arange(len(index))
        height, width = self._crop
        # A view of every possible crop, so that one indexing operation selects and crops.
        windows = images.unfold(2, height, 1).unfold(3, width, 1)
        crops = windows[index, :, top, left]
        crops = torch.where(mirrored.bool().reshape(-1, 1, 1, 1), crops.flip(3), crops)
        return crops.float().mul_(self._scale).add_(self._shift), labels


class EpochDraws:
    """The draws of an epoch, batch by batch; the sampler of an `EpochLoader`.

    Batch sizes differ by at most one and do not exceed `batch_size`. Every process gets the same
    number of batches, and each image goes to one process.

    Args:
        draw: epoch -> int64 (count, 4).
        count: Images per epoch.
        batch_size: Maximum batch size in each process.
        rank: Rank of this process.
        world_size: Number of processes.
        device: The device to move the draws to, once per epoch.

    Example:
        >>> sampler = EpochDraws(lambda epoch: torch.zeros(10, 4), count=10, batch_size=4)
        >>> [len(batch) for batch in sampler]
        [4, 3, 3]
    """

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        *,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._draw = draw
        self.count = count
        self._batches = -(-count // (batch_size * world_size))
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, for the next iteration. Lightning calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Tensor]:
        draws = self._draw(self._epoch).to(self._device)
        parts = draws.tensor_split(self._batches * self._world_size)
        yield from parts[self._rank :: self._world_size]


class EpochLoader:
    """A data loader for Lightning, which sets the epoch of its `sampler`.

    It is not a `DataLoader`: Lightning would replace its sampler in distributed training, and
    recommend workers, which are not needed for batches created on the device.

    Args:
        images: The dataset.
        sampler: The draws of each batch.
        num_workers: Number of worker processes; 0 creates batches in this process.
        pin_memory: Whether to pin the memory of batches from workers.
    """

    batch_sampler = None  # Lightning reads it if there is a `sampler`

    def __init__(
        self,
        images: AugmentedImages,
        sampler: EpochDraws,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self._images = images
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that an epoch set between `iter` and the first `next` is used.
        if self._num_workers == 0:
            for draws in self.sampler:
                yield self._images[draws]
        else:
            yield from DataLoader(
                self._images,
                batch_size=None,
                sampler=list(self.sampler),
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # otherwise it uses the global one
            )
