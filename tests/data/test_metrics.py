import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from pomona.data.metrics import classification_metrics, expected_calibration_error, regression_metrics


def test_perfect_and_uniform_classification():
    target = torch.tensor([0, 1, 2, 0])
    perfect = classification_metrics(50 * torch.eye(3)[target], target)
    assert perfect == pytest.approx(
        {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "log_loss": 0, "auroc": 1, "ece": 0}, abs=1e-9
    )
    flat = classification_metrics(torch.zeros(4, 3), target)
    assert flat["log_loss"] == pytest.approx(np.log(3)) and flat["auroc"] == pytest.approx(0.5)


def test_classification_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator)
    got = classification_metrics(logits, target)
    probability = logits.double().softmax(-1).numpy()
    assert got["log_loss"] == pytest.approx(sk.log_loss(target, probability))
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(target, probability, multi_class="ovr"))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(target, probability.argmax(1), average="macro"))


def test_auroc_needs_two_classes():
    assert np.isnan(classification_metrics(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))["auroc"])


def test_calibration_error_of_half_right_certainty_is_a_half():
    assert expected_calibration_error(np.array([[1.0, 0.0]] * 10), np.arange(10) % 2) == pytest.approx(0.5)


def test_regression():
    target = torch.tensor([[1.0], [2.0], [3.0]])
    assert regression_metrics(target, target) == {"rmse": 0, "mae": 0, "r2": 1}
    mean = regression_metrics(torch.full((3, 1), 2.0), target)
    assert mean["r2"] == pytest.approx(0) and mean["rmse"] == pytest.approx(np.sqrt(2 / 3))
    assert np.isnan(regression_metrics(torch.zeros(3, 1), torch.ones(3, 1))["r2"])
