"""Copies of the weights in two processes: rank 0 decides, and every process has the same masks."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from pruneflow import Given, MaskSet, Pruner, Random, magnitude


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))


def weights(model):
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith("weight")}


def same(masks, others):
    return list(masks) == list(others) and all(torch.equal(masks[n], others[n]) for n in masks)


def noise(model):
    return Given({name: torch.rand_like(weight) for name, weight in weights(model).items()})


def gradients(model):
    model(torch.randn(5, 10)).square().sum().backward()
    return Given({name: weight.grad.abs() for name, weight in weights(model).items()})


# What makes the importance in each process, the scope, and whether the random state matters.
METHODS = {
    "magnitude": (lambda model: magnitude, "global", False),
    "magnitude of each layer": (lambda model: magnitude, "layer", False),
    "random": (lambda model: Random(3), "global", False),
    "noise": (noise, "global", True),
    "gradients": (gradients, "global", True),
    "torch, random": (lambda model: prune.RandomUnstructured, "layer", True),
    "torch, own amount": (lambda model: prune.L1Unstructured(0.5), "layer", False),
}


def prune_twice(method, seed=None):
    # Unless told otherwise, weights and random states of the processes have nothing in common.
    model = network(dist.get_rank() if seed is None else seed)
    make, scope, _ = METHODS[method]
    importance = make(model)
    pruner = Pruner(model, importance=importance, scope=scope, optimizers=[])
    own_amount = isinstance(importance, prune.BasePruningMethod)
    masks = [pruner.prune() if own_amount else pruner.prune_to(share) for share in (0.5, 0.75)]
    for name, mask in masks[-1].items():
        assert torch.equal(weights(model)[name] != 0, mask)
    return masks


@pytest.mark.parametrize("method", METHODS)
def test_every_process_holds_the_masks_of_rank_0(two, method):
    first, second = two(prune_twice, method)
    assert [masks.sparsity for masks in first] == [0.5, 0.75]
    assert all(map(same, first, second))
    _, _, by_chance = METHODS[method]
    if not by_chance:
        assert all(map(same, first, prune_twice(method, seed=0)))


def hold_zeros():
    model = network(0)
    model[2 * dist.get_rank()].weight.data[:2] = 0
    return Pruner(model, optimizers=[]).hold_zeros()


def test_every_process_holds_the_zeros_of_rank_0(two):
    first, second = two(hold_zeros)
    assert same(first, second)
    assert (first["0.weight"] == (torch.arange(20) >= 2)[:, None]).all()
    assert first["2.weight"].all()


class OddError(Exception):
    """Cannot be sent to another process as it is."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def odd(name, tensor, context):
    raise OddError("salt", "pepper")


def go_wrong(case):
    model = network(0)
    pruner = Pruner(model, optimizers=[])
    before = pruner.prune_to(0.5)
    first = dist.get_rank() == 0
    pruner.importance = odd if case == "odd" and first else magnitude
    if case == "weights" and first:
        model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(Exception, match=r"pepper|must") as caught:
        pruner.prune_to(0.25 if case == "target" else 0.75)
    assert same(pruner.masks, before)
    model[2].weight.data.nan_to_num_()
    pruner.importance = magnitude
    return f"{type(caught.value).__name__}: {caught.value}", pruner.prune_to(0.875)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("weights", "ValueError: `model` must have finite weights"),
        ("target", "ValueError: `sparsity` must be at least the present one, 0.5"),
        ("odd", "RuntimeError: OddError: salt and pepper"),
    ],
)
def test_what_goes_wrong_in_rank_0_goes_wrong_everywhere_and_the_next_prune_works(
    two, case, message
):
    (here, masks), (there, others) = two(go_wrong, case)
    assert message in here and message in there
    assert masks.sparsity == 0.875 and same(masks, others)


def train(view):
    model = network(0)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    pruner = Pruner(replica, optimizers=[optimizer])
    gradients = []
    for target in (0.5, 0.75):
        masks = pruner.prune_to(target)
        for step in range(3):
            optimizer.zero_grad(set_to_none=step == 1)
            replica(torch.randn(8, 10)).square().mean().backward()
            for name, weight in weights(model).items():
                assert not weight.grad[~masks[name]].any()
                gradients.append(weight.grad.clone())
            optimizer.step()
            for name, weight in weights(model).items():
                assert torch.equal(weight != 0, masks[name])
    moments = {name: optimizer.state[weight]["exp_avg"] for name, weight in weights(model).items()}
    return masks, gradients, model.state_dict(), moments


@pytest.mark.parametrize("view", [False, True])
def test_replicas_stay_equal_and_zeros_hold_through_training(two, view):
    first, second = two(train, view)
    assert list(first[0]) == ["0.weight", "2.weight"]  # without the wrapper's `module.`
    torch.testing.assert_close([*first[1], *first[2:]], [*second[1], *second[2:]], rtol=0, atol=0)
    assert same(first[0], second[0])
    for name, moment in first[3].items():
        assert moment.any() and not moment[~first[0][name]].any()


def names_when_compiled():
    compiled = torch.compile(DistributedDataParallel(network(0)))
    return Pruner(compiled, optimizers=[]).names


def test_names_are_those_of_the_plain_model_also_when_compiled(two):
    assert two(names_when_compiled) == [("0.weight", "2.weight")] * 2


def test_masks_travel_bit_packed():
    masks = MaskSet({"weight": torch.rand(1000, 800) < 0.5})
    packed = pickle.dumps(masks)
    assert len(packed) < 1000 * 800 / 8 + 2000
    assert same(pickle.loads(packed), masks)
