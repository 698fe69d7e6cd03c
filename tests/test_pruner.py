import warnings

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import prune

from pruneflow import MaskSet, Pruner, Random, fold_model, sparsity


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))


def train(network, optimizer, steps=3):
    for seed in range(steps):
        points = torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        network(points).square().mean().backward()
        optimizer.step()


def test_zeros_hold_through_training_in_any_loop():
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    pruner = Pruner(network, optimizers=[optimizer])
    for target in (0.5, 0.75, 0.9):
        masks = pruner.prune_to(target)
        train(network, optimizer)
        assert masks.pruned == round(target * 400)
        assert sparsity(network) == pytest.approx(target)
    pruner.remove()
    assert len(pruner.masks) == 0


def test_pruning_to_the_same_target_again_changes_nothing():
    pruner = Pruner(model(), optimizers=[], importance=Random(1))
    first = pruner.prune_to(0.5, round=1)
    again = pruner.prune_to(0.5, round=2)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_importance_is_read_from_the_live_weights():
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizers=[optimizer], scope="layer", include=["0.weight"])
    pruner.prune_to(0.1)
    survivor = pruner.masks["0.weight"].flatten().nonzero()[0]
    network[0].weight.data.view(-1)[survivor] = 10.0
    pruner.prune_to(0.99)
    assert pruner.masks["0.weight"].flatten()[survivor]


def test_nothing_is_changed_when_a_weight_is_not_a_number():
    network = model()
    pruner = Pruner(network, optimizers=[])
    pruner.prune_to(0.5)
    network[2].weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masks = pruner.masks
    with pytest.raises(ValueError, match=r"'2\.weight'"):
        pruner.prune_to(0.9)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(masks[name], pruner.masks[name]) for name in masks)


def test_says_that_zeros_do_not_hold_without_optimizers():
    with pytest.warns(UserWarning, match="`optimizers` was not given"):
        Pruner(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model(), optimizers=[])


def test_refuses_a_tensor_that_no_optimizer_holds_and_an_all_frozen_model():
    network = model()
    optimizer = torch.optim.SGD(network[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"none holds 2\.weight"):
        Pruner(network, optimizers=[optimizer])
    with pytest.raises(ValueError, match="all are frozen"):
        Pruner(network.requires_grad_(False), optimizers=[])


def test_refuses_masks_that_are_not_of_the_tensors_to_prune():
    pruner = Pruner(model(), optimizers=[])
    mask = torch.ones(20, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"2\.weight has none"):
        pruner.hold(MaskSet({"0.weight": mask}))
    with pytest.raises(ValueError, match=r"has no '0\.bias'"):
        pruner.hold(MaskSet({"0.bias": mask}))


def test_optimizer_state_after_a_prune():
    def momentum_after(policy):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[0.1, 1.0]])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        pruner = Pruner(layer, optimizers=[optimizer], optimizer_state=policy)
        pruner.prune_to(0.5)
        state = optimizer.state[layer.weight]
        before = state["momentum_buffer"].tolist() if state else None
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        pruner.prune_to(0.5)  # prunes nothing more, hence settles nothing
        after = optimizer.state[layer.weight]["momentum_buffer"].tolist()
        assert layer.weight[0, 0] == 0
        return before, after

    assert momentum_after("keep") == ([[1.0, 1.0]], [[0.5, 1.5]])
    assert momentum_after("zero_pruned") == ([[0.0, 1.0]], [[0.0, 1.5]])
    assert momentum_after("reset") == (None, [[0.0, 1.0]])
    with pytest.raises(ValueError, match="`optimizer_state` is expected to be"):
        momentum_after("forget")


def test_adam_forgets_its_moments_only_when_reset():
    def steps_after(policy):
        network = model()
        optimizer = torch.optim.Adam(network.parameters())
        train(network, optimizer)
        mask = Pruner(network, optimizers=[optimizer], optimizer_state=policy).prune_to(0.5)
        state = optimizer.state[network[0].weight]
        if policy == "zero_pruned":
            assert (state["exp_avg_sq"][~mask["0.weight"]] == 0).all()
            assert (state["exp_avg_sq"][mask["0.weight"]] > 0).any()
        train(network, optimizer, steps=1)
        return int(optimizer.state[network[0].weight]["step"])

    assert [steps_after(policy) for policy in ("keep", "zero_pruned", "reset")] == [4, 4, 1]


def test_refuses_a_model_that_torch_prune_holds():
    network = model()
    prune.l1_unstructured(network[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"torch.nn.utils.prune holds 0\.weight; call `fold_model"):
        Pruner(network, optimizers=[])
    fold_model(network)
    assert Pruner(network, optimizers=[]).hold_zeros().pruned == 100


def test_refuses_the_zero_optimizer(tmp_path):
    network = model()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", world_size=1, rank=0
    )
    try:
        optimizer = ZeroRedundancyOptimizer(network.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer updates a share"):
            Pruner(network, optimizers=[optimizer])
    finally:
        torch.distributed.destroy_process_group()
