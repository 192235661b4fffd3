import math

import pytest

from pomona.errors import PomonaError
from pomona.train.schedules import Constant, Cosine, Linear, Step, Warmup


def test_constant_is_one():
    assert {Constant()(p / 10, p) for p in range(11)} == {1.0}


@pytest.mark.parametrize("schedule", [Cosine(0.1), Linear(0.1)])
def test_cosine_and_linear_go_from_one_to_the_floor(schedule):
    values = [schedule(p / 100, p) for p in range(101)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.1)
    assert schedule(1.5, 0) == values[-1]
    assert values == sorted(values, reverse=True)
    assert values[50] == pytest.approx(0.55)


def test_step_drops_at_equal_distances():
    schedule = Step(drops=2, gamma=0.1)
    assert [schedule(p, 0) for p in (0, 0.3, 0.34, 0.6, 0.7, 1.0)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warmup_rises_linearly_into_the_inner_schedule():
    schedule = Warmup(Constant(), 0.2)
    assert schedule(0.0, 0) == pytest.approx(0.02)
    assert schedule(0.1, 5) == pytest.approx(0.5)
    assert schedule(0.2, 10) == 1
    assert Warmup(Cosine(), 0.0)(0.0, 0) == 1
    assert Warmup(Cosine(), 0.2)(0.5, 0) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


def test_warmup_must_be_a_fraction():
    with pytest.raises(PomonaError, match="warmup=1 must be a fraction"):
        Warmup(Constant(), 1)
