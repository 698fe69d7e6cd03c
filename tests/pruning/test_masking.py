"""One conformance suite for both ways to hold masks."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruneflow import InPlace, MaskSet, Pruner, Reparametrize, magnitude, sparsity
from pruneflow.pruning.selection import compute_masks

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
        for bits in held.raw_masks.values()
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
    from pruneflow.structure.parameters import locate

    shape = locate(model)[name].parameter.shape
    with pytest.raises(ValueError, match=rf"{name} \(.*{why}.*use masking=InPlace"):
        Reparametrize().attach(model, MaskSet({name: torch.ones(shape, dtype=torch.bool)}), [])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_in_place_holds_tensors_with_sparse_gradients(optimizer):
    table = nn.Embedding(6, 4, sparse=True)
    mask = torch.rand(6, 4) < 0.5
    optimizer = optimizer(table.parameters(), lr=0.1)
    held = InPlace()
    held.attach(table, MaskSet({"weight": mask}), [optimizer])
    for _ in range(2):
        table(torch.tensor([1, 2, 2, 5])).sum().backward()
    dense = table.weight.grad.to_dense()
    expected = torch.tensor([0.0, 2, 4, 0, 0, 2])[:, None].expand(6, 4)
    assert torch.equal(dense, torch.where(mask, expected, 0))
    before = table.weight.detach().clone()
    optimizer.step()
    assert torch.equal(table.weight != 0, mask & (before != 0))
    assert not torch.equal(table.weight, before)


def test_in_place_holds_complex_weights():
    layer = nn.Linear(4, 3, dtype=torch.complex64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    masks = Pruner(layer, optimizers=[optimizer]).prune_to(0.5)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(5, 4, dtype=torch.complex64)).abs().sum().backward()
        assert torch.equal(layer.weight.grad != 0, masks["weight"])
        optimizer.step()
        assert torch.equal(layer.weight != 0, masks["weight"])


def orders():
    """Textbook trainings in which a graph outlives the step of another optimizer."""

    def adversarial(g, d, og, od):  # the order of PyTorch's own tutorial on DCGAN
        fake = g(torch.randn(8, 4))
        od.zero_grad()
        (d(fake.detach()).mean() - d(torch.randn(8, 4)).mean()).backward()
        od.step()
        og.zero_grad()
        (-d(fake).mean()).backward()
        og.step()

    def heads(g, d, og, od):  # two losses of one pass, each with an optimizer of its own
        hidden = torch.randn(8, 4)
        one, two = g(hidden).square().mean(), d(hidden).square().mean()
        og.zero_grad()
        one.backward()
        og.step()
        od.zero_grad()
        two.backward()
        od.step()

    def one_at_a_time(g, d, og, od):  # an optimizer that skips what has no gradient
        both = torch.optim.SGD([*g.parameters(), *d.parameters()], lr=0.1)
        waits = d(torch.randn(8, 4)).square().mean()
        g(torch.randn(8, 4)).square().mean().backward()
        both.step()
        waits.backward()
        both.zero_grad()

    return [adversarial, heads, one_at_a_time]


@both
@pytest.mark.parametrize("order", orders())
def test_steps_leave_alone_what_other_graphs_hold(masking, order):
    def train(prune):
        torch.manual_seed(0)
        g, d = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in "gd")
        og, od = (torch.optim.Adam(net.parameters(), lr=0.1) for net in (g, d))
        model = nn.ModuleList([g, d])
        if prune:
            Pruner(model, optimizers=[og, od], masking=masking()).prune_to(0.5)
        for _ in range(3):
            order(g, d, og, od)
        return sparsity(model)

    train(prune=False)
    assert train(prune=True) == pytest.approx(0.5, abs=0.01)


def test_a_step_shows_in_the_graphs_that_it_breaks():
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    Pruner(layer, optimizers=[optimizer]).prune_to(0.5)
    loss = layer(layer(torch.randn(2, 3))).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("when", ["before", "after"])
def test_in_place_holds_through_steps_within_the_backward_pass(when):
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    def hook():
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    if when == "before":
        hook()
    Pruner(model, optimizers=list(optimizers.values())).prune_to(0.8)
    if when == "after":
        hook()
    for _ in range(3):
        model(torch.randn(4, 1, 6, 6)).square().sum().backward()
        assert sparsity(model) == pytest.approx(0.8, abs=1e-3)


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", [None, 3])
def test_what_load_state_dict_brings_is_masked_at_once(masking, assign, part):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    target = model if part is None else model[part]
    first = copy.deepcopy(target.state_dict())
    pruner = Pruner(model, optimizers=[optimizer], masking=masking())
    masks = pruner.prune_to(0.8)
    target.load_state_dict(first, assign=assign)
    assert sparsity(model) == masks.sparsity
    held = target.state_dict()
    name = "3.weight" if part is None else "weight"
    assert torch.equal(held[name], torch.where(masks["3.weight"], first[name], 0))
    pruner.remove()
    assert not any(module._load_state_dict_post_hooks for module in model.modules())
    target.load_state_dict(first)
    assert torch.equal(target.state_dict()[name], first[name])


@both
def test_what_state_dict_gives_is_masked_whatever_moved_the_weights(masking):
    model = network()
    pruner = Pruner(model, optimizers=[], masking=masking())
    pruner.prune_to(0.8)
    masks = pruner.masks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    state = model.state_dict()
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())


def test_a_model_can_be_converted_by_swapping_while_held_and_after():
    model = network()
    pruner = Pruner(model, optimizers=[])
    pruner.prune_to(0.8)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        assert sparsity(model) == pruner.prune_to(0.8).sparsity
        pruner.remove()
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_copies_of_a_held_model_are_free(tmp_path):
    model = network()
    dense = copy.deepcopy(model.state_dict())
    Pruner(model, optimizers=[torch.optim.SGD(model.parameters(), 0.1)]).prune_to(0.5)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert sparsity(twin) == 0.5
        twin.load_state_dict(dense)
        assert sparsity(twin) == 0


@both
def test_a_model_that_is_no_longer_used_is_freed(masking):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, optimizers=[optimizer], masking=masking())
    pruner.prune_to(0.5)
    weight = weakref.ref(model[0].weight)
    del model, optimizer, pruner
    gc.collect()
    assert weight() is None


def test_in_place_follows_a_model_to_another_dtype():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    Pruner(model, optimizers=[optimizer]).prune_to(0.5)
    model.double()
    model(torch.randn(4, 1, 6, 6).double()).sum().backward()
    optimizer.step()
    assert sparsity(model) == 0.5


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
