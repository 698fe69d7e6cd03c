"""Trace through subclasses of PyTorch's layers, such as timm's BatchNormAct2d."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTION = ("weight bias", "stride padding dilation groups")
_TRANSPOSED = ("weight bias", "stride padding output_padding groups dilation")
# Function -> the layers that call it, and the names of its arguments after the input: tensors and
# options of the layer.
_FUNCTIONS: dict[Any, tuple[tuple[type[nn.Module], ...], str, str]] = {
    F.linear: ((nn.Linear,), "weight bias", ""),
    F.conv1d: ((nn.Conv1d,), *_CONVOLUTION),
    F.conv2d: ((nn.Conv2d,), *_CONVOLUTION),
    F.conv3d: ((nn.Conv3d,), *_CONVOLUTION),
    F.conv_transpose1d: ((nn.ConvTranspose1d,), *_TRANSPOSED),
    F.conv_transpose2d: ((nn.ConvTranspose2d,), *_TRANSPOSED),
    F.conv_transpose3d: ((nn.ConvTranspose3d,), *_TRANSPOSED),
    F.batch_norm: (_NORMS, "running_mean running_var weight bias", "training momentum eps"),
    F.prelu: ((nn.PReLU,), "weight", ""),
}
_DEFAULTS = {
    **{"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1},
    **{"training": False, "eps": 1e-5},
}
_NO_LAYERS = {"torch.nn.modules.module", "torch.nn.modules.container"}
LAYERS = tuple(kind for kinds, _, _ in _FUNCTIONS.values() for kind in kinds)


class SubclassTracer(fx.Tracer):
    """Traces through subclasses of layers with their own `forward`.

    A subclass that cannot be traced remains a leaf. If its code depends on the input size, as that
    of timm's Conv2dSame does, a tracer that is given `sizes` can trace it.

    Args:
        sizes: Qualified names of layers -> shape of their input.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.sizes = sizes or {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record the forward pass."""
        with _dimensions_unchecked():
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one of PyTorch's layers, without changes."""
        subclass = isinstance(m, LAYERS) and type(m) not in LAYERS
        changed = subclass or "forward" in vars(m)
        return not changed and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace through a module, or record a call of it."""
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        if isinstance(m, LAYERS) and (path := self.path_of_module(m)) in self.sizes:
            args = (_Sized(args[0].node, self, self.sizes[path]), *args[1:])
            self.param_shapes_constant = True
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # the layer's own code can raise anything
            if not _extends_a_layer(m):
                raise
            for node in reversed(list(self.graph.nodes)[before:]):
                if node.op != "get_attr":  # others may use the same
                    self.graph.erase_node(node)
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        finally:
            self.param_shapes_constant = False


def _extends_a_layer(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch or a subclass of one, such as `nn.LSTM`."""
    places = {base.__module__ for base in type(module).__mro__} - _NO_LAYERS
    return any(place.startswith("torch.nn.") for place in places)


class _Sized(fx.Proxy):
    """A value of known size, except for the batch size."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, sizes: Sequence[int]) -> None:
        super().__init__(node, tracer)
        self._sizes = sizes

    def size(self, dim: int | None = None) -> Any:
        samples = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        sizes = (samples, *self._sizes[1:])
        return sizes if dim is None else sizes[dim]

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> int:
        return len(self._sizes)

    def dim(self) -> int:
        return len(self._sizes)


def closed_layers(traced: fx.GraphModule) -> dict[str, Sequence[int]]:
    """The subclasses of layers that could not be traced: qualified name -> shape of their input.

    Args:
        traced: A graph from a `SubclassTracer`, with the shapes of its values.
    """
    called = [node for node in traced.graph.nodes if node.op == "call_module" and node.args]
    times = Counter(node.target for node in called)
    return {
        str(node.target): node.args[0].meta["shape"]
        for node in called
        if times[node.target] == 1
        and isinstance(node.args[0], fx.Node)
        and "shape" in node.args[0].meta
        and isinstance(layer := traced.get_submodule(str(node.target)), LAYERS)
        and type(layer) not in LAYERS
    }


def recognise(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Turn function calls back into layer calls where they do what the base layer does.

    For example, `BatchNormAct2d` becomes a batch norm and an activation. Layers that recompute
    their weights, as in weight standardisation, are not recognised.

    Args:
        model: The traced model.
        graph: Its graph from a `SubclassTracer`; modified in place.

    Returns:
        Qualified name -> the layer as an instance of its base class. It shares its attributes with
        the layer of the model.

    Example:
        >>> class Squared(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) ** 2
        >>> model = nn.Sequential(Squared(2, 3))
        >>> graph = SubclassTracer().trace(model)
        >>> recognise(model, graph)
        {'0': Linear(in_features=2, out_features=3, bias=True)}
        >>> [node.target for node in graph.nodes][1:3]
        ['0', <built-in function pow>]
    """
    layers: dict[str, nn.Module] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            given = _arguments(node)
            path = _owner(given)
            kind = _computed(model.get_submodule(path), path, given, *_FUNCTIONS[node.target])
            if path and kind is not None and not _is_shared(path, graph, layers):
                layers[path] = _as_one_of(kind, model.get_submodule(path))
                node.op, node.target = "call_module", path
                node.args, node.kwargs = (given["input"],), {}
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return layers


def _is_shared(path: str, graph: fx.Graph, layers: Collection[str]) -> bool:
    """Whether replacing the module at `path` would change a module that the graph calls."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    within = any(path.startswith(f"{outer}.") for outer in called)
    return within or any(layer.startswith(f"{path}.") for layer in layers)


def _arguments(node: fx.Node) -> dict[str, Any]:
    _, tensors, options = _FUNCTIONS[node.target]
    names = ["input", *tensors.split(), *options.split()]
    return {**_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _owner(given: dict[str, Any]) -> str:
    """The module whose tensors are among the arguments."""
    for name in ("weight", "running_mean"):
        tensor = given.get(name)
        if isinstance(tensor, fx.Node) and tensor.op == "get_attr":
            return str(tensor.target).rpartition(".")[0]
    return ""


def _computed(
    module: nn.Module,
    path: str,
    given: dict[str, Any],
    kinds: tuple[type[nn.Module], ...],
    tensors: str,
    options: str,
) -> type[nn.Module] | None:
    """The layer type whose `forward` passes exactly these arguments, if the module is one."""
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    layer: Any = module
    if kind is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    expected = {
        **{name: getattr(layer, name, None) for name in options.split()},
        **{"training": False, "momentum": given.get("momentum")},
    }
    same_options = all(_equal(given[name], expected[name]) for name in options.split())
    plain = getattr(layer, "padding_mode", "zeros") == "zeros"
    same_tensors = all(
        _is(given.get(name), None if getattr(layer, name) is None else f"{path}.{name}")
        for name in tensors.split()
    )
    return kind if same_options and plain and same_tensors else None


def _equal(given: Any, expected: Any) -> bool:
    if isinstance(expected, tuple) and not isinstance(given, str):
        given = tuple(given) if isinstance(given, list | tuple) else (given,) * len(expected)
    return bool(given == expected)


def _is(given: Any, name: str | None) -> bool:
    if name is None or not isinstance(given, fx.Node):
        return given is None and name is None
    return given.op == "get_attr" and given.target == name


def _as_one_of(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    view = kind.__new__(kind)
    object.__setattr__(view, "__dict__", vars(module))
    return view


@contextmanager
def _dimensions_unchecked() -> Iterator[None]:
    """Disable the dimension check of batch norm, as proxies have no known dimensions."""
    checks = {kind: vars(kind)["_check_input_dim"] for kind in _NORMS}
    try:
        for kind in _NORMS:
            setattr(kind, "_check_input_dim", lambda self, input: None)  # noqa: B010
        yield
    finally:
        for kind, check in checks.items():
            setattr(kind, "_check_input_dim", check)  # noqa: B010
