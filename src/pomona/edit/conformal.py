"""Prediction sets that cover the true class as often as asked, and calibration, for networks with early exits.

Source: Jointly-Learned Exit and Inference for a Dynamic Neural Network : JEI-DNN (arXiv 2310.09163).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pomona.data.metrics import expected_calibration_error
from pomona.edit.jei_dnn import Exited
from pomona.errors import PomonaError


def conformal_threshold(scores: Tensor, coverage: float = 0.95) -> float:
    """The ``ceil((n + 1) coverage)``-th smallest of n held-out scores; infinite when n is too small for it.

    A new score from the same distribution lies at or below it with probability at least ``coverage``.
    """
    if not 0 < coverage < 1:
        raise PomonaError(f"coverage={coverage} must lie between 0 and 1")
    rank = math.ceil((len(scores) + 1) * coverage)
    return float(scores.sort().values[rank - 1]) if rank <= len(scores) else math.inf


def calibrate(exited: Exited, y: Tensor, exits: int, *, coverage: float = 0.95, per_exit: bool = True) -> Tensor:
    """Thresholds on ``1 - p(class)`` for each exit ``(exits,)``, from inputs that nothing was trained on.

    Args:
        exited: what :meth:`~pomona.edit.jei_dnn.EarlyExit.choose` gave for them.
        y: their classes ``(n,)``.
        exits: number of exits, the last included.
        coverage: share of new inputs whose set is to hold the true class.
        per_exit: one threshold for those that leave at each exit (coverage holds at each), or one for all.
    """
    scores = _scores(exited).gather(1, y[:, None])[:, 0]
    if not per_exit:
        return torch.full((exits,), conformal_threshold(scores, coverage), dtype=scores.dtype)
    found = [conformal_threshold(scores[exited.exit == i], coverage) for i in range(exits)]
    return torch.tensor(found, dtype=scores.dtype)


def prediction_sets(exited: Exited, thresholds: Tensor) -> Tensor:
    """Which classes are in the set of each input: ``1 - p(class) <= threshold of its exit``, ``(n, classes)`` bool."""
    return _scores(exited) <= thresholds.to(exited.logits)[exited.exit][:, None]


def calibration(exited: Exited, y: Tensor, thresholds: Tensor) -> dict[str, Any]:
    """Expected calibration error of what left, also exit by exit; coverage and mean size of the prediction sets."""
    probability, target = exited.logits.softmax(1).double().cpu().numpy(), y.cpu().numpy()
    at = exited.exit.cpu().numpy()
    sets = prediction_sets(exited, thresholds)
    return {
        "ece": expected_calibration_error(probability, target),
        "ece_by_exit": {
            i: expected_calibration_error(probability[at == i], target[at == i]) for i in sorted(set(at.tolist()))
        },
        "coverage": float(sets.gather(1, y[:, None]).double().mean()),
        "set_size": float(sets.sum(1).double().mean()),
    }


def _scores(exited: Exited) -> Tensor:
    return 1 - exited.logits.softmax(1)
