import json
from functools import partial

import pytest
import torch

from pruneflow.models import constant, cosine, multistep, one_cycle

ALL = [constant, multistep, cosine, one_cycle]


def rates(schedule, epochs, lr=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = schedule(optimizer, epochs)
    found = []
    for _ in range(epochs):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant, [1, 1, 1, 1]),
        (multistep, [1, 1, 0.1, 0.01]),
        (partial(multistep, milestones=(0.3,), gamma=0.5), [1, 1, 0.5, 0.5]),
        (cosine, [1, 0.853553, 0.5, 0.146447]),
        (partial(cosine, warmup_epochs=2), [1 / 3, 2 / 3, 1, 0.5]),
        (partial(one_cycle, peak=0.5), [0.04, 0.52, 1, 0.5]),
        (partial(one_cycle, peak=0), [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_four_epochs_by_hand(schedule, expected):
    assert rates(schedule, 4) == pytest.approx(expected, abs=1e-6)
    assert rates(schedule, 4, lr=0.2) == pytest.approx([0.2 * rate for rate in expected], abs=1e-6)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("epochs", [1, 2, 7, 100])
def test_the_optimizers_rate_is_the_highest(schedule, epochs):
    found = rates(schedule, epochs)
    assert max(found) == 1
    assert min(found) > 0


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for rate in rates(cosine, 10):
        assert rate == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", ALL)
def test_state_is_plain_and_resumes(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = schedule(optimizer, 10)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))
    resumed = schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10)
    resumed.load_state_dict(state)
    assert resumed.get_last_lr() == pytest.approx([rates(schedule, 10)[6]])


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *((partial(schedule, epochs=0), "epochs") for schedule in ALL),
        (partial(multistep, epochs=10, milestones=[5]), "milestones"),
        (partial(cosine, epochs=5, warmup_epochs=5), "warmup_epochs"),
        (partial(one_cycle, epochs=5, peak=1), "peak"),
    ],
)
def test_bad_arguments_are_named(schedule, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0))
