import copy
import operator
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import prune
from torchvision.models import MobileNetV2, ResNet, VisionTransformer, mobilenet_v3_small
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import cfgs, make_layers

from pruneflow import sparsity_report
from pruneflow.deploy.shrink import shrink


def alive(model):
    """As trained: statistics and biases are not what a fresh model has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(parameter)
            elif not parameter.any():  # as the head of torchvision's ViT
                nn.init.normal_(parameter, std=0.1)
    return model


def vgg():
    features = make_layers([c if c == "M" else c // 8 for c in cfgs["A"][:-1]], batch_norm=True)
    return nn.Sequential(
        *features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(),
        nn.Dropout(), nn.Linear(32, 10),
    )  # fmt: skip


def convnext():
    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.1, layer_scale=0.5, num_classes=10)


def perceptron():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 32), nn.GELU(), nn.Linear(32, 32), nn.Hardswish(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images):
        return self.head(self.encoder(images.flatten(2).transpose(1, 2).reshape(-1, 16, 48)))


NETWORKS = {
    "ResNet-10": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "ResNet-14": lambda: ResNet(Bottleneck, [1, 1, 1, 1], 10, width_per_group=16),
    "VGG-11": vgg,
    "MobileNetV2": lambda: MobileNetV2(num_classes=10, width_mult=0.25),
    "MobileNetV3": lambda: mobilenet_v3_small(num_classes=10, width_mult=0.25),
    "ConvNeXt": convnext,
    "ViT": lambda: VisionTransformer(16, 8, 2, 4, 32, 64, num_classes=10),
    "encoder": Encoder,
    "perceptron": perceptron,
}


def matrices(model):
    weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    return [(n, p) for n, p in weights if n not in ("class_token", "conv_proj.weight")]


@torch.no_grad()
def magnitude(model, sparsity=0.98):
    scaled = [(p, p.abs() / p.abs().mean()) for _, p in matrices(model)]
    threshold = torch.cat([s.flatten() for _, s in scaled]).quantile(sparsity)
    for weight, scores in scaled:
        weight[scores <= threshold] = 0


@torch.no_grad()
def filters(model):
    for _, weight in matrices(model)[:-1]:
        weight[torch.randperm(len(weight))[: len(weight) // 2]] = 0


@torch.no_grad()
def layers(model):
    for _, weight in matrices(model)[1:-1:3]:
        weight.zero_()


@torch.no_grad()
def branches(model):
    ends = ("conv2", "conv3", "block.5", "linear2", "mlp.3", "out_proj", "block.3.0", "conv.2")
    for name, weight in matrices(model):
        if name.endswith(tuple(f"{end}.weight" for end in ends)):
            weight.zero_()


@torch.no_grad()
def everything(model):
    for _, weight in matrices(model):
        weight.zero_()


PRUNINGS = [magnitude, filters, layers, branches, everything]


def agree(model, small, images):
    model, small = model.eval(), small.eval()
    with torch.no_grad():
        expected, found = model(images.clone()), small(images.clone())
    bound = 1e-9 if expected.dtype == torch.float64 else 1e-5
    return float((found - expected).norm()) <= bound * float(expected.norm())


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("pruned", PRUNINGS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same_with_less(name, pruned):
    torch.manual_seed(0)
    model = alive(NETWORKS[name]())
    pruned(model)
    if not any((weight == 0).any() for _, weight in matrices(model)):
        pytest.skip("no branches")
    model = model.double()
    small = shrink(model, torch.randn(2, 3, 16, 16).double())
    assert agree(model, small, torch.randn(5, 3, 16, 16).double())
    assert parameters(small) < parameters(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same_in_single_precision(name):
    torch.manual_seed(0)
    model = alive(NETWORKS[name]())
    magnitude(model)
    small = shrink(model, torch.randn(2, 3, 16, 16))
    assert agree(model, small, torch.randn(5, 3, 16, 16))


@pytest.mark.parametrize("name", NETWORKS)
def test_where_nothing_is_dead_the_model_stays_as_it_is(name):
    torch.manual_seed(0)
    model = alive(NETWORKS[name]()).train()
    with torch.no_grad():
        for _, weight in matrices(model):
            weight *= torch.rand_like(weight) < (
                0.5 if min(weight[0].numel(), len(weight)) > 16 else 2
            )
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, torch.randn(1, 3, 16, 16))
    assert type(small) is type(model)
    assert not small.training
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(small.state_dict()[key], before[key])
        assert small.state_dict()[key] is not value


def test_other_sizes_of_images_go_through():
    torch.manual_seed(0)
    model = alive(NETWORKS["ResNet-10"]())
    filters(model)
    small = shrink(model, torch.randn(1, 3, 32, 32))
    assert agree(model, small, torch.randn(2, 3, 48, 40))


def convolutions(*channels, **options):
    torch.manual_seed(0)
    layers = [
        layer
        for pair in pairwise(channels)
        for layer in (nn.Conv2d(*pair, 3, **options), nn.ReLU())
    ]
    return nn.Sequential(*layers).double()


def constant(layer, values):
    """Let the first filters give these constants."""
    layer.weight.data[: len(values)] = 0
    layer.bias.data[: len(values)] = torch.tensor(values, dtype=torch.float64)


def test_a_constant_goes_into_the_bias_where_there_is_no_padding():
    model = convolutions(2, 5, 3)
    constant(model[0], [0.5, -1.0, 2.0])
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small[0].weight.shape == (2, 2, 3, 3)
    expected = (
        model[2].bias + model[2].weight.sum((2, 3))[:, :3] @ torch.tensor([0.5, 0, 2]).double()
    )
    assert torch.allclose(small[2].bias, expected)
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


def test_constants_that_zero_padding_ends_are_merged_into_one():
    model = convolutions(2, 6, 3, padding=1)
    constant(model[0], [0.5, -1.0, 2.0, 1.0])
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small[0].bias.tolist()[0] == 2  # the largest
    assert small[2].weight.shape == (3, 3, 3, 3)
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


def test_a_constant_read_by_taps_that_never_meet_the_padding_is_none_that_varies():
    model = convolutions(2, 6, 3, padding=1)
    constant(model[0], [0.5, 1.0, 2.0])
    inner = model[2].weight.data[:, :3, 1, 1].clone()
    model[2].weight.data[:, :3] = 0
    model[2].weight.data[:, :3, 1, 1] = inner
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small[2].weight.shape == (3, 3, 3, 3)
    assert 2 not in small[0].bias
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


@pytest.mark.parametrize(("dead", "left"), [(1, 64), (17, 48), (50, 14)])
def test_what_stays_of_many_channels_is_a_multiple_of_sixteen(dead, left):
    model = convolutions(2, 64, 3)
    constant(model[0], [-1.0] * dead)
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small.get_submodule("0").out_channels == left
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


@pytest.mark.parametrize("layer", [nn.AvgPool2d(3, 1, 1), nn.ZeroPad2d(1), nn.MaxPool2d(3, 1, 1)])
def test_padding_of_other_layers_ends_constants_as_well(layer):
    model = convolutions(2, 6, 3)
    constant(model[0], [0.5, 2.0, -1.0])
    model.insert(2, layer)
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small[0].out_channels == (3 if isinstance(layer, nn.MaxPool2d) else 5)
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_leave_constants_alone(mode):
    model = convolutions(2, 6, 3, padding=1, padding_mode=mode)
    constant(model[0], [0.5, 1.0, 2.0])
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small[2].weight.shape == (3, 3, 3, 3)
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


def test_taps_that_are_zero_on_all_sides_go():
    model = convolutions(2, 5, 3, padding=1, stride=2)
    kept = model[0].weight.data[:, :, 1, 1].clone()
    model[0].weight.data.zero_()
    model[0].weight.data[:, :, 1, 1] = kept
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert type(small) is nn.Sequential
    assert small[0].kernel_size == (1, 1) and small[0].padding == (0, 0)
    assert agree(model, small, torch.randn(2, 2, 9, 7).double())


@pytest.mark.parametrize(
    ("tap", "options"), [(1, {}), (2, {"padding": 1, "stride": 3}), (0, {"padding": 1})]
)
def test_taps_stay_where_less_padding_cannot_stand_for_them(tap, options):
    model = convolutions(2, 5, **options)
    kept = model[0].weight.data[:, :, tap, tap].clone()
    model[0].weight.data.zero_()
    model[0].weight.data[:, :, tap, tap] = kept
    images = torch.randn(2, 2, 6, 6).double()
    small = shrink(model, images, fixed_size=True)
    assert small[0].kernel_size == (3, 3)
    assert agree(model, small, images)


def test_for_a_fixed_size_taps_go_that_read_padding_alone():
    torch.manual_seed(0)
    model = alive(NETWORKS["ResNet-10"]())
    images = torch.randn(3, 3, 32, 32)
    assert parameters(shrink(model, images)) == parameters(model)
    small = shrink(model, images[:1], fixed_size=True)
    assert small.layer4.get_submodule("0").conv1.kernel_size == (2, 2)
    assert small.layer4.get_submodule("0").conv2.kernel_size == (1, 1)
    assert agree(model, small, images)
    torch.export.export(small, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(AssertionError, match=r"fixed size \(3, 32, 32\)"):
        small(torch.randn(1, 3, 40, 40))


def test_a_dead_branch_becomes_a_constant_that_can_be_trained():
    torch.manual_seed(0)
    model = alive(NETWORKS["ResNet-10"]())
    model.layer2[0].conv2.weight.data.zero_()
    small = shrink(model, torch.randn(1, 3, 32, 32))
    assert not [name for name in small.state_dict() if name.startswith("layer2.0.conv")]
    (name,) = [name for name, _ in small.named_parameters() if name.endswith("constant")]
    assert small.get_parameter(name).shape == (1, 128, 1, 1)
    assert agree(model, small, torch.randn(2, 3, 32, 32))
    small.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


class Added(nn.Module):
    """x + branch(x), then another convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, bias=False)
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Conv2d(16, 2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.branch(x)))


def test_a_sum_that_is_zero_on_one_side_goes():
    model = Added().double()
    model.branch[0].weight.data.zero_()
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert operator.add not in {node.target for node in small.graph.nodes}
    assert list(small.state_dict()) == ["stem.weight", "head.weight", "head.bias"]
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


def test_what_a_dead_branch_reads_twice_goes_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Conv2d(2, 2, 1) for _ in range(4))
            self.dead = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            read = self.a(x)
            return self.head(x + self.dead(torch.cat([self.b(read), read], 1)))

    model = Model().double()
    nn.init.zeros_(model.dead.weight)
    small = shrink(model, torch.randn(2, 2, 8, 8).double())
    assert not hasattr(small, "a") and not hasattr(small, "b")
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


def test_a_branch_works_on_the_channels_it_needs():
    torch.manual_seed(0)
    model = alive(Added()).double()
    model.branch[0].weight.data[:12] = 0
    model.branch[0].weight.data[:, 4:] = 0
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    assert small.branch.get_submodule("0").weight.shape == (5, 4, 3, 3)
    assert small.stem.weight.shape[0] == 16
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


def test_a_layer_may_read_what_is_copied_for_others():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a = nn.Conv2d(2, 16, 1), nn.Conv2d(16, 16, 1)
            self.b, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            copied = self.a(x)  # twelve of its channels are copies of one
            return self.head(x + copied + self.b(copied))

    torch.manual_seed(0)
    model = Reading().double()
    constant(model.a, [1] * 12)
    small = shrink(model, torch.randn(1, 2, 8, 8).double())
    (copying,) = (node for node in small.graph.nodes if node.target is torch.index_select)
    assert {user.target for user in copying.users} == {"b", operator.add}
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_go_and_channels_that_every_head_can_spare(batch_first):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 4, batch_first=batch_first)

        def forward(self, x):
            attended, _ = self.attention(x, x, x)
            return x + attended

    torch.manual_seed(0)
    model = alive(Attending()).double()
    attention = model.attention
    weight = attention.in_proj_weight.data
    nn.init.normal_(attention.in_proj_bias)
    weight[48:54] = 0  # values of the first head
    attention.out_proj.weight.data[:, 18:] = 0  # the last head is not read
    for head in range(4):
        weight[6 * head : 6 * head + 2] = 0  # two queries of each
        attention.in_proj_bias.data[6 * head : 6 * head + 2] = 0
    x = torch.randn(5, 7, 24).double()
    small = shrink(model, x)
    shapes = {name: tuple(p.shape) for name, p in small.attention.named_parameters()}
    assert shapes["q_proj.weight"] == shapes["k_proj.weight"] == (8, 24)
    assert shapes["v_proj.weight"] == (12, 24)
    assert shapes["out_proj.weight"] == (24, 12)
    assert agree(model, small, x[:3, :2])


class Flat(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.conv, self.linear, self.view = nn.Conv2d(2, 8, 3), nn.Linear(72, 3), view

    def forward(self, x):
        return self.linear(self.view(torch.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("view", "same_class"),
    [
        (lambda x: x.flatten(1), True),
        (lambda x: x.view(x.size(0), -1), True),
        (lambda x: x.reshape(x.shape[0], -1), True),
        (lambda x: x.view(-1, 72), False),
    ],
)
def test_features_of_a_filter_go_whatever_way_they_are_flattened(view, same_class):
    torch.manual_seed(0)
    model = Flat(view).double()
    constant(model.conv, [-1, 1, 2])
    small = shrink(model, torch.randn(1, 2, 5, 5).double())
    assert isinstance(small, Flat) == same_class
    assert small.linear.weight.shape == (3, 45)
    assert agree(model, small, torch.randn(4, 2, 5, 5).double())


class Reading(nn.Module):
    """Something of the first convolution's channels stands in the code."""

    def __init__(self, code):
        super().__init__()
        self.a, self.b, self.code = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 3, 3), code
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        return self.b(self.code(self, self.a(x)))


@pytest.mark.parametrize(
    "code",
    [
        lambda _, x: x * x.size(1),
        lambda _, x: x / x.shape[1],
        lambda _, x: x.view(x.size(0), 8, x.size(2), x.size(3)),
        lambda _, x: x.view(x.size(0), 2, 4, x.size(2), -1).transpose(1, 2).flatten(1, 2),
        lambda _, x: torch.einsum("bchw,cd->bdhw", x, torch.eye(8, dtype=x.dtype)),
        lambda _, x: F.softmax(x, 1),
        lambda _, x: F.group_norm(x, 2),
        lambda _, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]],
        lambda m, x: F.conv2d(x, m.b.weight.new_ones(8, 8, 1, 1)),
    ],
)
def test_what_is_not_understood_reads_all_channels(code):
    torch.manual_seed(0)
    model = Reading(code).double()
    constant(model.a, [0.5, 1, -1])
    small = shrink(model, torch.randn(2, 2, 8, 8).double())
    assert small.a.weight.shape[0] == 8
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.scale * x,
        lambda _, x: x[:, :, ::2, 1:],
        lambda _, x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
        lambda _, x: x * x.mean((2, 3), keepdim=True),
        lambda _, x: x * x.mean((2, 3))[:, :, None, None],
        lambda _, x: F.max_pool2d(F.interpolate(x, scale_factor=2), 3, padding=1),
        lambda _, x: F.pad(F.avg_pool2d(x, 3, 1, 1), (1, 2, 0, 1)),
        lambda _, x: x.add_(1).mul_(2),
        lambda _, x: F.dropout(x, 0.5, training=False) - 0.25,
    ],
)
def test_what_treats_channels_one_by_one_lets_them_go(code):
    torch.manual_seed(0)
    model = Reading(code).double()
    constant(model.a, [-1, -2, -3])
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    small = shrink(model, torch.randn(2, 2, 8, 8).double())
    assert small.a.weight.shape[0] == 5
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


@pytest.mark.parametrize(
    "code",
    [
        lambda _, x: x.relu_() + x.neg(),
        lambda _, x: (x.flatten(2).relu_(), x)[1],
        lambda _, x: (x.add_(1), x)[1],
        lambda _, x: torch.relu(x) + x.clamp_(0, 1) + x,
    ],
)
def test_values_that_are_written_over_are_not_taken_for_what_they_were(code):
    torch.manual_seed(0)
    model = Reading(code).double()
    constant(model.a, [-1, 0.5, 3])
    small = shrink(model, torch.randn(2, 2, 8, 8).double())
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


class Aliased(nn.Module):
    """Its code writes in place what has another name as well."""

    def __init__(self, code):
        super().__init__()
        self.a, self.b, self.code = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), code
        self.head = nn.Conv2d(8, 2, 1)
        self.register_buffer("kept", torch.ones(2, 8, 4, 4))

    def forward(self, x):
        return self.head(self.code(self, self.a(x).abs() + 0.1, self.b(x).abs() + 1))


def written(operator, target):
    """Code that ends in `target operator y` and gives back another name of x."""
    names = {}
    code = "def code(m, x, y):\n    alias, view = x, x[:, 2:6]\n    part = y[:, 2:6]\n"
    exec(f"{code}    {target.format(operator)}\n    return alias", names)
    return names["code"]


IN_PLACE = ["+=", "-=", "*=", "/=", "**=", "//=", "%="]
TARGETS = ["x {} y", "x {} 2", "view {} part", "x[:, 2:6] {} part", "x.mT {} y.mT"]


def agree_in_place(model, example):
    torch.manual_seed(0)
    model = model.double()
    constant(model.a, [0, 0.5, 3])
    constant(model.b, [0, 0.5, 3, 2])
    with torch.no_grad():
        model.head.weight[:, :2] = 0
    small = shrink(model, example.double())
    return agree(model, small, torch.rand(2, 3, 4, 4).double())


@pytest.mark.parametrize("operator", IN_PLACE)
@pytest.mark.parametrize("target", TARGETS[:-1])
def test_what_python_writes_in_place_is_seen_under_all_names(operator, target):
    assert agree_in_place(Aliased(written(operator, target)), torch.zeros(2, 3, 4, 4))


def test_written_channels_still_go():
    model = Aliased(written("+=", "x {} y")).double()
    with torch.no_grad():
        model.head.weight[:, :3] = 0
    assert shrink(model, torch.zeros(2, 3, 4, 4).double()).a.out_channels == 5


def numbers(m, x, y):
    count = kept = y.size(0)
    count += 1
    count *= 2
    size = before = y.shape[:1]
    size += (8,)
    return x.view(kept, 8, 4, 4) * count + before[0] + size[1]


def masks(m, x, y):
    positive = alias = x > 0
    positive &= y > 1.5
    positive |= x > 1
    positive ^= x > 2
    whole = shifted = y.to(torch.int64)
    whole <<= 2
    whole >>= 1
    return x * alias + shifted


@pytest.mark.parametrize(
    "code",
    [
        numbers,
        masks,
        lambda m, x, y: (x.__setitem__((slice(None), 0), y[:, 1]), x)[1],
        lambda m, x, y: (x.__setitem__(x < 0, 0), x)[1],
        lambda m, x, y: (x.mT.__iadd__(y.mT), x)[1],
        lambda m, x, y: (x.data.__iadd__(y), x)[1],
        lambda m, x, y: (x.chunk(2, 1)[0].__imul__(2), x)[1],
        lambda m, x, y: (torch.mul(y, y, out=x), x)[1],
        lambda m, x, y: (torch._foreach_add_([x], [y]), x)[1],
        lambda m, x, y: (F.relu(x, inplace=True), x)[1],
        lambda m, x, y: operator.imatmul(x, y) + x,
        lambda m, x, y: (m.kept.copy_(x), m.kept)[1],
        lambda m, x, y: (m.kept.add_(x), m.kept)[1],
        lambda m, x, y: (z := x.new_zeros(x.shape), z[:, :4].__iadd__(y[:, :4]), z)[2],
    ],
)
def test_other_ways_to_write_are_seen_too(code):
    assert agree_in_place(Aliased(code), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (lambda m, x, y: setattr(x, "data", y) or x, r"`x\.data = \.\.\.` cannot be traced"),
        (
            lambda m, x, y: torch.zeros(2, 8, 4, 4).__iadd__(y),
            "creates independently of its inputs",
        ),
        (lambda m, x, y: setattr(m, "kept", m.kept + x) or m.kept, r"assigns to `self\.kept`"),
    ],
)
def test_writes_that_cannot_be_followed_are_refused(code, message):
    model = Aliased(code)
    with pytest.raises(ValueError, match=rf"`model` .*{message}"):
        shrink(model, torch.rand(2, 3, 4, 4))


def test_an_example_of_zeros_hides_nothing():
    class Counting(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x).view(-1, 8)) * self.calls

    model = Counting()
    model.a.weight.data[:3] = 0
    with pytest.raises(
        RuntimeError, match=r"noise of its shape, got a relative difference of 5\.0e-01"
    ):
        shrink(model, torch.zeros(1, 4))


def test_noise_that_ends_in_nan_or_an_error_is_no_test():
    class Positive(nn.Module):
        def __init__(self, *, asserts):
            super().__init__()
            self.a, self.b, self.asserts = nn.Linear(4, 8), nn.Linear(8, 2), asserts

        def forward(self, x):
            x = x.log()
            if self.asserts:
                torch._assert(x.isfinite().all(), "positive numbers are expected")
            return self.b(self.a(x))

    for asserts in (False, True):
        model = Positive(asserts=asserts)
        model.b.weight.data[:, :3] = 0
        assert shrink(model, torch.ones(1, 4)).a.out_features == 5


def test_infinite_outputs_are_equal_if_they_are_the_same():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([True, False]), -torch.inf)

    model = Masked(nn.Linear(4, 8), nn.Linear(8, 2))
    model[1].weight.data[:, :3] = 0
    assert shrink(model, torch.zeros(1, 4))[0].out_features == 5


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize(
    ("squeeze", "left"),
    [
        (lambda x: x.squeeze(), 2),
        (torch.squeeze, 2),
        (lambda x: x.squeeze(-1).squeeze(-1).squeeze(1), 2),
        (lambda x: x.squeeze((2, 3)), 1),
    ],
)
def test_a_single_channel_is_not_squeezed(squeeze, left, pictures):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Calling(squeeze))
    model.append(nn.Linear(8, 2)).double()
    constant(model[0], [0.0] * 7)
    small = shrink(model, torch.randn(pictures, 3, 6, 6).double())
    assert small.get_submodule("0").out_channels == left
    for count in (1, 3):
        images = torch.randn(count, 3, 6, 6).double()
        assert agree(model, small, images) and small(images).shape == model(images).shape


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_weights_keep_their_memory_format(layer):
    for form in (torch.channels_last, torch.contiguous_format):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer(8, 4, 3), nn.Conv2d(4, 4, 1))
        model.double().to(memory_format=form)
        constant(model[0], [0.0] * 3)
        small = shrink(model, torch.randn(1, 3, 8, 8).double())
        assert small[0].out_channels == 5
        for weight in (small[0].weight, small[2].weight):
            assert weight.is_contiguous(memory_format=form)
        assert agree(model, small, torch.randn(2, 3, 8, 8).double())


@pytest.mark.parametrize("listed", [nn.ModuleList, nn.Sequential])
def test_a_layer_under_two_names_is_one_layer(listed):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.layers = (
                listed([self.first, self.second])
                if listed is nn.ModuleList
                else (listed(self.first, self.second))
            )

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model = Named().double()
    constant(model.first, [0.0] * 3)
    small = shrink(model, torch.randn(1, 3, 4, 4).double())
    assert small.first is small.layers[0]
    assert (small.first.out_channels, small.second.in_channels) == (5, 5)
    assert agree(model, small, torch.randn(2, 3, 4, 4).double())


def test_functions_may_write_to_lists_of_numbers():
    model = Calling(shifted)
    assert agree(model, shrink(model, torch.rand(2, 3, 8, 8)), torch.rand(1, 3, 8, 8))


@fx.wrap
def shift(x, sizes):
    sizes[0] = 1  # as torchvision's 3-d Swin does
    return x.roll(sizes, (2, 3))


def shifted(x):
    return shift(x, [0, 3])


def test_a_sum_is_not_left_out_where_its_result_is_written_over():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.dead, self.head = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            return self.head((self.dead(x) + x).relu_() + x)

    model = Model().double()
    nn.init.zeros_(model.dead.weight)
    nn.init.zeros_(model.dead.bias)
    small = shrink(model, torch.randn(2, 2, 8, 8).double())
    assert not hasattr(small, "dead")
    assert agree(model, small, torch.randn(3, 2, 9, 9).double())


def test_shared_and_hooked_layers_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.tied, self.hooked = (nn.Linear(4, 4) for _ in range(3))
            self.other = nn.Linear(4, 4)
            self.other.weight = self.tied.weight
            self.last = nn.Linear(4, 4)
            self.hooked.register_forward_hook(lambda module, args, output: output + 1)

        def forward(self, x):
            x = self.twice(self.twice(x).relu()).relu()
            return self.last(self.hooked(self.other(self.tied(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model = Twice().double()
    for layer in (model.twice, model.tied, model.hooked):
        layer.weight.data[:2] = 0
    small = shrink(model, torch.randn(2, 4).double())
    assert small.state_dict().keys() == model.state_dict().keys()
    assert small.tied.weight is small.other.weight
    assert agree(model, small, torch.randn(3, 4).double())


def test_only_the_first_argument_is_an_input():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, features, shift=None, *, scale=1):
            out = self.layers(features) * scale
            return {"logits": out if shift is None else out + shift}

    model = Model().double()
    model.layers[2].weight.data[:, 3:] = 0
    x = torch.randn(3, 4).double()
    small = shrink(model, x)
    assert small.layers[0].out_features == 3
    assert torch.allclose(small(x)["logits"], model(x)["logits"], rtol=1e-9)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = alive(NETWORKS["ResNet-10"]())
    filters(model)
    model.layer2[0].conv2.weight.data.zero_()
    return shrink(model, torch.randn(1, 3, 32, 32))


def test_the_result_is_a_plain_model(small, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(small, fx.GraphModule)
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(loaded(images), small(images))
    copied = copy.deepcopy(small)
    copied.load_state_dict({name: tensor.clone() for name, tensor in small.state_dict().items()})
    assert sparsity_report(small, images[:1]).multiply_adds < 4e7


def test_the_result_exports_and_compiles(small):
    images = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(small, (images,), dynamic_shapes=({0: batch},))
    found = program.module()(torch.cat([images] * 3))
    assert torch.allclose(found[:2], small(images), atol=1e-4)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), small(images), atol=1e-4)


def test_shrinking_twice_changes_nothing_more(small):
    again = shrink(small, torch.randn(1, 3, 32, 32))
    assert parameters(again) == parameters(small)


def test_masks_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"`model` .* got masks on 0\.weight; .*fold_model"):
        shrink(model, torch.zeros(1, 4))


def test_what_cannot_be_traced_is_refused():
    class Model(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"`model` .* while tracing Model: .*control flow"):
        shrink(Model(), torch.ones(1, 4))


def test_what_tracing_cannot_see_is_found_out():
    class Model(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x).view(-1, 4)) * self.calls

    model = Model()
    assert isinstance(shrink(model, torch.ones(1, 4)), Model)
    model.a.weight.data[0], model.a.bias.data[0] = 0, 0
    with pytest.raises(RuntimeError, match=r"`model` .* a relative difference of 5\.0e-01"):
        shrink(model, torch.ones(1, 4))


class RandomNetwork(nn.Module):
    """Operations drawn at random, each on values drawn from those there are."""

    def __init__(self, draw):
        super().__init__()
        self.steps = []
        self.layers = nn.ModuleList()
        channels = [3]
        for _ in range(draw(st.integers(2, 9))):
            index = draw(st.integers(0, len(channels) - 1))
            size = channels[index]
            kind = draw(st.sampled_from(["conv", "conv", "depthwise", "norm", "pointwise", "pool",
                                         "add", "iadd", "part", "cat", "gate"]))  # fmt: skip
            other = draw(st.integers(0, len(channels) - 1))
            layer = self.layer(draw, kind, size)
            if kind in ("add", "iadd") and channels[other] != size:
                layer = nn.Conv2d(channels[other], size, 1)
            self.layers.append(layer)
            self.steps.append((kind, index, other))
            new = {"cat": size + channels[other], "conv": getattr(layer, "out_channels", 0)}
            channels.append(new.get(kind, size))
        self.head = nn.Linear(4 * channels[-1], 3)

    def layer(self, draw, kind, size):
        if kind == "conv":
            kernel, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2)]))
            options = {
                "padding": dilation * (kernel // 2),
                "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"])),
                "dilation": dilation,
                "bias": draw(st.booleans()),
            }
            return nn.Conv2d(size, draw(st.integers(1, 5)), kernel, **options)
        if kind == "depthwise":
            return nn.Conv2d(size, size, 3, padding=1, groups=size)
        if kind == "norm":
            return nn.BatchNorm2d(size)
        if kind == "pool":
            return draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(3, 1, 1)
        if kind == "gate":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(size, 2, 1), nn.ReLU(),
                                 nn.Conv2d(2, size, 1), nn.Hardsigmoid())  # fmt: skip
        if kind == "pointwise":
            kinds = [partial(nn.ReLU, inplace=True), nn.ReLU6, nn.GELU, nn.Hardswish, nn.Sigmoid]
            return draw(st.sampled_from(kinds))()
        return nn.Identity()

    def forward(self, x):
        values = [x]
        for (kind, index, other), layer in zip(self.steps, self.layers, strict=True):
            value = values[index]
            if kind == "add":
                value = value + layer(values[other])
            elif kind == "iadd":  # all that are the same tensor, or views of it
                value += layer(values[other])
            elif kind == "part":
                value = value.transpose(2, 3).transpose(2, 3)
                value[:, ::2] *= 0.5
            elif kind == "cat":
                value = torch.cat([value, values[other]], 1)
            elif kind == "gate":
                value = value * layer(value)
            else:
                value = layer(value)
            values.append(value)
        return self.head(F.adaptive_avg_pool2d(values[-1], 2).flatten(1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_networks_compute_the_same(data):
    model = RandomNetwork(data.draw).double()
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    alive(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                kept = data.draw(st.sampled_from([0, 0.3, 0.6, 1]))
                parameter *= torch.rand_like(parameter) < kept
                parameter *= torch.rand(len(parameter), *[1] * (parameter.ndim - 1)) < 0.7
            elif data.draw(st.booleans()):
                parameter *= torch.rand_like(parameter) < 0.5
    fixed = shrink(model, torch.randn(1, 3, 7, 7).double(), fixed_size=True)
    assert agree(model, fixed, torch.randn(2, 3, 7, 7).double())
    small = shrink(model, torch.randn(1, 3, 7, 7).double())
    assert agree(model, small, torch.randn(2, 3, 9, 8).double())
    assert parameters(small) <= parameters(model) + sum(
        layer.out_channels for layer in model.layers if isinstance(layer, nn.Conv2d)
    ) + sum(layer.num_features for layer in model.layers if isinstance(layer, nn.BatchNorm2d))
