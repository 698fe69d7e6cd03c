"""Follow a model's values through its forward pass, as a graph of torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pruneflow.channels.subclasses import SubclassTracer, closed_layers, recognise

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def trace(model: nn.Module, example_input: Tensor, *, fixed_size: bool = False) -> fx.GraphModule:
    """Record the forward pass of `model` with its first argument as the only input.

    PyTorch's own layers stay whole; `nn.TransformerEncoder` is opened, and so are subclasses of
    layers, see `recognise`. Every node whose value is a tensor gets its shape and dtype in
    `node.meta`.

    Args:
        model: In evaluation mode. The result shares its layers.
        example_input: What `model` takes; it is not changed.
        fixed_size: Whether the graph is for inputs of this size alone, so that layers can be opened
            whose code depends on it.

    Raises:
        ValueError: If torch.fx cannot trace the model.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval(), torch.zeros(5, 2))
        >>> [(node.name, node.meta["shape"]) for node in traced.graph.nodes][1:3]
        [('_0', (5, 3)), ('_1', (5, 3))]
    """
    traced = _traced(model, example_input, _Tracer())
    shapes = {n: n.meta["shape"] for n in traced.graph.nodes if "shape" in n.meta}
    closed = closed_layers(traced, shapes) if fixed_size else {}
    return _traced(model, example_input, _Tracer(closed)) if closed else traced


def _traced(model: nn.Module, example_input: Tensor, tracer: SubclassTracer) -> fx.GraphModule:
    try:
        graph = tracer.trace(model)
    except Exception as error:  # tracing runs the model's own code, which can raise anything
        raise ValueError(
            f"`model` is expected to be traceable by torch.fx, but tracing {type(model).__name__} "
            f"ended with: {error}; move control flow that depends on tensors out of `forward`, "
            "hide it in a function behind torch.fx.wrap, or give the part of the model that can "
            "be traced"
        ) from error
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:  # as of `_` in `x, _ = ...`
            graph.erase_node(node)
    layers = recognise(model, graph)
    traced = fx.GraphModule(model, graph, class_name=type(model).__name__)
    for name, layer in layers.items():
        traced.set_submodule(name, layer)
    _Shapes(traced).run(example_input.clone())
    return traced


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors `node` computes with."""
    return [source for source in node.all_input_nodes if "shape" in source.meta]


def of_parameters(node: fx.Node) -> bool:
    """Whether a value is computed from parameters and buffers alone."""
    return node.op == "get_attr" or node.meta.get("of_parameters", False)


def is_in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node writes its result over its first input."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    flag = node.kwargs.get("inplace", False) or any(argument is True for argument in node.args)
    name = getattr(node.target, "__name__", "")
    known = node.target in _IN_PLACE_OPERATORS or node.target is operator.setitem
    return bool(flag) or known or (name.endswith("_") and not name.endswith("__"))


def out_of_place(node: fx.Node) -> None:
    """Let a node that adds, subtracts, multiplies or divides make a new tensor."""
    if node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
    else:
        node.target = _IN_PLACE_OPERATORS.get(node.target, node.target)  # type: ignore[arg-type]


class Storage:
    """Which values may share memory, so that writing over one is seen in another.

    Args:
        traced: The graph.
        fresh: Whether a node that does not work in place is sure to make a new tensor.
    """

    def __init__(self, traced: fx.GraphModule, fresh: Callable[[fx.Node], bool]) -> None:
        self._order = {node: position for position, node in enumerate(traced.graph.nodes)}
        self._sharing: dict[fx.Node, set[fx.Node]] = {}
        self._in_place = {node for node in self._order if is_in_place(traced, node)}
        for node in self._order:
            family = self._sharing[node] = {node}
            sources = node.all_input_nodes
            if node in self._in_place:
                sources = sources[:1]
            elif fresh(node):
                sources = []
            for source in sources:
                family |= self._sharing[source]
            for member in family:
                self._sharing[member] = family

    def overwritten(self) -> set[fx.Node]:
        """Values that are read again after they, or what shares their memory, were written over."""
        return {
            member
            for node in self._in_place
            if self._read_later(node, node)
            for member in self._sharing[node]
        }

    def can_stand_for(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether `value` may be given to all that read `node`, which computes just that."""
        others = (self._sharing[node] | self._sharing[value]) - {node}
        written = any(member in self._in_place for member in others)
        return not (written and self._read_later(value, node))

    def _read_later(self, value: fx.Node, node: fx.Node) -> bool:
        now = self._order[node]
        return any(
            self._order[member] < now and any(self._order[user] > now for user in member.users)
            for member in self._sharing[value]
        )


class _Tracer(SubclassTracer):
    proxy_buffer_attributes = True  # what is computed from them, as FrozenBatchNorm2d does, is seen

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        # The other arguments keep their defaults, which control flow may well depend on.
        def forward(root: nn.Module, input: Tensor) -> Any:
            return root_fn(root, input)

        return super().create_args_for_root(forward, is_module, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _OPENED:
            return False
        # A leaf it still drops branches in training mode.
        stochastic_depth = type(m).__module__ == "torchvision.ops.stochastic_depth"
        return stochastic_depth or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        plain = _OPENED.get(type(m))
        if plain is None:
            return super().call_module(m, forward, args, kwargs)
        if len(args) != 1 or any(value is not None for value in kwargs.values()):  # masks
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return super().call_module(m, lambda source: plain(m, source), args, {})


def _encoder(encoder: Any, source: Any) -> Any:
    for layer in encoder.layers:
        source = layer(source)
    return source if encoder.norm is None else encoder.norm(source)


def _encoder_layer(layer: Any, source: Any) -> Any:
    def attend(x: Any) -> Any:
        return layer.dropout1(layer.self_attn(x, x, x, need_weights=False)[0])

    def feed_forward(x: Any) -> Any:
        hidden = layer.dropout(layer.activation(layer.linear1(x)))
        return layer.dropout2(layer.linear2(hidden))

    if layer.norm_first:
        source = source + attend(layer.norm1(source))
        return source + feed_forward(layer.norm2(source))
    source = layer.norm1(source + attend(source))
    return layer.norm2(source + feed_forward(source))


# Their own code chooses between fast paths by looking at the tensors.
_OPENED: dict[type[nn.Module], Callable[[nn.Module, Any], Any]] = {
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
}


class _Shapes(fx.Interpreter):
    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        sources = n.all_input_nodes
        n.meta["of_parameters"] = bool(sources) and all(map(of_parameters, sources))
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
            n.meta["dtype"] = result.dtype
        return result
