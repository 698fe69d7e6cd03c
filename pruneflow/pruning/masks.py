"""MaskSet: the masks of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruneflow.distributed import gather_full
from pruneflow.errors import expect


class MaskSet(Mapping[str, Tensor]):
    """Masks by qualified name: bool tensors of the weights' shapes, True = keep.

    Masks of sharded weights are `DTensor`s with the same sharding. For these, `pruned`, `sparsity`
    and `state` are collective: all processes must call them, and all get the same result.

    Args:
        masks: Qualified name -> mask.

    Raises:
        TypeError: If a mask is not a bool tensor.

    Example:
        >>> masks = MaskSet({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.weights, masks.pruned, masks.sparsity
        (4, 1, 0.25)
        >>> MaskSet.from_state(masks.state())["weight"]
        tensor([[ True, False],
                [ True,  True]])
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            kind = getattr(mask, "dtype", type(mask).__name__)
            expect(
                isinstance(mask, Tensor) and mask.dtype == torch.bool,
                "masks",
                "be bool tensors, True = keep",
                f"{kind} for {name}",
                "convert it, for example with `mask != 0`",
                error=TypeError,
            )
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_state, (self.state(),)  # bit-packed: an eighth of the size

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.pruned:,} of {self.weights:,} weights pruned)"

    @property
    def weights(self) -> int:
        """Number of weights, pruned or not."""
        return sum(mask.numel() for mask in self.values())

    @property
    def pruned(self) -> int:
        """Number of pruned weights."""
        return self.weights - sum(int(gather_full(mask.sum())) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is pruned, in [0, 1]; 0.0 without weights."""
        return self.pruned / self.weights if self.weights else 0.0

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the masks match these tensors.

        Raises:
            ValueError: If a name is unknown, or a mask has another shape than its tensor.
        """
        remedy = "use masks of the same model"
        unknown = [name for name in self if name not in tensors]
        got = f"{', '.join(unknown[:1])}{and_more(unknown)}"
        expect(not unknown, "masks", "be of tensors in this model", got, remedy)
        other = [
            f"{tuple(self[name].shape)} for {name} {tuple(tensors[name].shape)}"
            for name in self
            if self[name].shape != tensors[name].shape
        ]
        got = f"{', '.join(other[:1])}{and_more(other)}"
        expect(not other, "masks", "have the shapes of their tensors", got, remedy)

    def state(self) -> dict[str, dict[str, Any]]:
        """The masks, bit-packed (one bit per weight), as builtins and tensors."""
        return {
            name: {
                "shape": list(mask.shape),
                "bits": torch.from_numpy(np.packbits(gather_full(mask).cpu().numpy().reshape(-1))),
            }
            for name, mask in self.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Any]]) -> MaskSet:
        """The masks of a `state`.

        Raises:
            ValueError: If the bits of a mask do not match its shape.
        """
        masks = {}
        for name, packed in state.items():
            count = math.prod(packed["shape"])
            size, expected = len(packed["bits"]), -(-count // 8)
            expect(
                size == expected,
                "state",
                f"have {expected} bytes for {name} of shape {packed['shape']}",
                f"{size} bytes",
                "the file is damaged, so use another checkpoint",
            )
            bits = np.unpackbits(packed["bits"].cpu().numpy(), count=count)
            masks[name] = torch.from_numpy(bits.astype(bool)).reshape(packed["shape"])
        return cls(masks)


def and_more(names: Sequence[str]) -> str:
    """How many names there are besides the first, such as " and 2 more"."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
