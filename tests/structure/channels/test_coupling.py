import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models import DenseNet, MobileNetV2, ResNet, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import StochasticDepth
from two_layers import Points, TwoLayers

from pruneflow.deploy import shrink
from pruneflow.structure.channels.coupling import find_coupling
from pruneflow.structure.channels.removal import remove_channels


def vgg():
    features = make_layers([c if c == "M" else c // 8 for c in cfgs["A"][:-1]], batch_norm=True)
    return nn.Sequential(
        *features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(),
        nn.Dropout(), nn.Linear(32, 10),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 32), nn.GELU(), nn.Linear(32, 32), nn.Sigmoid(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Narrow(ResNet):
    """An eighth of the channels."""

    def __init__(self, block):
        super().__init__(block, [1, 1, 1, 1])
        self.fc = nn.Linear(64 * block.expansion, 10)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def convnext():
    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.1, layer_scale=0.5, num_classes=10)


NETWORKS = {
    "ResNet-10": lambda: Narrow(BasicBlock),
    "ResNet-14": lambda: Narrow(Bottleneck),
    "VGG-11": vgg,
    "MobileNetV2": lambda: MobileNetV2(num_classes=10, width_mult=0.25),
    "DenseNet": lambda: DenseNet(4, (2, 2), 8, num_classes=10),
    "ConvNeXt": convnext,
    "perceptron": perceptron,
}
IMAGES = torch.zeros(2, 3, 16, 16)


def trained(name):
    """A network with statistics and biases that are not those of a fresh one, without chance."""
    torch.manual_seed(0)
    model = NETWORKS[name]() if name in NETWORKS else VisionTransformer(16, 8, 1, 4, 32, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0
        for own, parameter in module.named_parameters(recurse=False):
            if own == "bias" or isinstance(module, nn.BatchNorm2d) or not parameter.any():
                nn.init.uniform_(parameter, 0.1, 1)
    return model.double()


def entries(tensor, name, coupling, dead):
    """The entries of a tensor that belong to no dead unit."""
    for dim in range(tensor.ndim):
        unit = coupling.members.get((name, dim))
        if unit is not None:
            tensor = tensor.index_select(dim, ((unit < 0) | ~dead[unit]).nonzero().flatten())
    return tensor


def masks(model, coupling, dead):
    found = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for (name, dim), unit in coupling.members.items():
        if name in found:
            found[name].movedim(dim, -1).mul_((unit < 0) | ~dead[unit])
    return found


def some(coupling, seed=0):
    """Units drawn at random, never all of a family."""
    dead = torch.rand(coupling.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    for family in range(int(coupling.families.max()) + 1):
        dead[(coupling.families == family).nonzero()[0]] = False
    return dead


def zero(model, coupling, dead):
    found = masks(model, coupling, dead)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= found[name]
    return found


def step(model, optimizer, held=None):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images), torch.arange(4)).backward()
    if held is not None:
        for name, parameter in model.named_parameters():
            parameter.grad *= held[name]
    optimizer.step()
    if held is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter *= held[name]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    # A bias before batch norm has a gradient of nothing but rounding.
    "Adam": lambda p: torch.optim.Adam(p, 0.01, eps=1e-4, amsgrad=True),
}


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")  # scales of ConvNeXt
@pytest.mark.parametrize("name", NETWORKS)
def test_units_are_those_of_torch_pruning(name):
    tp = pytest.importorskip("torch_pruning")
    model = NETWORKS[name]()
    graph = tp.DependencyGraph().build_dependency(model, IMAGES)
    coupling = find_coupling(model, IMAGES)
    names = {module: path for path, module in model.named_modules()}

    def theirs(layer, index):
        grouped = getattr(layer, "groups", 1) > 1
        prune_filters = tp.prune_conv_out_channels
        if isinstance(layer, nn.Linear):
            prune_filters = tp.prune_linear_out_channels
        elif grouped:
            prune_filters = tp.prune_depthwise_conv_out_channels
        for dependency, indices in graph.get_pruning_group(layer, prune_filters, idxs=[index]):
            module = dependency.target.module
            rows = graph.is_out_channel_pruning_fn(dependency.handler)
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for own, tensor in tensors.items() if module in names else ():
                read = not rows and tensor.ndim > 1
                if tensor.ndim and (rows or read or isinstance(module, nn.BatchNorm2d)):
                    for entry in indices:
                        yield f"{names[module]}.{own}", int(read), int(entry)

    for path, dim in coupling.writes:
        layer = model.get_submodule(path.removesuffix(".weight").removesuffix(".bias"))
        unit = coupling.members[path, dim]
        for index in {0, len(unit) // 2, len(unit) - 1}:
            ours = {
                (*place, entry)
                for place, units in coupling.members.items()
                for entry in (units == unit[index]).nonzero().flatten().tolist()
            }
            assert ours == set(theirs(layer, index))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ConvNeXt"])
def test_all_layers_lose_filters_but_the_last(name):
    model = NETWORKS[name]()
    coupling = find_coupling(model, IMAGES)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        assert (coupling.members[f"{layer}.weight", 0] >= 0).all()
    assert (f"{layers[-1]}.weight", 0) not in coupling.members
    assert (f"{layers[0]}.weight", 1) not in coupling.members


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [*NETWORKS, "ViT"])
def test_evaluates_and_trains_the_same_without_dead_channels(name, optimizer):
    model = trained(name)
    images = torch.randn(3, 3, 16, 16).double()
    own = OPTIMIZERS[optimizer](model.parameters())
    coupling = find_coupling(model, images)
    dead = some(coupling)
    held = zero(model, coupling, dead)
    step(model, own, held)
    dense, dense_own = copy.deepcopy((model, own))
    assert remove_channels(model, images, [own]) == dead.sum()
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(images), dense.eval()(images), rtol=1e-12, atol=1e-12
        )
    for _ in range(2):
        step(model, own)
        step(dense, dense_own, held)
    tensors = dict(dense.named_parameters()) | dict(dense.named_buffers())
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        expected = entries(tensors[path], path, coupling, dead)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-9)
    for path, parameter in model.named_parameters():
        for key, value in own.state[parameter].items():
            expected = dense_own.state[tensors[path]][key]
            if value.ndim:
                expected = entries(expected, path, coupling, dead)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())


def members(model, example):
    return {place: unit.tolist() for place, unit in find_coupling(model, example).members.items()}


class Model(nn.Module):
    """Layers, and code that calls them."""

    def __init__(self, code, **layers):
        super().__init__()
        self.code = code
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.code(self, x)


def test_a_sum_a_norm_a_scale_and_features_of_an_image():
    def code(m, x):
        x = m.a(x)
        return m.last(m.act(x + m.norm(m.b(x)) * m.scale).flatten(1))

    model = Model(
        code, a=nn.Conv2d(1, 3, 1), b=nn.Conv2d(3, 3, 1, bias=False), norm=nn.BatchNorm2d(3),
        act=nn.PReLU(3), scale=nn.Parameter(torch.ones(3, 1, 1)), last=nn.Linear(12, 2),
    )  # fmt: skip
    each = [0, 1, 2]
    assert members(model, torch.zeros(1, 1, 2, 2)) == {
        ("a.weight", 0): each, ("a.bias", 0): each, ("b.weight", 0): each, ("b.weight", 1): each,
        ("norm.weight", 0): each, ("norm.bias", 0): each,
        ("norm.running_mean", 0): each, ("norm.running_var", 0): each,
        ("scale", 0): each, ("act.weight", 0): each,
        ("last.weight", 1): [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    }  # fmt: skip
    coupling = find_coupling(model, torch.zeros(1, 1, 2, 2))
    assert coupling.writes == {("a.weight", 0), ("a.bias", 0), ("b.weight", 0)}
    assert coupling.families.tolist() == [0, 0, 0]
    assert coupling.units == 3


def test_groups_go_whole_and_transposed_convolutions_lie_the_other_way_round():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose2d(6, 2, 1),
        nn.Conv2d(2, 1, 1),
    )  # fmt: skip
    two, three = [0, 0, 1, 1], [0, 0, 0, 1, 1, 1]
    assert members(model, torch.zeros(1, 1, 2, 2)) == {
        ("0.weight", 0): two, ("0.bias", 0): two,
        ("1.weight", 0): three, ("1.bias", 0): three,
        ("2.weight", 0): three, ("2.weight", 1): [2, 3], ("2.bias", 0): [2, 3],
        ("3.weight", 1): [2, 3],
    }  # fmt: skip


def test_where_a_concatenation_is_added_to_something_every_part_is_a_family():
    def code(m, x):
        return m.last(torch.cat([m.a(x), m.b(x)], 1) + m.c(x))

    model = Model(
        code, a=nn.Linear(2, 2), b=nn.Linear(2, 3), c=nn.Linear(2, 5), last=nn.Linear(5, 1)
    )
    coupling = find_coupling(model, torch.zeros(1, 2))
    assert coupling.members["c.weight", 0].tolist() == [0, 1, 2, 3, 4]
    first, second = coupling.families[:2].unique(), coupling.families[2:].unique()
    assert len(first) == len(second) == 1 and first != second
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert remove_channels(model, torch.zeros(1, 2)) == 3
    assert [layer.out_features for layer in (model.a, model.b, model.c)] == [1, 1, 2]


def test_channels_with_inputs_of_the_model_beside_them_stay_apart():
    def code(m, x):
        return m.last(m.b(torch.cat([x, m.a(x)], 1)))

    model = Model(code, a=nn.Linear(2, 2), b=nn.Linear(4, 2), last=nn.Linear(2, 1))
    assert members(model, torch.zeros(1, 2))["b.weight", 1] == [-1, -1, 0, 1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.b.weight[0, :2] = 1  # of the inputs
        model.last.weight[0, 0] = 1
    assert remove_channels(model, torch.zeros(1, 2)) == 2
    assert model.b.weight.shape == (1, 3) and (model.b.out_features, model.b.in_features) == (1, 3)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.b(m.a(x).view(-1, 4)),
        lambda m, x: m.b(m.a(x).view((-1, 4))),
        lambda m, x: m.b(F.layer_norm(m.a(x), (4,))),
        lambda m, x: m.b(m.a(x).softmax(1)),
        lambda m, x: m.same(m.same(x)),
        lambda m, x: m.b(m.hooked(x)),
        lambda m, x: m.b(m.tied(x)),
        lambda m, x: (m.b(m.a(x)), m.a.weight),
        lambda m, x: [m.a(x), m.b(m.a(x))],
    ],
)
def test_what_is_not_understood_and_what_is_shared_stays(code):
    model = Model(
        code, a=nn.Linear(2, 4), b=nn.Linear(4, 2), hooked=nn.Linear(2, 4), tied=nn.Linear(2, 4),
        other=nn.Linear(2, 4), same=nn.Linear(2, 2),
    )  # fmt: skip
    model.other.weight = model.tied.weight
    model.hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"`model` .* channels that can be removed"):
        find_coupling(model, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"`model` .* channels that can be removed"):
        remove_channels(model, torch.zeros(3, 2))


@pytest.mark.parametrize("joined", [False, True])
def test_a_view_without_a_number_lets_channels_go(joined):
    def code(m, x):
        size = (x.size(0), -1)
        return m.b(m.a(x).view(size) if joined else m.a(x).view(*size))

    model = Model(code, a=nn.Linear(2, 4), b=nn.Linear(4, 2))
    assert members(model, torch.zeros(3, 2))["b.weight", 1] == [0, 1, 2, 3]


MODES = []


class Network(L.LightningModule):
    """Notes things while it runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout()
        )
        self.head = nn.Linear(6, 2)
        self.seen = None

    def forward(self, images):
        self.seen = images
        MODES.append((self.training, torch.is_grad_enabled()))
        self.noise = torch.rand(1)
        x = self.body(images) + torch.zeros(1)
        return self.head(x.mean((2, 3)))


def test_the_model_is_left_as_it_was(tmp_path):
    model = Network().train()
    model.body[1].eval()
    model.trainer = L.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    images = torch.randn(4, 3, 8, 8)
    model(images).sum().backward()
    model.seen = "before"
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    state, example = torch.get_rng_state(), images.clone()
    coupling = find_coupling(model, images)
    assert coupling.units == 6
    assert coupling.members.keys() <= {(name, dim) for name in tensors for dim in range(4)}
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, example)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.seen == "before" and model.training and not model.body[1].training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is tensors[name] and torch.equal(tensor, values[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
    assert torch.is_grad_enabled()
    assert set(MODES[1:]) == {(False, False)}


def test_a_compiled_model_is_the_model_it_wraps():
    model = perceptron()
    compiled = torch.compile(model, backend="eager")
    assert members(compiled, IMAGES) == members(model, IMAGES)
    with torch.no_grad():
        for parameter in model[1:4:2].parameters():
            parameter.zero_()
        model[5].weight.zero_()
    assert remove_channels(compiled, IMAGES) == 62
    assert model[3].weight.shape == (1, 1) and compiled(IMAGES).shape == (2, 10)


def compiled_within(model):
    model[1] = torch.compile(model[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, checkpoint_wrapper, compiled_within]
)
def test_wrappers_are_the_models_they_wrap(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0], model[2].weight[:, 0] = 0, 0, 0
    model = wrap(model)
    expected = model(PIXELS)
    assert sum(p.numel() for p in shrink(model, PIXELS).parameters()) == 2 * 4 + 2 + 2 * 2 + 2
    assert remove_channels(model, PIXELS) == 1
    torch.testing.assert_close(model(PIXELS), expected)


def test_training_goes_on_in_a_trainer(trainer):
    class Removing(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                with torch.no_grad():
                    for entries in (
                        module.body.weight[10:], module.body.bias[10:], module.head.weight[:, 10:]
                    ):  # fmt: skip
                        entries.zero_()
                remove_channels(module, torch.zeros(1, 20), trainer.optimizers)

    model = TwoLayers()
    fit = trainer(Removing())
    fit.fit(model, Points())
    assert model.body.weight.shape == (10, 20) and model.head.weight.shape == (2, 10)
    assert fit.callback_metrics["val_accuracy"] > 0.9
    (optimizer,) = fit.optimizers
    momentum = optimizer.state[model.body.weight]["momentum_buffer"]
    assert momentum.shape == (10, 20) and momentum.any()


def two_layers(*, dead=(1,)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for entries in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            nn.init.uniform_(entries, 0.1, 1)
            entries[list(dead)] = 0
        model[3].weight[:, list(dead)] = 0
    model[1].running_mean.uniform_()
    return model


PIXELS = torch.ones(1, 1, 2, 2)


@pytest.mark.parametrize("alive", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"])
def test_a_channel_stays_if_any_of_its_weights_does(alive):
    model = two_layers(dead=(1, 2))
    with torch.no_grad():
        tensor = model.get_parameter(alive)
        (tensor[1] if tensor.shape[0] == 4 else tensor[1, 1]).fill_(torch.nan)
        tensor = tensor if tensor.shape[0] == 4 else tensor[1]
        tensor[1] = 1e-30
    assert remove_channels(model, PIXELS) == 1
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (3, 3, 3)
    assert model[1].running_mean.shape == model[1].running_var.shape == (3,)


def test_where_nothing_is_dead_all_stays_the_same():
    model = two_layers(dead=())
    before = list(model.parameters())
    assert remove_channels(model, PIXELS) == 0
    assert all(now is parameter for now, parameter in zip(model.parameters(), before, strict=True))


def test_sizes_of_layers_with_groups_and_of_transposed_ones():
    model = nn.Sequential(
        nn.Conv1d(1, 4, 1), nn.PReLU(4), nn.Conv1d(4, 6, 1, groups=2), nn.ConvTranspose1d(6, 3, 1),
        nn.Conv1d(3, 1, 1),
    )  # fmt: skip
    x = torch.randn(2, 1, 5)
    coupling = find_coupling(model, x)
    dead = torch.tensor([True, False, False, True, False])
    zero(model, coupling, dead)
    model[1].weight.data.fill_(0.5)  # of channels that are gone it does not matter
    expected = model(x)
    assert remove_channels(model, x) == 2
    assert str(model).splitlines()[1:-1] == [
        "  (0): Conv1d(1, 2, kernel_size=(1,), stride=(1,))",
        "  (1): PReLU(num_parameters=2)",
        "  (2): Conv1d(2, 3, kernel_size=(1,), stride=(1,))",
        "  (3): ConvTranspose1d(3, 2, kernel_size=(1,), stride=(1,))",
        "  (4): Conv1d(2, 1, kernel_size=(1,), stride=(1,))",
    ]
    torch.testing.assert_close(model(x), expected)


def test_gradients_flags_layouts_and_groups_of_optimizers_come_along():
    model = two_layers().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    groups = [{"params": [model[3].bias, model[3].weight], "lr": 0.5}, {"params": model[1].weight}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    other = torch.optim.Adagrad([model[0].bias, model[1].bias], 0.2)
    model(PIXELS).sum().backward()
    kept, gradient = [0, 2, 3], model[3].weight.grad.clone()
    before = dict(model.named_parameters())
    order = list(before)
    optimizer.step()
    other.step()
    with torch.no_grad():
        for entries in (model[0].bias, model[1].weight, model[1].bias):
            entries[1] = 0
        model[3].weight[:, 1] = 0
    assert remove_channels(model, PIXELS, [optimizer, other]) == 1
    assert [name for name, _ in model.named_parameters()] == order
    assert torch.equal(model[3].weight.grad, gradient[:, kept])
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[0].weight.grad is None
    assert all(p is before[name] for name, p in model.named_parameters())
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(model[3].bias), id(model[3].weight)]
    assert [id(p) for p in second["params"]] == [id(model[1].weight)]
    assert (first["lr"], second["lr"]) == (0.5, 0.1)
    assert len(optimizer.state) == 3 and len(other.state) == 2
    assert other.state[model[1].bias]["sum"].shape == (3,)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_optimizers_that_are_not_named_go_on_to_train_the_model():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(torch.randn(5, 4)).sum()  # its graph is alive while shapes change
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3], model[2].weight[:, :3] = 0, 0, 0
    assert remove_channels(model, torch.zeros(1, 4)) == 3
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert loss.requires_grad


def test_weights_stay_in_the_memory_layout_they_have():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 6, 3)).to(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3], model[1].weight[:, :3] = 0, 0, 0
    assert remove_channels(model, torch.zeros(1, 2, 8, 8)) == 3
    for layer in model:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()


def test_factored_states_lose_entries_along_the_dimensions_they_have():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[2].weight[:, 1] = 0, 0, 0
    assert remove_channels(model, torch.ones(1, 3), [optimizer]) == 1
    rows, columns = optimizer.state[model[0].weight], optimizer.state[model[2].weight]
    kept = [0, 2, 3]
    assert torch.equal(rows["row_var"], before["0.weight"]["row_var"][kept])
    assert torch.equal(rows["col_var"], before["0.weight"]["col_var"])
    assert torch.equal(columns["col_var"], before["2.weight"]["col_var"][:, kept])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def everything(model, *optimizers):
    """All there is to a model, by identity, and the state of optimizers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(tensor), tensor.clone().tolist()) for name, tensor in tensors],
        [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()],
        [[[id(p) for p in g["params"]] for g in o.param_groups] for o in optimizers],
        [{id(p): {k: id(v) for k, v in s.items()} for p, s in o.state.items()} for o in optimizers],
        [None if p.grad is None else id(p.grad) for p in model.parameters()],
    )


def number_in_the_code(m, x):
    return m.last(m.body(x)) / m.body[0].out_channels


def number_in_a_condition(m, x):
    if m.body[0].out_channels != 4:
        raise AssertionError("four channels are expected")
    return m.last(m.body(x))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (number_in_the_code, "got a relative difference of"),
        (number_in_a_condition, "AssertionError: four channels are expected; .*take numbers"),
    ],
)
def test_a_model_that_does_not_run_with_less_is_put_back(code, message):
    layers = two_layers()
    model = Model(code, body=layers[:3], last=layers[3])
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 1, 2, 2)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter, mask in zip(model.parameters(), two_layers().parameters(), strict=True):
            parameter *= mask != 0
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=f"`model` .*{message}"):
        remove_channels(model, PIXELS, [optimizer])
    assert everything(model, optimizer) == before


class Joined(torch.optim.SGD):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["blocks"] = [torch.zeros(parameter.numel())]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "for each parameter, got LBFGS; leave it out"),
        (Joined, "got another shape for 'blocks' of 0.weight in Joined; create a new"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused_before_anything_changes(optimizer, message):
    model = two_layers()
    fine = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    refused = optimizer(model.parameters(), 0.0)
    model(PIXELS).sum().backward()
    fine.step()
    refused.step(lambda: model(PIXELS).sum())
    before = everything(model, fine, refused)
    with pytest.raises(ValueError, match=f"`optimizers` .*{message}"):
        remove_channels(model, PIXELS, [fine, refused])
    assert everything(model, fine, refused) == before


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(kind):
    model = two_layers()
    handle = getattr(model[0].bias, kind)(lambda _: None)
    before = everything(model)
    with pytest.raises(ValueError, match=r"`model` .* got hooks on 0\.bias; remove masks"):
        remove_channels(model, PIXELS)
    assert everything(model) == before
    handle.remove()
    assert remove_channels(model, PIXELS) == 1


def test_masks_are_refused():
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"`model` .* got masks on 0\.weight; .*fold_model"):
        find_coupling(model, PIXELS)


def test_what_cannot_be_traced_is_refused_and_left_as_it_was():
    model = Model(lambda m, x: x if x.sum() > 0 else -x, a=nn.Linear(1, 1)).train()
    with pytest.raises(ValueError, match=r"`model` .* while tracing Model: .*control flow"):
        find_coupling(model, torch.ones(1, 4))
    assert model.training and model.a.training


class Listed(nn.Module):
    """Its layers have two names each, as in U-Nets on a backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(1, 4, 1), "norm": nn.BatchNorm2d(4)})
        self.encoder = nn.Sequential(self.backbone["stem"], self.backbone["norm"], nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)
        self.last = self.head

    def forward(self, x):
        return self.last(self.encoder(x))


def test_a_layer_under_two_names_goes_by_the_first():
    model = Listed()
    each = [0, 1, 2, 3]
    assert members(model, PIXELS) == {
        ("backbone.stem.weight", 0): each, ("backbone.stem.bias", 0): each,
        ("backbone.norm.weight", 0): each, ("backbone.norm.bias", 0): each,
        ("backbone.norm.running_mean", 0): each, ("backbone.norm.running_var", 0): each,
        ("head.weight", 1): each,
    }  # fmt: skip
    with torch.no_grad():
        for entries in (*model.encoder[0].parameters(), *model.encoder[1].parameters()):
            entries[1] = 0
        model.head.weight[:, 1] = 0
    expected = model.eval()(PIXELS)
    assert remove_channels(model, PIXELS) == 1
    assert model.encoder[0] is model.backbone["stem"] and model.encoder[0].out_channels == 3
    torch.testing.assert_close(model(PIXELS), expected)


@pytest.mark.parametrize(
    ("squeeze", "prunable"),
    [(lambda x: x.squeeze(), 3), (lambda x: x.squeeze((2, 3)), 4), (torch.squeeze, 3)],
)
def test_where_one_channel_would_be_squeezed_two_stay(squeeze, prunable):
    def code(m, x):
        return m.b(squeeze(m.a(x).mean((2, 3), keepdim=True)))

    model = Model(code, a=nn.Conv2d(1, 4, 1), b=nn.Linear(4, 2))
    images = torch.ones(2, 1, 2, 2)
    assert find_coupling(model, images).units == prunable
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert remove_channels(model, images) == prunable - 1
    assert model(images).shape == model(images[:1]).reshape(1, 2).expand(2, 2).shape


def test_what_is_written_under_another_name_is_not_dead():
    def code(m, x):
        skip = h = m.a(x)
        h += m.b(x)
        return m.last(skip)

    model = Model(code, a=nn.Linear(2, 3), b=nn.Linear(2, 3), last=nn.Linear(3, 1))
    each = [0, 1, 2]
    coupling = find_coupling(model, torch.zeros(1, 2))
    assert {name for name, _ in coupling.writes} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert all(unit.tolist() == each for unit in coupling.members.values())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, "while tracing Model: "),
        (lambda m, x: m.a(x.new_zeros(len(list(x)), 4)), "while tracing Model: "),
        (lambda m, x: m.a(fails(x)), "while running the traced graph of Model: only once"),
    ],
)
def test_all_that_tracing_raises_names_the_model_and_a_remedy(code, message):
    model = Model(code, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"`model` .* {message}.*torch\.fx\.wrap"):
        find_coupling(model, torch.ones(1, 4))


@fx.wrap
def fails(x):
    raise ValueError("only once\nand for all")
