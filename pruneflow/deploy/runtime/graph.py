"""Capture a model as layers of the sparse runtime; operations it does not know are refused."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pruneflow.deploy.runtime.known import (
    CLAMPS,
    DIFFERENCES,
    DROPOUTS,
    FUNCTIONS,
    IN_PLACE,
    POOLS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
)
from pruneflow.deploy.runtime.layers import (
    INFINITY,
    Activation,
    Add,
    Clamp,
    Concatenate,
    Convolution,
    Flatten,
    Layer,
    Multiply,
    Network,
    Pair,
    Pool,
    Scale,
    Shape,
    Weight,
    Window,
    adaptive_windows,
    fuse,
)
from pruneflow.structure.channels.tracing import of_parameters, trace
from pruneflow.structure.running import clone, evaluating


def capture(model: nn.Module, example_input: Tensor) -> Network:
    """Trace a model and fuse BatchNorm, ReLU and residual additions into its convolutions.

    Args:
        model: In evaluation mode, float32 on the CPU.
        example_input: `(batch, channels, height, width)` or `(batch, features)`.

    Raises:
        ValueError: If the model does not take the example, cannot be traced or has an operation
            that the runtime does not know, which is named.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> (layer,) = capture(model, torch.zeros(1, 3, 5, 5)).layers
        >>> type(layer).__name__, layer.bounds
        ('Convolution', (0.0, inf))
    """
    # Tracing keeps PyTorch's modules whole, but not the outermost one.
    wrapped = nn.Sequential(model)
    with evaluating(wrapped, example_input):
        traced = trace(wrapped, example_input[:1], fixed_size=True)
    _drop_assertions(traced.graph)
    captured = _Capture(traced)
    for node in traced.graph.nodes:
        captured.visit(node)
    return Network(
        layers=tuple(fuse(captured.layers, captured.result)),
        shapes=tuple(captured.shapes),
        output=captured.result,
        input_shape=tuple(example_input.shape[1:]),
        output_shape=captured.output_shape,
    )


def _drop_assertions(graph: fx.Graph) -> None:
    """Leave out what the model asserts, such as the size of its images: each call checks that."""
    asserted: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        reads = node in asserted or node.target is getattr  # as the text of an assertion does
        alone = reads and node.op == "call_function" and not node.users
        if alone or node.target is torch._assert:
            asserted.update(node.all_input_nodes)
            graph.erase_node(node)


def _pads_with_zeros(options: Sequence[Any], keywords: dict[str, Any]) -> bool:
    given = {"mode": "constant", **dict(zip(("mode", "value"), options, strict=False)), **keywords}
    return given["mode"] == "constant" and not given.get("value")


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass
class _Capture:
    """Turns the nodes of a traced model into layers, one by one."""

    traced: fx.GraphModule
    layers: list[Layer] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    values: dict[fx.Node, int] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)  # of a view: the value that it views
    batch_sizes: set[fx.Node] = field(default_factory=set)
    result: int = -1
    output_shape: tuple[int, ...] = ()

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.shapes:
                self.refuse(node, "a second input")
            self.new_value(node)
        elif node.op == "output":
            self.result = self.operand(node)
            (result,) = node.args
            assert isinstance(result, fx.Node)
            self.output_shape = self.shape(result)
        elif node.op == "call_module":
            self.module(node, self.traced.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            self.constants[node] = operator.attrgetter(str(node.target))(self.traced).detach()
        elif of_parameters(node):
            self.constants[node] = self.evaluated(node)
        else:
            self.function(node)

    def evaluated(self, node: fx.Node) -> Any:
        """The result of what is computed from parameters alone, such as `1 + self.gamma`."""
        args, kwargs = cast(
            Any, fx.node.map_arg((node.args, node.kwargs), lambda n: clone(self.constants[n]))
        )
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Any, node.target)(*args, **kwargs)

    def refuse(self, node: fx.Node, what: str) -> NoReturn:
        raise ValueError(
            f"`model` must consist of operations that the sparse runtime knows, got {node.name!r}, "
            f"which is {what}; use `shrink` or `export_onnx` for this model"
        )

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of one sample."""
        if "shape" not in node.meta:
            self.refuse(node, "not one tensor")
        if node.meta["dtype"] != torch.float32:
            self.refuse(node, f"of {node.meta['dtype']}")
        return tuple(node.meta["shape"][1:])

    def new_value(self, node: fx.Node) -> int:
        """Number the value that a node computes."""
        shape = self.shape(node)
        if len(shape) not in (1, 3):
            self.refuse(node, f"of shape (batch, {', '.join(map(str, shape))})")
        self.shapes.append(cast(Shape, (*shape, 1, 1)[:3]))
        self.values[node] = len(self.shapes) - 1
        return self.values[node]

    def overwrite(self, node: fx.Node, value: int) -> None:
        """A node works in place: whoever reads the value later reads the node's."""
        for other, held in list(self.values.items()):
            if held == value:
                self.values[other] = self.values[node]
            elif self.root(held) == self.root(value) and any(user > node for user in other.users):
                self.refuse(node, f"in place on what {other.name!r} holds as well")
        self.memory[self.values[node]] = self.root(value)

    def root(self, value: int) -> int:
        """The value in whose memory a value lies; itself if it is no view."""
        return self.memory.get(value, value)

    def operand(self, node: fx.Node, position: int = 0) -> int:
        """The value that is a node's argument."""
        value = node.args[position] if position < len(node.args) else None
        if not isinstance(value, fx.Node) or value not in self.values:
            self.refuse(node, "not of a tensor that was computed before")
        return self.values[value]

    def module(self, node: fx.Node, module: Any) -> None:
        value = self.operand(node)
        kind = type(module)
        if "forward" in vars(module):
            self.refuse(node, f"a {kind.__name__} with a `forward` of its own")
        # Exact types: a subclass may compute something else.
        if kind in (nn.Identity, *DROPOUTS) or kind.__name__ == "StochasticDepth":  # torchvision's
            self.pass_through(node, module, value)
        elif kind is nn.Conv2d:
            self.conv2d(node, module, value)
        elif kind is nn.Linear:
            self.linear(node, module, value)
        elif kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            self.batch_norm(node, module, value)
        elif kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh) or kind in FUNCTIONS:
            self.activation(node, module, value)
        elif kind is nn.ZeroPad2d:
            self.pad(node, module.padding, value)
        elif kind is nn.Flatten:
            if [module.start_dim, module.end_dim] != [1, -1]:
                self.refuse(node, "a Flatten of other than all but the first dimension")
            self.flatten(node, value)
        elif kind in (nn.MaxPool2d, nn.AvgPool2d):
            self.pool(node, module, value)
        elif kind is nn.AdaptiveAvgPool2d:
            self.adaptive_pool(node, value)
        else:
            self.refuse(node, f"a {kind.__name__}")

    def pass_through(self, node: fx.Node, module: nn.Module, value: int) -> None:
        if module.training and type(module) is not nn.Identity:
            self.refuse(node, f"a {type(module).__name__} in training mode")
        self.values[node] = value

    def activation(self, node: fx.Node, module: Any, value: int) -> None:
        output = self.new_value(node)
        if type(module) in FUNCTIONS:
            self.layers.append(Activation((value,), output, FUNCTIONS[type(module)]))
        else:
            low = float(getattr(module, "min_val", 0.0))
            high = float(getattr(module, "max_val", INFINITY))
            self.layers.append(Clamp((value,), output, (low, high)))
        if getattr(module, "inplace", False):
            self.overwrite(node, value)

    def function(self, node: fx.Node) -> None:
        target, keywords = node.target, dict(node.kwargs)
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        inplace = bool(keywords.pop("inplace", False)) or name.endswith("_")
        inplace = inplace or target in IN_PLACE
        arguments = node.args[1:]
        if target == "size" and (arguments, keywords) == ((0,), {}):
            self.batch_sizes.add(node)
            return
        affine = self.affine(node)
        value = -1 if target is torch.cat or (affine and not inplace) else self.operand(node)
        if affine is not None:
            self.scale(node, *affine)
        elif not keywords and self.elementwise(node, value):
            pass
        elif self.is_flatten(node):
            self.flatten(node, value)
        elif target in POOLS:
            make, names = POOLS[target]
            given = dict(zip(["kernel_size", *names.split()], arguments, strict=False))
            self.pool(node, make(**given, **keywords), value)
        elif target is functional.adaptive_avg_pool2d or self.is_global_mean(node):
            self.adaptive_pool(node, value)
        elif target is functional.pad and _pads_with_zeros(arguments[1:], keywords):
            self.pad(node, cast(Sequence[int], arguments[0]), value)
        elif target is torch.cat:
            self.concatenate(node)
        elif target is torch.index_select and not keywords:
            self.index_select(node, value)
        elif (
            target == "contiguous"
            or (target is functional.dropout and keywords.get("training", True) is False)
            or (name == "stochastic_depth" and arguments[-1] is False)  # torchvision's
        ):
            self.values[node] = value
        else:
            self.refuse(node, f"a call of {name} with {arguments} and {keywords}")
        if inplace:
            self.overwrite(node, value)

    def affine(self, node: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | None:
        """The value, its factor and its offset, if the other operand is a constant."""
        known = [isinstance(arg, fx.Node) and arg in self.values for arg in node.args]
        if len(known) != 2 or sum(known) != 1 or node.kwargs:
            return None
        first = known[0]
        value, other = cast(tuple[fx.Node, Any], node.args if first else node.args[::-1])
        other = self.constants.get(other) if isinstance(other, fx.Node) else other
        if not isinstance(other, Tensor | int | float):
            return None
        constant = torch.as_tensor(other, dtype=torch.float64, device="cpu")
        zero, one = constant.new_zeros(()), constant.new_ones(())
        if node.target in SUMS:
            return value, one, constant
        if node.target in PRODUCTS:
            return value, constant, zero
        if node.target in DIFFERENCES:
            return (value, one, -constant) if first else (value, -one, constant)
        return (value, 1 / constant, zero) if node.target in QUOTIENTS and first else None

    def scale(self, node: fx.Node, source: fx.Node, factor: Tensor, offset: Tensor) -> None:
        """Multiply each channel by its factor, and add its offset."""
        shape = source.meta["shape"]
        if node.meta["shape"] != shape:
            self.refuse(node, "with a tensor of a larger shape")
        value, arrays = self.values[source], []
        channels, *size = self.shapes[value]
        for constant in (factor, offset):
            rows = constant.broadcast_to(1, *shape[1:]).reshape(channels, -1)
            if not (rows == rows[:, :1]).all():
                self.refuse(node, "with other than one number for each channel")
            arrays.append(rows[:, 0].float().numpy())
        self.layers.append(Scale((value,), self.new_value(node), _pair(size), *arrays))

    def elementwise(self, node: fx.Node, value: int) -> bool:
        """Take an operation on each float; False if the node is none."""
        if node.target in CLAMPS and len(node.args) == 1:
            self.layers.append(Clamp((value,), self.new_value(node), CLAMPS[node.target]))
        elif node.target in FUNCTIONS and len(node.args) == 1:
            self.layers.append(Activation((value,), self.new_value(node), FUNCTIONS[node.target]))
        elif node.target in (*SUMS, *PRODUCTS):
            self.combine(node, value, self.operand(node, 1))
        else:
            return False
        return True

    def combine(self, node: fx.Node, one: int, other: int) -> None:
        """Take a sum or a product of two values, or a product with a factor for each channel."""
        larger, smaller = sorted((one, other), key=lambda value: -prod(self.shapes[value]))
        shape, factor = self.shapes[larger], self.shapes[smaller]
        kind = Add if node.target in SUMS else Multiply
        wider = self.shape(node) not in (shape, shape[:1])  # (batch, C) and (batch, C, 1, 1)
        if wider or (factor != shape and (kind is Add or factor != (shape[0], 1, 1))):
            self.refuse(node, f"of tensors of different shapes, {shape} and {factor}")
        self.layers.append(kind((larger, smaller), self.new_value(node)))

    def is_flatten(self, node: fx.Node) -> bool:
        """Whether the result is (batch, features) for a batch of any size."""
        sizes: Any = node.args[1:]
        if node.target in (torch.flatten, "flatten"):
            whole = sizes in ((1,), (1, -1)) and not node.kwargs
            return bool(whole or (not sizes and node.kwargs == {"start_dim": 1}))
        if node.target not in ("view", "reshape", torch.reshape):
            return False
        if len(sizes) == 1 and isinstance(sizes[0], Sequence):
            sizes = tuple(sizes[0])
        features = (prod(self.shapes[self.operand(node)]),)
        if len(sizes) != 2 or self.shape(node) != features:
            return False
        return sizes[0] in self.batch_sizes or (sizes[0] == -1 and sizes[1] != -1)

    def is_global_mean(self, node: fx.Node) -> bool:
        """Whether it takes the mean of all pixels."""
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        source: Any = node.args[0]
        return (
            node.target in (torch.mean, "mean")
            and isinstance(dims, Sequence)
            and sorted(int(dim) % 4 for dim in dims) == [2, 3]
            and len(self.shape(source)) == 3
        )

    def convolve(
        self,
        node: fx.Node,
        value: int,
        window: Window,
        weight: Tensor,
        bias: Tensor | None,
        groups: int = 1,
    ) -> None:
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.layers.append(
            Convolution(
                (value,),
                self.new_value(node),
                window,
                Weight.from_dense(weight.detach().numpy()),
                bias.detach().numpy().copy(),
                groups,
            )
        )

    def conv2d(self, node: fx.Node, module: nn.Conv2d, value: int) -> None:
        if module.padding_mode != "zeros":
            self.refuse(node, f"a Conv2d with padding_mode={module.padding_mode!r}")
        if module.padding == "same":  # the odd pixel lies below and to the right
            left, _, above, _ = module._reversed_padding_repeated_twice
        else:
            above, left = (0, 0) if isinstance(module.padding, str) else _pair(module.padding)
        window = Window(
            self.shapes[value][1:],
            kernel=_pair(module.kernel_size),
            output=_pair(self.shape(node)[1:]),
            stride=_pair(module.stride),
            padding=(above, left),
            dilation=_pair(module.dilation),
        )
        weight = module.weight.flatten(2)
        self.convolve(node, value, window, weight, module.bias, module.groups)

    def linear(self, node: fx.Node, module: nn.Linear, value: int) -> None:
        if len(self.shape(node)) != 1:
            self.refuse(node, "a Linear over other than (batch, features)")
        window = Window((1, 1), kernel=(1, 1), output=(1, 1))
        self.convolve(node, value, window, module.weight[:, :, None], module.bias)

    def batch_norm(self, node: fx.Node, module: nn.BatchNorm2d, value: int) -> None:
        if module.training or module.running_mean is None or module.running_var is None:
            self.refuse(node, "a BatchNorm that takes its statistics from the batch")
        factor = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            factor = factor * module.weight.detach().double()
        offset = -module.running_mean.double() * factor
        if module.bias is not None:
            offset = offset + module.bias.detach().double()
        channels: tuple[int, ...] = (-1, *[1] * (len(self.shape(node)) - 1))
        self.scale(node, node.all_input_nodes[0], factor.view(channels), offset.view(channels))

    def pad(self, node: fx.Node, rows_and_columns: Sequence[int], value: int) -> None:
        """Zeros around an image: the padding of a depthwise 1x1 convolution with ones."""
        left, _, above, _ = (*rows_and_columns, 0, 0)[:4]
        if len(rows_and_columns) > 4 or len(self.shape(node)) != 3:
            self.refuse(node, f"a padding of {tuple(rows_and_columns)}")
        channels, *size = self.shapes[value]
        output = _pair(self.shape(node)[1:])
        window = Window(_pair(size), kernel=(1, 1), output=output, padding=(above, left))
        ones = torch.ones(channels, 1, 1, dtype=torch.float32, device="cpu")
        self.convolve(node, value, window, ones, None, channels)

    def flatten(self, node: fx.Node, value: int) -> None:
        if self.shapes[value][1:] == (1, 1):
            self.values[node] = value
        else:
            self.layers.append(Flatten((value,), self.new_value(node)))
            self.memory[self.values[node]] = self.root(value)

    def index_select(self, node: fx.Node, value: int) -> None:
        """Channels by number, which `shrink` uses: a 1x1 convolution with a one in each row."""
        dim, index = cast(tuple[int, fx.Node], node.args[1:])
        if dim not in (1, -len(self.shape(node))) or index not in self.constants:
            self.refuse(node, f"a choice of {index} over dimension {dim}")
        channels, *size = self.shapes[value]
        weight = functional.one_hot(self.constants[index], channels).float()[:, :, None]
        window = Window(_pair(size), kernel=(1, 1), output=_pair(size))
        self.convolve(node, value, window, weight, None)

    def concatenate(self, node: fx.Node) -> None:
        tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = isinstance(tensors, Sequence) and all(each in self.values for each in tensors)
        if not known or dim not in (1, -len(self.shape(node))):
            self.refuse(node, f"a concatenation over dimension {dim}")
        inputs = tuple(self.values[each] for each in tensors)
        self.layers.append(Concatenate(inputs, self.new_value(node)))

    def pool(self, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d, value: int) -> None:
        window = Window(
            self.shapes[value][1:],
            kernel=_pair(module.kernel_size),
            output=_pair(self.shape(node)[1:]),
            stride=_pair(module.stride or module.kernel_size),
            padding=_pair(module.padding),
        )
        if isinstance(module, nn.MaxPool2d):
            table = replace(window, dilation=_pair(module.dilation)).table
            self.layers.append(Pool((value,), self.new_value(node), table))
            return
        divisor = (window.table >= 0).sum(0)
        if module.divisor_override:
            divisor = np.full_like(divisor, module.divisor_override)
        elif module.count_include_pad:  # what ceil_mode reaches beyond the padding does not count
            height, width = (window.size[axis] + 2 * window.padding[axis] for axis in (0, 1))
            with_padding = replace(window, size=(height, width), padding=(0, 0))
            divisor = (with_padding.table >= 0).sum(0)
        mean = (1 / divisor).astype(np.float32)
        self.layers.append(Pool((value,), self.new_value(node), window.table, mean))

    def adaptive_pool(self, node: fx.Node, value: int) -> None:
        output = _pair((*self.shape(node), 1, 1)[1:3])
        table, mean = adaptive_windows(self.shapes[value][1:], output)
        self.layers.append(Pool((value,), self.new_value(node), table, mean))
