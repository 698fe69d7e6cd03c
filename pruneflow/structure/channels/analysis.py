"""Follow all channels of a model, and compare what it computes before and after a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pruneflow.structure.channels.flow import Flow
from pruneflow.structure.channels.operations import makes_a_new_tensor, rule_of
from pruneflow.structure.channels.rules import Rule
from pruneflow.structure.channels.subclasses import LAYERS
from pruneflow.structure.channels.tracing import Storage
from pruneflow.structure.parameters import locate, unwrap
from pruneflow.structure.running import Example, call, evaluating, tensors_in


def plain(model: nn.Module) -> nn.Module:
    """The model itself where torch.compile or another wrapper is around it.

    Raises:
        ValueError: If a mask of `torch.nn.utils.prune` is still on it.
    """
    model = unwrap(model)
    masked = [name for name, slot in locate(model).items() if slot.reparametrized]
    if masked:
        raise ValueError(
            f"`model` is expected to be plain, but {', '.join(masked)} are under the masks of "
            "torch.nn.utils.prune; make them plain with pruneflow.fold_model(model)"
        )
    return model


_OF_LAYERS = ("weight", "bias", "running_mean", "running_var")


def owned(model: nn.Module, traced: fx.GraphModule) -> set[str]:
    """Names of the layers and tensors that have one place in the model and are used once."""
    nodes = Counter(
        str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")
    )
    tensors = dict(_tensors(traced))
    # A layer under two names has one place; a tensor of two layers has two.
    places = Counter(id(tensor) for module in model.modules() for tensor in _held(module))
    places.update(id(tensors[name]) for name in nodes if name in tensors)
    modules = {name for name in nodes if name not in tensors}

    def alone(name: str) -> bool:
        if name in modules:
            layer = traced.get_submodule(name)
            held = dict(_tensors(layer))
            if type(layer) in LAYERS:  # it may be of a subclass that has more of them
                held = {own: tensor for own, tensor in held.items() if own in _OF_LAYERS}
            return all(places[id(tensor)] == 1 for tensor in held.values())
        return places[id(tensors[name])] == 2

    return {name for name, count in nodes.items() if count == 1 and alone(name)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _held(module: nn.Module) -> list[Tensor]:
    held = chain(module._parameters.values(), module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def analyse(traced: fx.GraphModule, own: set[str], *, fixed_size: bool) -> tuple[Flow, list[Rule]]:
    """Follow constants forward through the graph, and needs backward.

    Args:
        traced: The graph.
        own: See `owned`.
        fixed_size: Whether all inputs will have the size of the example.
    """
    storage = Storage(traced, lambda node: makes_a_new_tensor(traced, node))
    overwritten = storage.overwritten()
    flow = Flow(own, fixed_size=fixed_size)
    rules = []
    for node in traced.graph.nodes:
        if node.op == "placeholder" or node in flow.values:
            continue
        rule = Rule(traced, flow, node)
        if node not in overwritten and node.op != "output":
            rule = rule_of(traced, flow, node)
        if not rule.forward():
            rule = Rule(traced, flow, node)
            rule.forward()
        rules.append(rule)
    for rule in reversed(rules):
        rule.backward()
    return flow, rules


Outputs = list[tuple[Example, Any]]


def outputs(model: nn.Module, example_input: Example) -> Outputs:
    """What a model computes, to compare it with what it computes when it was changed.

    For the example and for noise in its place, as an example of zeros hides most of what a model
    does; but not where noise is nothing to compute with, and ends in an error or in NaN.

    Raises:
        ValueError: If the model does not take the example.
    """
    with evaluating(model, example_input):
        found = [(example_input, call(model, example_input))]
        if any(tensor.is_floating_point() for tensor in tensors_in(example_input)):
            noise = tree_map(_noise, example_input)
            with suppress(ValueError):
                result = call(model, noise)
                if not any(tensor.isnan().any() for tensor in _tensors_of(result)):
                    found.append((noise, result))
    return found


def check_same(expected: Outputs, model: nn.Module, after: str) -> None:
    """Compare what a model computes with what it did before it was changed.

    Raises:
        RuntimeError: If it differs by more than rounding, or the model does not run.
    """
    with evaluating(model, expected[0][0]):
        for example_input, before in expected:
            try:
                now = call(model, example_input)
            except ValueError as error:
                raise RuntimeError(
                    f"`model` is expected to run after {after}, but that ended with: "
                    f"{error.__cause__}; take numbers of channels in `forward` from the shapes of "
                    "its tensors"
                ) from error
            for pair in zip(_tensors_of(before), _tensors_of(now), strict=True):
                _check_close(*pair, after)


def _check_close(before: Tensor, now: Tensor, after: str) -> None:
    if not (before.is_floating_point() or before.is_complex()):
        return
    if now.shape != before.shape:
        raise RuntimeError(
            f"`model` is expected to compute the same after {after}, but returned a tensor of "
            f"shape {tuple(now.shape)}, not {tuple(before.shape)}; take numbers of channels in "
            "`forward` from the shapes of its tensors"
        )
    same = (before == now) | (before.isnan() & now.isnan())
    wide = torch.promote_types(before.dtype, torch.float64)
    error = torch.linalg.vector_norm(torch.where(same, 0, now - before).to(wide))
    scale = torch.linalg.vector_norm(before[before.isfinite()].to(wide))
    # Far above what rounding leaves, far below what a mistake makes.
    if not error <= torch.finfo(before.dtype).eps ** 0.5 * scale:
        raise RuntimeError(
            f"`model` is expected to compute the same after {after}, but on `example_input`, or "
            f"noise in its place, the relative difference is {float(error / scale):.1e}; its "
            "forward pass depends on more than the input, or this is a fault of pruneflow: please "
            "report it"
        )


def _noise(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator(value.device).manual_seed(0)
    return torch.empty_like(value).normal_(generator=generator)


def _tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    tensors = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):
            tensors += _tensors_of(list(leaf.values()))
        elif is_dataclass(leaf):
            tensors += _tensors_of(list(vars(leaf).values()))
    return tensors
