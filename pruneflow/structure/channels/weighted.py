"""How convolutions and Linear layers read and compute channels, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruneflow.structure.channels.flow import rounded_up
from pruneflow.structure.channels.rules import Entries, Rule, laid_out_as

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# A layer may be cut to fewer channels than its neighbours keep, at the cost of copying channels. It
# is if at most this fraction of the channels remains.
_WORTH_A_COPY = 0.75


class Weighted(Rule):
    """A convolution or Linear layer.

    Zero weights read nothing. Constant input channels are folded into the bias. If zero padding
    makes them vary at the borders, one of them replaces all, with the sum of their weights.
    """

    def forward(self) -> bool:
        """Find filters that depend on constants only."""
        flow, node, module = self.flow, self.node, self.module
        linear = isinstance(module, nn.Linear)
        dim = len(node.meta["shape"]) - 1 if linear else 1
        source = flow.along(node.all_input_nodes[0], dim)
        if source is None:
            return False
        self.source = source
        self.result = flow.new(node, dim)
        self.groups = 1 if linear else module.groups
        # Sizes of images before and after; inputs may have other sizes after cutting.
        self.sizes = node.all_input_nodes[0].meta["shape"][2:], node.meta["shape"][2:]
        self.reached = _reached(module, *self.sizes) if flow.fixed_size else torch.tensor(True)
        weight, inside = self._weight(), _never_in_padding(module)
        self.reads = (weight != 0).any(2)
        self.reads_border = (weight[:, :, ~inside] != 0).any(2)
        if self.groups > 1:
            flow.unite(
                [*inputs, *outputs]
                for inputs, outputs in zip(
                    source.atoms.reshape(self.groups, -1).tolist(),
                    self.result.atoms.reshape(self.groups, -1).tolist(),
                    strict=True,
                )
            )
        known, constant = self._per_filter(source.known), self._per_filter(source.constant)
        varying = torch.where(known, (constant != 0) & self.reads_border, self.reads)
        self.wide = torch.promote_types(weight.dtype, torch.float64)
        bias = torch.zeros(len(weight), dtype=self.wide)
        if module.bias is not None:
            bias += module.bias.detach()
        # Constants are 0 where not known.
        some = (constant != 0).any(0)
        sums = weight[:, some].sum(2, dtype=self.wide) * constant[:, some]
        self.result.known = ~varying.any(1)
        self.result.constant = (bias + sums.sum(1)).to(source.constant.dtype) * self.result.known
        return True

    def backward(self) -> None:
        """Channels read by wanted filters are needed."""
        read = self.reads & self.result.wanted[:, None]
        if self.groups == 1:
            self.source.needed |= read.any(0)
        else:
            index = self._per_filter(torch.arange(len(self.source.atoms)))
            self.source.needed[index[read]] = True

    def entries(self) -> Iterator[Entries]:
        """The filters and the input channels; only filters of a grouped convolution."""
        dim = 1 if type(self.module) in _TRANSPOSED else 0
        yield Entries(f"{self.node.target}.weight", dim, self.result, written=True)
        if self.module.bias is not None:
            yield Entries(f"{self.node.target}.bias", 0, self.result, written=True)
        if self.groups == 1:
            yield Entries(f"{self.node.target}.weight", 1 - dim, self.source)

    def keep_constants(self) -> None:
        """Keep one of the constants that vary at borders, if none is kept yet."""
        varying = self._varying_constants()
        kept = self.flow.kept(self.source)
        if (varying & ~kept).any() and not (varying & kept).any():
            largest = (self.source.constant.abs() * varying).argmax()
            self.flow.keep(int(self.source.atoms[largest]))

    def cut(self) -> bool:
        """Cut the layer, copying channels in and out where that pays off."""
        kept_in, kept_out = self.flow.kept(self.source), self.flow.kept(self.result)
        columns, rows = kept_in, kept_out
        if self.groups == 1:
            columns, rows = self._worth_reading(kept_in), self._worth_computing(kept_out)
        taps = self._used_taps()
        if columns.all() and rows.all() and taps is None:
            return False
        if self.groups == 1:
            weight, bias = self._folded(kept_in)
            weight = weight[rows][:, columns]
        else:
            weight, bias = self._weight()[rows], self.module.bias
            self.module.groups = int(kept_in.sum()) // weight.shape[1]
        weight = weight.reshape(*weight.shape[:2], *getattr(self.module, "kernel_size", ()))
        if taps is not None:
            weight = weight[(slice(None), slice(None), *(slice(lo, hi + 1) for lo, hi, _ in taps))]
            self.module.kernel_size = tuple(hi - lo + 1 for lo, hi, _ in taps)
            self.module.padding = tuple(padding for _, _, padding in taps)
        if type(self.module) in _TRANSPOSED:
            weight = weight.transpose(0, 1)
        self._resize(weight, bias, columns, rows)
        gathers = False
        graph, dim = self.traced.graph, -1 if isinstance(self.module, nn.Linear) else 1
        if not torch.equal(columns, kept_in):
            index = columns[kept_in].nonzero().flatten()
            self.module.register_buffer("channels_read", index)
            with graph.inserting_before(self.node):
                indices = graph.get_attr(f"{self.node.target}.channels_read")
                source = self.node.all_input_nodes[0]
                read = graph.call_function(torch.index_select, (source, dim, indices))
            self.node.replace_input_with(source, read)
            gathers = True
        if not torch.equal(rows, kept_out):
            # Rows that are not computed are copies of the one that represents them.
            position = rows.cumsum(0) - 1
            index = torch.where(rows, position, position[self.representative])[kept_out]
            self.module.register_buffer("channels_written", index)
            with graph.inserting_after(self.node):
                indices = graph.get_attr(f"{self.node.target}.channels_written")
            with graph.inserting_after(indices):
                written = graph.call_function(torch.index_select, (self.node, dim, indices))
            self.node.replace_all_uses_with(written, lambda user: user is not written)
            gathers = True
        return gathers

    def _weight(self) -> Tensor:
        """The weight as (filters, input channels of a filter, taps)."""
        weight: Tensor = self.module.weight.detach()
        if type(self.module) in _TRANSPOSED:
            weight = weight.transpose(0, 1)
        return weight.reshape(*weight.shape[:2], -1).masked_fill(~self.reached, 0)

    def _used_taps(self) -> list[tuple[int, int, int]] | None:
        """First tap, last tap and padding in each dimension of a smaller kernel, if any."""
        module = self.module
        if type(module) not in _CONVOLUTIONS or isinstance(module.padding, str):
            return None
        if module.padding_mode != "zeros":
            return None
        used = (self._weight() != 0).any(0).any(0).reshape(module.kernel_size)
        taps = []
        for dim, (size, result) in enumerate(zip(*self.sizes, strict=True)):
            kernel, stride = module.kernel_size[dim], module.stride[dim]
            dilation, padding = module.dilation[dim], module.padding[dim]
            places = used.movedim(dim, 0).reshape(kernel, -1).any(1).nonzero().flatten().tolist()
            first, last = (places[0], places[-1]) if places else ((kernel - 1) // 2,) * 2
            # Dropping as many taps on both sides preserves the output size for any input.
            both = min(first, kernel - 1 - last, padding // dilation)
            choice = (both, kernel - 1 - both, padding - both * dilation)
            if self.flow.fixed_size:
                rest = padding - first * dilation
                if (size + 2 * rest - dilation * (last - first) - 1) // stride + 1 == result:
                    choice = (first, last, rest) if rest >= 0 else choice
            taps.append(choice)
        smaller = any(hi - lo + 1 < k for (lo, hi, _), k in zip(taps, used.shape, strict=True))
        return taps if smaller else None

    def _per_filter(self, entries: Tensor) -> Tensor:
        """Entries of input channels: one row per filter if grouped, otherwise one for all."""
        if self.groups == 1:
            return entries[None]
        grouped = entries.reshape(self.groups, -1)
        return grouped.repeat_interleave(len(self.reads) // self.groups, 0)

    def _varying_constants(self) -> Tensor:
        """Constant input channels that vary at borders due to zero padding."""
        if self.groups > 1:
            return torch.zeros_like(self.source.known)
        read = (self.reads_border & self.result.wanted[:, None]).any(0)
        return read & (self.source.constant != 0)

    def _folded(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that do not read the removed channels."""
        weight, wanted = self._weight().clone(), self.result.wanted
        constant = self.source.constant.to(self.wide)
        varying = self._varying_constants()
        merged = varying & ~kept
        if merged.any():
            target = (constant.abs() * (varying & kept)).argmax()
            ratio = constant[merged] / constant[target]
            taps = torch.einsum("oit,i->ot", weight[:, merged].to(self.wide), ratio)
            weight[:, target] = (weight[:, target] + taps).to(weight.dtype)
        absorbed = (constant != 0) & ~kept & ~varying
        bias = weight[:, absorbed].sum(2, dtype=self.wide) @ constant[absorbed]
        if self.module.bias is not None:
            bias += self.module.bias.detach()
        weight[~wanted] = 0
        bias = torch.where(wanted, bias, self.result.constant.to(self.wide))
        needless = self.module.bias is None and not bias.any()
        return weight, None if needless else bias.to(weight.dtype)

    def _worth_reading(self, kept: Tensor) -> Tensor:
        zero = self.source.known & (self.source.constant == 0)
        read = kept & (self.reads & self.result.wanted[:, None]).any(0) & ~zero
        if not read.any():
            read = _first(kept)
        read = rounded_up(read, kept)
        return read if read.sum() <= _WORTH_A_COPY * kept.sum() else kept

    def _worth_computing(self, kept: Tensor) -> Tensor:
        """The filters to compute, with one to represent all that give the same constant."""
        others = kept & ~self.result.wanted
        constants = self.result.constant[others & self.result.known]
        if not others.any() or (constants != constants[:1]).any():
            return kept
        known = others & self.result.known
        self.representative = _first(known if known.any() else others)
        rows = rounded_up((kept & ~others) | self.representative, kept)
        return rows if rows.sum() <= _WORTH_A_COPY * kept.sum() else kept

    def _resize(self, weight: Tensor, bias: Tensor | None, columns: Tensor, rows: Tensor) -> None:
        module = self.module
        trained = module.weight.requires_grad
        module.weight = nn.Parameter(laid_out_as(weight.detach(), module.weight), trained)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach()[rows], trained)
        names = ("in_features", "out_features")
        if not isinstance(module, nn.Linear):
            names = ("in_channels", "out_channels")
        for name, kept in zip(names, (columns, rows), strict=True):
            setattr(module, name, int(kept.sum()))


def _never_in_padding(module: Any) -> Tensor:
    """Whether each tap of a kernel never reads zero padding."""
    if isinstance(module, nn.Linear):
        return torch.ones(1, dtype=torch.bool)
    if type(module) in _TRANSPOSED:  # not every tap contributes at every position
        return torch.zeros(module.weight[0, 0].numel(), dtype=torch.bool)
    inside = torch.ones(1, dtype=torch.bool)
    for dim, (before, after) in enumerate(_padding(module)):
        offset = torch.arange(module.kernel_size[dim]) * module.dilation[dim]
        free = (offset >= before) & (offset <= offset[-1] - after)
        inside = (inside[:, None] & free).flatten()
    return inside


def _reached(module: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """Whether each tap of a kernel reads anything but zero padding, for inputs of this size."""
    if type(module) not in _CONVOLUTIONS:
        return torch.tensor(True)
    reached = torch.ones(1, dtype=torch.bool)
    for dim, (padding, _) in enumerate(_padding(module)):
        taps = torch.arange(module.kernel_size[dim]) * module.dilation[dim] - padding
        position = taps[:, None] + torch.arange(after[dim]) * module.stride[dim]
        some = ((position >= 0) & (position < before[dim])).any(1)
        reached = (reached[:, None] & (some | (module.padding_mode != "zeros"))).flatten()
    return reached


def _padding(module: Any) -> list[tuple[int, int]]:
    """Zeros before and after the image in each dimension."""
    none = module.padding_mode != "zeros" or module.padding == "valid"
    sizes = []
    for dim, kernel in enumerate(module.kernel_size):
        reach = module.dilation[dim] * (kernel - 1)
        if none:
            sizes.append((0, 0))
        elif module.padding == "same":
            sizes.append((reach // 2, reach - reach // 2))
        else:
            sizes.append((module.padding[dim],) * 2)
    return sizes


def _first(mask: Tensor) -> Tensor:
    chosen = torch.zeros_like(mask)
    chosen[mask.nonzero()[0]] = True
    return chosen
