import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from pomona.errors import PomonaError
from pomona.recipe.estimators import PomonaClassifier, PomonaRegressor

X, Y = load_iris(return_X_y=True)


def small(estimator):
    """Enough for the checks that ask for some accuracy."""
    return estimator("mlp width=32 depth=1", epochs=10, random_state=0)


@parametrize_with_checks([small(PomonaClassifier), small(PomonaRegressor)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_cross_validation_is_as_good_as_iris_allows():
    assert cross_val_score(PomonaClassifier("mlp width=32", random_state=0), X, Y, cv=3).mean() > 0.9


def test_a_grid_search_over_candidates():
    search = GridSearchCV(small(PomonaClassifier), {"candidate": ["mlp width=16", "mlp act=gelu"]}, cv=2).fit(X, Y)
    assert search.best_params_["candidate"] in {"mlp width=16", "mlp act=gelu"}
    assert search.best_estimator_.score(X, Y) > 0.8


def test_a_clone_has_the_settings_and_not_the_network():
    fitted = small(PomonaClassifier).fit(X, Y)
    other = clone(fitted)
    assert other.get_params() == fitted.get_params() and not hasattr(other, "network_")
    np.testing.assert_array_equal(other.fit(X, Y).predict_proba(X), fitted.predict_proba(X))


def typed(rows: int = 200) -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.normal(size=rows), "colour": rng.choice(["red", "green", "blue"], rows)})
    frame.loc[::17, "size"] = np.nan
    return frame, frame["colour"].map({"red": "no", "green": "yes", "blue": "yes"})


def test_a_frame_with_categories_and_gaps_is_learned_from_as_it_is():
    frame, y = typed()
    fitted = PomonaClassifier("mlp width=16", epochs=30, random_state=0).fit(frame, y)
    assert fitted.score(frame, y) > 0.95 and list(fitted.classes_) == ["no", "yes"]
    np.testing.assert_allclose(fitted.predict_proba(frame).sum(1), 1)
    unseen = frame.head(3).assign(colour="violet")
    assert set(fitted.predict(unseen)) <= {"no", "yes"}


def test_columns_of_a_frame_are_held_to():
    frame, y = typed()
    fitted = PomonaClassifier("mlp width=8", epochs=1).fit(frame, y)
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame.rename(columns={"size": "length"}))


def test_several_targets_keep_their_shape():
    x, y = load_diabetes(return_X_y=True)
    both = np.stack([y, -y], axis=1)
    fitted = PomonaRegressor("mlp width=32", epochs=20, random_state=0).fit(x, both)
    assert fitted.predict(x).shape == both.shape and fitted.score(x, both) > 0.3
    assert small(PomonaRegressor).fit(x, y).predict(x).shape == y.shape


def test_no_validation_keeps_all_rows_for_training():
    fitted = PomonaClassifier("mlp width=16", validation=0.0, epochs=5, random_state=0).fit(X, Y)
    assert fitted.score(X, Y) > 0.7


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"candidate": "mlpp"}, "candidate='mlpp' is not known; did you mean mlp"),
        ({"epochs": 0}, "epochs=0 must be above 0"),
        ({"validation": 1.0}, r"validation=1.0 must be a fraction in \[0, 1\)"),
        ({"candidate": "convnet"}, "convnet takes image input, not table; use mlp, mixer"),
        (
            {"candidate": "mlp act=square depth=6 lr=1e9 optimizer=sgd clip=none"},
            "the training diverged; try a smaller learning rate",
        ),
    ],
)
def test_settings_that_are_wrong_are_one_sentence(settings, message):
    with pytest.raises(PomonaError, match=f"^{message}"):
        PomonaClassifier(**{"epochs": 1, **settings}).fit(X, Y)
