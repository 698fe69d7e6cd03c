"""Unit: what is removed together, if not each weight: N of M, blocks or whole channels."""

from pruneflow.pruning.granularity.blocks import Block
from pruneflow.pruning.granularity.channels import Channels
from pruneflow.pruning.granularity.nm import NM

Granularity = NM | Block | Channels
"""Groups of weights that stay or go together, and which of them go."""

__all__ = ["NM", "Block", "Channels", "Granularity"]
