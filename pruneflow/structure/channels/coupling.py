"""Which tensor entries of a model belong to the same channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruneflow.errors import expect
from pruneflow.structure.channels.analysis import analyse, find_unshared, plain
from pruneflow.structure.channels.rules import Carried
from pruneflow.structure.channels.tracing import trace
from pruneflow.structure.running import Example, evaluating


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which tensor entries belong to each removable channel of a model.

    A unit is a channel with everything that must be removed with it: the filters and biases that
    compute it, in several layers if their outputs are added; its entries in batch norm, PReLU and
    per-channel scales; and the input channels or features of every layer that reads it. Groups of a
    grouped convolution are removed as a whole.

    Args:
        members: (qualified name of a parameter or buffer, dimension) -> int64 vector of the size of
            that dimension, on the CPU: the unit of each index, or -1 if it cannot be removed.
        writes: The members that compute channels (filters and biases), not those that read them.
        families: int64 vector: the family of each unit. The units of a family are computed by the
            same layers, so at least one of them must stay.
    """

    members: Mapping[tuple[str, int], Tensor]
    writes: frozenset[tuple[str, int]]
    families: Tensor

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.families)


def find_coupling(model: nn.Module, example_input: Example) -> Coupling:
    """Find the channels of a model that can be removed, and the tensor entries of each.

    Units are in the order of the forward pass, which is traced in evaluation mode: layers used in
    training only, such as the auxiliary head of Inception, are not seen. Not removable are the
    inputs and outputs of the model; channels read by operations that need all of them or are not
    supported, such as LayerNorm, attention and `x.view(-1, 512)`; and those of layers that are used
    twice, have hooks, or share a tensor. Subclasses of layers are traced through.

    Args:
        model: The model; wrappers such as `torch.compile` are unwrapped. It is not modified.
        example_input: An input batch on the device of the model.

    Raises:
        ValueError: If torch.fx cannot trace the model, or it has masks of `torch.nn.utils.prune`
            or no removable channels.

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
        traced = trace(model, example_input, fixed_size=True)  # it is not run again
        flow, rules = analyse(traced, find_unshared(model, traced), fixed_size=False)
        for rule in rules:
            if isinstance(rule, Carried) and rule.has_size_in_code:
                flow.pin(rule.node)
            elif isinstance(rule, Carried) and rule.drops_one:
                flow.pin(rule.node, 1)  # besides the one of each family that stays anyway
        unit_of = flow.units()
        entries = [
            (entry, unit.cpu())
            for rule in rules
            for entry in rule.entries()
            if ((unit := unit_of[entry.channels.atoms]) >= 0).any()
        ]
    expect(
        entries,
        "model",
        "have channels that can be removed",
        f"{type(model).__name__}, in which every layer computes the output, is read by an "
        "operation that needs all channels, has hooks, or is used twice",
        "prune single weights instead",
    )
    members = {(entry.name, entry.dim): unit for entry, unit in entries}
    writes = frozenset((entry.name, entry.dim) for entry, _ in entries if entry.written)
    families = torch.zeros(int(unit_of.max()) + 1, dtype=torch.int64)
    for member, unit in members.items():
        if member in writes:
            written = torch.zeros_like(families)
            written[unit[unit >= 0]] = 1
            families = (2 * families + written).unique(return_inverse=True)[1]
    return Coupling(members, writes, families)
