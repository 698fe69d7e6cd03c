import gc
import io
import pickle
import weakref
from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from pruneflow.pruning.optimizers import mask_optimizer_state
from pruneflow.training.rewinding import LearningRateSnapshot


class Table:
    """Factors of the learning rate, and a memory of what was asked for."""

    def __init__(self):
        self.factors = np.linspace(1, 0.1, 6)
        self.asked = deque(maxlen=2)

    def __call__(self, epoch):
        self.asked.append(epoch)
        return self.factors[epoch] + 0 * self.factors.mean() + len(self.asked)


class OfNumPy(LRScheduler):
    """Keeps all that a checkpoint cannot hold."""

    def __init__(self, optimizer):
        self.decay = np.float32(0.5)
        self.steps = {np.int64(2): np.array([1.0, 2.0])}
        self.functions = np.minimum
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] * self.decay for group in self.optimizer.param_groups]


def stored(snapshot):
    """The snapshot as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(snapshot.state(), file)
    file.seek(0)
    return LearningRateSnapshot.from_state(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 5),
        lambda optimizer: MultiStepLR(optimizer, [2, 4]),
        lambda optimizer: MultiStepLR(optimizer, np.array([2, 4]), gamma=np.float64(0.5)),
        lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=6),
        lambda optimizer: CyclicLR(optimizer, 0.1, 0.5, 2, scale_fn=lambda x: 1.0),
        lambda optimizer: LambdaLR(optimizer, lambda epoch: np.float64(0.5) ** epoch),
        lambda optimizer: LambdaLR(optimizer, Table()),
        lambda optimizer: SequentialLR(
            optimizer, [ConstantLR(optimizer), ExponentialLR(optimizer, 0.5)], [2]
        ),
        lambda optimizer: ChainedScheduler([ConstantLR(optimizer), LambdaLR(optimizer, Table())]),
        OfNumPy,
    ],
)
@pytest.mark.parametrize("lr", [0.1, np.float64(0.1), torch.tensor(0.1)])
def test_the_learning_rates_of_a_round_are_those_of_the_first(make, lr):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    snapshot = stored(LearningRateSnapshot([optimizer], [scheduler]))
    seen = []
    for _ in range(2):
        rates = []
        for _ in range(5):
            group = optimizer.param_groups[0]
            rates.append((float(group["lr"]), float(group["momentum"])))
            optimizer.step()
            scheduler.step()
        seen.append(rates)
        snapshot.restore([optimizer], [scheduler])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 1


def test_the_state_is_builtins_and_tensors():
    optimizer = torch.optim.Adam(
        [nn.Parameter(torch.zeros(2))], lr=np.float64(0.1), betas=(np.float64(0.5), np.float64(0.9))
    )
    snapshot = LearningRateSnapshot([optimizer], [MultiStepLR(optimizer, np.array([2]))])
    [[group]], [scheduler] = snapshot.state().values()
    assert type(group["lr"]) is type(group["betas"][0]) is float
    assert scheduler["milestones"] == Counter({2: 1})
    assert type(next(iter(scheduler["milestones"]))) is int


@pytest.mark.parametrize("form", [lambda thing: thing, lambda thing: {"deep": [0, thing]}])
@pytest.mark.parametrize("thing", [object(), range(3), frozenset({1})])
def test_what_no_checkpoint_can_hold_is_refused_by_name(form, thing):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.5)
    scheduler.thing = form(thing)
    snapshot = LearningRateSnapshot([optimizer], [scheduler])
    snapshot.restore([optimizer], [scheduler])  # all the same
    with pytest.raises(ValueError, match=rf"{type(thing).__name__} for schedulers.*'thing'"):
        snapshot.state()


def three_groups():
    """Learning rates 1, 2 and 3, which are halved for all, or by functions of their own."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": [weight], "lr": float(lr)} for lr, weight in enumerate(weights, 1)]
    return torch.optim.SGD(groups)


def halving(optimizer):
    return LambdaLR(optimizer, [lambda epoch: 0.5**epoch] * len(optimizer.param_groups))


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=0.01)


def step(optimizer, scheduler):
    optimizer.step()
    scheduler.step(*[0.0] * isinstance(scheduler, ReduceLROnPlateau))


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


every_scheduler = pytest.mark.parametrize(
    "make", [lambda optimizer: ExponentialLR(optimizer, 0.5), halving, plateau]
)
in_memory_or_stored = pytest.mark.parametrize("keep", [lambda snapshot: snapshot, stored])


@in_memory_or_stored
@every_scheduler
def test_groups_that_came_later_go_back_to_where_they_came(make, keep):
    optimizer = three_groups()
    scheduler = make(optimizer)
    snapshot = LearningRateSnapshot([optimizer], [scheduler])
    for _ in range(3):
        step(optimizer, scheduler)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.8})
    if isinstance(scheduler, LambdaLR):  # as PyTorch wants it
        scheduler.base_lrs.append(0.8)
        scheduler.lr_lambdas.append(lambda epoch: 0.5 ** (epoch - 3))
    snapshot.update([optimizer], [scheduler])
    step(optimizer, scheduler)
    assert rates(optimizer)[3] <= 0.8
    snapshot = keep(snapshot)
    for _ in range(2):
        snapshot.restore([optimizer], [scheduler])
        assert rates(optimizer) == [1, 2, 3, 0.8]
        assert scheduler.last_epoch == 0
        for _ in range(3):
            step(optimizer, scheduler)
        assert max(rates(optimizer)[:3]) <= 0.75


@in_memory_or_stored
@every_scheduler
def test_groups_that_are_gone_are_forgotten(make, keep):
    optimizer = three_groups()
    scheduler = make(optimizer)
    snapshot = LearningRateSnapshot([optimizer], [scheduler])
    step(optimizer, scheduler)
    for per_group in (optimizer.param_groups, *map(vars(scheduler).get, PER_GROUP)):
        if per_group is not None:
            del per_group[0]
    snapshot.update([optimizer], [scheduler])
    snapshot = keep(snapshot)
    snapshot.restore([optimizer], [scheduler])
    assert rates(optimizer) == [2, 3]
    for _ in range(3):
        step(optimizer, scheduler)
    assert rates(optimizer) == [0.25, 0.375] or isinstance(scheduler, ReduceLROnPlateau)


PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "_last_lr")


def test_optimizers_and_schedulers_that_came_later_go_back_to_where_they_came():
    first, second = three_groups(), three_groups()
    snapshot = LearningRateSnapshot([first], [])
    for group in second.param_groups:
        group["lr"] = 0.7
    optimizers, schedulers = [second, first], [halving(second), halving(first)]
    snapshot.update(optimizers, schedulers)
    for pair in zip(optimizers, schedulers, strict=True):
        step(*pair)
    snapshot.restore(optimizers, schedulers)
    assert (rates(second), rates(first)) == ([0.7] * 3, [1, 2, 3])
    assert [scheduler.last_epoch for scheduler in schedulers] == [0, 0]
    snapshot.restore([second], schedulers[:1])
    assert len(snapshot.state()["groups"]) == 1


def test_a_scheduler_need_not_know_its_optimizer():
    class Counter:
        def __init__(self):
            self.count = 0

        def state_dict(self):
            return dict(vars(self))

        def load_state_dict(self, state):
            vars(self).update(state)

    optimizer, counter = three_groups(), Counter()
    snapshot = stored(LearningRateSnapshot([optimizer], [counter]))
    counter.count = 5
    snapshot.restore([optimizer], [counter])
    assert counter.count == 0


def test_a_learning_rate_in_a_tensor_stays_in_it():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    snapshot = LearningRateSnapshot([optimizer], [])
    rate.fill_(0.1)
    snapshot.restore([optimizer], [])
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_what_is_released_keeps_no_optimizer_and_can_be_pickled():
    optimizer = three_groups()
    snapshot = LearningRateSnapshot([optimizer], [halving(optimizer)])
    expected = snapshot.state()
    alive = weakref.ref(optimizer.param_groups[0]["params"][0])
    snapshot.release()
    del optimizer
    gc.collect()
    assert alive() is None
    assert pickle.loads(pickle.dumps(snapshot)).state() == expected


def test_momentum_and_weights_are_left_alone():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    snapshot = LearningRateSnapshot([optimizer], [])
    weight.grad = torch.ones(2)
    optimizer.step()
    snapshot.restore([optimizer], [])
    assert weight.tolist() == pytest.approx([0.9, 0.9])
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1, 1]


def test_moments_of_pruned_weights_are_zeroed_and_others_kept():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight, other], lr=0.1)
    weight.grad = other.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    before = optimizer.state[weight]["exp_avg"].clone()
    mask_optimizer_state("zero_pruned", [optimizer], [(weight, torch.tensor([True, False, True]))])
    state = optimizer.state[weight]
    assert state["exp_avg"].tolist() == [before[0], 0, before[2]]
    assert state["exp_avg_sq"][1] == 0
    assert state["step"] == 1
    assert (optimizer.state[other]["exp_avg"] != 0).all()
