"""Every option of a method in two processes, which hold copies of the weights or shards of them."""

import pytest
import torch
import torch.distributed as dist
from settings import IMAGE, SETTINGS, Net, batches, loss
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pruneflow import Pruner, gradients, input_norms

OF_A_RULE = [s for s in SETTINGS if s.argument in ("importance", "scope", "granularity", "costs")]


def by_name(name):
    return next(setting for setting in OF_A_RULE if str(setting) == name)


def prune(name, *, sharded=False):
    """The masks after two rounds, packed; of all processes with the same batches."""
    setting = by_name(name)
    arguments = setting.arguments
    if name == "costs=latency":
        arguments["costs"] = {"conv1.weight": 3.0, "conv2.weight": 2.0, "fc.weight": 1.0}
    if name == "importance=a method of torch":
        torch.manual_seed(0)
    model = Net()
    if sharded:
        fully_shard(model)
    pruner = Pruner(model, optimizers=[], example_input=IMAGE, **arguments)
    needs = pruner.rule.needs
    for number, target in enumerate((0.3, 0.5), start=1):
        evidence = None if needs is None else needs(model, batches(), loss)
        pruner.prune_to(target, round=number, evidence=evidence)
    return pruner.masks.state()


def refused(name):
    try:
        prune(name, sharded=True)
    except ValueError as error:
        return str(error)
    return None


def same(one, other):
    assert one.keys() == other.keys()
    for name, mask in one.items():
        assert torch.equal(mask["bits"], other[name]["bits"]), name


@pytest.mark.parametrize("setting", OF_A_RULE, ids=str)
def test_copies_get_the_masks_of_one_process(two, setting):
    first, second = two(prune, str(setting))
    same(first, second)
    same(first, prune(str(setting)))


@pytest.mark.parametrize("setting", OF_A_RULE, ids=str)
def test_shards_get_the_masks_of_one_process_or_are_refused_by_name(two, setting):
    if setting.sharded:
        first, second = two(prune, str(setting), sharded=True)
        same(first, second)
        same(first, prune(str(setting)))
    else:
        first, second = two(refused, str(setting))
        assert first == second
        assert first.startswith(f"`{setting.argument}` must be ")


def collect(evidence):
    """Evidence from batches that differ between the processes, of a wrapped model."""
    model = DistributedDataParallel(Net())
    mine = batches(4)[dist.get_rank() :: 2]
    found = [evidence(model, mine, loss) for _ in range(2)]
    model(mine[0][0]).sum().backward()  # it can still be trained
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    return found[0]


@pytest.mark.parametrize("evidence", [gradients, input_norms])
def test_evidence_is_that_of_the_batches_of_all_processes(two, evidence):
    first, second = two(collect, evidence)
    expected = evidence(Net(), batches(4), loss)
    assert first.keys() == expected.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, expected[name])


def measure_unlike(sharded):
    """Costs that each process measures otherwise, as it does with times."""

    def costs(model, example):
        return {"conv1.weight": 1.0 + dist.get_rank(), "conv2.weight": 2.0, "fc.weight": 3.0}

    model = Net()
    if sharded:
        fully_shard(model)
    pruner = Pruner(model, costs=costs, example_input=IMAGE, optimizers=[])
    pruner.prune_to(0.5)
    return dict(pruner.costs), pruner.masks.state()


@pytest.mark.parametrize("sharded", [False, True])
def test_costs_are_those_that_the_first_process_measured(two, sharded):
    (costs, masks), (others, theirs) = two(measure_unlike, sharded)
    assert costs == others == {"conv1.weight": 1.0, "conv2.weight": 2.0, "fc.weight": 3.0}
    same(masks, theirs)
