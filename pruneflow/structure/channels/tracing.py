"""Trace the forward pass of a model with torch.fx."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pruneflow.structure.channels.subclasses import SubclassTracer, closed_layers, recognise
from pruneflow.structure.parameters import wrapped
from pruneflow.structure.running import Example, arguments, clone

# In-place operators -> the same out of place, for values such as numbers.
_OPERATORS = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and_", "or_", "xor", "lshift", "rshift"),
    )
}


def trace(model: nn.Module, example_input: Example, *, fixed_size: bool = False) -> fx.GraphModule:
    """Trace the forward pass of a model for the arguments in an example input.

    PyTorch's own layers are leaves, except `nn.TransformerEncoder`; subclasses of layers are traced
    through, see `recognise`. Each node with a tensor gets its shape and dtype in `node.meta`. Reads
    of a tensor after an in-place operation become reads of the node of that operation. Numbers,
    strings and None among the arguments are constants of the graph, which asserts their values.

    Args:
        model: The model in evaluation mode. The result shares its layers.
        example_input: An input batch; it is not modified.
        fixed_size: Whether the graph is for inputs of this size only, so that layers whose code
            depends on it can be traced.

    Raises:
        ValueError: If the model does not accept the example input, torch.fx cannot trace it, or the
            traced graph fails.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval(), torch.zeros(5, 2))
        >>> [(node.name, node.meta["shape"]) for node in traced.graph.nodes][1:3]
        [('_0', (5, 3)), ('_1', (5, 3))]
    """
    traced = _traced(model, example_input)
    closed = closed_layers(traced) if fixed_size else {}
    return _traced(model, example_input, closed) if closed else traced


def _traced(
    model: nn.Module, example_input: Example, sizes: Mapping[str, Sequence[int]] | None = None
) -> fx.GraphModule:
    args, kwargs = tree_map(clone, arguments(example_input))
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"`example_input` must be a valid input of {type(model).__name__}, got TypeError: "
            f"{error}; pass a tensor, a tuple of positional arguments or a dict of keyword "
            "arguments"
        ) from error
    tracer = _Tracer(given, sizes)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # tracing runs the model's own code, which can raise anything
        raise _untraceable(model, "while tracing", error) from error
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:  # such as `_` in `x, _ = ...`
            graph.erase_node(node)
    layers = recognise(model, graph)
    traced = fx.GraphModule(model, graph, class_name=type(model).__name__)
    for name, layer in layers.items():
        traced.set_submodule(name, layer)
    try:
        _Values(traced, given).note()
        tracer.check_constants()
    except Exception as error:  # so does running the graph
        raise _untraceable(model, "while running the traced graph of", error) from error
    _read_what_was_written(traced.graph)
    return traced


def _untraceable(model: nn.Module, when: str, error: Exception) -> ValueError:
    message = str(error).strip().partition("\n")[0]
    return ValueError(
        f"`model` must be traceable by torch.fx, got an error {when} {type(model).__name__}: "
        f"{message or type(error).__name__}; move control flow that depends on tensors out of "
        "`forward` or into a function wrapped by torch.fx.wrap, or pass only the part of the model "
        "that can be traced"
    )


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are tensors."""
    return [source for source in node.all_input_nodes if "shape" in source.meta]


def given_tensors(graph: fx.Graph) -> list[fx.Node]:
    """The tensors among the arguments of a graph, including those in lists and dicts."""
    given: set[Any] = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        is_part = node.target is operator.getitem and node.args[0] in given
        if is_part and "shape" not in node.args[0].meta:
            given.add(node)
    return [node for node in graph.nodes if node in given and "shape" in node.meta]


def of_parameters(node: fx.Node) -> bool:
    """Whether a value is computed from parameters and buffers only."""
    return node.op == "get_attr" or node.meta.get("of_parameters", False)


def is_in_place(node: fx.Node) -> bool:
    """Whether a node modifies one of its inputs."""
    return bool(node.meta.get("written"))


def out_of_place(node: fx.Node) -> None:
    """Make an in-place arithmetic node out of place."""
    node.meta["written"] = ()
    if node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
    else:
        node.target = _OPERATORS.get(node.target, node.target)


def _written(node: fx.Node) -> list[fx.Node]:
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaves[position] for position in node.meta.get("written", ())]


def _read_what_was_written(graph: fx.Graph) -> None:
    """Replace reads of a tensor after an in-place operation by reads of its result."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.meta.pop("is_its_input", False):
            (source,) = _written(node)
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)


class Storage:
    """Which values may share memory, so that modifying one changes the other.

    Args:
        traced: The graph.
        fresh: Whether a node that is not in place always returns a new tensor.
    """

    def __init__(self, traced: fx.GraphModule, fresh: Callable[[fx.Node], bool]) -> None:
        self._order = {node: position for position, node in enumerate(traced.graph.nodes)}
        self._sharing: dict[fx.Node, set[fx.Node]] = {}
        self._in_place = {node for node in self._order if is_in_place(node)}
        attributes: dict[str, fx.Node] = {}
        for node in self._order:
            family = self._sharing[node] = {node}
            sources = [] if fresh(node) else node.all_input_nodes
            if node in self._in_place:
                sources = _written(node)
            elif node.op == "get_attr":
                sources = [attributes.setdefault(str(node.target), node)]
            for source in sources:
                family |= self._sharing[source]
            for member in family:
                self._sharing[member] = family

    def overwritten(self) -> set[fx.Node]:
        """Values that are read again after their memory was modified.

        Tensors of the model are read again in the next call.
        """
        return {
            member
            for node in self._in_place
            if self._read_later(node, node)
            or any(member.meta.get("is_rewritten") for member in self._sharing[node])
            for member in self._sharing[node]
        }

    def can_stand_for(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether `value` may replace `node`, which has the same value."""
        others = (self._sharing[node] | self._sharing[value]) - {node}
        written = any(member in self._in_place for member in others)
        return not (written and self._read_later(value, node))

    def _read_later(self, value: fx.Node, node: fx.Node) -> bool:
        now = self._order[node]
        return any(
            self._order[member] < now and any(self._order[user] > now for user in member.users)
            for member in self._sharing[value]
        )


class _Proxy(fx.Proxy):
    """Records in-place operators and assignments, which torch.fx does not support."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise TypeError("`x.data = ...` cannot be traced, use `x.copy_(...)`")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute that may be a view, such as `x.T`."""


def _recording(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in _OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _recording(_function))


class _Tracer(SubclassTracer):
    """Records in-place arithmetic, with PyTorch's own layers as leaves.

    Args:
        given: The arguments; None for those of the signature, needed to unpickle traced models.
        sizes: See `SubclassTracer`.
    """

    proxy_buffer_attributes = True  # to trace computations with buffers, as in FrozenBatchNorm2d

    def __init__(
        self,
        given: inspect.BoundArguments | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(sizes)
        self._given = given
        self._made: dict[Tensor, int] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return _Proxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record the forward pass."""
        buffers = [(module._buffers, module._buffers.copy()) for module in root.modules()]
        try:
            graph = super().trace(root, concrete_args)
            if not any(isinstance(b, fx.Proxy) for table, _ in buffers for b in table.values()):
                return graph
        except Exception:  # the model's own code can raise anything
            pass
        # It branches on a buffer, or assigns to one, as in `self.count += 1`: keep them as tensors.
        for table, before in buffers:
            table.update(before)
        self.proxy_buffer_attributes = False
        self._made.clear()
        return super().trace(root, concrete_args)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Proxies for the given arguments; all others keep their defaults."""
        if self._given is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        given = copy.copy(self._given)
        given.arguments = {
            name: self._argument(
                self.create_proxy("placeholder", _placeholder(given, name), (), {}), value
            )
            for name, value in given.arguments.items()
        }
        # Not the method of the class: an instance may have its own `forward`.
        return lambda root: root.forward(*given.args, **given.kwargs), [self.root]

    def create_arg(self, a: Any) -> Any:
        """The argument for a value in the graph; tensors created in `forward` become constants."""
        known = len(self.tensor_attrs)
        result = super().create_arg(a)
        if isinstance(a, Tensor) and len(self.tensor_attrs) > known:
            self._made[a] = a._version
        return result

    def check_constants(self) -> None:
        """Check that constants of the graph are not modified, which would affect the next call.

        Raises:
            TypeError: If one is modified.
        """
        if any(tensor._version != version for tensor, version in self._made.items()):
            raise TypeError(
                "`forward` modifies a tensor that it creates independently of its inputs, create "
                "it with `x.new_zeros(...)` or similar"
            )

    def _argument(self, proxy: Any, value: Any) -> Any:
        """An argument for the model's code, with proxies for tensors only."""
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            parts = (self._argument(proxy[index], each) for index, each in enumerate(value))
            return type(value)(parts)
        if isinstance(value, dict):
            return {key: self._argument(proxy[key], each) for key, each in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            message = f"an argument must be {value!r}, as in the example input of this model"
            torch._assert(operator.eq(proxy, value), message)
            return value
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _OPENED:
            return False
        # As a leaf it still drops branches in training mode.
        stochastic_depth = type(m).__module__ == "torchvision.ops.stochastic_depth"
        return stochastic_depth or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if wrapped(m) == "_orig_mod":  # by torch.compile, which refuses to be traced
            return m.get_submodule("_orig_mod")(*args, **kwargs)
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


# Their own code selects fast paths depending on the tensors.
_OPENED: dict[type[nn.Module], Callable[[nn.Module, Any], Any]] = {
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
}


def _placeholder(given: inspect.BoundArguments, name: str) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    kind: Any = given.signature.parameters[name].kind
    return f"{stars.get(kind, '')}{name}"


class _Values(fx.Interpreter):
    """Runs a graph on its example input and records shapes and in-place writes of each node."""

    def __init__(self, traced: fx.GraphModule, given: inspect.BoundArguments) -> None:
        super().__init__(traced)
        self._given = given.arguments
        self._attributes: list[tuple[fx.Node, Any, int]] = []

    def note(self) -> None:
        """Run the graph, and find tensors of the model that were modified."""
        self.run()
        for node, value, version in self._attributes:
            node.meta["is_rewritten"] = _version(value) != version

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The argument of that name."""
        return self._given[str(target).lstrip("*")]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, fx.Proxy):
            raise TypeError(f"`forward` assigns to `self.{target}`, use `self.{target}.copy_(...)`")
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments of a node, with mutable lists instead of torch.fx's immutable ones."""
        return _thawed(super().fetch_args_kwargs_from_env(n))  # type: ignore[no-any-return]

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and find the tensors it modifies by their version counters."""
        leaves = [
            self.env[leaf] if isinstance(leaf, fx.Node) else None
            for leaf in tree_leaves((n.args, n.kwargs))
        ]
        before = [_version(leaf) for leaf in leaves]
        result = super().run_node(n)
        written = [i for i, leaf in enumerate(leaves) if _version(leaf) != before[i]]
        n.meta["written"] = tuple(written)
        n.meta["is_its_input"] = len(written) == 1 and result is leaves[written[0]]
        if n.target in _OPERATORS and not written:  # on numbers, which are immutable
            n.target = _OPERATORS[n.target]
        sources = n.all_input_nodes
        n.meta["of_parameters"] = bool(sources) and all(map(of_parameters, sources))
        if n.op == "get_attr":
            self._attributes.append((n, result, _version(result)))
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
            n.meta["dtype"] = result.dtype
        return result


def _version(value: Any) -> int:
    return sum(leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _thawed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _thawed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_thawed(each) for each in value]
    return tuple(map(_thawed, value)) if type(value) is tuple else value
