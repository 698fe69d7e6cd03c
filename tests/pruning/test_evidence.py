"""What is collected for scores, and that nothing is left behind."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruneflow import InPlace, Pruner, gradients, input_norms, taylor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.calls = []

    def forward(self, images):
        self.calls.append(len(images))
        return self.head(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))


def by_input_norms(name, tensor, context):
    return tensor.abs() * context.evidence[name]


by_input_norms.needs = input_norms


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, 3, 6, 6, generator=generator)
    return [(each, torch.arange(8) % 2) for each in images]


both = pytest.mark.parametrize("evidence", [gradients, input_norms])


@both
def test_leaves_everything_as_it_was(evidence):
    model = Net().train()
    model.eval().norm.train()
    loss(model, batches()[0]).backward()
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    calls, hooks = list(model.calls), [len(m._forward_pre_hooks) for m in model.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert evidence(model, batches(), loss)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.calls == calls
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@both
def test_a_loss_that_fails_leaves_everything_as_it_was(evidence):
    model = Net()
    before = copy.deepcopy(model.state_dict())

    def failing(module, batch):
        loss(module, batch)
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        evidence(model, batches(), failing)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@both
def test_a_shuffled_loader_gives_the_training_the_batches_it_would_have_had(evidence):
    data = TensorDataset(torch.randn(32, 3, 6, 6), torch.arange(32) % 2)
    loader = DataLoader(data, 8, shuffle=True)
    model = Net()
    torch.manual_seed(3)
    expected = [labels for _, labels in loader]
    torch.manual_seed(3)
    evidence(model, loader, loss)
    assert all(torch.equal(a, b) for a, (_, b) in zip(expected, loader, strict=True))


def test_gradients_are_the_mean_of_those_of_autograd():
    model = Net().eval()
    found = gradients(model, batches(), loss)
    total = sum(loss(model, batch) for batch in batches()) / 3
    for (name, parameter), each in zip(
        model.named_parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], each, msg=name)
        assert parameter.grad is None


def test_gradients_do_not_reach_what_is_pruned():
    model = Net().eval()
    pruner = Pruner(model, importance=taylor, masking=InPlace(), optimizers=[])
    masks = pruner.prune_to(0.5, evidence=gradients(model, batches(), loss))
    again = gradients(model, batches(), loss)
    assert all((again[name][~mask] == 0).all() for name, mask in masks.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_input_norms_in_any_precision(dtype):
    layer = nn.Linear(3, 2).to(dtype)
    inputs = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]], dtype=dtype)
    found = input_norms(layer, [inputs[:1], inputs[1:]], lambda model, x: model(x).mean())
    assert found["weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found["weight"], torch.tensor([[5.0, 2**0.5, 0.0]]), check_dtype=False
    )


def test_input_norms_of_tied_weights_and_repeated_layers_add_up():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            nn.init.eye_(self.first.weight)

        def forward(self, inputs):
            return self.second(input=self.first(self.first(inputs)))

    found = input_norms(Tied(), [torch.tensor([[1.0, 2.0]])], lambda model, x: model(x).mean())
    torch.testing.assert_close(found, {"first.weight": torch.tensor([[3**0.5, 12**0.5]])})


def test_input_norms_know_linear_layers_and_convolutions_of_all_dimensions():
    model = nn.ModuleDict(
        {
            "one": nn.Conv1d(2, 2, 3),
            "three": nn.Conv3d(1, 2, 2),
            "up": nn.ConvTranspose1d(2, 2, 3),
        }
    )

    def forward(model, batch):
        cube = batch[:, None, :, :, None].expand(-1, -1, -1, -1, 2)
        return model["one"](batch).mean() + model["three"](cube).mean() + model["up"](batch).mean()

    found = input_norms(model, [torch.randn(4, 2, 5)], forward)
    assert {name: tuple(norms.shape) for name, norms in found.items()} == {
        "one.weight": (1, 2, 3),
        "three.weight": (1, 1, 2, 2, 2),
    }
    with pytest.raises(ValueError, match=r"got none for up\.weight"):
        Pruner(model, importance=by_input_norms, optimizers=[]).prune_to(0.5, evidence=found)


@both
def test_bad_input(evidence):
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        evidence(Net(), [], loss)


@pytest.mark.parametrize(
    ("value", "came"), [(1.0, "1.0"), (torch.ones(2, requires_grad=True), "tensor")]
)
def test_gradients_of_no_scalar(value, came):
    with pytest.raises(ValueError, match=rf"`loss` must return a scalar .* got {came}"):
        gradients(Net(), batches(), lambda model, batch: value)
