"""Run a model on an example of what it takes, and leave it as it was."""

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
"""What a model takes: one tensor, positional arguments, or keyword arguments."""


def arguments(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that an example stands for.

    Raises:
        ValueError: If it stands for none.

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
        f"arguments, got {type(example_input).__name__}; give what `forward` takes"
    )


def tensors_in(example_input: Example) -> list[Tensor]:
    """The tensors of an example, in order."""
    return [leaf for leaf in tree_leaves(arguments(example_input)) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module, example_input: Example) -> torch.device:
    """The device of the example; without a tensor in it, of the model."""
    for tensor in (*tensors_in(example_input), *model.parameters()):
        return tensor.device
    return torch.device("cpu")


def call(model: nn.Module, example_input: Example) -> Any:
    """What a model returns for an example, which is not changed.

    Raises:
        ValueError: If the model does not take it.
    """
    args, kwargs = tree_map(clone, arguments(example_input))
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it is the model's own code
        raise ValueError(
            f"`example_input` must be what {type(model).__name__} takes, got "
            f"{type(error).__name__}: {error}; give a tensor, a tuple of positional arguments or a "
            "dict of keyword arguments"
        ) from error


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model; activations that it keeps, as `weight_norm` does, lose their graph.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer(torch.ones(1, 2))
        >>> copied(layer).last.requires_grad
        False
    """
    kept = [part for part in _parts(model) if isinstance(part, Tensor) and not part.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})


def clone(value: Any) -> Any:
    """A tensor of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def evaluating(model: nn.Module, example_input: Example) -> Iterator[None]:
    """Run a model, or trace it, without a trace.

    In evaluation mode, without gradients, and with new tensors on the device of the input. At the
    end the model is again as it was: its modules, hooks and attributes, the lists, dicts and sets
    among them, those of objects such as a config, the values of all tensors; and so are the
    generators of random numbers.

    Raises:
        ValueError: If layers wait for the first forward pass to make their parameters.
    """
    check_not_lazy(model)
    device = device_of(model, example_input)
    used = [device] if device.type == "cuda" else []
    reshard(model)
    put_back = _snapshot(model)
    states = random.getstate(), np.random.get_state()
    try:
        for module in model.modules():
            module.training = False  # not `eval()`, which a model may have its own ideas of
        with torch.random.fork_rng(devices=used), torch.no_grad(), device:
            yield
    finally:
        reshard(model)
        put_back()
        random.setstate(states[0])
        np.random.set_state(states[1])


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Note all that hangs on a model; the result puts it back.

    It takes the memory of one more copy of the weights: layers such as `nn.Embedding(max_norm=1)`
    write theirs in every forward pass.
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

    def put_back() -> None:
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
                # Of the memory, not of the tensor: a graph that holds it is still to be used.
                with torch.inference_mode(memory.is_inference()):
                    memory.copy_(values)

    return put_back


def _parts(model: nn.Module) -> Iterator[Any]:
    """All modules, containers and tensors that hang on a model, each once.

    Also the attributes of other objects, as of a config, but not those that hang on these in turn:
    through the Trainer of a LightningModule that would be all there is.
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
    """Whether it is an object of somebody's own; PyTorch's, as of FSDP, look after themselves."""
    own = type(value).__module__.partition(".")[0] != "torch"
    return own and not isinstance(value, Tensor | type | ModuleType) and hasattr(value, "__dict__")


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values can be noted; the other kinds no forward pass writes in place."""
    strided = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return type(tensor) in (Tensor, nn.Parameter) and strided


def _bytes(tensor: Tensor) -> Tensor:
    # So that NaN is the same as NaN.
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _contents(container: Any) -> list[Any]:
    """What is in it, in order; of a dict, keys and values by turns."""
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
