"""Granularities: single weights, N:M groups, blocks and channels."""

from pruneflow.pruning.granularity.blocks import Block
from pruneflow.pruning.granularity.channels import Channels
from pruneflow.pruning.granularity.nm import NM
from pruneflow.pruning.granularity.units import Granularity
from pruneflow.pruning.granularity.weights import Weights

__all__ = ["NM", "Block", "Channels", "Granularity", "Weights"]
