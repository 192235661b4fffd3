import pytest
import torch

from pomona.data.arithmetic import ArithmeticTask
from pomona.errors import PomonaError

SIZES = (200, 50, 100)


@pytest.mark.parametrize(
    ("op", "answer"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul", lambda a, b: a * b),
        ("div", lambda a, b: a / b),
        ("square", lambda a, b: a**2),
        ("sqrt", lambda a, b: a**0.5),
    ],
)
def test_targets_are_the_operation_on_two_overlapping_sums(op, answer):
    task = ArithmeticTask(op, sizes=SIZES)
    assert task.subsets.sum(1).tolist() == [25, 25] and (task.subsets.prod(0)).sum() == 12
    assert [len(s) for s in task.splits.values()] == [200, 50, 100]
    for x, y in task.splits.values():
        a, b = (x.double() @ task.subsets.T).unbind(1)
        torch.testing.assert_close(y[:, 0].double(), answer(a, b), rtol=1e-6, atol=0)
    assert task.splits["train"].x.max() < 2 < task.splits["test"].x.min()


def test_threshold_separates_smaller_errors_from_larger_ones():
    task = ArithmeticTask("mul", 20, train_range=(-2, 2), test_range=(-6, -2), sizes=SIZES, seed=3)
    x = task.splits["test"].x
    assert task.threshold(1e-6) < task.threshold() < task.threshold(1e-4)
    assert task.solved(task.answer(x, (task.subsets - 0.9e-5).abs()))
    assert not task.solved(task.answer(x, (task.subsets - 1.1e-5).abs()))
    assert task.solved(task.splits["test"].y)


def test_seed_gives_subsets_and_numbers():
    a, b, c = (ArithmeticTask(sizes=SIZES, seed=seed) for seed in (1, 1, 2))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


def test_bad_input():
    with pytest.raises(PomonaError, match=r"^op='mull' is not known; did you mean mul"):
        ArithmeticTask("mull")
    with pytest.raises(PomonaError, match=r"^op='sqrt' needs ranges above 0"):
        ArithmeticTask("sqrt", train_range=(-2, 2))
    with pytest.raises(PomonaError, match=r"they have 75 and span 113"):
        ArithmeticTask(subset_ratio=0.75)
