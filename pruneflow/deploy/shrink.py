"""Remove dead channels from a pruned model without changing its outputs."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from pruneflow.structure.channels.analysis import analyse, check_same, find_unshared, outputs, plain
from pruneflow.structure.channels.flow import Flow
from pruneflow.structure.channels.operations import SUMS, makes_a_new_tensor
from pruneflow.structure.channels.rules import Carried, Rule
from pruneflow.structure.channels.tracing import (
    Storage,
    given_tensors,
    is_in_place,
    of_parameters,
    out_of_place,
    tensor_inputs,
    trace,
)
from pruneflow.structure.channels.weighted import Weighted
from pruneflow.structure.running import Example, copied, device_of, evaluating


def shrink(model: nn.Module, example_input: Example, *, fixed_size: bool = False) -> nn.Module:
    """Build a smaller dense model that gives the same outputs in evaluation mode.

    Filters, channels, features and attention heads are removed if no nonzero weight reads or
    computes them, or if they are constant; constants are folded into the next bias, and a constant
    residual branch is replaced by its value. Channels are kept where an operation is not supported
    or needs all of them, as LayerNorm does. If a sum needs more channels than one of its layers,
    `torch.index_select` copies them around that layer. More than 16 channels of a multiple of 16
    are rounded up to a multiple of 16, as a few less do not make CPUs faster.

    Outputs are the same up to rounding, in evaluation mode, for finite inputs of any batch size,
    and of any image size that the model supports. In training mode, batch statistics differ, and
    rewritten branches and attention have no functional dropout.

    Args:
        model: The pruned model: plain, with exact zeros. It is not modified.
        example_input: An input batch, to determine shapes.
        fixed_size: Whether all inputs will have the size of the example, except for the batch size.
            Then taps of kernels that only read zero padding are removed too, such as eight of nine
            in the last stage of a ResNet on small images. The result asserts the input size.

    Returns:
        A new model in evaluation mode: of the same class with smaller layers if its `forward`
        supports that, otherwise a `torch.fx.GraphModule`. Layers keep their names.

    Raises:
        ValueError: If the model has masks of `torch.nn.utils.prune`, or torch.fx cannot trace it.
        RuntimeError: If the result gives different outputs for `example_input`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = model[0].weight.data[3:].zero_(), model[0].bias.data[3:].fill_(0.5)
        >>> shrink(model, torch.zeros(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    model = plain(model)
    expected = outputs(model, example_input)
    small = copied(model).eval()
    with evaluating(small, example_input):
        traced = trace(small, example_input, fixed_size=fixed_size)
    with torch.no_grad(), device_of(model, example_input):
        unshared = find_unshared(small, traced)
        flow, rules = analyse(traced, unshared, fixed_size=fixed_size)
        changed = False
        while _fold_branches(traced, flow):
            flow, rules = analyse(traced, unshared, fixed_size=fixed_size)
            changed = True
        _resolve(flow, rules)
        rewritten = [rule.cut() for rule in rules]
        unreached = any(isinstance(rule, Weighted) and not rule.reached.all() for rule in rules)
        if changed or unreached or any(rewritten):
            if fixed_size:
                _assert_size(traced)
            for node in traced.graph.nodes:
                node.meta.clear()  # shapes have changed
            traced.graph.lint()
            small = fx.GraphModule(traced, traced.graph, type(model).__name__).eval()
        else:
            _copy_tensors(traced, small)
    check_same(expected, small, "shrinking")
    return small


def _copy_tensors(traced: fx.GraphModule, small: nn.Module) -> None:
    """Set the parameters and buffers of the graph on the model, which shares its layers."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            setattr(small.get_submodule(owner), name, getattr(traced.get_submodule(owner), name))


def _fold_branches(traced: fx.GraphModule, flow: Flow) -> bool:
    """Replace constant inputs of sums, products and the like by their values."""
    folded = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" or node not in flow.values or len(tensor_inputs(node)) < 2:
            continue
        for source in tensor_inputs(node):
            channels = flow.values.get(source)
            if channels is None or of_parameters(source):
                continue
            if not (channels.known | ~channels.needed).all():
                continue
            others = [other for other in tensor_inputs(node) if other is not source]
            # Another input must have the shape of the result.
            if any(
                not of_parameters(other) and other.meta["shape"] == node.meta["shape"]
                for other in others
            ):
                folded.add(node)
                _insert_constant(traced, flow, node, source)
                break
    for node in [node for node in traced.graph.nodes if node in folded]:
        constant = traced.get_parameter(_name_of_constant(node))
        if node.target in SUMS and not node.kwargs and not constant.any():
            (other,) = (source for source in tensor_inputs(node) if source.op != "get_attr")
            storage = Storage(traced, lambda node: makes_a_new_tensor(traced, node))
            if storage.can_stand_for(other, node):
                node.replace_all_uses_with(other)
                _remove_unused(traced, node)
    return bool(folded)


def _name_of_constant(node: fx.Node) -> str:
    return f"{node.name}_constant"


def _insert_constant(traced: fx.GraphModule, flow: Flow, node: fx.Node, source: fx.Node) -> None:
    channels = flow.values[source]
    shape = [1] * len(source.meta["shape"])
    shape[channels.dim] = -1
    constant = channels.constant.reshape(shape).clone()  # 0 where not needed
    name = _name_of_constant(node)
    trained = constant.is_floating_point()
    traced.register_parameter(name, nn.Parameter(constant, trained))
    with traced.graph.inserting_before(node):
        value = traced.graph.get_attr(name)
    value.meta.update(shape=tuple(constant.shape), dtype=constant.dtype)
    node.replace_input_with(source, value)
    out_of_place(node)
    flow.unshared.add(name)
    _remove_unused(traced, source)


def _remove_unused(traced: fx.GraphModule, node: fx.Node) -> None:
    if node not in traced.graph.nodes:  # removed already
        return
    sources = node.all_input_nodes
    writes = is_in_place(node) and any(len(source.users) > 1 for source in sources)
    if node.users or node.op == "placeholder" or writes:
        return
    traced.graph.erase_node(node)
    for source in sources:
        _remove_unused(traced, source)


def _resolve(flow: Flow, rules: list[Rule]) -> None:
    """Decide which channels are kept."""
    flow.resolve()
    for rule in rules:
        if isinstance(rule, Weighted):
            rule.keep_constants()
    for channels in flow.values.values():
        if not flow.kept(channels).any():  # not all backends support empty tensors
            flow.keep(int(channels.atoms[0]))
    for rule in rules:
        if isinstance(rule, Carried) and rule.drops_one:
            channels = flow.values[rule.node]
            if flow.kept(channels).sum() == 1:
                flow.keep(int(channels.atoms[~flow.kept(channels)][0]))
    for rule in rules:
        if isinstance(rule, Weighted):
            flow.round_up(rule.result)


def _assert_size(traced: fx.GraphModule) -> None:
    graph = traced.graph
    for given in given_tensors(graph):
        size = given.meta["shape"][1:]
        with graph.inserting_after(given):
            shape = graph.call_function(getattr, (given, "shape"))
        with graph.inserting_after(shape):
            found = graph.call_function(operator.getitem, (shape, slice(1, None)))
        with graph.inserting_after(found):
            same = graph.call_function(operator.eq, (found, size))
        message = f"the input must be of the fixed size {size} this model was shrunk for"
        with graph.inserting_after(same):
            graph.call_function(torch._assert, (same, message))
