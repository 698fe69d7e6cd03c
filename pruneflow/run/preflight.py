"""Check all settings before anything runs, so that no run fails after hours of training.

Values of nodes with a `_target_` are checked against its type annotations. Only the types of other
keys are listed here.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pruneflow.errors import expect
from pruneflow.models import Loss

_log = logging.getLogger(__name__)

# Key -> type and example.
_TYPES: dict[str, tuple[Any, Any]] = {
    "task": (Literal["prune", "deploy"], "prune"),
    "checkpoint": (str | None, "FILE"),
    "seed": (int, 0),
    "resume": (bool, True),
    "dense.epochs": (int, 10),
    "dense.weights": (str | None, "FILE"),
    "dense.cache": (str | None, None),
    "pruning.epochs": (int, 20),
    "pruning.exclude": (list[str], "['fc.*']"),
    "pruning.gradient_batches": (int, 8),
    "deploy.batches": (list[int], [1, 16, 128]),
    "deploy.threads": (int | None, None),
}
_RANGES: dict[str, tuple[int, float]] = {
    "seed": (0, 2**32 - 1),
    "dense.epochs": (0, math.inf),
    "pruning.epochs": (0, math.inf),
    "pruning.gradient_batches": (1, math.inf),
    "deploy.batches": (1, math.inf),
    "deploy.threads": (1, os.cpu_count() or 1),
    "trainer.accumulate_grad_batches": (1, math.inf),
    "trainer.min_epochs": (0, math.inf),
}


_FILES = ("checkpoint", "dense.weights")


class BuildError(ValueError):
    """A node of the configuration could not be built.

    Args:
        key: Key of the node.
        cause: The exception raised.
    """

    def __init__(self, key: str, cause: BaseException) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.key = key


def unwrap(error: InstantiationException, key: str = "") -> BuildError:
    """The original error of a constructor, with the key that Hydra reports."""
    _, named, full_key = str(error).rpartition("full_key: ")
    return BuildError(full_key if named else key, error.__cause__ or error)


@contextmanager
def building(key: str) -> Iterator[None]:
    """Convert all exceptions to `BuildError`."""
    try:
        yield
    except InstantiationException as error:
        raise unwrap(error, key) from error
    except Exception as error:
        raise BuildError(key, error) from error


# -- values ----------------------------------------------------------------------------------------


def check_values(config: DictConfig) -> None:
    """Check that values have the right type and are in range.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: With a line for each invalid value.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    missing = OmegaConf.missing_keys(config)
    wrong = [f"`{key}` must be set, got nothing; set {key}=..." for key in missing]
    for key, (hint, example) in {**_TYPES, **_annotated(config, values)}.items():
        try:
            value = _value(values, key)
        except (KeyError, TypeError):  # removed; there will be an error if it is needed
            continue
        least, most = _RANGES.get(key, (-math.inf, math.inf))
        if not _fits(value, hint):
            expected = _type_name(hint)
            if _fits([value], hint) and _within([value], least, most):
                example = [value]
        elif not all(map(math.isfinite, _numbers(value))):
            expected = "finite"
        elif not _within(value, least, most):
            expected = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
        elif key in _FILES and value is not None and not Path(value).is_file():
            expected = "an existing file"
        else:
            continue
        got = "null" if value is None else repr(value)
        wrong.append(f"`{key}` must be {expected}, got {got}; set {key}={_plain(example)}")
    if wrong:
        raise ValueError("\n".join(wrong))


def _plain(value: Any) -> str:
    """Format a value for the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int | float)]


def _within(value: Any, least: float, most: float) -> bool:
    return all(least <= number <= most for number in _numbers(value))


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


_NO_DEFAULT = inspect.Parameter.empty
_EXAMPLES = {int: 1, float: 0.5, bool: True}


def _annotated(config: DictConfig, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> annotation and example, for keys of nodes with a `_target_`.

    Interpolated keys are left out, such as `data.seed`, as the original (`seed`) is checked.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name, node, settings in _nodes(config, values):
        try:
            target: Any = get_object(node["_target_"])
            parameters = inspect.signature(target).parameters
            function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
            hints = get_type_hints(function)
        except Exception:  # building it will fail; or an annotation cannot be resolved
            continue
        for key in node.keys() & hints.keys() & parameters.keys():
            default, hint = parameters[key].default, hints[key]
            if node[key] != default and not OmegaConf.is_interpolation(settings, key):
                example = _EXAMPLES.get(hint, "...")
                found[f"{name}.{key}"] = hint, example if default is _NO_DEFAULT else default
    return dict(sorted(found.items()))


def _nodes(
    config: DictConfig, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any], DictConfig]]:
    """Nodes with a `_target_`: key, values, and the node."""
    for name, value in values.items():
        if isinstance(value, dict):
            if "_target_" in value:
                yield f"{prefix}{name}", value, config[name]
            yield from _nodes(config[name], value, f"{prefix}{name}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a builtin has an annotated type; True if not known.

    Example:
        >>> _fits(1, float), _fits("1", float), _fits(True, int), _fits(None, int | None)
        (True, False, False, True)
        >>> _fits([0.5], list[float]), _fits(0.5, list[float]), _fits("a", Literal["a", "b"])
        (True, False, True)
        >>> _fits("grey", list[float]), _fits("a", float | nn.Module), _fits("cpu", torch.device)
        (False, False, True)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(value, dict):  # a node of its own, or a mapping
        return True
    if origin in (Union, types.UnionType):
        known = [member for member in arguments if get_origin(member) or member in _CLASSES]
        return not known or any(_fits(value, member) for member in known)
    if origin is Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Sequence):
        inner = next((argument for argument in arguments if argument is not ...), Any)
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    classes = _CLASSES.get(hint, object)  # other types may accept any builtin
    return isinstance(value, classes) and not (isinstance(value, bool) and hint in (int, float))


_CLASSES: dict[Any, type | tuple[type, ...]] = {
    int: int,
    float: (float, int),
    bool: bool,
    str: str,
    Path: str,
    type(None): type(None),
}


def _type_name(hint: Any) -> str:
    """Describe an annotation.

    Example:
        >>> _type_name(int | None), _type_name(list[float]), _type_name(Literal["a", "b"])
        ('a whole number or null', 'a list of numbers', "'a' or 'b'")
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        known = [member for member in arguments if get_origin(member) or member in _TYPE_NAMES]
        names = [_type_name(m) for m in known if not (m is int and float in known)]
        return " or ".join(dict.fromkeys(names))
    if arguments:
        return f"a list of {_type_name(arguments[0]).removeprefix('a ')}s"
    return _TYPE_NAMES.get(hint, "a list")


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}


def check_folder(key: str, folder: str) -> None:
    """Create a folder, and check that it can be written to.

    Args:
        key: Key that sets it.
        folder: Path of the folder.

    Raises:
        ValueError: If it cannot be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{key}` must be a folder that can be written to, got {folder!r} "
            f"({error.strerror}); set {key}=DIR"
        ) from error


# -- parts -----------------------------------------------------------------------------------------


def build(config: DictConfig, key: str) -> Any:
    """Build the object of a config node; None for an empty node.

    Raises:
        BuildError: If it cannot be built.
    """
    with building(key):
        built = instantiate(config[key]) if config[key] else None
        if isinstance(built, partial):  # not called before the first round
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
        return built


def build_scope(config: DictConfig) -> Any:
    """Build `pruning.scope`: a name, groups of globs, or a distribution with a `_target_`.

    Raises:
        BuildError: If it cannot be built.
    """
    scope = config.pruning.scope
    if not OmegaConf.is_config(scope):
        return scope
    with building("pruning.scope"):
        plain: Any = OmegaConf.to_container(scope, resolve=True)
        return instantiate(plain) if "_target_" in plain else plain


def check_trainer(config: DictConfig) -> L.Trainer:
    """Check the settings of the Trainer.

    Args:
        config: The node of the Trainer.

    Returns:
        A Trainer with these settings, not for training.

    Raises:
        ValueError: If Lightning does not accept them, or would use another precision.
    """
    with building("trainer"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not supported on CPU")  # an error below
        trainer: L.Trainer = instantiate(
            config, max_epochs=1, devices=1, logger=False, enable_checkpointing=False, callbacks=[]
        )
    precision, supported = str(config.get("precision")), str(trainer.precision)
    expect(
        precision not in ("16", "16-mixed") or not supported.startswith("bf16"),
        "trainer.precision",
        "be supported by the accelerator",
        f"{precision!r} on a CPU",
        f"set trainer.precision={supported}",
    )
    return trainer


def build_data(config: DictConfig, trainer: L.Trainer | None = None) -> Any:
    """Build a datamodule, and check its attributes and that it has batches.

    Args:
        config: The node of the datamodule.
        trainer: A Trainer with the limits on batches; None if only the test set is used.

    Raises:
        ValueError: If something is missing.
    """
    with building("data"):
        data: Any = instantiate(config)
        data.prepare_data()
        for stage in ("fit", "test") if trainer else ("test",):
            data.setup(stage)
    missing = [
        f"`{name}`" for name in ("num_classes", "classes", "image_shape") if not hasattr(data, name)
    ]
    expect(
        not missing,
        "data",
        "be a LightningDataModule with `num_classes`, `classes` (their names) and `image_shape` "
        "(channels, height, width) after setup()",
        f"{type(data).__name__} without {', '.join(missing)}",
        "see pruneflow.data.ImageData",
    )
    expect(
        data.num_classes >= 2 and len(data.classes) == data.num_classes,
        "data",
        "have at least two classes, each with a name",
        f"{data.num_classes} with the names {list(data.classes)}",
        "create one folder of images for each class",
    )
    for stage in ("train", "val", "test") if trainer else ("test",):
        with building("data"):
            loader = getattr(data, f"{stage}_dataloader")()
        _check_batches(stage, loader, getattr(trainer, f"limit_{stage}_batches", 1.0))
    return data


def _check_batches(stage: str, loader: Any, limit: float) -> None:
    try:
        count = len(loader)
    except TypeError:  # an iterable dataset
        return
    remedy = "lower data.batch_size, or add images"
    expect(count, "data", f"have batches in `{stage}_dataloader`", "none", remedy)
    if stage == "train" and count == 1:
        _log.warning("`data.batch_size` is at least the number of images: an epoch is one step")
    key, remedy = f"trainer.limit_{stage}_batches", "use 1 or more, or null for all"
    expect(_limited(count, limit), key, f"keep at least 1 of the {count} batches", limit, remedy)


def _limited(count: int, limit: float) -> int:
    return int(limit * count) if isinstance(limit, float) else min(limit, count)


def steps_per_epoch(data: Any, trainer: L.Trainer) -> int | None:
    """Optimizer steps per epoch; None if the data has no length."""
    try:
        batches = _limited(len(data.train_dataloader()), trainer.limit_train_batches)
    except TypeError:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def build_network(config: DictConfig, data: Any) -> nn.Module:
    """Build a network, and check that it fits the images and classes.

    Args:
        config: The node of the network.
        data: The datamodule, after `setup`.

    Raises:
        ValueError: If it does not fit.
    """
    channels, *_ = shape = tuple(data.image_shape)
    with building("model"):
        network: nn.Module = instantiate(config)(num_classes=data.num_classes, in_channels=channels)
        training = network.training
        with torch.no_grad():
            outputs = network.eval()(torch.zeros(2, *shape))
        network.train(training)
    got = tuple(getattr(outputs, "shape", ()))
    expect(
        got == (2, data.num_classes),
        "model",
        f"return {data.num_classes} logits for each image, one per class",
        f"{f'shape {got}' if got else type(outputs).__name__} for two images of shape {shape}",
        "give its last layer `num_classes` outputs",
    )
    return network


def check_loss(loss: Loss, num_classes: int, image_shape: Sequence[int]) -> None:
    """Check that a loss returns a differentiable scalar, on a batch of two.

    Raises:
        ValueError: If it does not.
    """
    logits = torch.zeros(2, num_classes, requires_grad=True)
    with building("loss"):
        value = loss(logits, torch.tensor([0, 1]), torch.zeros(2, *image_shape))
    valid = isinstance(value, Tensor) and not value.dim() and value.requires_grad
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    remedy = "return the mean over the batch"
    expect(valid, "loss", "return a scalar that depends on the logits", got, remedy)
