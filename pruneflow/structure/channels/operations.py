"""The rule of each operation."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pruneflow.structure.channels.attention import Attention
from pruneflow.structure.channels.flow import Flow
from pruneflow.structure.channels.rules import (
    NORMS,
    Carried,
    Concatenated,
    Pointwise,
    Rule,
    Sizes,
    TensorAttribute,
    flattens,
)
from pruneflow.structure.channels.tracing import of_parameters, tensor_inputs
from pruneflow.structure.channels.weighted import Weighted

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink),
)
# These return their input in evaluation mode.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_IDLE_FUNCTIONS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
SUMS = {operator.add, torch.add, "add"}
_POINTWISE = {
    *SUMS,
    *(operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.neg),
    *(torch.sub, torch.mul, torch.neg, torch.clamp, torch.abs, torch.exp, torch.sqrt, torch.rsqrt),
    *(torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu),
    *(F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh),
    *(F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid),
    *("add_", "sub", "sub_", "mul", "mul_", "neg", "clamp", "clamp_", "abs"),
    *("exp", "sqrt", "rsqrt"),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clone"),
}
_SAME = {"contiguous", "detach"}
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_CARRIED_LAYERS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Flatten),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d),
)
_CARRIED = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.interpolate, F.pad, torch.mean, torch.amax),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.flatten),
    *(torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze, operator.getitem),
    *("mean", "amax", "permute", "transpose", "unsqueeze", "squeeze", "flatten"),
}
_RESHAPES = {torch.reshape, "view", "reshape"}
_SIZES = ("shape", "size", "dim", "ndim", "dtype", "device", "is_cuda")
# Including the batch dimension.
_DIMENSIONS: dict[type[nn.Module], int] = {
    **{nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5},
    **{nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5},
}


def rule_of(traced: fx.GraphModule, flow: Flow, node: fx.Node) -> Rule:
    """The rule for an operation."""
    sources = tensor_inputs(node)
    read = node.args[1] if node.target is getattr else node.target
    if node.op != "call_module" and isinstance(read, str) and read in _SIZES:
        return Sizes(traced, flow, node)
    if node.op == "get_attr" and math.prod(node.meta.get("shape", (0,))):
        return TensorAttribute(traced, flow, node)
    if sources and node.op == "call_module":
        return _rule_of_layer(traced, flow, node)
    if sources and node.op in ("call_function", "call_method") and "shape" in node.meta:
        return _rule_of_function(traced, flow, node)
    return Rule(traced, flow, node)


def makes_a_new_tensor(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation that is not in place never returns a view of its inputs."""
    if node.op == "call_module":
        kind = type(traced.get_submodule(str(node.target)))
        return kind in (*_ACTIVATIONS, *NORMS, nn.Linear, *_DIMENSIONS)
    function = node.op in ("call_function", "call_method")
    return function and (node.target in _POINTWISE or node.target is torch.cat)


def _rule_of_layer(traced: fx.GraphModule, flow: Flow, node: fx.Node) -> Rule:
    module: Any = traced.get_submodule(str(node.target))
    kind, unshared = type(module), node.target in flow.unshared
    patched = "forward" in vars(module)  # replaced on the instance, as accelerate does
    hooked = patched or module._forward_hooks or module._forward_pre_hooks
    if unshared and not hooked and kind is nn.MultiheadAttention and _can_be_opened(module, node):
        return Attention(traced, flow, node)
    if hooked or "shape" not in node.meta or len(node.args) != 1 or node.kwargs:
        return Rule(traced, flow, node)
    convolution = _DIMENSIONS.get(kind) == len(node.meta["shape"])
    if convolution and isinstance(module, nn.modules.conv._ConvTransposeNd):
        convolution = module.groups == 1
    if unshared and (kind is nn.Linear or convolution):
        return Weighted(traced, flow, node)
    normalises = kind in NORMS and module.running_mean is not None
    activates = kind in _ACTIVATIONS and (unshared or not list(module.parameters()))
    drops = kind in _IDLE or kind.__module__ == "torchvision.ops.stochastic_depth"
    if (unshared and normalises) or activates or drops:
        return Pointwise(traced, flow, node)
    if kind in _CARRIED_LAYERS and not getattr(module, "return_indices", False):
        return Carried(traced, flow, node, only_zeros=_pads_with_zeros(module))
    return Rule(traced, flow, node)


def _rule_of_function(traced: fx.GraphModule, flow: Flow, node: fx.Node) -> Rule:
    sources = tensor_inputs(node)
    if flattens(node):
        return Carried(traced, flow, node, only_zeros=False)
    if set(node.all_input_nodes) != set(sources) or "out" in node.kwargs:
        return Rule(traced, flow, node)
    if node.target is torch.cat:
        return Concatenated(traced, flow, node)
    divides = node.target in _QUOTIENTS and len(sources) == 1 and node.args[0] is sources[0]
    if node.target in _POINTWISE or node.target in _SAME or divides or _is_idle(node):
        return Pointwise(traced, flow, node)
    carries = node.target in _CARRIED or (node.target in _RESHAPES and of_parameters(node))
    if carries and len(sources) == 1 and not _pads_with_a_value(node):
        zeros = getattr(node.target, "__name__", "").startswith(("avg_pool", "pad"))
        return Carried(traced, flow, node, only_zeros=zeros)
    return Rule(traced, flow, node)


def _can_be_opened(module: nn.MultiheadAttention, node: fx.Node) -> bool:
    options = {**node.kwargs, "need_weights": None, "average_attn_weights": None}
    return (
        len(node.args) == 3
        and not any(options.values())
        and not module.add_zero_attn
        and module.bias_k is None
        and bool(node.users)
        and all(
            user.target is operator.getitem and user.args[1] == 0 and len(user.meta["shape"]) == 3
            for user in node.users
        )
    )


def _pads_with_zeros(module: Any) -> bool:
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        padded = module.padding not in (0, (0,), (0, 0), (0, 0, 0)) and module.count_include_pad
        return padded or getattr(module, "divisor_override", None) is not None
    return isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d)


def _pads_with_a_value(node: fx.Node) -> bool:
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    return node.target is F.pad and bool(value)


def _is_idle(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    position = 3 if name == "stochastic_depth" else 2
    training = node.args[position] if len(node.args) > position else node.kwargs.get("training")
    return (node.target in _IDLE_FUNCTIONS or name == "stochastic_depth") and training is False
