import itertools
import random

import pytest
import torch

from pomona.data.reber import SYMBOLS, accepts, embedded_reber, encode, reber_string, reber_task
from pomona.errors import PomonaError


@pytest.mark.parametrize("embedded", [True, False])
def test_generated_strings_are_accepted(embedded):
    rng = random.Random(0)
    strings = [reber_string(rng, embedded) for _ in range(300)]
    assert all(accepts(string, embedded) for string in strings)
    assert len(set(strings)) > 50


def test_the_shortest_strings_are_known():
    five = ["".join(letters) for letters in itertools.product(SYMBOLS, repeat=5)]
    assert sorted(s for s in five if accepts(s, embedded=False)) == ["BPVVE", "BTXSE"]
    assert accepts("BTBTXSETE")
    assert accepts("BPBPVPSEPE")
    for wrong in ("BTBTXSEPE", "BTBTXSET", "BTBTXSTE", "", "BTTE", "BPVVE"):
        assert not accepts(wrong)


@pytest.mark.parametrize("embedded", [True, False])
def test_corrupted_strings_are_rejected_and_differ_by_one_letter(embedded):
    strings, valid = embedded_reber(400, 10, 25, corrupt=0.3, embedded=embedded, seed=4)
    assert [accepts(s, embedded) for s in strings] == valid.bool().tolist()
    assert int(valid.sum()) == 280
    assert all(10 <= len(s) <= 25 for s in strings)
    again, _ = embedded_reber(400, 10, 25, corrupt=0.3, embedded=embedded, seed=4)
    assert strings == again


def test_long_range_corruption_breaks_only_the_frame():
    strings, _ = embedded_reber(50, corrupt=1.0, long_range=1.0)
    for string in strings:
        assert accepts(string[2:-2], embedded=False)
        assert string[1] + string[-2] in ("TP", "PT")


def test_encoding_ends_together():
    x = encode(["BTE", "BE"], 4)
    assert x.shape == (2, 7, 4)
    assert x[1].sum(0).tolist() == [0, 0, 1, 1]
    assert [SYMBOLS[i] for i in x[0].argmax(0)[1:]] == list("BTE")


def test_task():
    task = reber_task(100, seed=2, min_len=9)
    assert [len(task.splits[name]) for name in ("train", "valid", "test")] == [64, 16, 20]
    assert task.example.shape[1:] == task.inputs.shape == (7, 30)
    assert torch.equal(reber_task(100, seed=2, min_len=9).splits["test"].x, task.splits["test"].x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupt": 2.0}, r"corrupt=2.0 must lie in \[0, 1\]"),
        ({"max_len": 9}, "max_len=9 leave too few strings; max_len must be above 10"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(PomonaError, match=message):
        embedded_reber(10, **options)
