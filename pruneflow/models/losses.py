"""Training losses of a classifier: functions of logits, labels and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from pruneflow.errors import expect

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(logits, labels, images) -> loss`: the mean over the batch, a scalar."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the softmax of the logits.

    Args:
        label_smoothing: Amount of label smoothing, in [0, 1).

    Raises:
        ValueError: If `label_smoothing` is out of range.

    Example:
        >>> import torch
        >>> loss = CrossEntropy(label_smoothing=0.1)
        >>> loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.zeros(1, 3, 8, 8))
        tensor(0.2269)

    References:
        Szegedy et al. 2016 (label smoothing), https://arxiv.org/abs/1512.00567.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        valid = 0 <= self.label_smoothing < 1
        expect(valid, "label_smoothing", "be in [0, 1)", self.label_smoothing, "0.1 is usual")

    def __call__(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits: Outputs of the network (B, classes).
            labels: Class indices (B,).
            images: Inputs of the network (B, C, H, W); not used.
        """
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
