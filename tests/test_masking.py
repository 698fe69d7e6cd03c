"""One conformance suite for both ways to hold masks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruneflow import InPlace, MaskSet, Pruner, Reparametrize, magnitude, sparsity
from pruneflow.masks import compute_masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-1),
}
both = pytest.mark.parametrize("masking", [InPlace, Reparametrize])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def step(model, optimizer, seed, clip=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 1, 6, 6, generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.arange(16) % 3).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None
    optimizer.step()
    return norm


def masks_of(model, target, masks=None):
    tensors = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }
    return compute_masks(tensors, target, importance=magnitude, masks=masks)


def weights(model):
    return [layer.weight for layer in model if hasattr(layer, "weight")]


@both
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_same_trajectory_as_torch_prune_and_zeros_after_every_step(masking, optimizer, clip):
    ours, theirs = network(), network()
    our_optimizer = OPTIMIZERS[optimizer](ours.parameters())
    their_optimizer = OPTIMIZERS[optimizer](theirs.parameters())
    for seed in range(3):  # momentum exists before the first prune
        step(ours, our_optimizer, seed)
        step(theirs, their_optimizer, seed)
    held = masking()
    first = masks_of(ours, 0.5)
    second = masks_of(ours, 0.8, masks=first)
    held.attach(ours, first, [our_optimizer])
    for round, masks in enumerate((first, second)):
        held.update(masks)
        for index, name in ((0, "0.weight"), (3, "3.weight"), (5, "5.weight")):
            prune.custom_from_mask(theirs[index], "weight", masks[name])
        for seed in range(5):
            our_norm = step(ours, our_optimizer, 10 * round + seed, clip)
            their_norm = step(theirs, their_optimizer, 10 * round + seed, clip)
            if clip:  # torch's parameters() are reordered, so its norm sums in another order
                torch.testing.assert_close(our_norm, their_norm)
            for name, mask in masks.items():
                layer = ours.get_submodule(name.rpartition(".")[0])
                assert int((layer.weight[~mask] != 0).sum()) == 0
    held.remove()
    theirs(torch.zeros(1, 1, 6, 6))  # refresh torch's stale `weight` attributes
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        if clip:
            torch.testing.assert_close(mine, other.detach())
        else:
            assert torch.equal(mine, other.detach())


@both
def test_pruned_weights_are_positive_zero(masking):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = masking()
    held.attach(model, masks_of(model, 0.7), [optimizer])
    for seed in range(4):
        step(model, optimizer, seed)
    held.remove()
    for weight in weights(model):
        assert not torch.signbit(weight[weight == 0]).any()


@both
def test_remove_restores_plain_parameters_in_their_order(masking):
    model = network()
    dense_keys = list(model.state_dict())
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held = masking()
    held.attach(model, masks_of(model, 0.6), [optimizer])
    step(model, optimizer, 0)
    held.remove()
    assert [name for name, _ in model.named_parameters()] == dense_keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not list(model.buffers())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_post_hooks
    assert len(held.masks) == 0
    assert sparsity(model) == pytest.approx(0.6, abs=1e-3)


@both
def test_state_dict_is_the_dense_models_throughout(masking):
    model, plain = network(), network()
    held = masking()
    held.attach(model, masks_of(model, 0.5), [])
    state = model.state_dict()
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    assert sparsity(plain) == pytest.approx(0.5, abs=1e-3)
    model.load_state_dict(state, strict=True)
    images = torch.ones(1, 1, 6, 6)
    assert torch.equal(model(images), plain(images))


@both
def test_one_mask_is_alive_however_many_rounds(masking):
    model = network()
    held = masking()
    masks = masks_of(model, 0.1)
    held.attach(model, masks, [])
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    buffers = len(list(model.buffers()))
    for target in (0.2, 0.5, 0.9):
        masks = masks_of_live(model, target, held.masks)
        held.update(masks)
        assert all(torch.equal(held.masks[name], masks[name]) for name in masks)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert len(list(model.buffers())) == buffers


def masks_of_live(model, target, masks):
    tensors = {name: model.state_dict()[name] for name in masks}
    return compute_masks(tensors, target, importance=magnitude, masks=masks)


@both
def test_a_gradient_that_waits_is_masked_too(masking):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    nn.functional.cross_entropy(model(torch.ones(2, 1, 6, 6)), torch.tensor([0, 1])).backward()
    held = masking()
    masks = masks_of(model, 0.9)
    held.attach(model, masks, [optimizer])
    optimizer.step()
    for name, mask in masks.items():
        assert int((model.state_dict()[name][~mask] != 0).sum()) == 0


def test_in_place_zeros_survive_an_optimizer_with_one_state_for_all():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    pruner = Pruner(model, optimizers=[optimizer])
    images = torch.randn(16, 1, 6, 6)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), torch.arange(16) % 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    pruner.prune_to(0.8)
    for _ in range(3):
        optimizer.step(closure)
        assert sparsity(model) == pytest.approx(0.8, abs=1e-3)


class NoisySGD(torch.optim.SGD):
    """Langevin dynamics: each step moves every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def test_in_place_zeros_survive_an_optimizer_that_moves_every_weight():
    model = network()
    optimizer = NoisySGD(model.parameters(), lr=0.05)
    Pruner(model, optimizers=[optimizer]).prune_to(0.8)
    for seed in range(3):
        step(model, optimizer, seed)
        assert sparsity(model) == pytest.approx(0.8, abs=1e-3)


def test_in_place_clears_what_is_not_a_number():
    layer = nn.Linear(2, 1, bias=False)
    held = InPlace()
    held.attach(layer, MaskSet({"weight": torch.tensor([[True, False]])}), [])
    (layer.weight * torch.tensor([[1.0, float("nan")]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_in_place_any_dtype_and_memory_format(dtype):
    layer = nn.Conv2d(3, 4, 3).to(dtype=dtype, memory_format=torch.channels_last)
    mask = torch.rand(4, 3, 3, 3) < 0.5
    before = layer.weight.detach().clone()
    held = InPlace()
    held.attach(layer, MaskSet({"weight": mask}), [])
    assert torch.equal(layer.weight.detach(), torch.where(mask, before, 0))
    assert torch.equal(held.masks["weight"], mask)


def test_in_place_holds_one_byte_a_weight():
    model = network()
    held = InPlace()
    held.attach(model, masks_of(model, 0.5), [])
    sizes = {
        id(value): value.numel() * value.element_size()
        for _, bits in held._held.values()
        for value in (bits,)
    }
    assert sum(sizes.values()) == sum(weight.numel() for weight in weights(model))


def test_in_place_supports_deepcopy_and_tied_weights():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizers=[optimizer])
    pruner.prune_to(0.5)
    model["b"](model["a"](torch.randn(8, 4))).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    assert int((twin["b"].weight == 0).sum()) == 8


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (nn.MultiheadAttention(4, 2), "out_proj.weight", "MultiheadAttention"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "bias",
            "its module is parametrized",
        ),
        (prune.identity(nn.Linear(2, 2), "weight"), "weight", "already holds it"),
    ],
)
def test_reparametrize_refuses_by_name(model, name, why):
    from pruneflow.parameters import locate

    shape = locate(model)[name].parameter.shape
    with pytest.raises(ValueError, match=rf"{name} \(.*{why}.*use masking=InPlace"):
        Reparametrize().attach(model, MaskSet({name: torch.ones(shape, dtype=torch.bool)}), [])


def test_in_place_refuses_sparse_gradients_by_name():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    with pytest.raises(ValueError, match=r"those of 0\.weight are sparse"):
        InPlace().attach(model, MaskSet({"0.weight": torch.ones(4, 2, dtype=torch.bool)}), [])


def test_reparametrize_refuses_tied_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight \(tied to 1\.weight\)"):
        Reparametrize().attach(model, MaskSet({"0.weight": torch.ones(3, 3, dtype=torch.bool)}), [])


def test_reparametrize_is_what_torch_prune_code_expects():
    model = network()
    held = Reparametrize()
    held.attach(model, masks_of(model, 0.5), [])
    assert prune.is_pruned(model)
    assert torch.equal(model[3].weight, model[3].weight_orig * model[3].weight_mask)
