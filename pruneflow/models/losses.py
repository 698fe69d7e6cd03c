"""What a classifier is trained on: functions of logits, labels and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(logits, labels, images) -> loss`, a scalar: the mean over the batch."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the softmax of the logits.

    Args:
        label_smoothing: Share of each label that is spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: If it is out of range.

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
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}; 0.1 is usual"
            )

    def __call__(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """The mean loss of a batch.

        Args:
            logits: Of shape (B, classes).
            labels: Class indices (B,).
            images: The inputs (B, C, H, W); not used.
        """
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
