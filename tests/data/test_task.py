import pytest
import torch

from pomona.data import tensors
from pomona.nets.specs import Inputs, Outputs


def task(outputs, y):
    x = torch.arange(8.0).reshape(4, 2)
    return tensors("t", Inputs("table", (2,)), outputs, (x, y), (x, y), (x, y))


def test_loss_of_numbers_is_in_units_of_the_training_scale():
    numbers = task(Outputs("number", 1, ("y",), (0.0,), (10.0,)), torch.zeros(4, 1))
    assert float(numbers.loss(torch.full((4, 1), 20.0), torch.zeros(4, 1))) == pytest.approx(4)
    assert numbers.metric == "rmse" and not numbers.higher_is_better


def test_loss_of_classes_is_cross_entropy():
    classes = task(Outputs("classes", 2, ("a", "b")), torch.tensor([0, 1, 0, 1]))
    assert float(classes.loss(torch.zeros(4, 2), classes.splits["train"].y)) == pytest.approx(0.6931472)
    assert classes.metric == "accuracy" and classes.higher_is_better
    assert classes.example.shape == (2, 2) and len(classes.splits["test"]) == 4


def test_the_fingerprint_sees_every_input_and_target():
    y = torch.tensor([0, 1, 0, 1])
    first = task(Outputs("classes", 2), y)
    assert first.fingerprint() == task(Outputs("classes", 2), y.clone()).fingerprint()
    changed = task(Outputs("classes", 2), torch.tensor([0, 1, 0, 0]))
    assert first.fingerprint() != changed.fingerprint()
    first.splits["test"].x[0, 0] += 1
    assert first.fingerprint() != task(Outputs("classes", 2), y).fingerprint()
