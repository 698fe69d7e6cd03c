import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruneflow import Clock, Compounding, Linear, OneShot, Plan
from pruneflow.pruning.plan import pruned_count


@given(
    rounds=st.integers(1, 20),
    start=st.integers(0, 10),
    every=st.integers(1, 5),
    slack=st.integers(1, 9),
)
def test_each_round_is_due_exactly_once(rounds, start, every, slack):
    length = start + (rounds - 1) * every + slack
    plan = Plan.lay(Linear(0.9, rounds), Clock(start, every), length)
    due = [plan.due(epoch) for epoch in range(length)]
    assert due == sorted(due)
    assert due[-1] == rounds
    for number in range(1, rounds + 1):
        assert due.index(number) == start + (number - 1) * every


def test_a_look_at_a_long_plan_is_a_short_one():
    class Watched:
        looks = 0

        def __init__(self, at):
            self._at = at

        @property
        def at(self):
            Watched.looks += 1
            return self._at

    plan = Plan(tuple(Watched(3 * number) for number in range(1, 5001)), "step", None)
    assert [plan.due(step) for step in (0, 2, 3, 4, 7500, 99999)] == [0, 0, 1, 1, 2500, 5000]
    assert Watched.looks < 6 * 14


def test_amounts_are_of_the_remaining():
    plan = Plan.lay([0.5, 0.75, 0.9], Clock(), 3)
    assert [planned.amount for planned in plan.rounds] == pytest.approx([0.5, 0.5, 0.6])


def test_counts_do_not_drift_over_rounds():
    schedule = Compounding(target=0.98, rounds=50)
    assert pruned_count(schedule(50), 1003) == round(0.98 * 1003)


def test_a_plain_function_gets_as_many_rounds_as_fit():
    plan = Plan.lay(lambda k: 1 - 0.5**k, Clock(start=1, every=2), length=6)
    assert [(planned.at, planned.sparsity) for planned in plan.rounds] == [
        (1, 0.5),
        (3, 0.75),
        (5, 0.875),
    ]


def test_sparsity_not_known_in_advance():
    table = Plan.lay(2, Clock(every=3), 6).table(100)
    assert "The sparsity is not known in advance" in table
    assert table.splitlines()[2].split() == ["1", "0", "?", "?", "?"]


def test_says_how_much_fine_tuning_follows():
    assert "5 epochs of fine-tuning follow" in Plan.lay(OneShot(0.9), Clock(2), 7).table(10)
    assert "1 step of fine-tuning follows" in Plan.lay(OneShot(0.9), Clock(6, 1, "step"), 7).table(
        9
    )


def test_the_remedy_makes_room_for_all_rounds():
    with pytest.raises(ValueError, match="raise `max_epochs` to 9"):
        Plan.lay(Linear(0.9, 3), Clock(6), 6)
    Plan.lay(Linear(0.9, 3), Clock(6), 9)


@pytest.mark.parametrize("schedule", [OneShot(0.9), lambda k: 0.5])
def test_refuses_what_cannot_finish(schedule):
    with pytest.raises(ValueError, match=r"`max_epochs`=10.*raise `max_epochs` to 15"):
        Plan.lay(schedule, Clock(10, 5), 10)


def test_refuses_more_rounds_than_fit_but_not_one_that_just_fits():
    Plan.lay(Linear(0.9, 4), Clock(0, 3), 10)
    with pytest.raises(
        ValueError, match="whose last round, 4, would prune at the start of epoch 9"
    ):
        Plan.lay(Linear(0.9, 4), Clock(0, 3), 9)


@pytest.mark.parametrize(
    ("clock", "message"),
    [
        (dict(start=-1), "`start_epoch`"),
        (dict(every=0), "`epochs_per_round`"),
        (dict(every=1.5, unit="step"), "`steps_per_round`"),
        (dict(every=np.float64(2)), "`epochs_per_round`"),
        (dict(start=np.True_), "`start_epoch`"),
        (dict(start=torch.tensor([1, 2])), "`start_epoch`"),
    ],
)
def test_refuses_a_clock_that_does_not_run(clock, message):
    with pytest.raises(ValueError, match=message):
        Clock(**clock)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_whole_numbers_of_any_kind_become_plain(kind):
    clock = Clock(kind(3), kind(2))
    assert clock == Clock(3, 2)
    assert type(clock.start) is type(clock.every) is int
    assert Clock.counting(None, None, kind(0), kind(5)) == Clock(0, 5, "step")
    assert Plan.lay(kind(2), clock, 9) == Plan.lay(2, clock, 9)
