"""Metrics of a soft confusion matrix: the usual ones of classification, as functions of counts that need not be whole.

Source: AnyLoss: Transforming Classification Metrics into Loss Functions, arXiv 2405.14745.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pomona.errors import unknown


class Counts(NamedTuple):
    """Entries of a (soft) confusion matrix, each of shape (columns,)."""

    tp: Tensor
    fn: Tensor
    fp: Tensor
    tn: Tensor


Metric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
EPS = 1e-7


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, 0 where both are."""
    return part / whole.clamp_min(EPS)


def f_beta(beta: float) -> Metric:
    """(1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP)."""

    def metric(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
        weighted = (1 + beta**2) * tp
        return ratio(weighted, weighted + beta**2 * fn + fp)

    return metric


def _sensitivity(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return ratio(tp, tp + fn)


def _specificity(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return ratio(tn, tn + fp)


def _youden(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return _sensitivity(tp, fn, fp, tn) + _specificity(tp, fn, fp, tn) - 1


def _gmean(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    # the clamp keeps the square root's slope finite at 0
    return (_sensitivity(tp, fn, fp, tn) * _specificity(tp, fn, fp, tn)).clamp_min(EPS).sqrt()


def _mcc(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    # four square roots instead of one of the product, which overflows float32 for large batches
    whole = [(a + b).clamp_min(EPS).sqrt() for a, b in ((tp, fp), (tp, fn), (tn, fp), (tn, fn))]
    return (tp / whole[0] / whole[1]) * (tn / whole[2] / whole[3]) - (fp / whole[0] / whole[2]) * (
        fn / whole[1] / whole[3]
    )


def _kappa(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return ratio(2 * (tp * tn - fn * fp), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))


METRICS: dict[str, Metric] = {
    "accuracy": lambda tp, fn, fp, tn: ratio(tp + tn, tp + fn + fp + tn),
    "balanced_accuracy": lambda tp, fn, fp, tn: (_youden(tp, fn, fp, tn) + 1) / 2,
    "f1": f_beta(1.0),
    "f2": f_beta(2.0),
    "f05": f_beta(0.5),
    "gmean": _gmean,
    "jaccard": lambda tp, fn, fp, tn: ratio(tp, tp + fn + fp),
    "mcc": _mcc,
    "youden": _youden,
    "informedness": _youden,
    "precision": lambda tp, fn, fp, tn: ratio(tp, tp + fp),
    "recall": _sensitivity,
    "specificity": _specificity,
    "kappa": _kappa,
}
"""Metrics of soft counts (tp, fn, fp, tn), best at 1."""


def metric_function(metric: str | Metric) -> Metric:
    """The metric of a name, of names joined by ``+`` (their mean), or the function itself.

    Raises:
        PomonaError: for a name that is not known.
    """
    if callable(metric):
        return metric
    for name in metric.split("+"):
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    chosen = [METRICS[name] for name in metric.split("+")]
    return lambda tp, fn, fp, tn: torch.stack([m(tp, fn, fp, tn) for m in chosen]).mean(0)
