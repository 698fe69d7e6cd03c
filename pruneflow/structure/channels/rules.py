"""How operations without weights propagate channels from their inputs to their output."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pruneflow.structure.channels.flow import Flow, ValueChannels, same_in_rows
from pruneflow.structure.channels.tracing import of_parameters, tensor_inputs

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True)
class Entries:
    """Which channels the entries of a tensor belong to.

    Args:
        name: Qualified name of the parameter or buffer.
        dim: The dimension along which it has one entry per channel.
        channels: The channels of its entries.
        written: Whether a layer computes the channels with these entries.
    """

    name: str
    dim: int
    channels: ValueChannels
    written: bool = False


class Rule:
    """How one operation propagates channels; this base class is for unsupported operations.

    These read all channels of their inputs, and all of them must be kept.

    Args:
        traced: The graph, with the layers.
        flow: What is known about the values.
        node: The operation.
    """

    def __init__(self, traced: fx.GraphModule, flow: Flow, node: fx.Node) -> None:
        self.traced, self.flow, self.node = traced, flow, node

    @property
    def module(self) -> Any:
        """The layer that is called; None for a function."""
        if self.node.op != "call_module":
            return None
        return self.traced.get_submodule(str(self.node.target))

    def forward(self) -> bool:
        """Propagate channels and constants to the result; False if that is not supported."""
        for source in self.node.all_input_nodes:
            self.flow.pin(source)
        return True

    def backward(self) -> None:
        """Propagate which channels are needed to the inputs."""
        for source in self.node.all_input_nodes:
            if source in self.flow.values:
                self.flow.values[source].needed[:] = True

    def entries(self) -> Iterator[Entries]:
        """The tensors with an entry for each channel."""
        return iter(())

    def cut(self) -> bool:
        """Remove channels that are not kept; True if the graph has changed."""
        return False


class Sizes(Rule):
    """Reads the shape of a tensor, not its values."""

    def forward(self) -> bool:
        """Keep all channels if their number is read."""
        source = self.node.all_input_nodes[0]
        channels = self.flow.values.get(source)
        if channels is None or self._reads(channels.dim, len(source.meta["shape"])):
            self.flow.pin(source)
        return True

    def backward(self) -> None:
        """No channel is needed."""

    def _reads(self, dim: int, ndim: int) -> bool:
        attribute = self.node.args[1] if self.node.op == "call_function" else self.node.target
        if attribute not in ("shape", "size"):
            return False
        if attribute == "size" and (len(self.node.args) > 1 or self.node.kwargs):
            asked = [self.node.kwargs.get("dim", self.node.args[-1])]
        else:
            asked = [_index(user) for user in self.node.users]
        return any(
            index is None or dim in _chosen(range(ndim), index)  # type: ignore[arg-type]
            for index in asked
        )


def _index(node: fx.Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


def _chosen(dims: range, index: int | slice) -> tuple[int, ...]:
    return tuple(dims[index]) if isinstance(index, slice) else (dims[index],)


class TensorAttribute(Rule):
    """A parameter or buffer that operations use directly, such as a scale for each channel.

    The channel dimension of a vector is clear. For others, such as position embeddings, it follows
    from the operations that use them.
    """

    def forward(self) -> bool:
        """Read its values."""
        node, flow = self.node, self.flow
        flow.tensors[node] = attribute_of(self.traced, str(node.target)).detach()
        if node.target not in flow.unshared:
            flow.pin(node)
        long = [dim for dim, size in enumerate(node.meta["shape"]) if size > 1]
        if len(long) == 1:
            flow.along(node, long[0])
        return True

    def entries(self) -> Iterator[Entries]:
        """The tensor itself."""
        if self.node in self.flow.values:
            channels = self.flow.values[self.node]
            yield Entries(str(self.node.target), channels.dim, channels)

    def cut(self) -> bool:
        """Cut the tensor."""
        channels = self.flow.values.get(self.node)
        if channels is None or self.flow.kept(channels).all():
            return False
        owner, _, attribute = str(self.node.target).rpartition(".")
        module = self.traced.get_submodule(owner)
        old = getattr(module, attribute)
        kept = self.flow.kept(channels).nonzero().flatten()
        tensor = laid_out_as(old.detach().index_select(channels.dim, kept), old)
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, old.requires_grad)
        setattr(module, attribute, tensor)
        return False


class Pointwise(Rule):
    """An elementwise operation, such as an activation, a sum or batch norm.

    It may use tensors of its layer with an entry per channel, such as batch norm statistics.
    """

    def forward(self) -> bool:
        """Couple the channels of all inputs."""
        flow, node = self.flow, self.node
        shape, sources = node.meta["shape"], tensor_inputs(node)
        # The shape of a parameter does not show the channel dimension of what it scales.
        telling = [source for source in sources if not of_parameters(source)] or sources
        dims = {
            channels.dim + len(shape) - len(source.meta["shape"])
            for source in telling
            if (channels := flow.values.get(source)) is not None
            and (len(channels.atoms) > 1 or len(sources) == 1)
        }
        if len(dims) != 1:
            return False
        dim = dims.pop()
        if dim >= len(shape) or (
            self.module is not None and len(self._channel_tensors()) and dim != 1
        ):
            return False
        self.operands: list[ValueChannels] = []
        self.broadcast: list[fx.Node] = []
        self.dim, size = dim, shape[dim]
        for source in sources:
            source_dim = dim - len(shape) + len(source.meta["shape"])
            if source_dim < 0 or source.meta["shape"][source_dim] != size:
                self.broadcast.append(source)
            else:
                channels = flow.along(source, source_dim)
                if channels is None:
                    return False
                self.operands.append(channels)
        flow.unite(zip(*(channels.atoms.tolist() for channels in self.operands), strict=True))
        result = flow.new(node, dim, self.operands[0].atoms)
        for source in self.broadcast:
            flow.pin(source)
        self._note_constants(result)
        return True

    def backward(self) -> None:
        """Each channel of the inputs is needed if it is wanted in the result."""
        wanted = self.flow.values[self.node].wanted
        for channels in self.operands:
            channels.needed |= wanted
        for source in self.broadcast:
            if source in self.flow.values:
                self.flow.values[source].needed |= bool(wanted.any())

    def entries(self) -> Iterator[Entries]:
        """The tensors of batch norm and the weight of PReLU."""
        channels = self.flow.values[self.node]
        for name in self._channel_tensors():
            yield Entries(f"{self.node.target}.{name}", 0, channels)

    def cut(self) -> bool:
        """Cut the tensors of the layer."""
        kept = self.flow.kept(self.flow.values[self.node])
        if kept.all():
            return False
        for name in self._channel_tensors():
            tensor = getattr(self.module, name)[kept]
            if isinstance(getattr(self.module, name), nn.Parameter):
                tensor = nn.Parameter(tensor.detach(), getattr(self.module, name).requires_grad)
            setattr(self.module, name, tensor)
        for attribute in ("num_features", "num_parameters"):
            if hasattr(self.module, attribute) and self._channel_tensors():
                setattr(self.module, attribute, int(kept.sum()))
        return False

    def _channel_tensors(self) -> list[str]:
        """The tensors of the layer with an entry per channel."""
        if isinstance(self.module, NORMS):
            names = ("weight", "bias", "running_mean", "running_var")
            return [name for name in names if getattr(self.module, name) is not None]
        per_channel = isinstance(self.module, nn.PReLU) and self.module.num_parameters > 1
        return ["weight"] if per_channel else []

    def _note_constants(self, result: ValueChannels) -> None:
        """Evaluate the operation on one element per channel, enough for constants."""
        size = len(result.atoms)
        inputs: dict[fx.Node, Tensor] = {}
        known = torch.ones(size, dtype=torch.bool)
        zero = torch.zeros(size, dtype=torch.bool)
        for source in tensor_inputs(self.node):
            ndim = len(source.meta["shape"])
            if source in self.broadcast:
                source_known = torch.zeros(1, dtype=torch.bool)
                constant = torch.zeros(1, dtype=source.meta["dtype"])
                if source in self.flow.tensors:
                    source_known, constant = same_in_rows(self.flow.tensors[source].reshape(1, -1))
            else:
                source_known = self.flow.values[source].known
                constant = self.flow.values[source].constant
            known &= source_known
            zero |= source_known & (constant == 0)
            shape = [1] * ndim
            if len(constant) > 1:
                shape[self.dim - len(self.node.meta["shape"]) + ndim] = size
            inputs[source] = constant.reshape(shape).clone()
        if isinstance(self.module, NORMS) and self.module.weight is not None:
            known |= self.module.weight == 0
        value = compute(self.traced, self.node, inputs).reshape(-1).expand(size)
        if self.node.target in _PRODUCTS:
            known |= zero
            value = value.masked_fill(zero, 0)
        result.known = known & value.isfinite()
        result.constant = value.masked_fill(~result.known, 0)


class Carried(Rule):
    """Maps each channel to one channel or, when flattening, to a run of features.

    Args:
        only_zeros: Whether only constants of zero stay constant, as with zero padding.
    """

    def __init__(
        self, traced: fx.GraphModule, flow: Flow, node: fx.Node, *, only_zeros: bool
    ) -> None:
        super().__init__(traced, flow, node)
        self.only_zeros = only_zeros

    def forward(self) -> bool:
        """Find the channel dimension of the result."""
        source = tensor_inputs(self.node)[0]
        channels = self.flow.values.get(source)
        if channels is None:
            return False
        shape, result_shape = list(source.meta["shape"]), self.node.meta["shape"]
        size = shape[channels.dim]
        # One more channel shows the channel dimension, and that no size is hard-coded.
        shape[channels.dim] += 1
        probe = torch.empty(shape, dtype=source.meta["dtype"], device="meta")
        try:
            if flattens(self.node):
                grown = torch.flatten(probe, 1).shape
            else:
                grown = compute(self.traced, self.node, {source: probe}).shape
            self.drops_one = self._drops_a_dimension_of_size_one(source, probe)
        except (RuntimeError, IndexError, ValueError):
            return False
        if len(grown) != len(result_shape):
            return False
        changed = [dim for dim in range(len(grown)) if grown[dim] != result_shape[dim]]
        if len(changed) != 1:
            return False
        dim = changed[0]
        self.run = grown[dim] - result_shape[dim]
        same_front = dim == channels.dim and result_shape[:dim] == source.meta["shape"][:dim]
        if self.run * size != result_shape[dim] or (_is_reshape(self) and not same_front):
            return False
        self.source = channels
        result = self.flow.new(self.node, dim, channels.atoms.repeat_interleave(self.run))
        known = channels.known & (channels.constant == 0) if self.only_zeros else channels.known
        result.known = known.repeat_interleave(self.run)
        result.constant = channels.constant.repeat_interleave(self.run) * result.known
        return True

    def _drops_a_dimension_of_size_one(self, source: fx.Node, probe: Tensor) -> bool:
        """Whether a single channel would lose its dimension, as after `squeeze()`."""
        if flattens(self.node):
            return False
        one = probe.narrow(self.flow.values[source].dim, 0, 1)
        ndim = compute(self.traced, self.node, {source: one}).dim()
        return ndim != len(self.node.meta["shape"])

    @property
    def has_size_in_code(self) -> bool:
        """Whether the number of features is hard-coded, as in `x.view(-1, 512)`."""
        return flattens(self.node) and tree_leaves(self.node.args)[-1] != -1

    def backward(self) -> None:
        """A channel is needed if any feature of its run is wanted."""
        wanted = self.flow.values[self.node].wanted
        self.source.needed |= wanted.reshape(-1, self.run).any(1)

    def cut(self) -> bool:
        """Replace a hard-coded number of features that has changed."""
        if not self.has_size_in_code or self.flow.kept(self.flow.values[self.node]).all():
            return False
        self.node.op, self.node.target = "call_function", torch.flatten
        self.node.args, self.node.kwargs = (self.node.args[0], 1), {}
        return True


class Concatenated(Rule):
    """torch.cat along the channel dimension."""

    def forward(self) -> bool:
        """Concatenate the channels of all inputs."""
        node, flow = self.node, self.flow
        sources: Any = node.args[0]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        dim = range(len(node.meta["shape"]))[dim]  # type: ignore[index]
        operands = [flow.along(source, dim) for source in sources]
        if any(channels is None for channels in operands):
            return False
        self.operands = [channels for channels in operands if channels is not None]
        result = flow.new(node, dim, torch.cat([channels.atoms for channels in self.operands]))
        result.known = torch.cat([channels.known for channels in self.operands])
        result.constant = torch.cat([channels.constant for channels in self.operands])
        return True

    def backward(self) -> None:
        """Each channel of the inputs is needed if it is wanted in the result."""
        parts = self.flow.values[self.node].wanted.split([len(o.atoms) for o in self.operands])
        for channels, wanted in zip(self.operands, parts, strict=True):
            channels.needed |= wanted


def compute(traced: fx.GraphModule, node: fx.Node, inputs: dict[fx.Node, Tensor]) -> Tensor:
    """Run one operation on other inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: inputs[source])
    if node.op == "call_module":
        result: Tensor = traced.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.detach()


def attribute_of(traced: fx.GraphModule, path: str) -> Tensor:
    """A parameter or buffer by its qualified name."""
    owner, _, attribute = path.rpartition(".")
    tensor: Tensor = getattr(traced.get_submodule(owner), attribute)
    return tensor


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the memory format of another, such as channels_last."""
    order = sorted(range(other.dim()), key=other.stride, reverse=True)
    return tensor.permute(order).contiguous().permute([order.index(d) for d in range(other.dim())])


def flattens(node: fx.Node) -> bool:
    """Whether a view or reshape flattens all dimensions but the first."""
    if node.op != "call_method" or node.target not in ("view", "reshape"):
        return False
    before, after = node.args[0].meta["shape"], node.meta["shape"]  # type: ignore[union-attr]
    return len(after) == 2 and len(before) >= 2 and before[0] == after[0]


def _is_reshape(rule: Rule) -> bool:
    named = rule.node.target in (torch.flatten, "flatten") or isinstance(rule.module, nn.Flatten)
    return named or flattens(rule.node)
