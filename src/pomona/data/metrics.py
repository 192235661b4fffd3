"""Metrics of outputs against targets, on logits (n, classes) or values (n, size)."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auroc", "ece")
REGRESSION = ("rmse", "mae", "r2")
LOWER_IS_BETTER = frozenset({"log_loss", "ece", "rmse", "mae"})


def expected_calibration_error(probability: np.ndarray, target: np.ndarray, bins: int = 15) -> float:
    """sum_b |B_b|/n * |accuracy(B_b) - confidence(B_b)| over equal-width bins of the top probability."""
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == target
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(target))


def probability_metrics(probability: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The classification metrics of probabilities (n, classes) against class indices (n,).

    AUROC is one-versus-rest, averaged over the classes that occur in ``target`` (nan when fewer than two do).
    """
    if not np.isfinite(probability).all():  # a network that has diverged is not to be scored
        return dict.fromkeys(CLASSIFICATION, float("nan"))
    n_classes = probability.shape[1]
    predicted = probability.argmax(axis=1)
    present = np.unique(target)
    confusion = np.bincount(target * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    right, of_class, as_class = confusion.diagonal()[present], confusion.sum(1)[present], confusion.sum(0)[present]
    auroc = float("nan")
    if len(present) > 1:
        columns = np.array([1]) if n_classes == 2 else present
        # the area is the share of (example of the class, other example) pairs in the right order, counted by ranks
        ranks = rankdata(probability[:, columns], axis=0)
        positive = target[:, None] == columns
        count = positive.sum(0)
        above = (ranks * positive).sum(0) - count * (count + 1) / 2
        auroc = float(np.mean(above / (count * (len(target) - count))))
    picked = np.clip(probability[np.arange(len(target)), target], 1e-12, 1.0)
    return {
        "accuracy": float((predicted == target).mean()),
        "balanced_accuracy": float((right / of_class).mean()),
        "macro_f1": float((2 * right / (of_class + as_class)).mean()),
        "log_loss": float(-np.log(picked).mean()),
        "auroc": auroc,
        "ece": expected_calibration_error(probability, target),
    }


def classification_metrics(output: Tensor, target: Tensor) -> dict[str, float]:
    """The classification metrics of logits (n, classes)."""
    probability = output.detach().double().softmax(-1).cpu().numpy()
    return probability_metrics(probability, target.cpu().numpy())


def regression_metrics(output: Tensor, target: Tensor) -> dict[str, float]:
    """RMSE, MAE and R2 of values (n, size), averaged over targets."""
    predicted, true = output.detach().double().cpu().numpy(), target.double().cpu().numpy()
    error = predicted - true
    variance = true.var(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(variance > 0, 1 - (error**2).mean(axis=0) / variance, np.nan)
    return {
        "rmse": float(np.sqrt((error**2).mean(axis=0)).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(np.mean(r2)),
    }
