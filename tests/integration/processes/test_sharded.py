"""Weights sharded over two processes: the masks are those of the whole weights, bit for bit."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import prune

from pruneflow import (
    NM,
    Block,
    Given,
    MaskSet,
    Pruner,
    Random,
    Reparametrize,
    compute_masks,
    distributed,
    magnitude,
    sparsity,
)


def make_weights():
    """Rows that two processes cannot share evenly, or at all; half precision; ties."""
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(7, 5, generator=generator),
        "one row": torch.randn(1, 30, generator=generator),
        "flat": torch.randn(11, generator=generator),
        "half": torch.randn(6, 4, 3, generator=generator).bfloat16(),
        "ties": torch.randint(-2, 3, (9, 4), generator=generator).float(),
        "equal": torch.ones(5, 4),
        "zeros": torch.zeros(4, 3),
        "none": torch.zeros(0, 3),
    }


def shard(weights, placements):
    mesh = init_device_mesh("cpu", (2, 1)[: len(placements)])
    return {name: distribute_tensor(w, mesh, placements) for name, w in weights.items()}


def whole(masks):
    return MaskSet.from_state(masks.state())


def same(masks, others):
    return list(masks) == list(others) and all(torch.equal(masks[n], others[n]) for n in masks)


def negative(name, tensor, context):
    """A function that does not say it is elementwise, hence gets the sharded tensor."""
    return -tensor


IMPORTANCES = {
    "magnitude": magnitude,
    "of the sharded tensor": negative,
    "random": Random(5),
    "given": Given({name: weight.double().cos() for name, weight in make_weights().items()}),
}
TARGETS = (0.0, 0.45, 0.5, 0.9)
PLACEMENTS = {
    "shards": [Shard(0)],
    "replicas": [Replicate()],
    "shards of replicas": [Replicate(), Shard(0)],
    "replicas of shards": [Shard(0), Replicate()],
}


def prune_rounds(weights, importance, scope):
    masks, rounds = None, []
    for round, target in enumerate(TARGETS, start=1):
        masks = compute_masks(
            weights, target, importance=importance, scope=scope, masks=masks, round=round
        )
        rounds.append(masks)
    return rounds


def prune_shards(importance, scope, placements):
    placements = PLACEMENTS[placements]
    weights = shard(make_weights(), placements)
    rounds = prune_rounds(weights, IMPORTANCES[importance], scope)
    for masks in rounds:
        assert all(masks[name].placements == weight.placements for name, weight in weights.items())
    return [(whole(masks), masks.pruned, masks.sparsity) for masks in rounds]


def check_shards(two, importance, scope, placements):
    expected = prune_rounds(make_weights(), IMPORTANCES[importance], scope)
    for found in two(prune_shards, importance, scope, placements):
        for (masks, pruned, share), alone in zip(found, expected, strict=True):
            assert same(masks, alone)
            assert (pruned, share) == (alone.pruned, alone.sparsity)


def groups_of_four():
    weights = make_weights()
    return {"odd rows": weights["half"].float().reshape(9, 8), "ties": weights["ties"]}


WAYS = {
    "by cost": {"costs": {"odd rows": 3.0, "ties": 0.5}},
    "n of m": {"granularity": NM(2, 4)},
    "both": {"granularity": NM(2, 4), "costs": {"odd rows": 3.0, "ties": 0.5}},
}


def prune_by(weights, way):
    masks = compute_masks(weights, 0.2, importance=magnitude, **WAYS[way])
    return compute_masks(weights, 0.4, importance=magnitude, masks=masks, **WAYS[way])


def prune_shards_by(way):
    return whole(prune_by(shard(groups_of_four(), [Shard(0)]), way))


@pytest.mark.parametrize("way", WAYS)
def test_costs_and_n_of_m_of_shards_are_those_of_the_whole(two, way):
    assert all(same(masks, prune_by(groups_of_four(), way)) for masks in two(prune_shards_by, way))


def refuse_blocks():
    weights = shard(groups_of_four(), [Shard(0)])
    with pytest.raises(ValueError, match="shards do not hold whole channels or blocks"):
        compute_masks(weights, 0.5, importance=magnitude, granularity=Block(1, 2))
    return True


def test_blocks_of_shards_are_refused(two):
    assert all(two(refuse_blocks))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_masks_of_shards_are_those_of_the_whole(two, importance):
    check_shards(two, importance, "global", "shards")


@pytest.mark.parametrize("placements", PLACEMENTS)
def test_masks_are_those_of_the_whole_however_it_is_placed(two, placements):
    check_shards(two, "magnitude", "layer", placements)


def prune_a_large_one():
    largest, sent, all_gather = [], [], distributed._all_gather

    def score(name, tensor, context):
        largest.append(tensor.numel())
        return tensor.abs()

    def count(value):
        sent.append(0 if value is None else value.numel())
        return all_gather(value)

    score.elementwise = True
    distributed._all_gather = count
    try:
        [weight] = shard({"": torch.randn(600, 1000)}, [Shard(0)]).values()
        masks = compute_masks({"": weight}, 0.5, importance=score)
    finally:
        distributed._all_gather = all_gather
    assert masks.pruned == 300_000
    return max(largest), sum(sent)


def test_no_process_sees_all_scores(two):
    for largest, sent in two(prune_a_large_one):
        assert largest == 300 * 1000
        assert sent < 600 * 1000 / 10


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 1))


def sharded_network():
    """The second process gets fewer rows of the first layer, and none of the last."""
    model = network()
    fully_shard(model[0])
    return fully_shard(model)


def plain_copy(model):
    copy = network()
    copy.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    return copy


def train_shards():
    model = sharded_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    pruner = Pruner(model, optimizers=[optimizer])
    torch.manual_seed(dist.get_rank())
    points = torch.randn(20, 10)
    for target in (0.5, 0.75, 0.9):
        alone = Pruner(plain_copy(model), optimizers=[])
        if pruner.masks:
            alone.hold(whole(pruner.masks))
        with torch.no_grad():
            model(points)  # leaves the weights of the last layer gathered
        masks = pruner.prune_to(target)
        assert same(whole(masks), alone.prune_to(target))
        torch.testing.assert_close(model(points), alone.model(points))
        for _ in range(3):
            optimizer.zero_grad()
            model(points).square().mean().backward()
            for name, mask in masks.items():
                assert not model.get_parameter(name).grad.to_local()[~mask.to_local()].any()
            optimizer.step()
            for name, mask in masks.items():
                weight = model.get_parameter(name)
                assert torch.equal(weight.to_local() != 0, mask.to_local())
                moment = optimizer.state[weight]["exp_avg"].to_local()
                assert not moment[~mask.to_local()].any()
    assert model[2].weight.to_local().numel() == (7 if dist.get_rank() == 0 else 0)
    state = pruner.masks.state()
    pruner.remove()
    assert sparsity(model) == masks.sparsity
    again = Pruner(sharded_network(), optimizers=[])
    held = again.hold(MaskSet.from_state(state))
    assert all(torch.equal(held[name].to_local(), masks[name].to_local()) for name in masks)
    with torch.no_grad():
        model(points)
    zeros = Pruner(model, optimizers=[]).hold_zeros(empty=True)
    assert all(torch.equal(zeros[name].to_local(), masks[name].to_local()) for name in masks)
    return whole(masks)


def test_zeros_hold_through_training_with_fully_shard(two):
    first, second = two(train_shards)
    assert same(first, second)
    assert first.pruned == round(0.9 * 77)


class Task(nn.Module):
    """A wrapper that is sharded itself: its own group holds the weights of the last layer."""

    wraps = "model"

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, points):
        return self.model(points)


def prune_within_a_sharded_wrapper():
    task = Task(network())
    fully_shard(task.model[0])
    fully_shard(task)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    pruner = Pruner(task, optimizers=[optimizer])
    points = torch.ones(3, 10)
    with torch.no_grad():
        task(points)  # leaves the weights of the last layer gathered
    masks = whole(pruner.prune_to(0.5))
    assert same(masks, Pruner(network(), optimizers=[]).prune_to(0.5))
    task(points).sum().backward()
    optimizer.step()
    assert sparsity(task) == masks.sparsity
    return masks


def test_a_wrapper_that_is_sharded_itself(two):
    first, second = two(prune_within_a_sharded_wrapper)
    assert same(first, second)


def spoilt_where_five(name, tensor, context):
    return tensor.abs().masked_fill(tensor == 5, torch.nan)


def refused_where_five(name, tensor, context):
    if (tensor == 5).any():
        raise ArithmeticError(f"no score for {name}")
    return tensor.abs()


class RefusedLate:
    """Refuses where five is, but only when masks are made, after all has been agreed on."""

    elementwise = True

    def __init__(self):
        self.calls = Counter()

    def __call__(self, name, tensor, context):
        self.calls[name] += 1
        return (refused_where_five if self.calls[name] == 3 else magnitude)(name, tensor, context)


spoilt_where_five.elementwise = refused_where_five.elementwise = True


def go_wrong(importance, value, target):
    model = sharded_network()
    pruner = Pruner(model, optimizers=[])
    before = pruner.prune_to(0.5)
    if dist.get_rank() == 1:
        model[0].weight.detach().to_local()[0, 0] = value
    pruner.importance = importance
    with pytest.raises(Exception, match=r"no score|must") as caught:
        pruner.prune_to(target)
    assert same(whole(pruner.masks), whole(before))
    if dist.get_rank() == 1:
        model[0].weight.detach().to_local()[0, 0] = 1
    pruner.importance = magnitude
    return f"{type(caught.value).__name__}: {caught.value}", whole(pruner.prune_to(0.875))


@pytest.mark.parametrize(
    ("importance", "value", "target", "message"),
    [
        (magnitude, torch.inf, 0.75, "ValueError: `model` must have finite weights"),
        (spoilt_where_five, 5, 0.75, "got NaN for '0.weight'; nothing was changed"),
        (refused_where_five, 5, 0.75, "ArithmeticError: no score for 0.weight"),
        (RefusedLate(), 5, 0.75, "ArithmeticError: no score for 0.weight"),
        (magnitude, 5, 0.48, "ValueError: `sparsity` must be at least the present one"),
    ],
    ids=["weights", "scores", "importance", "importance, late", "target"],
)
def test_what_goes_wrong_with_one_shard_goes_wrong_everywhere_and_the_next_prune_works(
    two, importance, value, target, message
):
    (here, masks), (there, others) = two(go_wrong, importance, value, target)
    assert message in here and message in there
    assert masks.pruned == round(0.875 * 77) and same(masks, others)


def refusal(case):
    model = network()
    arguments = {"optimizers": []}
    mesh = init_device_mesh("cpu", (2,))
    if case == "columns":
        parallelize_module(model[0], mesh, RowwiseParallel())
        parallelize_module(model[2], mesh, ColwiseParallel())
    elif case == "part":
        fully_shard(model[0])
    elif case == "other mesh":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"])
    elif case == "first version":
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True).module
    else:
        model = fully_shard(model)
        arguments |= {
            "torch method": {"importance": prune.L1Unstructured},
            "reparametrized": {"masking": Reparametrize()},
        }[case]
    with pytest.raises(ValueError, match=r"^`(model|importance|masking)`") as caught:
        Pruner(model, scope="layer", **arguments).prune_to(0.5)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("columns", "0.weight (Shard(dim=1))"),
        ("part", "2.weight (not sharded, but others are)"),
        ("other mesh", "0.weight (its mesh does not span all processes in the order of ranks)"),
        ("first version", "0.weight (flattened by FullyShardedDataParallel), 2.weight"),
        ("torch method", "`importance` must be a function for sharded weights"),
        ("reparametrized", "0.weight (it is sharded)"),
    ],
)
def test_refuses_by_name(two, case, message):
    for found in two(refusal, case):
        assert message in found
