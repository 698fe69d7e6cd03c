"""Classify images with the result of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pruneflow.data.images import pixels
from pruneflow.deploy import load_packed
from pruneflow.deploy.packed import FORMAT
from pruneflow.errors import expect
from pruneflow.models import load_state, load_weights, small_cnn, torchvision_model

KEY = "pruneflow.classifier"  # a single key: safetensors writes several in random order


class Description(TypedDict):
    """What a classifier needs besides its weights; JSON in the metadata of the file."""

    network: str  # the function that builds it, such as pruneflow.models.small_cnn
    arguments: dict[str, Any]  # of that function
    classes: list[str]  # names, in the order of the outputs
    image_shape: list[int]  # channels, height, width
    mean: list[float] | None  # of each channel, for pixels in [0, 1]; None if not known
    std: list[float] | None


class Prediction(NamedTuple):
    """The most likely class of an image."""

    name: str
    probability: float


def describe(network: Mapping[str, Any], data: Any) -> Description:
    """Describe what a classifier needs besides its weights.

    Args:
        network: `_target_` and its arguments.
        data: The datamodule it was trained on.
    """
    channels, *_ = shape = [int(length) for length in data.image_shape]
    arguments = {k: v for k, v in network.items() if not k.startswith("_") and k != "weights"}
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    return {
        "network": network["_target_"],
        "arguments": {**arguments, "num_classes": data.num_classes, "in_channels": channels},
        "classes": [str(name) for name in data.classes],
        "image_shape": shape,
        "mean": None if mean is None else [float(value) for value in mean],
        "std": None if std is None else [float(value) for value in std],
    }


def metadata(description: Description) -> dict[str, str]:
    """A description as the metadata of safetensors and ONNX files."""
    return {KEY: json.dumps(description)}


# Networks that are built if a file names them; anything else it names could be untrusted code.
_BUILT: dict[str, Callable[..., nn.Module]] = {
    "pruneflow.models.small_cnn": small_cnn,
    "pruneflow.models.torchvision_model": torchvision_model,
}


def load_classifier(path: str | Path, network: nn.Module | None = None) -> ImageClassifier:
    """Load the result of a run as an image classifier, in plain PyTorch on the CPU.

    Nothing that the file names is imported or run: networks of `pruneflow.models` are built from
    the arguments in the file; others must be passed as `network`.

    Args:
        path: A run folder, or its `model.safetensors` or `model.packed`.
        network: The network to load the weights into, if it is your own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file does not describe classes and images, or its weights are those of
            another network.

    Example:
        >>> from tempfile import mkdtemp
        >>> from pruneflow.data import Digits
        >>> from pruneflow.deploy import save_packed
        >>> data = Digits(); data.setup()
        >>> network = small_cnn(10, 1, width=4)
        >>> about = describe({"_target_": "pruneflow.models.small_cnn", "width": 4}, data)
        >>> path = Path(mkdtemp(), "model.packed")
        >>> _ = save_packed(network.state_dict(), path, metadata=metadata(about))
        >>> prediction = load_classifier(path).predict(torch.zeros(1, 8, 8))
        >>> prediction.name in data.classes, prediction.probability <= 1
        (True, True)
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "model.safetensors", path / "model.packed"]  # task=deploy writes the latter
        path = next((file for file in files if file.exists()), files[0])
    expect(
        path.is_file(),
        "path",
        "be a run folder or a file of weights",
        f"{str(path)!r}, which does not exist",
        "check the path; a run writes model.safetensors when it ends",
        error=FileNotFoundError,
    )
    description = _read(path)
    if network is None:
        target = description["network"]
        expect(
            target in _BUILT,
            "network",
            f"be given for weights of {target}, as code named in a file is not run",
            "None",
            f"pass network={target}({_keywords(description)})",
        )
        network = _BUILT[target](**description["arguments"])
    if path.suffix == ".packed":
        load_state(network, load_packed(path), str(path))
    else:
        load_weights(network, path)
    return ImageClassifier(network, description).eval()


def _keywords(description: Description) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in description["arguments"].items())


def _read(path: Path) -> Description:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = file.metadata() or {}
        if FORMAT in found:
            found = json.loads(found[FORMAT])["metadata"]
        read: Any = json.loads(found[KEY])
        description: Description = {key: read[key] for key in Description.__annotations__}  # type: ignore[assignment]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must be a file of a run, with a description of its classes and images, got "
            f"{str(path)!r}, which has none ({error}); give model.safetensors or model.packed of a "
            "run folder"
        ) from error
    return description


class ImageClassifier(nn.Module):
    """A network with the preprocessing of its images and the names of its classes.

    Args:
        network: Maps normalised images, float32 (B, C, H, W), to logits (B, classes).
        description: Its images and classes.

    Attributes:
        classes: Names, in the order of the outputs.
        image_shape: Channels, height and width of its images.

    Raises:
        ValueError: If the description has no mean or standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(description["classes"])
        self.image_shape = tuple(description["image_shape"])
        if description["mean"] is None or description["std"] is None:
            raise ValueError(
                "`mean` and `std` must be known to normalise images, got None, as the datamodule "
                "of the run does not have these attributes; add both to it, each a list with one "
                "number per channel, or load the weights with safetensors.torch.load_file"
            )
        for name, values in (("mean", description["mean"]), ("std", description["std"])):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W): uint8, or float in [0, 1]."""
        if not images.is_floating_point():
            images = images / 255
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    @torch.no_grad()
    def predict(self, picture: Any) -> Prediction:
        """Predict the class of an image.

        Args:
            picture: A path or a PIL image of any size, cropped and resized as in training; or a
                tensor (C, H, W) of the network's size, uint8 or float in [0, 1].

        Raises:
            ValueError: If a tensor has another shape, or floats outside [0, 1].
        """
        probabilities = self(self._image(picture)[None].to(self.mean.device))[0].softmax(0)
        best = int(probabilities.argmax())
        return Prediction(self.classes[best], float(probabilities[best]))

    def _image(self, picture: Any) -> Tensor:
        channels, height, width = self.image_shape
        if isinstance(picture, str | Path):
            with Image.open(picture) as file:
                return torch.from_numpy(pixels(file, channels, (width, height)))
        if isinstance(picture, Image.Image):
            return torch.from_numpy(pixels(picture, channels, (width, height)))
        image = torch.as_tensor(picture)
        expect(
            image.shape == self.image_shape,
            "picture",
            f"have shape {self.image_shape}",
            tuple(image.shape),
            "pass a path or a PIL image to have it cropped and resized",
        )
        if image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            got = f"{low:.3g} to {high:.3g}"
            remedy = "do not normalise it, or pass uint8"
            expect(low >= 0 and high <= 1, "picture", "hold floats in [0, 1]", got, remedy)
        return image


def snippet(description: Description, model: str, picture: str) -> str:
    """Python code that classifies one image in a new process.

    Args:
        description: That of the classifier.
        model: Path of the run folder.
        picture: Path of an image.
    """
    imports, given = ["from pruneflow import load_classifier"], ""
    if description["network"] not in _BUILT:
        module, _, name = description["network"].rpartition(".")
        imports.append(f"from {module} import {name}")
        given = f", {name}({_keywords(description)})"
    return "\n".join(
        [
            *imports,
            f"classifier = load_classifier({model!r}{given})",
            f"print(classifier.predict({picture!r}))",
        ]
    )
