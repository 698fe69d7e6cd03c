"""What people report of pruning tools, rebuilt small: one row a kind, with the right value."""

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unusual import Conv1D, Lora

from pruneflow import (
    NM,
    Channels,
    Compounding,
    InPlace,
    Pruner,
    PruningCallback,
    Random,
    Reparametrize,
    SparsityCheckpoint,
    compute_masks,
    magnitude,
    multiply_adds,
    remove_channels,
    sparsity,
    sparsity_report,
)
from pruneflow.deploy import load_packed, save_packed, shrink, sparse_compile


class Task(L.LightningModule):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*(layers or (nn.Linear(20, 2),)))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class ValidatedTask(Task):
    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def points():
    data = TensorDataset(torch.randn(64, 20), torch.randint(2, (64,)))
    return DataLoader(data, batch_size=16)


def test_layers_of_unknown_types_are_named_and_can_be_included():
    net = nn.Sequential(Conv1D(64, 256), nn.GELU(), Conv1D(256, 64), nn.Linear(64, 2))
    with pytest.warns(UserWarning, match=r"0\.weight \(\d+\.\d%\), 2\.weight \("):
        Pruner(net, optimizers=[])
    pruner = Pruner(net, include=[nn.Linear, Conv1D], optimizers=[])
    masks = pruner.prune_to(0.5)
    assert list(masks) == ["0.weight", "2.weight", "3.weight"]
    assert sparsity(net, include=["*.weight"]) == 0.5


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.b(self.a(x) * self.gamma)


def test_scales_of_one_dimension_go_along_with_their_channels():
    net, x = LayerScale().eval(), torch.randn(2, 4)
    pruner = Pruner(net, granularity=Channels(x), optimizers=[])
    pruner.prune_to(0.5)
    pruner.remove()
    small = shrink(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.convs = nn.ModuleList([self.c1, self.c2])

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))


def test_a_layer_of_two_names_is_one_layer():
    net, x = TwoNames().eval(), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        net.c1.weight[8:], net.c1.bias[8:] = 0, 0
    small = shrink(net, x)
    assert sum(p.numel() for p in small.parameters()) == 8 * 27 + 8 + 32 * 72 + 32
    report = sparsity_report(net, x)
    assert report.multiply_adds == 36 * (32 * 27 + 32 * 32 * 9)
    assert report.remaining_multiply_adds == 36 * (8 * 27 + 32 * 32 * 9)
    assert multiply_adds(net, x) == {"c1.weight": 36.0, "c2.weight": 36.0}
    assert Pruner(net, granularity=Channels(x), optimizers=[]).prune_to(0.3).pruned


class Accelerated(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_wrapped_optimizers_are_followed():
    net = nn.Linear(4, 4)
    optimizer = Accelerated(torch.optim.SGD(net.parameters(), 0.1))
    Pruner(net, optimizers=[optimizer]).prune_to(0.5)
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert sparsity(net) == 0.5


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_steps_within_the_backward_pass(first):
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in net.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    def prune():
        Pruner(net, optimizers=list(optimizers.values())).prune_to(0.5)

    def hook():
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    for action in (hook, prune) if first == "theirs" else (prune, hook):
        action()
    net(torch.randn(2, 4)).square().sum().backward()
    assert sparsity(net) == 0.5


def test_what_starts_at_zero_is_not_held_there():
    net, x = Lora(), torch.randn(64, 32)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    with pytest.warns(UserWarning, match=r"up\.weight are zero throughout"):
        Pruner(net, optimizers=[optimizer]).hold_zeros()
    net(x).square().mean().backward()
    optimizer.step()
    assert net.up.weight.any()
    with pytest.warns(UserWarning, match=r"nothing is left of up\.weight"):
        Pruner(Lora(), optimizers=[]).prune_to(0.5)


@pytest.mark.parametrize("masking", [InPlace, Reparametrize])
def test_weights_that_are_loaded_are_masked(masking):
    net = nn.Linear(100, 100)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    Pruner(net, optimizers=[optimizer], masking=masking()).prune_to(0.8)
    net.load_state_dict(first)
    assert sparsity(net) == 0.8


class NewLayer(L.Callback):
    def on_train_epoch_start(self, trainer, task):
        if trainer.current_epoch == 1:
            task.net[2] = nn.Linear(32, 32)
            trainer.optimizers[0].add_param_group({"params": list(task.net[2].parameters())})


def test_a_layer_that_is_replaced_is_pruned(trainer):
    task = Task(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    pruning = PruningCallback(Compounding(target=0.8, rounds=4))
    trainer(pruning, NewLayer(), max_epochs=5).fit(task, points())
    assert pruning.sparsity == sparsity(task) == pytest.approx(0.8, abs=1e-3)


def test_tensors_in_one_memory_are_refused():
    net = nn.ModuleDict({"e": nn.Linear(20, 40), "d": nn.Linear(40, 20)})
    net["d"].weight = nn.Parameter(net["e"].weight.data.t())
    with pytest.raises(ValueError, match=r"share memory, got e\.weight and d\.weight"):
        Pruner(net, importance=Random(0), optimizers=[])


def test_rewinding_takes_groups_that_come_later(trainer):
    task = Task(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))
    task.backbone = task.net[0]
    pruning = PruningCallback(
        Compounding(target=0.8, rounds=2), start_epoch=2, rewind="learning_rate"
    )
    finetuning = BackboneFinetuning(1, lambda _: 1.0, backbone_initial_lr=0.01)
    trainer(finetuning, pruning).fit(task, points())
    assert sparsity(task) == pytest.approx(0.8, abs=1e-3)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_weights_that_are_standardised_are_refused():
    with pytest.raises(ValueError, match=r"weight \(Standardised\)"):
        Pruner(Standardised(16, 16, 3), optimizers=[])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, y):
        return self.b((self.a(x) + self.a(y)).relu())


def test_several_inputs_work_or_are_refused_by_name():
    net, x = TwoInputs().eval(), torch.randn(2, 4)
    torch.testing.assert_close(shrink(net, (x, x))(x, x), net(x, x))
    assert sparsity_report(net, (x, x)).multiply_adds == 2 * (2 * 32 + 16)
    assert multiply_adds(net, (x, x)) == {"a.weight": 4.0, "b.weight": 2.0}
    with pytest.raises(ValueError, match="`example_input`"):
        sparse_compile(net, (x, x))


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(nn.functional.adaptive_avg_pool2d(self.a(x), 1).squeeze())


def test_squeeze_with_one_channel_left():
    net, x = Squeezed().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        net.a.weight[1:], net.a.bias[1:] = 0, 0
    torch.testing.assert_close(shrink(net, x)(x), net(x))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 2)

    def forward(self, index):
        return self.head(nn.functional.embedding(index, self.table, sparse=True))


def test_sparse_gradients_and_complex_weights():
    net = Table()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    masks = Pruner(net, include=["table"], optimizers=[optimizer]).prune_to(0.5)
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert torch.equal(net.table != 0, masks["table"])
    waves = nn.Linear(4, 4, dtype=torch.complex64)
    assert Pruner(waves, include=["weight"], optimizers=[]).prune_to(0.5).pruned == 8


def test_optimizers_go_on_after_channels_are_removed():
    net, x = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), torch.zeros(1, 20)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, granularity=Channels(x), optimizers=[optimizer])
    pruner.prune_to(0.5)
    pruner.remove()
    assert remove_channels(net, x)
    before = net[0].weight.detach().clone()
    net(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_a_network_that_has_become_constant_is_named():
    net = nn.Sequential(
        nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2)
    )
    net[2].weight.data *= 0.01
    with pytest.warns(UserWarning, match=r"nothing is left of 2\.weight, 4\.weight"):
        Pruner(net, optimizers=[]).prune_to(0.98)


@pytest.mark.parametrize("masking", [InPlace, Reparametrize])
def test_the_order_of_adversarial_training(masking):
    g = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 20))
    d = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))
    og, od = torch.optim.Adam(g.parameters(), 0.01), torch.optim.Adam(d.parameters(), 0.01)
    both = nn.ModuleList([g, d])
    Pruner(both, optimizers=[og, od], masking=masking()).prune_to(0.5)
    for _ in range(3):
        fake = g(torch.randn(32, 8))
        od.zero_grad()
        (d(fake.detach()).mean() - d(torch.randn(32, 20)).mean()).backward()
        od.step()
        og.zero_grad()
        (-d(fake).mean()).backward()
        og.step()
    assert sparsity(both) == 0.5


def test_a_last_round_that_is_never_validated_is_named(trainer, tmp_path):
    best = SparsityCheckpoint(monitor="accuracy", mode="max", dirpath=tmp_path)
    pruning = PruningCallback([0.2, 0.4, 0.6, 0.8], start_epoch=1)
    fit = trainer(pruning, best, max_epochs=5, check_val_every_n_epoch=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="check_val_every_n_epoch"):
        fit.fit(ValidatedTask(), points(), points())
    assert best.best_model_path == ""


class Lazy(nn.Linear):
    """As transformers does: hooks are put on at the first forward pass, a flag says so."""

    ready = False

    def forward(self, x):
        if not self.ready:
            self.register_forward_hook(lambda module, args, output: self.seen.append(1))
            self.ready = True
        return super().forward(x)


def test_measuring_leaves_hooks_as_they_were():
    net, x = Lazy(4, 4), torch.ones(1, 4)
    net.seen = []
    sparsity_report(net, x)
    multiply_adds(net, x)
    net(x)
    net.seen.clear()
    net(x)
    assert net.seen == [1]


def test_packed_files_keep_the_versions_of_modules(tmp_path):
    net = torchvision.models.mnasnet0_5(weights=None)
    save_packed(net.state_dict(), tmp_path / "m.packed")
    twin = torchvision.models.mnasnet0_5(weights=None)
    twin.load_state_dict(load_packed(tmp_path / "m.packed"))
    assert torch.equal(twin.layers[0].weight, net.layers[0].weight)


def test_transformers_of_videos_are_pruned_or_refused_by_name():
    net = torchvision.models.video.SwinTransformer3d(
        [2, 4, 4],
        embed_dim=24,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=[2, 7, 7],
        num_classes=5,
    ).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    pruner = Pruner(net, granularity=Channels(x), optimizers=[])
    pruner.prune_to(0.1)
    pruner.remove()
    torch.testing.assert_close(shrink(net, x)(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`model` .* the sparse runtime .* use `shrink`"):
        sparse_compile(net, x)


@pytest.mark.parametrize(
    "schedule",
    [
        list(np.linspace(0.3, 0.9, 4)),
        lambda round: 1 - np.exp(-0.3 * round),
        Compounding(target=np.float64(0.9), rounds=3),
    ],
)
def test_numbers_of_numpy_leave_checkpoints_readable(trainer, tmp_path, schedule):
    fit = trainer(PruningCallback(schedule), max_epochs=4)
    fit.fit(Task(), points())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]


def test_n_of_m_brings_nothing_back():
    weights = {"w": torch.randn(32, 64)}
    before = {"w": (torch.randperm(2048) >= 1000).view(32, 64)}
    after = compute_masks(weights, 0.5, importance=magnitude, granularity=NM(2, 4), masks=before)
    assert not (after["w"] & ~before["w"]).any()


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.head = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x):
        skip = h = self.a(x)
        h += self.b(x)  # skip sees the sum
        return self.head(skip)


def test_what_is_written_in_place_is_seen_under_every_name():
    net, x = AddsInPlace().eval(), torch.randn(2, 3, 8, 8)
    net.a.weight.data[:3] = 0
    small = shrink(net, torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(small(x), net(x))
