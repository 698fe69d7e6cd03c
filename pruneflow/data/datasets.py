"""Where each datamodule's images come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision.datasets

from pruneflow.data.datamodule import ImageData, Labelled
from pruneflow.data.images import ImageFiles, common_size, resize
from pruneflow.data.splits import stratified_split


class Digits(ImageData):
    """Scikit-learn's 1797 handwritten digits, 8x8 and grey, that come with it: no download.

    A fifth, stratified and always the same, is the test set. See `ImageData` for the arguments;
    `root` is accepted, so that data can be swapped, and not read.

    Example:
        >>> data = Digits()
        >>> data.setup()
        >>> data.image_shape, data.num_classes
        ((1, 8, 8), 10)
    """

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """Read the digits and split off the test set."""
        from sklearn.datasets import load_digits  # noqa: PLC0415  a second that others need not wait

        digits = load_digits()
        # 0..16 becomes 0..240.
        images = torch.from_numpy(digits.images * 15).to(torch.uint8).unsqueeze(1)
        images = resize(images, self.image_size)
        labels = torch.from_numpy(digits.target).long()
        train, test = stratified_split(labels, size=0.2, seed=0)
        return (
            Labelled(images[train], labels[train]),
            Labelled(images[test], labels[test]),
            [str(name) for name in digits.target_names],
        )


class CIFAR10(ImageData):
    """CIFAR-10, downloaded to `root` and checked by MD5 unless it lies there.

    See `ImageData` for the arguments.

    Raises:
        ValueError: If `root` is None.
        FileNotFoundError: If it neither lies in `root` nor can be downloaded.
    """

    def prepare_data(self) -> None:
        """Download what is missing."""
        self._read(train=False, download=True)

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """Read the archive's batches."""
        train, classes = self._read(train=True, download=False)
        test, _ = self._read(train=False, download=False)
        return train, test, classes

    def _read(self, *, train: bool, download: bool) -> tuple[Labelled, Sequence[str]]:
        archive = torchvision.datasets.CIFAR10
        if self.root is None:
            raise ValueError(
                "`root` is expected to be the folder of CIFAR-10 or to download it to, but None "
                "came; set data.root=DIR"
            )
        try:
            dataset = archive(str(self.root), train=train, download=download)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"`root`={str(self.root)!r} is expected to hold CIFAR-10, as {archive.filename} or "
                f"unpacked as {archive.base_folder}/, but it does not, or not intact, and "
                f"{archive.url} could not be read ({error}); put the archive there, or train on a "
                "folder of images with data=image_folder data.root=DIR"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset.targets)
        return Labelled(resize(images, self.image_size), labels), dataset.classes


class ImageFolder(ImageData):
    """Any tree `root`/train/<class>/*.jpg and `root`/test/<class>/*.jpg, read as RGB.

    Other formats that torchvision's `ImageFolder` reads serve as well. Images of unequal size need
    `image_size`: each is cropped to a centred square and resized. See `ImageData` for the
    arguments.

    Raises:
        ValueError: If `root` is None, if train and test have different classes, or if the images
            differ in size and `image_size` is None.
        FileNotFoundError: If `root` holds no such tree, or a class has no images.
    """

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """List the files; they are decoded later."""
        if self.root is None:
            raise ValueError(
                "`root` is expected to be a folder that holds train/ and test/, but None came; "
                "set data.root=DIR"
            )
        train, test = (self._list(self.root / part) for part in ("train", "test"))
        if train.classes != test.classes:
            only_train = sorted(set(train.classes) - set(test.classes))
            only_test = sorted(set(test.classes) - set(train.classes))
            raise ValueError(
                f"`root`={str(self.root)!r} is expected to have the same classes in train/ and "
                f"test/, but only train/ has {only_train} and only test/ has {only_test}; add or "
                "remove these folders"
            )
        parts = [[path for path, _ in part.samples] for part in (train, test)]
        if self.image_size is None:
            size = common_size(parts[0] + parts[1])
        else:
            size = (self.image_size, self.image_size)
        return (
            Labelled(ImageFiles(parts[0], size), torch.tensor(train.targets)),
            Labelled(ImageFiles(parts[1], size), torch.tensor(test.targets)),
            train.classes,
        )

    def _list(self, folder: Path) -> torchvision.datasets.ImageFolder:
        try:
            return torchvision.datasets.ImageFolder(str(folder))
        except OSError as error:
            raise FileNotFoundError(
                f"`root`={str(self.root)!r} is expected to hold train/<class>/*.jpg and "
                f"test/<class>/*.jpg, but: {error}; set data.root=DIR to the folder above train/"
            ) from error
