import io
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from pruneflow.models import constant, cosine, multistep, one_cycle
from pruneflow.training.rewinding import LearningRateSnapshot

ALL = [
    constant,
    multistep,
    cosine,
    partial(cosine, warmup_epochs=2),
    one_cycle,
    partial(one_cycle, cycle_momentum=True),
]


def make(schedule, *length, lr=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)
    return optimizer, schedule(optimizer, *length)


def stepped(optimizer, scheduler, steps):
    """Learning rate and momentum of each step, exactly."""
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return found


def rates(schedule, epochs, steps_per_epoch=1, lr=1.0):
    steps = stepped(*make(schedule, epochs, steps_per_epoch, lr=lr), epochs * steps_per_epoch)
    return [rate for rate, _ in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant, [1, 1, 1, 1]),
        (multistep, [1, 1, 0.1, 0.01]),
        (partial(multistep, milestones=(0.3,), gamma=0.5), [1, 1, 0.5, 0.5]),
        (cosine, [1, 0.853553, 0.5, 0.146447]),
        (partial(cosine, warmup_epochs=2), [1 / 3, 2 / 3, 1, 0.5]),
        (partial(one_cycle, peak=0.5), [0.04, 1, 0.5, 0]),
        (partial(one_cycle, peak=0.75), [0.04, 0.52, 1, 0]),
        (partial(one_cycle, peak=0), [0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_four_steps_by_hand(schedule, expected):
    assert rates(schedule, 4) == pytest.approx(expected, abs=1e-5)
    assert rates(schedule, 4, lr=0.2) == pytest.approx([0.2 * rate for rate in expected], abs=1e-5)


def test_lengths_are_in_steps():
    assert rates(multistep, 4, 2) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = rates(partial(cosine, warmup_epochs=1), 3, 4)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert warm[4:] == pytest.approx(rates(cosine, 2, 4))
    assert rates(partial(one_cycle, peak=0.5), 3, 4).index(1) == 5


@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        (multistep, lambda optimizer: MultiStepLR(optimizer, [10, 15])),
        (cosine, lambda optimizer: CosineAnnealingLR(optimizer, 20)),
        (one_cycle, lambda optimizer: OneCycleLR(optimizer, 1, 20, cycle_momentum=False)),
        (
            partial(one_cycle, cycle_momentum=True),
            lambda optimizer: OneCycleLR(optimizer, 1, 20),
        ),
    ],
)
def test_they_are_torchs_to_the_bit(schedule, torchs):
    assert stepped(*make(schedule, 4, 5), 20) == stepped(*make(torchs), 20)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_the_optimizers_rate_is_the_highest(schedule, steps_per_epoch):
    found = rates(schedule, 5, steps_per_epoch)
    assert 0.9 < max(found) <= 1
    assert min(found) > 0


@pytest.mark.parametrize("epochs", [1, 2, 4, 10])
@pytest.mark.parametrize("peak", [0, 0.1, 0.25, 0.5])
def test_a_cycle_may_be_of_few_steps(epochs, peak):
    assert len(rates(partial(one_cycle, peak=peak), epochs)) == epochs


def test_momentum_is_left_alone_unless_asked():
    assert {momentum for _, momentum in stepped(*make(one_cycle, 10), 10)} == {0.9}
    _, cycled = zip(*stepped(*make(partial(one_cycle, cycle_momentum=True), 10), 10), strict=True)
    assert min(cycled) == pytest.approx(0.85)
    assert max(cycled) == pytest.approx(0.95)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("after", [1, 7, 13])
def test_resumes_from_a_file_to_the_bit(schedule, after):
    whole = stepped(*make(schedule, 5, 4), 20)
    optimizer, scheduler = make(schedule, 5, 4)
    stepped(optimizer, scheduler, after)
    states = through_a_file([optimizer.state_dict(), scheduler.state_dict()])
    optimizer, scheduler = make(schedule, 5, 4)
    for part, state in zip((optimizer, scheduler), states, strict=True):
        part.load_state_dict(state)
    assert stepped(optimizer, scheduler, 20 - after) == whole[after:]


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("after", [1, 7, 13])
def test_rewinds_to_the_bit(schedule, after):
    optimizer, scheduler = make(schedule, 5, 4)
    state = through_a_file(LearningRateSnapshot([optimizer], [scheduler]).state())
    whole = stepped(optimizer, scheduler, 20)
    for _ in range(2):
        LearningRateSnapshot.from_state(state).restore([optimizer], [scheduler])
        assert stepped(optimizer, scheduler, after) == whole[:after]


@pytest.mark.parametrize(
    "schedule",
    [
        partial(multistep, milestones=np.array([0.5]), gamma=np.float64(0.1)),
        partial(cosine, warmup_epochs=np.int64(2)),
        partial(one_cycle, peak=np.float64(0.4)),
    ],
)
def test_numpys_numbers_do_not_enter_the_state(schedule):
    _, scheduler = make(schedule, np.int64(5), np.int64(2))
    through_a_file(scheduler.state_dict())


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *((partial(schedule, epochs=0), "epochs") for schedule in ALL),
        *((partial(schedule, epochs=5, steps_per_epoch=0), "steps_per_epoch") for schedule in ALL),
        (partial(multistep, epochs=10, milestones=[5]), "milestones"),
        (partial(cosine, epochs=5, warmup_epochs=5), "warmup_epochs"),
        (partial(one_cycle, epochs=5, peak=1), "peak"),
    ],
)
def test_bad_arguments_are_named(schedule, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0))
