"""Multi-head attention: how it propagates channels, and how heads are removed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruneflow.structure.channels.rules import Rule


class Attention(Rule):
    """nn.MultiheadAttention without masks, whose attention weights are not used.

    A head is removed if its values are constant or not used. Channels within heads are removed as
    well, the same number from each head. The layer is replaced by four Linear layers and
    scaled_dot_product_attention.
    """

    def forward(self) -> bool:
        """Find outputs that depend on constants only."""
        super().forward()
        module, node = self.module, self.node
        output = next(iter(node.users))
        self.result = self.flow.new(output, len(output.meta["shape"]) - 1)
        self.flow.pin(output)
        for user in node.users:
            self.flow.values[user] = self.result
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        self.weights = [weight.detach() for weight in weights]
        size = module.embed_dim
        bias = module.in_proj_bias
        self.biases = (torch.zeros(3 * size) if bias is None else bias.detach()).chunk(3)
        self.varies = (self.weights[2] != 0).any(1)
        projection = module.out_proj.weight.detach()
        # Attention weights sum to 1, so constant values stay constant.
        constant = self._constant_part(~self.varies)
        self.result.known = ~((projection != 0) & self.varies).any(1)
        self.result.constant = constant.to(projection.dtype) * self.result.known
        return True

    def cut(self) -> bool:
        """Replace the layer if heads or channels within heads can be removed."""
        module = self.module
        projection = module.out_proj.weight.detach()
        read = (projection[self.result.wanted] != 0).any(0)
        values = (self.varies & read).reshape(module.num_heads, -1)
        compared = torch.stack(
            [
                (weight != 0).any(1) | (bias != 0)
                for weight, bias in zip(self.weights[:2], self.biases[:2], strict=True)
            ]
        )
        keys = compared.all(0).reshape(module.num_heads, -1)
        heads = values.any(1).nonzero().flatten()
        heads = heads if len(heads) else torch.tensor([0])
        keys_kept, values_kept = _common(keys, heads), _common(values, heads)
        if len(keys_kept) == len(values_kept) == module.embed_dim:
            return False
        gone = ~self.varies
        gone[values_kept] = False
        layers = {}
        for name, weight, bias, kept in zip(
            ("q_proj", "k_proj", "v_proj"),
            self.weights,
            self.biases,
            (keys_kept, keys_kept, values_kept),
            strict=True,
        ):
            has_bias = module.in_proj_bias is not None
            layers[name] = _linear(weight[kept], bias[kept] if has_bias else None)
        bias = self._constant_part(gone).to(projection.dtype)
        needless = module.out_proj.bias is None and not bias.any()
        layers["out_proj"] = _linear(projection[:, values_kept], None if needless else bias)
        trained = module.out_proj.weight.requires_grad
        small = nn.ModuleDict(layers).requires_grad_(trained).train(module.training)
        self.traced.set_submodule(str(self.node.target), small)
        self._replace(len(heads), module.head_dim**-0.5, batch_first=module.batch_first)
        return True

    def _constant_part(self, values: Tensor) -> Tensor:
        """The bias of the output projection plus the contribution of constant values."""
        module = self.module
        weight = module.out_proj.weight.detach()[:, values].to(torch.float64)
        bias: Tensor = weight @ self.biases[2][values].to(torch.float64)
        if module.out_proj.bias is not None:
            bias += module.out_proj.bias.detach()
        return bias

    def _replace(self, heads: int, scale: float, *, batch_first: bool) -> None:
        graph, node, name = self.traced.graph, self.node, self.node.target
        with graph.inserting_before(node):
            parts = []
            for part, source in zip(("q_proj", "k_proj", "v_proj"), node.args, strict=False):
                x = graph.call_module(f"{name}.{part}", (source,))
                x = graph.call_method("unflatten", (x, -1, (heads, -1)))
                order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
                parts.append(graph.call_method("permute", (x, *order)))
            attend = F.scaled_dot_product_attention
            x = graph.call_function(attend, tuple(parts), {"scale": scale})
            x = graph.call_method("permute", (x, *((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))))
            x = graph.call_method("flatten", (x, 2))
            x = graph.call_module(f"{name}.out_proj", (x,))
        for user in list(node.users):
            user.replace_all_uses_with(x)
            graph.erase_node(user)
        graph.erase_node(node)


def _common(used: Tensor, heads: Tensor) -> Tensor:
    """The used channels of `heads`, padded with others to the same number for each head."""
    width = max(int(used[heads].sum(1).max()), 1)
    order = used[heads].to(torch.int8).argsort(stable=True, dim=1, descending=True)
    chosen: Tensor = order[:, :width].sort(1).values + heads[:, None] * used.shape[1]
    return chosen.flatten()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
