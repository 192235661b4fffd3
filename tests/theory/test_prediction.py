import numpy as np
import pytest
import torch

from pomona.errors import PomonaError
from pomona.theory.prediction import Measurement, Prediction, hold

X = [1.0, 2.0, 4.0]


def test_exact_agrees_within_standard_errors_and_not_beyond():
    prediction = Prediction(X, [1.0, 2.0, 4.0])
    near = hold(prediction, Measurement(X, [1.1, 1.9, 4.2], [0.1, 0.1, 0.1], 5))
    assert near.agrees and near.worst_z == pytest.approx(2.0)
    far = hold(prediction, Measurement(X, [1.1, 1.9, 4.4], [0.1, 0.1, 0.1], 5))
    assert not far.agrees and far.violations == 1 and far.worst_z == pytest.approx(4.0)
    assert hold(prediction, Measurement(X, [1.1, 1.9, 4.4], [0.1, 0.1, 0.1]), rtol=0.1).agrees


def test_measured_points_between_predicted_ones_are_interpolated():
    assert hold(Prediction(X, [1.0, 2.0, 4.0]), Measurement([3.0], [3.0])).agrees
    with pytest.raises(PomonaError, match="leaves the predicted range 1..4"):
        hold(Prediction(X, X), Measurement([5.0], [5.0]))


def test_bounds_count_violations_and_report_slack():
    upper = hold(Prediction(X, [1.0, 1.0, 1.0], kind="upper"), Measurement(X, [0.5, 0.8, 1.2]))
    assert not upper.agrees and upper.violations == 1 and upper.slack == pytest.approx(0.7 / 3)
    lower = hold(Prediction(X, [1.0, 1.0, 1.0], kind="lower"), Measurement(X, [1.5, 1.1, 1.2]))
    assert lower.agrees and lower.slack == pytest.approx(0.8 / 3) and lower.worst_z == 0


def test_asymptotic_judges_the_last_point_only():
    assert hold(Prediction(X, [1.0, 1.0, 1.0], kind="asymptotic"), Measurement(X, [9.0, 2.0, 1.0])).agrees
    assert not hold(Prediction(X, [1.0, 1.0, 1.0], kind="asymptotic"), Measurement(X, [1.0, 1.0, 2.0])).agrees


def test_sign_forgives_only_noise():
    prediction = Prediction(X, [1.0, -1.0, 1.0], kind="sign")
    assert hold(prediction, Measurement(X, [9.0, -0.1, -0.1], [0.1, 0.1, 0.1], 3)).agrees
    assert not hold(prediction, Measurement(X, [9.0, 0.5, 1.0], [0.1, 0.1, 0.1], 3)).agrees


def test_not_a_number_is_a_violation():
    assert not hold(Prediction(X, X), Measurement(X, [1.0, float("nan"), 4.0], [1.0, 1.0, 1.0])).agrees


def test_samples_give_mean_and_standard_error():
    m = Measurement.of([1.0, 2.0], torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    np.testing.assert_allclose(m.mean, [2.0, 2.0])
    np.testing.assert_allclose(m.sem, [1.0, 0.0])
    assert m.n_seeds == 2


def test_plot_draws_both(tmp_path):
    verdict = hold(Prediction(X, X), Measurement(X, X))
    assert len(verdict.figure().data) == 2
    verdict.plot(str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").stat().st_size > 1000


def test_bad_kind_message():
    with pytest.raises(PomonaError, match="kind='excat' is not known; did you mean exact"):
        Prediction(X, X, kind="excat")
