"""Parameters and buffers that belong to channels: scales, biases, learned positions."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pruneflow import Channels, Pruner
from pruneflow.deploy.runtime.model import SparseModel, sparse_compile
from pruneflow.deploy.shrink import shrink
from pruneflow.structure.channels.coupling import find_coupling
from pruneflow.structure.channels.removal import remove_channels

SHAPES = {
    "gamma": (6,), "beta": (6,), "column": (6, 1, 1), "whole": (1, 6, 1, 1), "last": (1, 1, 6),
    "number": (), "one": (1,), "positions": (5, 6), "rows": (2, 6), "square": (6, 6),
}  # fmt: skip


class Scaled(nn.Module):
    """Something is done to the channels between two layers; two of the six are dead."""

    def __init__(self, code, layer):
        super().__init__()
        self.code, self.a, self.b = code, layer(4, 6), layer(6, 3)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.rand(shape) + 0.5))
            self.register_buffer(f"held_{name}", torch.rand(shape) + 0.5)
        for entries in (self.a.weight[1:3], self.a.bias[1:3], self.b.weight[:, 1:3]):
            entries.data.zero_()

    def forward(self, x):
        return self.b(self.code(self, self.a(x)))


FEATURES = {  # (batch, channels)
    "gamma": lambda m, x: x * m.gamma,
    "gamma first": lambda m, x: m.gamma * x,
    "bias": lambda m, x: x + m.beta,
    "one and gamma": lambda m, x: x * (1 + m.gamma),
    "both": lambda m, x: x * m.gamma + m.beta,
    "product": lambda m, x: x * (m.gamma * m.beta.exp()),
    "twice": lambda m, x: (x * m.gamma).relu() * m.gamma,
    "in place": lambda m, x: x.mul_(m.gamma).add_(m.beta),
    "operators in place": lambda m, x: operator.iadd(operator.imul(x, m.gamma), m.beta * x),
    "view in place": lambda m, x: operator.isub(x, m.gamma.view(1, -1) * F.gelu(x)),
    "buffer": lambda m, x: x * m.held_gamma,
    "buffer twice": lambda m, x: x * m.held_gamma + m.held_gamma,
    "numbers": lambda m, x: x * m.number + m.one,
    "row": lambda m, x: x * m.gamma.view(1, -1),
}
TOKENS = {  # (batch, tokens, channels)
    "gamma": lambda m, x: x * m.gamma,
    "last": lambda m, x: x * m.last,
    "positions": lambda m, x: x + m.positions,
    "positions and gamma": lambda m, x: x + m.positions * m.held_gamma,
    "turned": lambda m, x: (x.transpose(1, 2) * m.gamma[:, None]).transpose(1, 2),
}
IMAGES = {  # (batch, channels, height, width)
    "column": lambda m, x: x * m.column,
    "whole": lambda m, x: m.whole * F.gelu(x) + m.held_whole,
    "view": lambda m, x: x * m.gamma.view(1, -1, 1, 1) + m.beta.reshape(-1, 1, 1),
    "index": lambda m, x: x * m.gamma[:, None, None] + m.beta.unsqueeze(-1).unsqueeze(-1),
    "last": lambda m, x: (x.permute(0, 2, 3, 1) * m.gamma).permute(0, 3, 1, 2),
    "both layouts": lambda m, x: (
        (x.permute(0, 2, 3, 1) * m.gamma).permute(0, 3, 1, 2) + m.gamma.view(-1, 1, 1)
    ),
    "width": lambda m, x: x * m.gamma + m.square,
}
WHOLE = {  # what has to stay as it is
    "read": lambda m, x: x * m.gamma + m.gamma.sum(),
    "softmax": lambda m, x: x * m.gamma.softmax(0),
    "matrix": lambda m, x: x @ m.square,
    "row of a matrix": lambda m, x: x * m.rows[0],
    "size": lambda m, x: x * m.gamma * m.gamma.shape[0],
    "number of channels": lambda m, x: x * m.gamma.view(1, 6),
    "other order": lambda m, x: x * m.gamma.flip(0),
}
CASES = [
    *((nn.Linear, (3, 4), code, 4) for code in FEATURES.values()),
    *((nn.Linear, (2, 5, 4), code, 4) for code in TOKENS.values()),
    *((lambda *c: nn.Conv2d(*c, 3, padding=1), (2, 4, 6, 6), code, 4) for code in IMAGES.values()),
    *((nn.Linear, (3, 4), code, 6) for code in WHOLE.values()),
]
NAMES = [
    f"{kind}-{name}"
    for kind, codes in (("x", FEATURES), ("tokens", TOKENS), ("image", IMAGES), ("whole", WHOLE))
    for name in codes
]


@pytest.mark.parametrize(("layer", "shape", "code", "left"), CASES, ids=NAMES)
def test_channels_go_with_their_scales_or_all_stay(layer, shape, code, left):
    torch.manual_seed(0)
    model = Scaled(code, layer).double().eval()
    example, other = torch.randn(shape).double(), torch.randn(7, *shape[1:]).double()
    with torch.no_grad():
        expected = model(other.clone())
    small = shrink(model, example)
    assert small.a.weight.shape[0] == left
    assert torch.allclose(small(other.clone()), expected, rtol=1e-12)
    if left == 6:
        with pytest.raises(ValueError, match="channels that can be removed"):
            find_coupling(model, example)
    else:
        assert type(small) is Scaled
        assert remove_channels(model, example) == 2
        assert torch.allclose(model(other.clone()), expected, rtol=1e-12)


def test_a_scale_belongs_to_the_channels_it_scales():
    model = Scaled(FEATURES["both"], nn.Linear)
    members = find_coupling(model, torch.zeros(1, 4)).members
    each = list(range(6))
    assert {place: unit.tolist() for place, unit in members.items()} == {
        ("a.weight", 0): each, ("a.bias", 0): each, ("gamma", 0): each, ("beta", 0): each,
        ("b.weight", 1): each,
    }  # fmt: skip
    unused = ("column", "whole", "last", "positions", "rows", "square")
    Pruner(model, exclude=unused, granularity=Channels(torch.zeros(1, 4)), optimizers=[])


def test_one_scale_of_two_layers_ties_their_channels():
    class Tied(Scaled):
        def forward(self, x):
            return self.b(self.a(x) * self.gamma) + self.b2(self.a2(x) * self.gamma)

    model = Tied(None, nn.Linear)
    model.a2, model.b2 = nn.Linear(4, 6), nn.Linear(6, 3)
    members = find_coupling(model, torch.zeros(1, 4)).members
    assert members["a.weight", 0].tolist() == members["a2.weight", 0].tolist() == list(range(6))


def test_frozen_batch_norm_is_a_scale_and_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    for entries in (model[0].weight[1:3], model[0].bias[1:3], model[3].weight[:, 1:3]):
        entries.data.zero_()
    images = torch.randn(2, 3, 9, 9)
    expected = model(images)
    assert remove_channels(model, images) == 2
    assert model[1].running_var.shape == (4,)
    assert torch.allclose(model(images), expected, atol=1e-5)


class Counted(Scaled):
    """Counts its calls, in evaluation mode too."""

    def forward(self, x):
        self.held_number += 1
        self.held_one.add_(1)
        return super().forward(x)


def test_a_buffer_that_is_written_is_no_hindrance():
    model, example = Counted(FEATURES["gamma"], nn.Linear).eval(), torch.randn(3, 4)
    expected, calls = model(example), model.held_one.clone()
    small = shrink(model, example)
    assert small.a.out_features == 4
    assert torch.allclose(small(example), expected, atol=1e-6)
    assert small.held_one == calls + 1
    assert remove_channels(model, example, []) == 2
    model.code = lambda m, x: x.relu()
    fast = sparse_compile(model, example, threads=1)
    assert isinstance(fast, SparseModel)
    assert torch.allclose(fast(example), model(example), atol=1e-5)


class Several(Scaled):
    def forward(self, x, *, y, flip=False):
        h = self.a(x) * self.gamma
        h += self.beta * self.a2(y)
        return {"out": self.b(-h if flip else h)}


def test_scales_of_several_inputs():
    model = Several(None, nn.Linear)
    model.a2 = nn.Linear(5, 6)
    model.a2.weight.data[1:3], model.a2.bias.data[1:3] = 0, 0
    example = {"x": torch.randn(3, 4), "y": torch.randn(3, 5), "flip": True}
    expected = model(**example)["out"]
    small = shrink(model, example)
    assert remove_channels(model, example, []) == 2
    for less in (small, model):
        assert less.gamma.shape == less.beta.shape == (4,)
        assert torch.allclose(less(**example)["out"], expected, atol=1e-6)


def test_a_buffer_that_control_flow_depends_on_is_no_hindrance():
    class Counting(Scaled):
        def forward(self, x):
            return self.b(self.a(x) * self.gamma if self.held_number > 0 else self.a(x))

    assert shrink(Counting(None, nn.Linear), torch.zeros(1, 4)).a.out_features == 4


@pytest.mark.parametrize("layer", [nn.Linear, lambda i, o, **kw: nn.Conv1d(i, o, 1, **kw)])
def test_layers_of_complex_weights(layer):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](torch.tanh(self[0](x)))

    net = Net(*(layer(*sizes, dtype=torch.cfloat) for sizes in ((4, 6), (6, 4))))
    x = torch.randn(3, 4, 4, dtype=torch.cfloat)
    for tensor in (net[0].weight, net[0].bias):
        tensor.data[2:4] = 0
    net[0].weight.data[5] = 0  # what is left of it, the bias, goes into that of the next layer
    expected, small = net(x), shrink(net, x)
    torch.testing.assert_close(small(x), expected)
    assert small[0].weight.shape[0] == 3
    assert remove_channels(net, x) == 0  # the next layer reads them
    net[1].weight.data[:, 2:4] = 0
    torch.testing.assert_close(net(x), expected)
    assert remove_channels(net, x) == 2
    torch.testing.assert_close(net(x), expected)
