import pytest

from pomona.errors import PomonaError
from pomona.train.budget import Budget, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("2m", 120), ("1h30m", 5400), ("1.5 min", 90), (3, 3), ("1d", 86400)]
)
def test_durations_read_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "2 parsecs", "0", "-3s", 0, True])
def test_other_texts_are_refused(text):
    with pytest.raises(PomonaError, match="budget="):
        parse_duration(text)


def test_steps_of_each_kind():
    assert Budget("epochs", 3).steps(100, 32) == 9
    assert Budget("epochs", 0.01).steps(100, 32) == 1
    assert Budget("examples", 640).steps(100, 32) == 20
    assert Budget("seconds", 5).steps(100, 32) is None
    assert Budget("flops", 3 * 32 * 10 * 7).steps(100, 32, flops_per_example=10) == 7


def test_a_batch_is_never_larger_than_the_data():
    assert Budget("epochs", 2).steps(10, 64) == 2
    assert Budget("examples", 100).steps(10, 64) == 10


def test_flops_need_a_cost():
    with pytest.raises(PomonaError, match="needs flops_per_example above 0"):
        Budget("flops", 1e6).steps(100, 32)


@pytest.mark.parametrize("amount", [0, -1, True, "3"])
def test_amounts_must_be_numbers_above_zero(amount):
    with pytest.raises(PomonaError, match="must be a number above 0"):
        Budget("epochs", amount)
