"""Use what a run hands over: from a file, or a run folder, to the names of classes."""

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
from pruneflow.models import load_state, load_weights, small_cnn, torchvision_model

KEY = "pruneflow.classifier"  # one alone: safetensors writes several in any order


class Description(TypedDict):
    """What files of weights say beside the weights, as JSON in their metadata."""

    network: str  # what builds it, such as pruneflow.models.small_cnn
    arguments: dict[str, Any]  # and with which arguments
    classes: list[str]  # names, in the order of the outputs
    image_shape: list[int]  # channels, height, width
    mean: list[float] | None  # of each channel, of pixels in [0, 1]; None: not known
    std: list[float] | None


class Prediction(NamedTuple):
    """The class that a picture is most likely of."""

    name: str
    probability: float


def describe(network: Mapping[str, Any], data: Any) -> Description:
    """Say what a classifier needs beside its weights.

    Args:
        network: `_target_`, and the arguments of what it names.
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


# Networks that are built because a file says so; whatever else it names is code to be trusted.
_BUILT: dict[str, Callable[..., nn.Module]] = {
    "pruneflow.models.small_cnn": small_cnn,
    "pruneflow.models.torchvision_model": torchvision_model,
}


def load_classifier(path: str | Path, network: nn.Module | None = None) -> ImageClassifier:
    """Load the result of a run to classify pictures with; plain PyTorch, on the CPU.

    Nothing that the file names is imported or run: the networks of `pruneflow.models` are built
    from the arguments that it holds, others have to be given.

    Args:
        path: A run folder, or its `model.safetensors` or `model.packed`.
        network: The network to load the weights into, where it is your own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file says nothing of classes and pictures, or its weights are of another
            network.

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
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a run folder or a file of weights, got {str(path)!r}, which is none; "
            "a run writes model.safetensors when it ends"
        )
    about = _read(path)
    if network is None:
        if about["network"] not in _BUILT:
            arguments = ", ".join(f"{key}={value!r}" for key, value in about["arguments"].items())
            raise ValueError(
                f"`network` must be given for weights of {about['network']}, which is not run only "
                f"because a file names it; give network={about['network']}({arguments})"
            )
        network = _BUILT[about["network"]](**about["arguments"])
    if path.suffix == ".packed":
        load_state(network, load_packed(path), str(path))
    else:
        load_weights(network, path)
    return ImageClassifier(network, about).eval()


def _read(path: Path) -> Description:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = file.metadata() or {}
        if FORMAT in found:
            found = json.loads(found[FORMAT])["metadata"]
        about: Any = json.loads(found[KEY])
        described: Description = {key: about[key] for key in Description.__annotations__}  # type: ignore[assignment]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must be a file of a run, which says what classes and pictures its weights are "
            f"for, got {str(path)!r}, which does not ({error}); give model.safetensors or "
            "model.packed of a run folder"
        ) from error
    return described


class ImageClassifier(nn.Module):
    """A network with what turns pictures into its inputs, and its outputs into names.

    Args:
        network: Normalised images, float32 (B, C, H, W), to logits (B, classes).
        description: What it was trained on.

    Attributes:
        classes: Names, in the order of the outputs.
        image_shape: Channels, height and width of its images.
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
                "`mean` and `std` must be known to turn pictures into inputs, got none: the "
                "datamodule of the run has no such attributes; give it both, each a list with a "
                "number for each channel, or load the weights with "
                "safetensors.torch.load_file"
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
        """Say what a picture shows.

        Args:
            picture: A path or a PIL image, of any size, which is cropped and resized as in the
                training; or a tensor (C, H, W) of the network's size, uint8 or float in [0, 1].

        Raises:
            ValueError: If a tensor has another shape, or floats outside of [0, 1].
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
        if image.shape != self.image_shape:
            raise ValueError(
                f"`picture` must be of shape {self.image_shape}, got {tuple(image.shape)}; give a "
                "path or a PIL image to have it cropped and resized"
            )
        if image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"`picture` must hold floats in [0, 1], got {float(image.min()):.3g} to "
                f"{float(image.max()):.3g}; give it as it was before it was normalised, or uint8"
            )
        return image


def snippet(description: Description, model: str, picture: str) -> str:
    """Lines of Python that classify one picture in a fresh process.

    Args:
        description: Of the classifier.
        model: Where the run folder lies.
        picture: Where a picture lies.
    """
    imports, given = ["from pruneflow import load_classifier"], ""
    if description["network"] not in _BUILT:
        module, _, name = description["network"].rpartition(".")
        arguments = ", ".join(f"{key}={value!r}" for key, value in description["arguments"].items())
        imports.append(f"from {module} import {name}")
        given = f", {name}({arguments})"
    return "\n".join(
        [
            *imports,
            f"classifier = load_classifier({model!r}{given})",
            f"print(classifier.predict({picture!r}))",
        ]
    )
