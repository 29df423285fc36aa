"""Learning rates: a function of the step alone until a time limit runs them down."""

import itertools

import pytest
import torch

from longstride.config import FlowConfig
from longstride.training.module_state import ModuleState
from longstride.training.schedule import RateSchedule, early_end_note, learning_rate

SCHEDULE = RateSchedule(peak=1.0, warm_up=10, total=100, max_seconds=30.0)


def state(step, cooldown_from=None):
    found = ModuleState.fresh(torch.nn.Linear(1, 1), learning_rate=1.0, weight_decay=0.0, rate_key="a.key", seed=0)
    found.step, found.cooldown_from = step, cooldown_from
    return found


def test_the_rate_depends_on_the_step_alone():
    rates = [learning_rate(step, peak=1.0, warm_up=10, total=100) for step in range(101)]
    assert rates[9] == 1.0
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert [SCHEDULE.rate(state(step)) for step in range(101)] == rates
    assert SCHEDULE.last_step(state(50)) == 100


@pytest.mark.parametrize("begin", [3, 40])
def test_past_the_time_limit_the_rate_falls_to_zero_in_a_twentieth_of_the_steps(begin):
    planned = [learning_rate(step, peak=1.0, warm_up=10, total=100) for step in range(101)]
    found = [SCHEDULE.rate(state(step, begin)) for step in range(begin, begin + 6)]
    assert SCHEDULE.last_step(state(begin, begin)) == begin + 5
    assert found[0] == planned[begin]
    assert found == pytest.approx([planned[begin] * (5 - k) / 5 for k in range(6)])


def test_an_early_end_never_lengthens_training_nor_raises_the_rate():
    assert SCHEDULE.last_step(state(98, 98)) == 100
    for step in (98, 99):
        assert SCHEDULE.rate(state(step, 98)) <= SCHEDULE.rate(state(step))


def test_the_early_end_begins_once():
    here = state(40)
    SCHEDULE.count(here, 29.0)
    assert (here.wall_s, here.cooldown_from) == (29.0, None)
    SCHEDULE.count(here, 31.0)
    here.step = 41
    SCHEDULE.count(here, 32.0)
    assert (here.wall_s, here.cooldown_from) == (32.0, 40)


def test_an_early_end_is_said():
    section = FlowConfig(max_steps=100, max_seconds=30.0)
    assert early_end_note(state(100), section) is None
    assert "the time limit of 30 s ended training at step 45 of 100" in early_end_note(state(45, 40), section)
