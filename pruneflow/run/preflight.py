"""Check what is set before anything runs: a run is refused at once, not after hours of training.

Signatures are the schema: what a node with a `_target_` sets is compared with the annotations of
what it builds. Only keys that belong to no node have their types here.
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

from pruneflow.models import Loss

_log = logging.getLogger(__name__)

# Key -> what it takes, and an example.
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
    """Something could not be built from what is set.

    Args:
        key: Of its node in the configuration.
        cause: What was raised.
    """

    def __init__(self, key: str, cause: BaseException) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.key = key


def unwrap(error: InstantiationException, key: str = "") -> BuildError:
    """What a constructor said, without what Hydra wraps it in but for the key."""
    _, named, full_key = str(error).rpartition("full_key: ")
    return BuildError(full_key if named else key, error.__cause__ or error)


@contextmanager
def building(key: str) -> Iterator[None]:
    """Raise `BuildError` for whatever a constructor, ours or another's, does not take."""
    try:
        yield
    except InstantiationException as error:
        raise unwrap(error, key) from error
    except Exception as error:
        raise BuildError(key, error) from error


# -- values ----------------------------------------------------------------------------------------


def check_values(config: DictConfig) -> None:
    """Refuse values of the wrong type, or out of range, all at once.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: Naming each key, what it takes and what came.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    wrong = [f"`{key}` must be set; give {key}=..." for key in OmegaConf.missing_keys(config)]
    for key, (hint, example) in {**_TYPES, **_annotated(config, values)}.items():
        try:
            value = _value(values, key)
        except (KeyError, TypeError):  # it was taken out; whoever wants it will tell
            continue
        least, most = _RANGES.get(key, (-math.inf, math.inf))
        if not _fits(value, hint):
            expected = _in_words(hint)
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
        wrong.append(f"`{key}` must be {expected}, got {got}; give {key}={_plain(example)}")
    if wrong:
        raise ValueError("\n".join(wrong))


def _plain(value: Any) -> str:
    """A value as it is written on the command line."""
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
    """What the keys of nodes that build something take, as far as it is annotated.

    Without those that follow another key, as `data.seed` follows `seed`, which is checked itself.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name, node, settings in _nodes(config, values):
        try:
            target: Any = get_object(node["_target_"])
            parameters = inspect.signature(target).parameters
            function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
            hints = get_type_hints(function)
        except Exception:  # building it will tell; or it is annotated with what is not there
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
    """The nodes that build something: the key of each, its values, and itself."""
    for name, value in values.items():
        if isinstance(value, dict):
            if "_target_" in value:
                yield f"{prefix}{name}", value, config[name]
            yield from _nodes(config[name], value, f"{prefix}{name}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type, as far as can be told.

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
    classes = _CLASSES.get(hint, object)  # who knows what else takes a string or a number
    return isinstance(value, classes) and not (isinstance(value, bool) and hint in (int, float))


_CLASSES: dict[Any, type | tuple[type, ...]] = {
    int: int,
    float: (float, int),
    bool: bool,
    str: str,
    Path: str,
    type(None): type(None),
}


def _in_words(hint: Any) -> str:
    """An annotation in words.

    Example:
        >>> _in_words(int | None), _in_words(list[float]), _in_words(Literal["a", "b"])
        ('a whole number or null', 'a list of numbers', "'a' or 'b'")
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        known = [member for member in arguments if get_origin(member) or member in _WORDS]
        words = [_in_words(m) for m in known if not (m is int and float in known)]
        return " or ".join(dict.fromkeys(words))
    if arguments:
        return f"a list of {_in_words(arguments[0]).removeprefix('a ')}s"
    return _WORDS.get(hint, "a list")


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}


def check_folder(key: str, folder: str) -> None:
    """Make a folder, and refuse one that cannot be written to.

    Args:
        key: What sets it.
        folder: Its path.

    Raises:
        ValueError: If it cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{key}` must be a folder that can be written to, got {folder!r} "
            f"({error.strerror}); give {key}=DIR"
        ) from error


# -- parts -----------------------------------------------------------------------------------------


def build(config: DictConfig, key: str) -> Any:
    """Build what a node of the configuration says; None where it says nothing.

    Raises:
        BuildError: If it is refused.
    """
    with building(key):
        built = instantiate(config[key]) if config[key] else None
        if isinstance(built, partial):  # which is not called before the first round
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
        return built


def check_trainer(config: DictConfig) -> L.Trainer:
    """Build a Trainer as the stages will, to have it refused now what it would refuse then.

    Args:
        config: The node of the Trainer.

    Returns:
        A Trainer that is good for its settings.

    Raises:
        ValueError: If Lightning refuses it, or would use another precision than was asked for.
    """
    with building("trainer"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not supported on CPU")  # which is refused below
        trainer: L.Trainer = instantiate(
            config, max_epochs=1, devices=1, logger=False, enable_checkpointing=False, callbacks=[]
        )
    asked, got = str(config.get("precision")), str(trainer.precision)
    if asked in ("16", "16-mixed") and got.startswith("bf16"):
        raise ValueError(
            f"`trainer.precision` must be one that the accelerator has, got {asked!r}, which CPUs "
            f"do not; give trainer.precision={got}"
        )
    return trainer


def build_data(config: DictConfig, trainer: L.Trainer | None = None) -> Any:
    """Build a datamodule that says what a run needs and leaves pictures to train and test on.

    Args:
        config: Its node.
        trainer: Whose limits on batches will hold; None where only the test set is used.

    Raises:
        ValueError: Naming what is missing.
    """
    with building("data"):
        data: Any = instantiate(config)
        data.prepare_data()
        for stage in ("fit", "test") if trainer else ("test",):
            data.setup(stage)
    missing = [
        f"`{name}`" for name in ("num_classes", "classes", "image_shape") if not hasattr(data, name)
    ]
    if missing:
        raise ValueError(
            "`data` must be a LightningDataModule that has `num_classes`, `classes` (their names) "
            "and `image_shape` (channels, height, width) after setup(), got "
            f"{type(data).__name__} without {', '.join(missing)}; see "
            "pruneflow.data.ImageData"
        )
    if data.num_classes < 2 or len(data.classes) != data.num_classes:
        raise ValueError(
            f"`data` must have two classes or more, each with a name, got {data.num_classes} and "
            f"the names {list(data.classes)}; a folder of pictures has one folder for each class"
        )
    for stage in ("train", "val", "test") if trainer else ("test",):
        with building("data"):
            loader = getattr(data, f"{stage}_dataloader")()
        _check_batches(stage, loader, getattr(trainer, f"limit_{stage}_batches", 1.0))
    return data


def _check_batches(stage: str, loader: Any, limit: float) -> None:
    try:
        count = len(loader)
    except TypeError:  # of a stream nobody knows
        return
    if not count:
        raise ValueError(
            f"`data` must give batches for `{stage}_dataloader`, got none; lower data.batch_size, "
            "or give more pictures"
        )
    if stage == "train" and count == 1:
        _log.warning("`data.batch_size` takes all pictures at once: an epoch is a single step")
    if not _limited(count, limit):
        raise ValueError(
            f"`trainer.limit_{stage}_batches` must leave some of the {count} batches, got {limit}, "
            f"which leaves none; give trainer.limit_{stage}_batches=1 or more, or null for all"
        )


def _limited(count: int, limit: float) -> int:
    return int(limit * count) if isinstance(limit, float) else min(limit, count)


def steps_per_epoch(data: Any, trainer: L.Trainer) -> int | None:
    """How many optimizer steps make an epoch; None where the data have no length."""
    try:
        batches = _limited(len(data.train_dataloader()), trainer.limit_train_batches)
    except TypeError:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def build_network(config: DictConfig, data: Any) -> nn.Module:
    """Build a network, and refuse one that does not take the pictures or tell the classes apart.

    Args:
        config: Its node.
        data: The datamodule, after `setup`.

    Raises:
        ValueError: Saying what is wrong.
    """
    channels, *_ = shape = tuple(data.image_shape)
    with building("model"):
        network: nn.Module = instantiate(config)(num_classes=data.num_classes, in_channels=channels)
        training = network.training
        with torch.no_grad():
            outputs = network.eval()(torch.zeros(2, *shape))
        network.train(training)
    got = tuple(getattr(outputs, "shape", ()))
    if got != (2, data.num_classes):
        raise ValueError(
            f"`model` must give {data.num_classes} numbers for each picture, one for each class, "
            f"got {f'shape {got}' if got else type(outputs).__name__} for two pictures of shape "
            f"{shape}; let its last layer have `num_classes` outputs"
        )
    return network


def check_loss(loss: Loss, num_classes: int, image_shape: Sequence[int]) -> None:
    """Refuse a loss that cannot be trained on, by what it says of a batch of two.

    Raises:
        ValueError: Saying what is wrong.
    """
    logits = torch.zeros(2, num_classes, requires_grad=True)
    with building("loss"):
        value = loss(logits, torch.tensor([0, 1]), torch.zeros(2, *image_shape))
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"`loss` must return a scalar that depends on the logits, got {got}; return the mean "
            "over the batch"
        )
