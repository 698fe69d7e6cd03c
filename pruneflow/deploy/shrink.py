"""Remove what is dead in a pruned model without changing what it computes."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from pruneflow.structure.channels.analysis import analyse, check_same, outputs, owned, plain
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
    """A smaller dense model that computes the same in evaluation mode.

    Filters, channels, features and heads of attention go when no surviving weight reads or writes
    them, or when what they hold is a constant, which then goes into the next bias; a residual
    branch that became a constant is replaced by it. What an operation does that is not understood,
    or that looks at all channels, as LayerNorm does, stays whole. Channels that a sum still needs
    but a layer beside it does not are copied around that layer by `torch.index_select`. Where more
    than 16 channels of a multiple of 16 stay, again a multiple of 16 does: CPUs are no faster on a
    few less.

    Exact means but for rounding, in evaluation mode, on finite inputs. Any batch size will do, and
    other sizes of images if they did before. In training mode the statistics of a batch differ, and
    branches and attention that had to be rewritten do without dropout that is no layer.

    Args:
        model: The model, pruned: plain, with zeros in place. It is left as it is.
        example_input: A batch of what the model takes, to learn the shapes from.
        fixed_size: Whether all inputs will have the size of the example, the batch aside. Then taps
            of kernels go as well that read nothing but zero padding, as eight of nine do in the
            last stage of a ResNet on small images. Other sizes are refused by an assertion.

    Returns:
        A new model in evaluation mode: of the same class, with smaller layers, where the code of
        `forward` fits them, otherwise a `torch.fx.GraphModule`. Layers keep their names.

    Raises:
        ValueError: If a mask of `torch.nn.utils.prune` is still on the model, or torch.fx cannot
            trace it.
        RuntimeError: If the result does not compute the same for `example_input`.

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
        own = owned(small, traced)
        flow, rules = analyse(traced, own, fixed_size=fixed_size)
        changed = False
        while _fold_branches(traced, flow):
            flow, rules = analyse(traced, own, fixed_size=fixed_size)
            changed = True
        _settle(flow, rules)
        rewritten = [rule.cut() for rule in rules]
        unreached = any(isinstance(rule, Weighted) and not rule.reached.all() for rule in rules)
        if changed or unreached or any(rewritten):
            if fixed_size:
                _refuse_other_sizes(traced)
            for node in traced.graph.nodes:
                node.meta.clear()  # of shapes that were
            traced.graph.lint()
            small = fx.GraphModule(traced, traced.graph, type(model).__name__).eval()
        else:
            _hand_over(traced, small)
    check_same(expected, small, "shrinking")
    return small


def _hand_over(traced: fx.GraphModule, small: nn.Module) -> None:
    """Give the model the parameters and buffers of the graph; the layers are one and the same."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            setattr(small.get_submodule(owner), name, getattr(traced.get_submodule(owner), name))


def _fold_branches(traced: fx.GraphModule, flow: Flow) -> bool:
    """Replace what a sum or product takes by its constant where all of it is one."""
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
            # Another input has to give the result its shape.
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
    constant = channels.constant.reshape(shape).clone()  # 0 where nobody needs it
    name = _name_of_constant(node)
    trained = constant.is_floating_point()
    traced.register_parameter(name, nn.Parameter(constant, trained))
    with traced.graph.inserting_before(node):
        place = traced.graph.get_attr(name)
    place.meta.update(shape=tuple(constant.shape), dtype=constant.dtype)
    node.replace_input_with(source, place)
    out_of_place(node)
    flow.own.add(name)
    _remove_unused(traced, source)


def _remove_unused(traced: fx.GraphModule, node: fx.Node) -> None:
    if node not in traced.graph.nodes:  # by then removed, as all that read it were
        return
    sources = node.all_input_nodes
    writes = is_in_place(node) and any(len(source.users) > 1 for source in sources)
    if node.users or node.op == "placeholder" or writes:
        return
    traced.graph.erase_node(node)
    for source in sources:
        _remove_unused(traced, source)


def _settle(flow: Flow, rules: list[Rule]) -> None:
    """Decide what stays."""
    flow.settle()
    for rule in rules:
        if isinstance(rule, Weighted):
            rule.keep_constants()
    for channels in flow.values.values():
        if not flow.kept(channels).any():  # not all backends take tensors without any
            flow.keep(int(channels.atoms[0]))
    for rule in rules:
        if isinstance(rule, Carried) and rule.drops_one:
            channels = flow.values[rule.node]
            if flow.kept(channels).sum() == 1:
                flow.keep(int(channels.atoms[~flow.kept(channels)][0]))
    for rule in rules:
        if isinstance(rule, Weighted):
            flow.round_up(rule.result)


def _refuse_other_sizes(traced: fx.GraphModule) -> None:
    graph = traced.graph
    for given in given_tensors(graph):
        size = given.meta["shape"][1:]
        with graph.inserting_after(given):
            shape = graph.call_function(getattr, (given, "shape"))
        with graph.inserting_after(shape):
            found = graph.call_function(operator.getitem, (shape, slice(1, None)))
        with graph.inserting_after(found):
            same = graph.call_function(operator.eq, (found, size))
        message = f"the input is expected to be of the fixed size {size} this model was shrunk for"
        with graph.inserting_after(same):
            graph.call_function(torch._assert, (same, message))
