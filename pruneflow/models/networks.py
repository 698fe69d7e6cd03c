"""Networks: a small CNN, and all classification networks of torchvision."""

from __future__ import annotations

import difflib
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.models
from safetensors import SafetensorError
from torch import Tensor, nn

from pruneflow.errors import expect
from pruneflow.state_dicts import described, load_safetensors, with_description

_log = logging.getLogger(__name__)


def small_cnn(num_classes: int, in_channels: int, width: int = 32) -> nn.Sequential:
    """Three 3x3 convolutions with batch norm and a linear layer, for images of about 8x8 pixels.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Output channels of the first convolution; the others have twice as many.

    Example:
        >>> small_cnn(num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def convolution(channels: int, filters: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, filters, 3, padding=1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *convolution(in_channels, width),
        *convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


def torchvision_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    weights: str | Path | None = None,
) -> nn.Module:
    """Build a torchvision classification network.

    Args:
        name: A name in `torchvision.models.list_models(module=torchvision.models)`.
        num_classes: Number of outputs.
        in_channels: Channels of the images. If not 3, the first convolution is replaced by a new
            one with PyTorch's default initialisation.
        stem: "imagenet" keeps the network unchanged; "cifar" adapts a ResNet to small images, with
            a 3x3 convolution of stride 1 instead of 7x7 and stride 2, and without the max-pool.
        weights: A local file, see `load_weights`, or the name of torchvision weights to download,
            such as "DEFAULT". If only the number of classes differs, the last layer is not loaded.

    Raises:
        ValueError: If the network or the weights are unknown, `stem` does not fit the network, or
            the weights belong to another network.

    Example:
        >>> network = torchvision_model("resnet18", num_classes=10, stem="cifar")
        >>> network.conv1
        Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    names = torchvision.models.list_models(module=torchvision.models)
    near = ", ".join(difflib.get_close_matches(name, names) or names)
    expected = "be a torchvision classification network"
    expect(name in names, "name", expected, repr(name), f"try one of {near}")
    valid, remedy = stem in ("imagenet", "cifar"), "use 'cifar' for small images"
    expect(valid, "stem", "be 'imagenet' or 'cifar'", repr(stem), remedy)
    # By default, these two have auxiliary outputs, and an initialisation that warns or is slow.
    options = {"aux_logits": False, "init_weights": False} if name in _WITH_AUXILIARY else {}
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    if stem == "cifar":
        if not isinstance(network, torchvision.models.ResNet):
            raise ValueError(
                "`stem` must be 'imagenet' unless the network is a ResNet, got 'cifar' for "
                f"{name!r}; use stem='imagenet'"
            )
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if in_channels != 3:
        _replace_first_convolution(network, in_channels)
    if weights is not None:
        _load(network, _read_weights(name, str(weights)), str(weights), num_classes)
    return network


_WITH_AUXILIARY = ("googlenet", "inception_v3")


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, attribute = path.rpartition(".")
            replacement = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            setattr(network.get_submodule(parent), attribute, replacement)
            return


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a network of the same architecture.

    Args:
        network: The network.
        path: A safetensors file, or a file of `torch.save`: a `state_dict`, a Lightning checkpoint,
            or a dict that contains one. Names may have a prefix, such as `net.` or `model.module.`;
            tensors without it are ignored.

    Raises:
        ValueError: If there is no such file, or its tensors do not fit the network.
    """
    expect(Path(path).is_file(), "weights", "be a file", repr(str(path)), "check the path")
    load_state(network, _read_file(Path(path)), str(path))


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a network; their names may have a prefix.

    Args:
        network: The network.
        state: Name -> tensor.
        source: Origin of the tensors, for error messages.

    Raises:
        ValueError: If the tensors do not fit the network.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> load_state(network, {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}, "here")
        >>> network.bias
        Parameter containing:
        tensor([1.], requires_grad=True)
    """
    # With 0 classes, a last layer of another shape is an error too.
    _load(network, state, source, num_classes=0)


# Raised by `torch.load` for files that are damaged, of another format, or hold other objects.
_UNREADABLE = (pickle.UnpicklingError, AttributeError, EOFError, KeyError, RuntimeError)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        return with_description(dict(_tensors(state)), described(state))
    except (*_UNREADABLE, SafetensorError) as error:
        raise ValueError(
            f"`weights` must hold a state_dict, got {str(path)!r}, which is damaged or holds other "
            "objects, which are not unpickled; save network.state_dict()"
        ) from error


def _tensors(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _read_weights(name: str, weights: str) -> dict[str, Tensor]:
    path = Path(weights)
    if path.is_file():
        return _read_file(path)
    entries = torchvision.models.get_model_weights(name)
    entry = weights.rpartition(".")[2]
    known = entries.__members__
    expected = f"be a file or one of {', '.join(known)}"
    expect(entry in known, "weights", expected, repr(weights), "check the path")
    downloaded: dict[str, Tensor] = entries[entry].get_state_dict(progress=False, check_hash=True)
    return downloaded


def _load(network: nn.Module, state: Mapping[str, Tensor], weights: str, num_classes: int) -> None:
    """Load `state`, except for a last layer that differs only in the number of classes."""
    own = network.state_dict()
    state = _without_prefix(state, own.keys(), weights)
    head = [
        key
        for key in own
        if own[key].shape != state[key].shape
        and own[key].shape[0] == num_classes
        and own[key].shape[1:] == state[key].shape[1:]
    ]
    wrong = [
        f"{key} of shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if own[key].shape != state[key].shape and key not in head
    ]
    expect(
        not wrong,
        "weights",
        "fit the network",
        f"{len(wrong)} tensors of another shape in {weights!r}: {', '.join(wrong[:4])}",
        "check `name`, `stem` and `in_channels`",
    )
    if head:
        _log.warning(
            "Not loaded from %s, as the number of classes differs: %s",
            weights,
            ", ".join(sorted(head)),
        )
    # Without version information, the modules are assumed to have the current versions.
    modules = described(state) or described(own)
    network.load_state_dict(with_description({**state, **{key: own[key] for key in head}}, modules))


def _without_prefix(
    state: Mapping[str, Tensor], wanted: Collection[str], weights: str
) -> OrderedDict[str, Tensor]:
    """The tensors with the wanted names, after removing a common prefix if necessary."""
    prefixes = {""} | {key[: dot.end()] for key in state for dot in re.finditer(r"\.", key)}
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for prefix in sorted(prefixes)
    }
    fitting = [prefix for prefix, part in parts.items() if part.keys() == set(wanted)]
    expect(
        len(fitting) <= 1,
        "weights",
        "hold the network once",
        f"copies with the prefixes {', '.join(map(repr, fitting))} in {weights!r}",
        "save the one you need",
    )
    if not fitting:
        nearest = max(parts.values(), key=lambda part: len(part.keys() & set(wanted)))
        raise ValueError(
            f"`weights` must fit the network, with the tensors {_first(wanted)}, got "
            f"{_first(state)} in {weights!r} "
            f"(missing: {_first(set(wanted) - nearest.keys())}; "
            f"unknown: {_first(nearest.keys() - set(wanted))}); check which network was saved"
        )
    return with_description(parts[fitting[0]], described(state, fitting[0]))


def _first(names: Collection[str], count: int = 4) -> str:
    shown = ", ".join(sorted(names)[:count]) or "none"
    return f"{shown}, ... ({len(names)})" if len(names) > count else shown
