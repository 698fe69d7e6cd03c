"""Follow all channels of a model, and leave the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pruneflow.channels.flow import Flow
from pruneflow.channels.operations import makes_a_new_tensor, rule_of
from pruneflow.channels.rules import Rule
from pruneflow.channels.subclasses import LAYERS
from pruneflow.channels.tracing import Storage
from pruneflow.parameters import locate


def plain(model: nn.Module) -> nn.Module:
    """The model itself where torch.compile wraps it.

    Raises:
        ValueError: If a mask of `torch.nn.utils.prune` is still on it.
    """
    model = getattr(model, "_orig_mod", model)
    masked = [name for name, slot in locate(model).items() if slot.reparametrized]
    if masked:
        raise ValueError(
            f"`model` is expected to be plain, but {', '.join(masked)} are under the masks of "
            "torch.nn.utils.prune; make them plain with pruneflow.importers.fold_model(model)"
        )
    return model


@contextmanager
def evaluating(model: nn.Module, example_input: Tensor) -> Iterator[None]:
    """Run a model, or trace it, without a trace.

    In evaluation mode, without gradients, and with new tensors on the device of the input. At the
    end the modes of all layers, what `forward` or torch.fx put into their attributes, and the state
    of the generators of random numbers are again as they were.
    """
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    device = example_input.device
    used = [device] if device.type == "cuda" else []
    try:
        for module in model.modules():
            module.training = False  # not `eval()`, which a model may have its own ideas of
        with torch.random.fork_rng(devices=used), torch.no_grad(), device:
            yield
    finally:
        for present, before in attributes:
            present.clear()
            present.update(before)


_OF_LAYERS = ("weight", "bias", "running_mean", "running_var")


def owned(model: nn.Module, traced: fx.GraphModule) -> set[str]:
    """Names of the layers and tensors that have one place in the model and are used once."""
    nodes = Counter(
        str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")
    )
    tensors, everywhere = (dict(_tensors(module)) for module in (traced, model))
    places = Counter(id(tensor) for tensor in everywhere.values())
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


def check_same(expected: Any, found: Any, after: str) -> None:
    """Compare what a model returned for an example before and after it was changed.

    Raises:
        RuntimeError: If it differs by more than rounding.
    """
    for before, now in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if not isinstance(before, Tensor) or not before.is_floating_point():
            continue
        error = torch.linalg.vector_norm((now - before).double())
        scale = torch.linalg.vector_norm(before.double())
        # Far above what rounding leaves, far below what a mistake makes.
        if not error <= torch.finfo(before.dtype).eps ** 0.5 * scale:
            raise RuntimeError(
                f"`model` is expected to compute the same after {after}, but on `example_input` "
                f"the relative difference is {float(error / scale):.1e}; its forward pass depends "
                "on more than the input, or this is a fault of pruneflow: please report it"
            )
