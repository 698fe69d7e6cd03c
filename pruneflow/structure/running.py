"""Run a model on an example input without changing it."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pruneflow.distributed import reshard
from pruneflow.structure.parameters import check_not_lazy

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""The input of a model: one tensor, positional arguments, or keyword arguments."""


def arguments(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments in an example input.

    Raises:
        ValueError: If it is neither a tensor nor arguments.

    Example:
        >>> arguments({"scale": 2})
        ((), {'scale': 2})
    """
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    raise ValueError(
        "`example_input` must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(example_input).__name__}; pass the arguments of `forward`"
    )


def tensors_in(example_input: Example) -> list[Tensor]:
    """The tensors in an example input, in order."""
    return [leaf for leaf in tree_leaves(arguments(example_input)) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module, example_input: Example) -> torch.device:
    """The device of the example input, or of the model if the input has no tensors."""
    for tensor in (*tensors_in(example_input), *model.parameters()):
        return tensor.device
    return torch.device("cpu")


def call(model: nn.Module, example_input: Example) -> Any:
    """Call a model on a copy of an example input.

    Raises:
        ValueError: If the model fails.
    """
    args, kwargs = tree_map(clone, arguments(example_input))
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code can raise anything
        raise ValueError(
            f"`example_input` must be a valid input of {type(model).__name__}, got "
            f"{type(error).__name__}: {error}; pass a tensor, a tuple of positional arguments or a "
            "dict of keyword arguments"
        ) from error


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model; activations it stores, as `weight_norm` does, are detached.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer(torch.ones(1, 2))
        >>> copied(layer).last.requires_grad
        False
    """
    kept = [part for part in _parts(model) if isinstance(part, Tensor) and not part.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})


def clone(value: Any) -> Any:
    """A copy of a tensor; any other value as it is."""
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def evaluating(model: nn.Module, example_input: Example) -> Iterator[None]:
    """Run or trace a model in evaluation mode and without gradients, then restore it.

    New tensors are created on the device of the input. At the end everything that `undisturbed`
    lists is restored.

    Raises:
        ValueError: If the model has uninitialized lazy layers.
    """
    check_not_lazy(model)
    device = device_of(model, example_input)
    with undisturbed(model, device), torch.no_grad(), device:
        for module in model.modules():
            module.training = False  # not `eval()`, which models may override
        yield


@contextmanager
def undisturbed(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Restore a model and the states of the random number generators at the end.

    Restored are its modules, hooks and attributes, including lists, dicts, sets and the attributes
    of objects such as a config, and the values of all tensors. Gradients are left alone.

    Args:
        model: The model.
        device: The device whose generator is restored besides the CPU's; None for that of the
            model's first parameter.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reshard(model)
    restore = _snapshot(model)
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        reshard(model)
        restore()
        random.setstate(states[0])
        np.random.set_state(states[1])


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Save the state of a model; calling the result restores it.

    This copies the weights, as layers such as `nn.Embedding(max_norm=1)` modify theirs in the
    forward pass.
    """
    kinds: list[tuple[nn.Module, type]] = []
    containers: list[tuple[Any, list[Any]]] = []
    tensors: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    for part in _parts(model):
        if isinstance(part, nn.Module):
            kinds.append((part, type(part)))
        elif not isinstance(part, Tensor):
            containers.append((part, _contents(part)))
        elif _is_plain(part):
            tensors.append((part, part.data, part.detach().clone(), part.requires_grad))

    def restore() -> None:
        for module, kind in kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for container, before in containers:
            now = _contents(container)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                _refill(container, before)
        for tensor, memory, values, trained in tensors:
            if tensor.requires_grad is not trained:
                tensor.requires_grad_(trained)
            if not tensor.is_set_to(memory):
                tensor.data = memory
            if not torch.equal(_bytes(memory), _bytes(values)):
                # Write to the memory, not the tensor, so that autograd graphs stay valid.
                with torch.inference_mode(memory.is_inference()):
                    memory.copy_(values)

    return restore


def _parts(model: nn.Module) -> Iterator[Any]:
    """All modules, containers and tensors reachable from a model, each once.

    Attributes of other objects, such as a config, are included one level deep: following the
    Trainer of a LightningModule any further would reach everything.
    """
    seen: set[int] = set()
    pending: list[tuple[Any, bool]] = [(model, True)]
    while pending:
        value, of_model = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: Iterable[Any] = ()
        if isinstance(value, nn.Module):
            inner, of_model = [vars(value)], True
        elif isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set | deque):
            inner = value
        elif of_model and _has_attributes(value):
            inner, of_model = [vars(value)], False
        if isinstance(value, nn.Module | Tensor | dict | list | set | deque):
            yield value
        pending.extend((each, of_model) for each in inner)


def _has_attributes(value: Any) -> bool:
    """Whether its attributes are to be restored; PyTorch's objects, as in FSDP, are left alone."""
    foreign = type(value).__module__.partition(".")[0] != "torch"
    return (
        foreign and not isinstance(value, Tensor | type | ModuleType) and hasattr(value, "__dict__")
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values can be saved; forward passes do not modify other kinds in place."""
    strided = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return type(tensor) in (Tensor, nn.Parameter) and strided


def _bytes(tensor: Tensor) -> Tensor:
    # Compared as bytes so that NaN equals NaN.
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _contents(container: Any) -> list[Any]:
    """The items in order; alternating keys and values for a dict."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


def _refill(container: Any, contents: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(zip(contents[::2], contents[1::2], strict=True))
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)
