"""Images as a uint8 tensor, or as files that are decoded when they are indexed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import resize as torchvision_resize

from pruneflow.errors import expect


def pixels(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The pixels of an image, uint8 (channels, height, width).

    Args:
        image: A PIL image of any mode.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        size: Width and height in pixels. An image of another size is centre-cropped to this aspect
            ratio and resized.

    Raises:
        ValueError: If `channels` is another number.

    Example:
        >>> pixels(Image.new("RGB", (20, 10), "white"), 1, (8, 8)).shape
        (1, 8, 8)
    """
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    expect(channels in modes, "channels", "be 1, 3 or 4", channels, "pass a tensor instead")
    image = image.convert(modes[channels])
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.array(image).reshape(size[1], size[0], channels).transpose(2, 0, 1).copy()


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"`root` must hold images that can be read, got {path} ({error}); replace or delete it"
        ) from error


class ImageFiles:
    """Image files that are indexed like a uint8 tensor of shape (N, 3, H, W).

    Indexing decodes with as many threads as PyTorch uses, so a data worker uses one.

    Args:
        paths: Image files in any format that PIL supports; converted to RGB.
        size: Width and height in pixels. An image of another size is centre-cropped to this aspect
            ratio and resized.
    """

    def __init__(self, paths: Sequence[str], size: tuple[int, int]) -> None:
        self._paths = paths
        self._size = size
        self.shape = (len(paths), 3, size[1], size[0])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at `indices`, int64 (B,), to uint8 (B, 3, H, W)."""
        images = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8)
        decoded, paths = images.numpy(), [self._paths[index] for index in indices.tolist()]

        def decode(rows: Iterable[int]) -> None:
            for row in rows:
                with _opened(paths[row]) as file:
                    decoded[row] = pixels(file, 3, self._size)

        threads = torch.get_num_threads()
        if threads == 1:
            decode(range(len(paths)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, [range(t, len(paths), threads) for t in range(threads)]))
        return images


def common_size(paths: Sequence[str]) -> tuple[int, int]:
    """The common width and height in pixels of all images at `paths`, from their headers.

    Raises:
        ValueError: If the images differ in size.
    """

    def read(path: str) -> tuple[int, int]:
        with _opened(path) as file:
            return file.size

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sizes = list(pool.map(read, paths))
    first = sizes[0]
    for path, size in zip(paths, sizes, strict=True):
        if size != first:
            raise ValueError(
                "`image_size` must be set if images differ in size (width x height), got None for "
                f"{paths[0]} ({first[0]}x{first[1]}) and {path} ({size[0]}x{size[1]}); try "
                f"image_size={min(first)}"
            )
    return first


Images = Tensor | ImageFiles


def resize(images: Tensor, image_size: int | None) -> Tensor:
    """Resize uint8 (N, C, H, W) to (N, C, image_size, image_size); None leaves it as it is.

    Example:
        >>> resize(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 16).shape
        torch.Size([2, 1, 16, 16])
    """
    if image_size is None:
        return images
    size = [image_size, image_size]
    return torch.cat(
        [torchvision_resize(part, size, antialias=True) for part in torch.split(images, 1000)]
    )


def channel_statistics(images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in [0, 1], from exact counts of pixel values.

    Args:
        images: uint8 (N, C, H, W).
        indices: int64, the images to measure; at most 10,000 of them, evenly spaced, are used.

    Returns:
        Two float32 tensors of shape (C,). The minimum standard deviation is 1/255.

    Example:
        >>> images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
        >>> channel_statistics(images, torch.tensor([0, 1]))
        (tensor([0.5000]), tensor([0.5000]))
    """
    sample = indices[:: -(-len(indices) // 10_000)]
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in torch.split(sample, 1000):
        pixels = images[part].transpose(0, 1).flatten(1)
        counts += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
    weights = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    std = (weights @ values**2 - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.float(), std.float()
