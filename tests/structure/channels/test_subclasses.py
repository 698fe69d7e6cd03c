"""Subclasses of layers, as libraries have them, are taken for what they compute."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from pruneflow.deploy.runtime.model import SparseModel, sparse_compile
from pruneflow.deploy.shrink import shrink
from pruneflow.structure.channels.coupling import find_coupling
from pruneflow.structure.channels.removal import remove_channels


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, size):
        super().__init__(size)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class NormThenAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class ConvAct(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class ConvScaled(nn.Conv2d):
    """With a scale of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.scale


class ConvByHand(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            x, self.weight, self.bias, stride=self.stride, padding=self.padding, groups=self.groups
        )


class Cast(nn.Linear):
    """As timm's Linear."""

    def forward(self, input):
        return F.linear(input, self.weight, bias=self.bias)


class Plain(nn.Linear):
    """Nothing of its own."""


class Slope(nn.PReLU):
    def forward(self, x):
        return super().forward(x)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """As timm's Conv2dSame: how much it pads, it computes from the image."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"padding": 0})

    def forward(self, x):
        pads = []
        for size, kernel in zip(x.size()[-2:], self.weight.shape[-2:], strict=True):
            pads += [0, max((math.ceil(size / 2) - 1) * 2 + kernel - size, 0)]
        assert x.ndim == x.dim() == 4 and x.shape[1] == x.size(1)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class Choosing(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e6 else -x)


class Doubled(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class Strided(nn.Conv2d):
    """Another stride than it says."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2, self.padding)


class Unnormalised(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.5)


def network(convolution=nn.Conv2d, norm=nn.BatchNorm2d, linear=nn.Linear, act=nn.ReLU):
    return nn.Sequential(
        convolution(3, 6, 3, padding=1), norm(6), act(), nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear(24, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip


@torch.no_grad()
def pruned(model):
    """Two of six channels and of five features are dead."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    for layer in (model[0], model[1], model[3]):
        layer.weight[1:3], layer.bias[1:3] = 0, 0
    model[6].weight[:, 4:12] = 0
    model[6].weight[1:3], model[6].bias[1:3], model[8].weight[:, 1:3] = 0, 0, 0
    return model.eval()


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KNOWN = {
    "norm and activation": {"norm": NormAct},
    "activation after super": {"norm": NormThenAct},
    "convolution and activation": {"convolution": ConvAct},
    "convolution by hand": {"convolution": ConvByHand},
    "a cast": {"linear": Cast},
    "nothing of its own": {"linear": Plain},
    "of PyTorch": {"linear": NonDynamicallyQuantizableLinear},
}


@pytest.mark.parametrize("layers", KNOWN.values(), ids=KNOWN)
def test_they_lose_channels_and_compile(layers):
    model = pruned(network(**layers))
    kinds = [type(layer) for layer in model]
    expected = model(IMAGES)
    fast = sparse_compile(model, IMAGES, threads=1)
    assert isinstance(fast, SparseModel)
    assert torch.allclose(fast(IMAGES), expected, rtol=1e-3, atol=1e-3)
    small = shrink(model, IMAGES)
    removed = remove_channels(model, IMAGES)
    assert removed == 4 and small[0].out_channels == 4 and small[6].out_features == 3
    for less in (small, model):
        assert [type(layer) for layer in less] == kinds
        assert torch.allclose(less(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert less[1].num_features == 4
        assert less[6].in_features == 16 and less[6].out_features == 3
    small.train()(IMAGES).sum().backward()
    assert small[1].weight.grad.shape == (4,)


def test_one_with_a_scale_of_its_own():
    model = pruned(network(ConvScaled))
    expected = model(IMAGES)
    small = shrink(model, IMAGES)
    assert remove_channels(model, IMAGES) == 4
    for less in (small, model):
        assert isinstance(less[0], ConvScaled) and less[0].scale.shape == (4, 1, 1)
        assert torch.allclose(less(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_a_slope_for_each_channel():
    model = pruned(network(act=lambda: Slope(6)))
    expected = model(IMAGES)
    assert remove_channels(model, IMAGES) == 4
    assert model[2].weight.shape == (4,) and model[2].num_parameters == 4
    assert torch.allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_one_that_counts_pixels():
    model = pruned(network(Same))
    images, others = IMAGES[..., :7], torch.randn(2, 3, 9, 6)
    expected, others_expected = model(images), model(others)
    fast = sparse_compile(model, images, threads=1)
    assert torch.allclose(fast(images[:2]), expected[:2], rtol=1e-3, atol=1e-3)
    small, fixed = shrink(model, images), shrink(model, images, fixed_size=True)
    assert fixed[0].out_channels == 4
    assert torch.allclose(fixed(images), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(small(others), others_expected, rtol=1e-4, atol=1e-4)
    assert remove_channels(model, images) == 4
    assert torch.allclose(model(others), others_expected, rtol=1e-4, atol=1e-4)


def parametrized():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Half())
    return model


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def patched():
    model = network()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + x.mean()
    return model


def hooked():
    model = network(ConvAct)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


WHOLE = {
    "standardised": lambda: network(Standardised),
    "what cannot be followed": lambda: network(Choosing),
    "another weight": lambda: network(Doubled),
    "another stride": lambda: network(Strided),
    "another epsilon": lambda: network(norm=Unnormalised),
    "forward set from outside": patched,
    "hooks": hooked,
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_what_computes_something_else_stays_whole(make):
    model = pruned(make())
    expected = model(IMAGES)
    small = shrink(model, IMAGES)
    assert small.state_dict()["0.weight"].shape[0] == 6
    assert torch.allclose(small(IMAGES), expected, rtol=1e-4, atol=1e-4)
    members = find_coupling(model, IMAGES).members
    assert ("0.weight", 0) not in members and ("6.weight", 0) in members
    assert remove_channels(model, IMAGES) == 2
    assert torch.allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`model` must (consist of operations|have no hooks)"):
        sparse_compile(model, IMAGES)


class NormInside(nn.Conv2d):
    """As detectron2's Conv2d: what comes after it is its child."""

    def __init__(self, *sizes, padding):
        super().__init__(*sizes, padding=padding)
        self.norm = NormAct(self.out_channels)
        self.norm.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.norm(super().forward(x))


def test_one_within_another_keeps_its_own_code():
    model = pruned(network(NormInside))
    expected = model(IMAGES)
    small = shrink(model, IMAGES)
    assert torch.allclose(small(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(shrink(small, IMAGES)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(IMAGES), expected)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = ConvAct(3, 6, 3), NormAct(6), Cast(6, 2)
        self.body = nn.Sequential(self.a, self.norm)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        x = self.body(x)
        x *= self.scale
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_names_and_a_scale_in_place(layout):
    model = TwoNames().to(memory_format=layout).eval()
    for entries in (model.a.weight, model.a.bias, model.norm.weight, model.norm.bias):
        entries.data[1:3] = 0
    model.head.weight.data[:, 1:3] = 0
    expected = model(IMAGES)
    small = shrink(model, IMAGES)
    assert remove_channels(model, IMAGES, []) == 2
    for less in (small, model):
        assert torch.allclose(less(IMAGES), expected, rtol=1e-4, atol=1e-5)
        assert less.body[0] is less.a and less.scale.shape == (4, 1, 1)
        assert less.a.weight.is_contiguous(memory_format=layout)


def test_a_parametrized_weight_is_not_the_layers_own():
    model = parametrized().eval()
    expected = model(IMAGES)
    with pytest.raises(ValueError, match="must consist of operations"):
        sparse_compile(model, IMAGES)
    assert torch.allclose(model(IMAGES), expected)


def test_the_model_is_left_as_it_was():
    model = pruned(network(ConvAct, NormAct))
    before = copy.deepcopy(model)
    find_coupling(model, IMAGES)
    shrink(model, IMAGES)
    sparse_compile(model, IMAGES, threads=1)
    assert str(model) == str(before)
    assert [vars(layer).keys() for layer in model] == [vars(layer).keys() for layer in before]
    assert "_check_input_dim" in vars(nn.BatchNorm2d)
    with pytest.raises(ValueError, match="expected 4D"):
        nn.BatchNorm2d(3)(torch.zeros(1, 3))


class Sequence(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class InstanceNormAct(nn.InstanceNorm1d):
    def forward(self, x):
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Sequence(8, 8, batch_first=True),
        lambda: SelfAttention(8, 2, batch_first=True),
        lambda: InstanceNormAct(5, affine=True),
    ],
)
def test_layers_whose_code_looks_at_its_input_stay_whole(layer):
    x = torch.randn(3, 5, 4)
    model = nn.Sequential(nn.Linear(4, 8), layer(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    for tensor in (model[0].weight, model[2].weight, model[2].bias):
        tensor.data[:2] = 0
    model[4].weight.data[:, :2] = 0
    expected, small = model.eval()(x), shrink(model, x)
    torch.testing.assert_close(small(x), expected)
    assert [small[i].out_features for i in (0, 2)] == [8, 4]
    assert remove_channels(model, x) == 2
    torch.testing.assert_close(model(x), expected)
