import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from pruneflow.rewinding import LearningRateSnapshot, settle_optimizer_state


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 5),
        lambda optimizer: MultiStepLR(optimizer, [2, 4]),
        lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=6),
    ],
)
def test_the_learning_rates_of_a_round_are_those_of_the_first(make):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    snapshot = LearningRateSnapshot([optimizer], [scheduler])
    file = io.BytesIO()
    torch.save(snapshot.state(), file)
    file.seek(0)
    snapshot = LearningRateSnapshot.from_state(torch.load(file, weights_only=True))
    seen = []
    for _ in range(2):
        rates = []
        for _ in range(5):
            group = optimizer.param_groups[0]
            rates.append((group["lr"], group["momentum"]))
            optimizer.step()
            scheduler.step()
        seen.append(rates)
        snapshot.restore([optimizer], [scheduler])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 1


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
    settle_optimizer_state(
        "zero_pruned", [optimizer], [(weight, torch.tensor([True, False, True]))]
    )
    state = optimizer.state[weight]
    assert state["exp_avg"].tolist() == [before[0], 0, before[2]]
    assert state["exp_avg_sq"][1] == 0
    assert state["step"] == 1
    assert (optimizer.state[other]["exp_avg"] != 0).all()
