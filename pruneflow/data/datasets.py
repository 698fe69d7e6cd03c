"""Datamodules for digits, CIFAR-10 and folders of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision.datasets

from pruneflow.data.datamodule import ImageData, Labelled
from pruneflow.data.images import ImageFiles, common_size, resize
from pruneflow.data.splits import stratified_split
from pruneflow.errors import expect


class Digits(ImageData):
    """The 1797 handwritten digits of scikit-learn, 8x8 and grey; no download.

    A fixed stratified fifth is the test set. See `ImageData` for the arguments; `root` is ignored.

    Example:
        >>> data = Digits()
        >>> data.setup()
        >>> data.image_shape, data.num_classes
        ((1, 8, 8), 10)
    """

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """Load the digits and split off the test set."""
        from sklearn.datasets import load_digits  # noqa: PLC0415  a slow import

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
    """CIFAR-10, downloaded to `root` if it is not there, and checked by MD5.

    See `ImageData` for the arguments.

    Raises:
        ValueError: If `root` is None.
        FileNotFoundError: If it is not in `root` and cannot be downloaded.
    """

    def prepare_data(self) -> None:
        """Download the data if needed."""
        self._read(train=False, download=True)

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """Load the images."""
        train, classes = self._read(train=True, download=False)
        test, _ = self._read(train=False, download=False)
        return train, test, classes

    def _read(self, *, train: bool, download: bool) -> tuple[Labelled, Sequence[str]]:
        archive = torchvision.datasets.CIFAR10
        set_root, remedy = self.root is not None, "set data.root=DIR"
        expect(
            set_root, "root", "be the folder of CIFAR-10, or one to download it to", None, remedy
        )
        try:
            dataset = archive(str(self.root), train=train, download=download)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"`root` must hold CIFAR-10, as {archive.filename} or unpacked as "
                f"{archive.base_folder}/, got {str(self.root)!r}, where it is missing or damaged, "
                f"and {archive.url} could not be downloaded ({error}); put the archive there, or "
                "train on a folder of images with data=image_folder data.root=DIR"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset.targets)
        return Labelled(resize(images, self.image_size), labels), dataset.classes


class ImageFolder(ImageData):
    """RGB images in folders: `root`/train/<class>/*.jpg and `root`/test/<class>/*.jpg.

    All image formats of torchvision's `ImageFolder` are supported. Images of different sizes need
    `image_size`: each is cropped to a centred square and resized. See `ImageData` for the
    arguments.

    Raises:
        ValueError: If `root` is None, if train and test have different classes, or if the images
            differ in size and `image_size` is None.
        FileNotFoundError: If `root` does not have these folders, or a class has no images.
    """

    def load(self) -> tuple[Labelled, Labelled, Sequence[str]]:
        """List the files; they are decoded later."""
        if self.root is None:
            raise ValueError(
                "`root` must be a folder with train/ and test/, got None; set data.root=DIR"
            )
        train, test = (self._list(self.root / part) for part in ("train", "test"))
        only_train = sorted(set(train.classes) - set(test.classes))
        only_test = sorted(set(test.classes) - set(train.classes))
        expect(
            train.classes == test.classes,
            "root",
            "have the same classes in train/ and test/",
            f"{only_train} in train/ only and {only_test} in test/ only, in {str(self.root)!r}",
            "add or remove these folders",
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
                "`root` must hold train/<class>/*.jpg and test/<class>/*.jpg, got "
                f"{str(self.root)!r} ({error}); set data.root=DIR to the folder that contains "
                "train/"
            ) from error
