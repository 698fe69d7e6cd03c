import pickle
from dataclasses import astuple
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pruneflow import Compounding, Cubic, Explicit, Linear, OneShot
from pruneflow.pruning.schedules import Schedule, sparsity_per_round

fractions = st.floats(0, 0.999)
rounds = st.integers(1, 40)
every_schedule = pytest.mark.parametrize(
    "make",
    [
        lambda target, rounds: OneShot(target),
        lambda target, rounds: Compounding(target=target, rounds=rounds),
        lambda target, rounds: Linear(target, rounds),
        lambda target, rounds: Cubic(target, rounds),
        lambda target, rounds: Explicit([0.1 * k for k in range(1, 10)], target=target),
    ],
    ids=["one_shot", "compounding", "linear", "cubic", "explicit"],
)


@every_schedule
@given(target=fractions, rounds=rounds)
@example(target=4.9502812221747115e-15, rounds=10)
def test_starts_dense_never_falls_and_ends_on_the_target(make, target, rounds):
    schedule = make(target, rounds)
    values = [schedule(k) for k in range(schedule.rounds + 1)]
    assert values[0] == 0
    assert values[-1] == target
    assert values == sorted(values)
    assert isinstance(schedule, Schedule)


@every_schedule
def test_is_a_value(make):
    schedule = make(0.9, 4)
    assert pickle.loads(pickle.dumps(schedule)) == schedule == make(0.9, 4)
    assert "0.9" in repr(schedule)


@every_schedule
@pytest.mark.parametrize("round", [-1, 100])
def test_refuses_rounds_it_does_not_have(make, round):
    with pytest.raises(ValueError, match="`round` must be from 0 to"):
        make(0.9, 4)(round)


def plain(value):
    """Whether it is Python's own number, or a tuple of such."""
    return all(map(plain, value)) if type(value) is tuple else type(value) in (int, float)


@every_schedule
@pytest.mark.parametrize("number", [np.float64, np.float32, np.array, torch.tensor, Fraction])
def test_numbers_of_any_kind_become_plain(make, number):
    whole = np.array if number is np.array else torch.tensor if number is torch.tensor else np.int64
    schedule = make(number(0.75), whole(3))
    assert schedule == make(0.75, 3)
    assert plain(astuple(schedule))
    assert plain(sparsity_per_round(schedule))


@pytest.mark.parametrize(
    "schedule",
    [
        list(np.linspace(0.3, 0.9, 4)),
        np.linspace(0.3, 0.9, 4),
        torch.linspace(0.3, 0.9, 4, dtype=torch.float64),
        [torch.tensor(0.3), Fraction(1, 2), np.float16(0.7), 0.9],
        lambda k: 1 - np.exp(-0.3 * k),
        lambda k: torch.tensor(0.2) * k,
        Explicit(np.linspace(0.3, 0.9, 4), target=np.float32(0.8), rounds=np.int64(4)),
        Explicit.from_amounts(np.full(4, 0.2), target=np.float64(0.8)),
        Compounding(amount=np.float64(0.2), rounds=np.int8(4)),
        Compounding(target=np.float64(0.6), amount=np.float32(0.2)),
    ],
)
def test_sparsities_are_plain_whatever_they_are_computed_with(schedule):
    sparsities = sparsity_per_round(schedule, 4)
    assert plain(sparsities)
    assert len(sparsities) >= 4


@given(amount=st.floats(0.01, 0.8), rounds=st.integers(1, 6))
def test_compounding_is_the_formula(amount, rounds):
    schedule = Compounding(amount=amount, rounds=rounds)
    assert schedule.target == pytest.approx(1 - (1 - amount) ** rounds)
    again = Compounding(target=schedule.target, rounds=rounds)
    assert again.amount == pytest.approx(amount)
    assert Compounding(target=schedule.target, amount=amount).rounds == rounds


def test_two_rounds_of_gamma_leave_the_square_of_the_density():
    assert Compounding(amount=0.2, rounds=5)(2) == pytest.approx(1 - 0.8**2)


def test_rounds_from_target_and_amount_are_enough_and_not_one_too_many():
    schedule = Compounding(target=0.98, amount=0.3)
    assert schedule.rounds == 11
    assert schedule.amount <= 0.3
    assert 1 - 0.7**10 < 0.98
    assert Compounding(target=0.875, amount=0.5).rounds == 3  # exactly, despite rounded logarithms


@given(amounts=st.lists(st.floats(0, 0.9), min_size=1, max_size=8))
def test_differing_amounts_compose(amounts):
    schedule = Explicit.from_amounts(amounts)
    density = reduce(lambda kept, amount: kept * (1 - amount), amounts, 1.0)
    assert schedule.target == pytest.approx(1 - density, abs=1e-12)


def test_cubic_and_linear_literals():
    assert [Cubic(0.8, 4)(k) for k in (1, 2, 4)] == pytest.approx([0.4625, 0.7, 0.8])
    assert [Linear(0.8, 4)(k) for k in (1, 2, 4)] == pytest.approx([0.2, 0.4, 0.8])


@pytest.mark.parametrize(
    "target",
    [
        *(1, 1.0, -0.1, 98, "0.9", True, float("nan"), 0.5j, 1 - Fraction(1, 10**20)),
        *(np.float64(1), np.float32("nan"), np.False_, np.array([0.5]), torch.tensor([0.5])),
        *(torch.tensor(False), torch.tensor(1.5)),
    ],
)
@every_schedule
def test_refuses_a_target_outside_zero_to_one(make, target):
    with pytest.raises(ValueError, match="`target` must be a number in"):
        make(target, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneShot(0.9, rounds=3), "`rounds` must be 1 .* for OneShot"),
        (lambda: Compounding(target=0.9), "two of `target`, `amount` and `rounds`"),
        (lambda: Compounding(target=0.9, amount=0.5, rounds=2), "`amount` must be 0.68"),
        (lambda: Compounding(target=0.9, amount=0), "`amount` must be above 0"),
        (lambda: Compounding(amount=0.9, rounds=400), "`target`"),
        (lambda: Linear(0.9, 0), "`rounds` must be a whole number"),
        (lambda: Cubic(0.9, 2.5), "`rounds` must be a whole number"),
        (lambda: Explicit([]), "`sparsities` must have one value per round, got none"),
        (lambda: Explicit([0.5, 0.4]), "must be cumulative and not decrease"),
        (lambda: Explicit([0.5, 0.9], rounds=3), "`rounds` must be the number"),
        (lambda: Explicit([0.0], target=0.5), "must be 0 if `sparsities` end at 0"),
        (lambda: sparsity_per_round(lambda k: 0.5), "must have a number of rounds"),
        (lambda: sparsity_per_round(lambda k: 1 - k / 4, 3), "must be cumulative and not decrease"),
    ],
)
def test_refuses_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_what_is_no_schedule():
    with pytest.raises(TypeError, match="`schedule` must be"):
        sparsity_per_round("cubic")
