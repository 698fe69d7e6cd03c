"""Which entries of a model's tensors belong to one channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruneflow.structure.channels.analysis import analyse, owned, plain
from pruneflow.structure.channels.rules import Carried
from pruneflow.structure.channels.tracing import trace
from pruneflow.structure.running import Example, evaluating


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which entries of which tensors hold each removable channel of a model.

    A unit is a channel with all that has to go with it: the filters that compute it, of several
    layers where their outputs are added up, with their biases; the entries of batch norm, of PReLU
    and of scales per channel; and the input channels or features of every layer that reads it. The
    groups of a grouped convolution stay or go whole.

    Args:
        members: (qualified name of a parameter or buffer, dimension) -> int64 vector of that
            dimension's size, on the CPU: the unit each index belongs to, -1 where it has to stay.
        writes: Those of the members along which the filters and biases of a layer lie, not what it
            reads.
        families: Int64 vector: per unit the family. Units of one family are written by the same
            layers, so that at least one of each has to stay.
    """

    members: Mapping[tuple[str, int], Tensor]
    writes: frozenset[tuple[str, int]]
    families: Tensor

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.families)


def find_coupling(model: nn.Module, example_input: Example) -> Coupling:
    """Find the channels of a model that can be removed, and what belongs to each.

    All in the order of the forward pass in evaluation mode, with all arguments but the first at
    their defaults. What only training uses, as the second head of Inception, is not seen. What
    stays whole: inputs and outputs of the model; what is read by an operation that looks at all
    channels or is not understood, as LayerNorm, attention and `x.view(-1, 512)`; layers that are
    used twice, have hooks, or share a tensor. Of a subclass of a layer it is seen what it adds.

    Args:
        model: The model; a wrapper, as of `torch.compile`, stands for what it wraps. It is left as
            it is.
        example_input: A batch of what the model takes, on its device.

    Raises:
        ValueError: If torch.fx cannot trace the model, a mask of `torch.nn.utils.prune` is on it,
            or it has no channel that can be removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> coupling = find_coupling(model, torch.zeros(1, 4))
        >>> for (name, dim), unit in coupling.members.items():
        ...     print(name, dim, unit.tolist())
        0.weight 0 [0, 1, 2]
        0.bias 0 [0, 1, 2]
        2.weight 1 [0, 1, 2]

    References:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning",
        https://arxiv.org/abs/2301.12900.
    """
    model = plain(model)
    with evaluating(model, example_input):
        traced = trace(model, example_input, fixed_size=True)  # nobody will run it
        flow, rules = analyse(traced, owned(model, traced), fixed_size=False)
        for rule in rules:
            if isinstance(rule, Carried) and rule.has_size_in_code:
                flow.pin(rule.node)
            elif isinstance(rule, Carried) and rule.drops_one:
                flow.pin(rule.node, 1)  # beside the one that stays of each family
        unit_of = flow.units()
        entries = [
            (entry, unit.cpu())
            for rule in rules
            for entry in rule.entries()
            if ((unit := unit_of[entry.channels.atoms]) >= 0).any()
        ]
    if not entries:
        raise ValueError(
            "`model` is expected to have channels that can be removed, but every layer of "
            f"{type(model).__name__} computes the output, is read by an operation that needs all "
            "channels, has hooks, or is used twice; prune weights instead"
        )
    members = {(entry.name, entry.dim): unit for entry, unit in entries}
    writes = frozenset((entry.name, entry.dim) for entry, _ in entries if entry.written)
    families = torch.zeros(int(unit_of.max()) + 1, dtype=torch.int64)
    for place, unit in members.items():
        if place in writes:
            written = torch.zeros_like(families)
            written[unit[unit >= 0]] = 1
            families = (2 * families + written).unique(return_inverse=True)[1]
    return Coupling(members, writes, families)
