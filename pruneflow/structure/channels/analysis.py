"""Analyse the channels of a model, and compare its outputs before and after a change."""

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

from pruneflow.errors import expect
from pruneflow.structure.channels.flow import Flow
from pruneflow.structure.channels.operations import makes_a_new_tensor, rule_of
from pruneflow.structure.channels.rules import Rule
from pruneflow.structure.channels.subclasses import LAYERS
from pruneflow.structure.channels.tracing import Storage
from pruneflow.structure.parameters import locate, unwrap
from pruneflow.structure.running import Example, call, evaluating, tensors_in


def plain(model: nn.Module) -> nn.Module:
    """Unwrap a model from `torch.compile` and other wrappers.

    Raises:
        ValueError: If it has masks of `torch.nn.utils.prune`.
    """
    model = unwrap(model)
    masked = ", ".join(name for name, slot in locate(model).items() if slot.reparametrized)
    expect(
        not masked,
        "model",
        "have no masks of torch.nn.utils.prune",
        f"masks on {masked}",
        "make them permanent with pruneflow.fold_model(model)",
    )
    return model


_OF_LAYERS = ("weight", "bias", "running_mean", "running_var")


def find_unshared(model: nn.Module, traced: fx.GraphModule) -> set[str]:
    """Names of the layers and tensors that occur once in the model and are used once."""
    nodes = Counter(
        str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")
    )
    tensors = dict(_tensors(traced))
    # A layer under two names counts once; a tensor of two layers counts twice.
    places = Counter(id(tensor) for module in model.modules() for tensor in _own_tensors(module))
    places.update(id(tensors[name]) for name in nodes if name in tensors)
    modules = {name for name in nodes if name not in tensors}

    def alone(name: str) -> bool:
        if name in modules:
            layer = traced.get_submodule(name)
            own = dict(_tensors(layer))
            if type(layer) in LAYERS:  # recognised from a subclass, which may have more tensors
                own = {name: tensor for name, tensor in own.items() if name in _OF_LAYERS}
            return all(places[id(tensor)] == 1 for tensor in own.values())
        return places[id(tensors[name])] == 2

    return {name for name, count in nodes.items() if count == 1 and alone(name)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = chain(module._parameters.values(), module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def analyse(
    traced: fx.GraphModule, unshared: set[str], *, fixed_size: bool
) -> tuple[Flow, list[Rule]]:
    """Propagate constants forward through the graph, and which channels are needed backward.

    Args:
        traced: The graph.
        unshared: Result of `find_unshared`.
        fixed_size: Whether all inputs will have the size of the example.
    """
    storage = Storage(traced, lambda node: makes_a_new_tensor(traced, node))
    overwritten = storage.overwritten()
    flow = Flow(unshared, fixed_size=fixed_size)
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
    """Outputs of a model for `check_same`.

    For the example input and for noise of its shape, as an input of zeros would hide differences.
    Noise is skipped if it leads to an error or NaN.

    Raises:
        ValueError: If the model fails on the example input.
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
    """Check that a changed model still gives the same outputs.

    Args:
        expected: Its `outputs` before the change.
        model: The model now.
        after: The change, for messages.

    Raises:
        RuntimeError: If the outputs differ by more than rounding, or the model fails.
    """
    with evaluating(model, expected[0][0]):
        for example_input, before in expected:
            try:
                now = call(model, example_input)
            except ValueError as error:
                raise RuntimeError(
                    f"`model` must run after {after}, got {type(error.__cause__).__name__}: "
                    f"{error.__cause__}; in `forward`, take numbers of channels from the shapes of "
                    "tensors"
                ) from error
            for pair in zip(_tensors_of(before), _tensors_of(now), strict=True):
                _check_close(*pair, after)


def _check_close(before: Tensor, now: Tensor, after: str) -> None:
    if not (before.is_floating_point() or before.is_complex()):
        return
    before, now = before.detach(), now.detach()
    expect(
        now.shape == before.shape,
        "model",
        f"return a tensor of shape {tuple(before.shape)} after {after}",
        tuple(now.shape),
        "in `forward`, take numbers of channels from the shapes of tensors",
        error=RuntimeError,
    )
    same = (before == now) | (before.isnan() & now.isnan())
    wide = torch.promote_types(before.dtype, torch.float64)
    error = torch.linalg.vector_norm(torch.where(same, 0, now - before).to(wide))
    scale = torch.linalg.vector_norm(before[before.isfinite()].to(wide))
    # Far above rounding errors, far below the effect of a mistake.
    expect(
        error <= torch.finfo(before.dtype).eps ** 0.5 * scale,
        "model",
        f"give the same outputs after {after}, for `example_input` and for noise of its shape",
        f"a relative difference of {float(error / scale):.1e}",
        "make sure that its outputs depend on its input only; otherwise this is a bug in "
        "pruneflow, please report it",
        error=RuntimeError,
    )


def _noise(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator(value.device).manual_seed(0)
    return torch.empty_like(value).normal_(generator=generator)


def _tensors_of(result: Any) -> list[Tensor]:
    """The tensors in the output of a model."""
    tensors = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):
            tensors += _tensors_of(list(leaf.values()))
        elif is_dataclass(leaf):
            tensors += _tensors_of(list(vars(leaf).values()))
    return tensors
