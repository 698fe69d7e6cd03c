"""Networks: a small one for small images, and every classification network of torchvision."""

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

from pruneflow.state_dicts import described, load_safetensors, with_description

_log = logging.getLogger(__name__)


def small_cnn(num_classes: int, in_channels: int, width: int = 32) -> nn.Sequential:
    """Three 3x3 convolutions with batch norm and a linear layer, for images of 8x8 or so.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Channels of the first convolution; the others have twice as many.

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
        name: As `torchvision.models.list_models(module=torchvision.models)` lists it.
        num_classes: Number of outputs.
        in_channels: Channels of the images. If not 3, the first convolution is replaced by one that
            takes as many, initialised as PyTorch initialises it.
        stem: "imagenet" leaves the network alone; "cifar" gives a ResNet, for small images, a 3x3
            convolution of stride 1 and no max-pool in place of 7x7, stride 2 and max-pool.
        weights: A local file, as `load_weights` reads it, or the name of a torchvision weights
            entry, such as "DEFAULT", which is downloaded. Where only the number of classes differs
            the last layer stays freshly initialised.

    Raises:
        ValueError: If the network or the weights are unknown, `stem` does not fit the network, or
            the weights are of another network.

    Example:
        >>> network = torchvision_model("resnet18", num_classes=10, stem="cifar")
        >>> network.conv1
        Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name, names) or names
        raise ValueError(
            f"`name` is expected to be a torchvision classification network, but {name!r} came; "
            f"did you mean {', '.join(near)}?"
        )
    # These two have auxiliary outputs unless told not to, and warn, or take seconds, to
    # initialise in a way of their own.
    options = {"aux_logits": False, "init_weights": False} if name in _WITH_AUXILIARY else {}
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    if stem == "cifar":
        if not isinstance(network, torchvision.models.ResNet):
            raise ValueError(
                f"`stem`='cifar' is expected only with a ResNet, but `name` is {name!r}, whose "
                "stem is another; take stem='imagenet'"
            )
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    elif stem != "imagenet":
        raise ValueError(f"`stem` is expected to be 'imagenet' or 'cifar', but {stem!r} came")
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
        path: A safetensors file, or what `torch.save` wrote: a `state_dict`, a Lightning
            checkpoint, or a dict that holds one. The network may lie anywhere in it: of all names
            those after one prefix count, such as `net.` or `model.module.`.

    Raises:
        ValueError: If there is no such file, or its tensors are not those of the network.
    """
    if not Path(path).is_file():
        raise ValueError(f"`weights`={str(path)!r} is expected to be a file; check the path")
    load_state(network, _read_file(Path(path)), str(path))


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a network, from under a prefix of their names where that makes them fit.

    Args:
        network: The network.
        state: Name -> tensor.
        source: Where they come from, for errors.

    Raises:
        ValueError: If they are not those of the network.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> load_state(network, {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}, "here")
        >>> network.bias
        Parameter containing:
        tensor([1.], requires_grad=True)
    """
    # No number of classes is 0: a last layer of another shape is refused too.
    _load(network, state, source, num_classes=0)


# What `torch.load` raises for files that are damaged, foreign, or hold other objects.
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
            f"`weights`={str(path)!r} is expected to hold a state_dict, but it is no such file or "
            "holds other objects, which are not unpickled; save network.state_dict()"
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
    if entry not in entries.__members__:
        raise ValueError(
            f"`weights` is expected to be a file or one of {', '.join(entries.__members__)}, but "
            f"{weights!r} is neither; check the path"
        )
    downloaded: dict[str, Tensor] = entries[entry].get_state_dict(progress=False, check_hash=True)
    return downloaded


def _load(network: nn.Module, state: Mapping[str, Tensor], weights: str, num_classes: int) -> None:
    """Load `state`, but for a last layer that differs in the number of classes alone."""
    own = network.state_dict()
    state = _below_prefix(state, own.keys(), weights)
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
    if wrong:
        raise ValueError(
            f"`weights`={weights!r} is expected to fit the network, but {len(wrong)} tensors are "
            f"of another shape: {', '.join(wrong[:4])}; check `name`, `stem` and `in_channels`"
        )
    if head:
        _log.warning("`weights`=%s: %s differ in classes and start afresh", weights, sorted(head))
    # Where nothing says of which versions the modules were, they are taken for those of today.
    modules = described(state) or described(own)
    network.load_state_dict(with_description({**state, **{key: own[key] for key in head}}, modules))


def _below_prefix(
    state: Mapping[str, Tensor], wanted: Collection[str], weights: str
) -> OrderedDict[str, Tensor]:
    """The tensors with the wanted names, as they are or after one prefix that all of them have."""
    prefixes = {""} | {key[: dot.end()] for key in state for dot in re.finditer(r"\.", key)}
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for prefix in sorted(prefixes)
    }
    fitting = [prefix for prefix, part in parts.items() if part.keys() == set(wanted)]
    if len(fitting) > 1:
        raise ValueError(
            f"`weights`={weights!r} must hold the network once, got it under each of "
            f"{', '.join(fitting)}; save the one that is meant"
        )
    if not fitting:
        nearest = max(parts.values(), key=lambda part: len(part.keys() & set(wanted)))
        raise ValueError(
            f"`weights`={weights!r} is expected to fit the network, whose tensors are "
            f"{_some(wanted)}, but {_some(state)} came; "
            f"missing: {_some(set(wanted) - nearest.keys())}; "
            f"unknown: {_some(nearest.keys() - set(wanted))}; check which network it was saved of"
        )
    return with_description(parts[fitting[0]], described(state, fitting[0]))


def _some(names: Collection[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most]) or "none"
    return f"{shown}, ... ({len(names)})" if len(names) > most else shown
