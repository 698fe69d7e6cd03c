import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pruneflow import Pruner
from pruneflow.structure.computed import check_zeros_stay
from pruneflow.structure.parameters import locate


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean, std = (
            self.weight.mean((1, 2, 3), keepdim=True),
            self.weight.std((1, 2, 3), keepdim=True),
        )
        weight = (self.weight - mean) / std
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByBatchNorm(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True)
        return super()._conv_forward(x, rows.reshape_as(weight), bias)


class Merged(nn.Linear):
    """LoRA, with its factors added to the weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = (
            nn.Parameter(torch.randn(2, sizes[0])),
            nn.Parameter(torch.randn(sizes[1], 2)),
        )

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Beside(Merged):
    def forward(self, x):
        return super(Merged, self).forward(x) + x @ self.a.T @ self.b.T


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 0.3 * self.weight.half().float(), self.bias).relu()


class CentredOverOutputs(nn.Conv1d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(0), self.bias)


class CentredInTensordot(nn.Linear):
    def forward(self, x):
        return torch.tensordot(x, self.weight - self.weight.mean(), ([1], [1]))


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


def parametrized(parametrization):
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


@pytest.mark.parametrize(
    ("layer", "lost"),
    [
        (lambda: Standardised(4, 6, 3, padding=1), ["weight"]),
        (lambda: Standardised(6, 6, 3, groups=6), ["weight"]),
        (lambda: StandardisedByBatchNorm(4, 6, 3), ["weight"]),
        (lambda: Merged(5, 3), ["weight"]),
        (lambda: CentredOverOutputs(8, 8, 3), ["weight"]),
        (lambda: CentredInTensordot(8, 8), ["weight"]),
        (lambda: parametrized(Centred()), ["parametrizations.weight.original"]),
        (lambda: Beside(5, 3), []),
        (lambda: Scaled(5, 3), []),
        (lambda: parametrizations.weight_norm(nn.Linear(5, 3)), []),
        (lambda: nn.Conv2d(4, 6, 3), []),
        (lambda: nn.MultiheadAttention(4, 2), []),
    ],
)
def test_weights_whose_zeros_do_not_stay_are_refused(layer, lost):
    layer = layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weights = {name: slot for name, slot in locate(layer).items() if "weight" in name}
    random = torch.random.get_rng_state()
    if lost:
        with pytest.raises(ValueError, match=f"got {lost[0]} .*`exclude` them"):
            check_zeros_stay(weights)
    else:
        check_zeros_stay(weights)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_pruner_refuses_them_and_prunes_the_others():
    model = nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"0\.weight \(Standardised\)"):
        Pruner(model, optimizers=[])
    assert Pruner(model, exclude=["0.*"], optimizers=[]).prune_to(0.5).sparsity == 0.5
