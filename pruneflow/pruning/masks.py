"""MaskSet: which weights of which tensors stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruneflow.distributed import whole


class MaskSet(Mapping[str, Tensor]):
    """Masks by qualified name: bool tensors of the weights' shapes, True = keep.

    Those of sharded weights are `DTensor`s, sharded alike; then every process has to ask for their
    `pruned`, `sparsity` and `state`, and all get the same.

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
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"mask {name!r} is expected to be a bool tensor, True = keep, but {came} came; "
                    "convert it, for example by `mask != 0`"
                )
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_state, (self.state(),)  # eight times smaller on its way elsewhere

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.pruned:,} of {self.weights:,} weights pruned)"

    @property
    def weights(self) -> int:
        """Number of weights under the masks."""
        return sum(mask.numel() for mask in self.values())

    @property
    def pruned(self) -> int:
        """Number of pruned weights."""
        return self.weights - sum(int(whole(mask.sum())) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Pruned fraction, in [0, 1]; 0.0 for no weights at all."""
        return self.pruned / self.weights if self.weights else 0.0

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse masks that do not fit these tensors.

        Raises:
            ValueError: If a name is unknown, or shapes differ.
        """
        unknown = [name for name in self if name not in tensors]
        if unknown:
            raise ValueError(
                f"masks are expected for tensors of this model, but it has no {unknown[0]!r}"
                f"{and_more(unknown)}; masks of another model do not fit"
            )
        differing = [name for name in self if self[name].shape != tensors[name].shape]
        if differing:
            name = differing[0]
            raise ValueError(
                f"mask {name!r} is expected to have the shape {tuple(tensors[name].shape)} of its "
                f"tensor, but has {tuple(self[name].shape)}{and_more(differing)}; "
                "masks of another model do not fit"
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """The masks bit-packed (one bit a weight), as builtins and tensors."""
        return {
            name: {
                "shape": list(mask.shape),
                "bits": torch.from_numpy(np.packbits(whole(mask).cpu().numpy().reshape(-1))),
            }
            for name, mask in self.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Any]]) -> MaskSet:
        """Unpack what `state` packed.

        Raises:
            ValueError: If the bits of a mask are fewer or more than its shape takes.
        """
        masks = {}
        for name, packed in state.items():
            count = math.prod(packed["shape"])
            if len(packed["bits"]) != -(-count // 8):
                raise ValueError(
                    f"packed mask {name!r} of shape {packed['shape']} is expected to take "
                    f"{-(-count // 8)} bytes, but {len(packed['bits'])} came; the file is damaged"
                )
            bits = np.unpackbits(packed["bits"].cpu().numpy(), count=count)
            masks[name] = torch.from_numpy(bits.astype(bool)).reshape(packed["shape"])
        return cls(masks)


def and_more(names: Sequence[str]) -> str:
    """How many names there are beside the first, in words."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
