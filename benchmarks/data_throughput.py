"""Images per second of one training epoch: batches made from one tensor, against torchvision's way.

Both crop (padding 4), mirror and normalise the same 32x32 images, in batches of 128, on this CPU.

    python benchmarks/data_throughput.py --root DIR     # DIR/train/<class>/*.jpg, 32x32
    python benchmarks/data_throughput.py                # random pixels
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pruneflow.data.batches import AugmentedImages, EpochDraws, EpochLoader, training_draws
from pruneflow.data.images import ImageFiles

BATCH_SIZE, MEAN, STD = 128, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class PilImages(Dataset[tuple[Tensor, int]]):
    """The usual way, at its best: PIL images that already lie decoded in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def read(root: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (count, 3, 32, 32) and labels int64 (count,)."""
    if root is None:
        return torch.randint(256, (count, 3, 32, 32)).byte(), torch.randint(10, (count,))
    folder = ImageFolder(f"{root}/train")
    files = ImageFiles([path for path, _ in folder.samples], (32, 32))
    chosen = torch.randperm(len(files))[:count]
    return files[chosen], torch.tensor(folder.targets)[chosen]


def from_one_tensor(images: Tensor, labels: Tensor) -> Iterable[Sequence[Tensor]]:
    """The way of `pruneflow.data`."""
    augmented = AugmentedImages(
        images, labels, padding=4, mean=torch.tensor(MEAN), std=torch.tensor(STD)
    )
    indices = torch.arange(len(images))

    def draw(epoch: int) -> Tensor:
        return training_draws(indices, epoch, seed=0, padding=4, flip=True)

    return EpochLoader(augmented, EpochDraws(draw, count=len(images), batch_size=BATCH_SIZE))


def by_torchvision(images: Tensor, labels: Tensor) -> Iterable[Sequence[Tensor]]:
    """The usual way."""
    return DataLoader(
        PilImages(images, labels),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )


def images_per_second(loader: Iterable[Sequence[Tensor]]) -> float:
    """Of one epoch."""
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in loader)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", help="folder that holds train/<class>/*.jpg; else random pixels")
    parser.add_argument("--count", type=int, default=50_000, help="images an epoch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each, in turn")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; torchvision has 2 workers"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    images, labels = read(arguments.root, arguments.count)
    ways: list[Callable[[Tensor, Tensor], Iterable[Sequence[Tensor]]]] = [
        by_torchvision,
        from_one_tensor,
    ]
    loaders = [way(images, labels) for way in ways]
    for loader in loaders:  # start workers, warm caches
        images_per_second(loader)
    # In turn, so that other work on the machine falls on both.
    rounds = [[images_per_second(loader) for loader in loaders] for _ in range(arguments.repeats)]
    for way, rates in zip(ways, zip(*rounds, strict=True), strict=True):
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{way.__name__:16} {statistics.median(rates):12,.0f} images/s  ({spread})")
    ratios = [ours / theirs for theirs, ours in rounds]
    print(f"{'ratio':16} {statistics.median(ratios):12.1f}           (median of {len(ratios)})")


if __name__ == "__main__":
    main()
