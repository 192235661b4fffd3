"""Any candidate as a scikit-learn estimator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from pomona.data.pipeline import Pipeline, fit_encoders
from pomona.data.target import TargetCoder
from pomona.data.task import Task, tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.recipe.execute import train_recipe
from pomona.recipe.recipe import Recipe
from pomona.train.budget import Budget
from pomona.train.loop import predict

FEWEST_STEPS = 300
"""Small tables get at least so many steps: 100 epochs of 30 rows would be 100 steps, too few to learn from."""


class _PomonaEstimator(BaseEstimator):
    """What classifier and regressor share.

    Args:
        candidate: text, mapping or :class:`~pomona.recipe.Recipe`.
        epochs: passes over the training rows, or 300 steps where that is more.
        validation: fraction of the rows that is held out to stop early and keep the best weights; 0 keeps the last.
        random_state: of the split, initialisation and batches.
        device: where to train.
    """

    _kind = ""

    def __init__(
        self,
        candidate: Any = "mlp",
        *,
        epochs: float = 100,
        validation: float = 0.2,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.candidate = candidate
        self.epochs = epochs
        self.validation = validation
        self.random_state = random_state
        self.device = device

    def _encode_inputs(self, X: Any, fit: bool) -> Tensor:
        """Typed columns for a frame that has some that are not numbers; standardised numbers otherwise."""
        if fit:
            self._typed = isinstance(X, pd.DataFrame) and not all(map(pd.api.types.is_numeric_dtype, X.dtypes))
        if self._typed:
            validate_data(self, X, reset=fit, skip_check_array=True)
            frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(X, columns=self.feature_names_in_)
            frame = frame.rename(columns=str)
            if fit:
                encoders, _ = fit_encoders(frame, {}, Path(), 32)
                self.pipeline_ = Pipeline("table", TargetCoder("y", "classes", ()), encoders)
                self._inputs = self.pipeline_.inputs
            return self.pipeline_.transform(frame)
        array = validate_data(self, X, reset=fit, dtype=np.float64, ensure_min_samples=2 if fit else 1)
        if fit:
            self.mean_ = array.mean(axis=0)
            spread = array.std(axis=0)
            self.scale_ = np.where(spread > 0, spread, 1.0)
            self._inputs = Inputs("table", (array.shape[1],))
        return torch.from_numpy(((array - self.mean_) / self.scale_).astype(np.float32))

    def _train(self, x: Tensor, y: Tensor, outputs: Outputs) -> None:
        recipe = Recipe.parse(self.candidate)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if not 0 <= self.validation < 1:
            raise PomonaError(f"validation={self.validation!r} must be a fraction in [0, 1)")
        rows = np.arange(len(x))
        held = int(self.validation * len(x))
        fitted, checked = rows, rows
        if held >= max(4, outputs.size if outputs.kind == "classes" else 1):
            stratum = y.numpy() if outputs.kind == "classes" else None
            if stratum is not None and np.unique(stratum, return_counts=True)[1].min() < 2:
                stratum = None
            fitted, checked = train_test_split(rows, test_size=held, random_state=seed, stratify=stratum)
        train, valid = (x[fitted], y[fitted]), (x[checked], y[checked])
        task = tensors("estimator", self._inputs, outputs, train, valid, valid)
        settings = recipe.train_settings()
        batch = min(settings.batch_size, len(fitted))
        if not self.epochs > 0:
            raise PomonaError(f"epochs={self.epochs!r} must be above 0")
        budget = Budget("examples", max(self.epochs * len(fitted), FEWEST_STEPS * batch))
        if len(checked) == len(rows):  # nothing was held out, so there is nothing to stop early by
            recipe = recipe.with_values({"patience": None})
        self._fitted(train_recipe(recipe, task, budget, seed=seed, device=self.device), task)

    def _fitted(self, trained: Any, task: Task) -> None:
        if trained.fit.stopped == "diverged" and trained.fit.best < 0:
            raise PomonaError("the training diverged; try a smaller learning rate, such as candidate='mlp lr=0.0005'")
        self.network_ = trained.fit.net
        self.curve_ = trained.fit.curve

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        # double precision, so that a row's prediction does not depend on the rows beside it
        return predict(copy.deepcopy(self.network_).double(), self._encode_inputs(X, fit=False).double())


class PomonaClassifier(ClassifierMixin, _PomonaEstimator):
    """A candidate as a scikit-learn classifier.

    Attributes:
        classes_: labels.
        network_: the trained module; it takes standardised features and gives logits.
        curve_: validation history.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> PomonaClassifier("mlp width=32", random_state=0).fit(X, y).score(X, y) > 0.9
        True
    """

    def fit(self, X: Any, y: Any) -> PomonaClassifier:
        """Train on rows ``X`` (n, features), an array or a DataFrame with columns of any type, and labels ``y`` (n,).

        Raises:
            PomonaError: for a wrong candidate or setting.
            ValueError: scikit-learn's own, for arrays that do not fit.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        x = self._encode_inputs(X, fit=True)
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        if len(labels) != len(x):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {[len(x), len(labels)]}")
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class, {self.classes_[0]!r}; a classifier needs at least two")
        names = tuple(map(str, self.classes_))
        self._train(x, torch.from_numpy(codes).long(), Outputs("classes", len(names), names))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, classes), in the order of ``classes_``."""
        return self._outputs(X).softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each row."""
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(-1).numpy()]


class PomonaRegressor(RegressorMixin, _PomonaEstimator):
    """A candidate as a scikit-learn regressor, for one target or several.

    Attributes:
        network_: the trained module; it takes standardised features and gives values in the target's units.
        curve_: validation history.
    """

    def fit(self, X: Any, y: Any) -> PomonaRegressor:
        """Train on rows ``X`` (n, features) and values ``y`` (n,) or (n, targets).

        Raises:
            PomonaError: for a wrong candidate or setting.
            ValueError: scikit-learn's own, for arrays that do not fit.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        x = self._encode_inputs(X, fit=True)
        values = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if len(values) != len(x):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {[len(x), len(values)]}")
        self._single = values.ndim == 1
        values = values.reshape(len(values), -1)
        if self._single is False and values.shape[1] == 1:
            values = column_or_1d(y, warn=True).astype(np.float64).reshape(-1, 1)
            self._single = True
        spread = values.std(axis=0)
        scale = tuple(float(s) for s in np.where(spread > 0, spread, 1.0))
        outputs = Outputs("number", values.shape[1], (), tuple(map(float, values.mean(axis=0))), scale)
        self._train(x, torch.tensor(values, dtype=torch.float32), outputs)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predicted values, shaped like the ``y`` of :meth:`fit`."""
        values = self._outputs(X).numpy()
        return values[:, 0] if self._single else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
