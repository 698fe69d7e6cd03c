import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from pruneflow.models import CrossEntropy


def test_smoothing_spreads_a_share_of_the_label_over_all_classes():
    logits, labels = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])  # 3/4 and 1/4
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert CrossEntropy(0.2)(logits, labels, torch.zeros(1)).item() == pytest.approx(expected)


def test_without_smoothing_it_is_plain_cross_entropy():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(CrossEntropy()(logits, labels, logits), cross_entropy(logits, labels))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range_is_named(smoothing):
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\), got"):
        CrossEntropy(smoothing)
