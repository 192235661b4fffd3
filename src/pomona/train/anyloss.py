"""Classification metrics as differentiable losses: AnyLoss, its relatives and the usual baselines.

Every loss here takes ``output`` and ``target`` in any of these forms:

- (B, K) logits and (B,) class indices, K >= 2; for K = 2 the positive class is 1 and its logit is the difference,
- (B,) or (B, 1) logits and (B,) targets 0 or 1,
- (B, K) logits and (B, K) targets 0 or 1 as floats: K separate labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, unknown
from pomona.train.soft_metrics import Counts, Metric, metric_function, ratio


def one_versus_rest(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and 0/1 targets as (B, columns), one column a binary problem, in at least float32.

    Raises:
        PomonaError: if the shapes fit none of the forms that this module takes.
    """
    if output.dtype in {torch.float16, torch.bfloat16}:
        output = output.float()
    if output.shape == target.shape:
        columns = output.shape[-1] if output.ndim > 1 else 1
        return output.reshape(-1, columns), target.reshape(-1, columns).to(output.dtype)
    if output.shape[:-1] != target.shape:
        raise PomonaError(
            f"output {tuple(output.shape)} does not match target {tuple(target.shape)}; "
            "give (B, K) logits with (B,) class indices, or equal shapes"
        )
    classes = output.shape[-1]
    output, target = output.reshape(-1, classes), target.reshape(-1, 1)
    if classes == 1:
        return output, target.to(output.dtype)
    if classes == 2:
        return output[:, 1:] - output[:, :1], target.to(output.dtype)
    return output, (target == torch.arange(classes, device=target.device)).to(output.dtype)


class ConfusionLoss(nn.Module):
    """1 - metric(TP, FN, FP, TN) with TP = sum y A, FN = sum y (1 - A), FP = sum (1 - y) A, TN = sum (1 - y)(1 - A).

    A in [0, 1] says how positive each example is; :meth:`amplify` computes it from the logit. With more than one column
    the loss is the mean over columns (macro). A column whose batch lacks positives or negatives, where most metrics
    are 0/0, falls back to binary cross-entropy.

    Args:
        metric: a name in `pomona.train.soft_metrics.METRICS`, names joined by ``+``, or a function (tp, fn, fp, tn) ->
            score.
        reduction: ``batch`` counts the batch alone; ``ema`` adds a decaying sum of earlier batches' counts (detached),
            for small batches. It keeps state, so it is not for ``vmap``.
        decay: of the ``ema`` counts.
    """

    running: Tensor

    def __init__(
        self, metric: str | Metric = "f1", reduction: Literal["batch", "ema"] = "batch", decay: float = 0.9
    ) -> None:
        super().__init__()
        if reduction not in {"batch", "ema"}:
            raise unknown("reduction", reduction, ["batch", "ema"])
        if not 0 <= decay < 1:
            raise PomonaError(f"decay={decay} must be in [0, 1)")
        self.metric, self.reduction, self.decay = metric_function(metric), reduction, decay
        self.register_buffer("running", torch.zeros(4, 0))

    def amplify(self, logit: Tensor) -> Tensor:
        """How positive each logit is, in [0, 1]."""
        raise NotImplementedError

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss."""
        logit, y = one_versus_rest(output, target)
        a = self.amplify(logit)
        tp, positives, amplified = (y * a).sum(0), y.sum(0), a.sum(0)
        return self.score(Counts(tp, positives - tp, amplified - tp, len(y) - positives - amplified + tp), logit, y)

    def score(self, counts: Counts, logit: Tensor, y: Tensor) -> Tensor:
        """Mean over columns of 1 - metric, or of the fallback."""
        if self.reduction == "ema":
            counts = self._remember(counts)
        present = (counts.tp + counts.fn > 0.5) & (counts.fp + counts.tn > 0.5)
        # mean over an empty batch would be nan
        fallback = F.binary_cross_entropy_with_logits(logit, y, reduction="none").sum(0) / max(len(y), 1)
        # where() alone would let the metric's nan gradients through, so absent columns get harmless counts
        safe = Counts(*(torch.where(present, count, torch.ones_like(count)) for count in counts))
        return torch.where(present, 1 - self.metric(*safe), fallback).mean()

    def _remember(self, counts: Counts) -> Counts:
        if self.running.shape[1] != len(counts.tp):
            self.running = counts.tp.new_zeros(4, len(counts.tp))
        total = torch.stack(counts) + self.running.to(counts.tp)
        if self.training:
            self.running = self.decay * total.detach()
        return Counts(*total)

    def reset(self) -> None:
        """Forget the counts of earlier batches."""
        self.running = self.running.new_zeros(4, 0)


class AnyLoss(ConfusionLoss):
    """A metric of soft counts with A(p) = 1 / (1 + exp(-L (p - threshold))), p = sigmoid(logit).

    Large ``L`` makes A a sharp step, so that the loss is close to the metric itself; the paper finds 73 the
    sharpest that keeps gradients in float arithmetic.

    Args:
        metric: see :class:`ConfusionLoss`, as are ``reduction`` and ``decay``.
        L: sharpness of the amplifier.
        threshold: probability above which an example counts as positive.
        average: for K > 2 classes, ``macro`` takes each class against the rest with p = sigmoid(its logit); ``matrix``
            uses the soft confusion matrix M = Y^T softmax(L log softmax(logits)).
        L_schedule: L as a function of the number of training calls so far, in place of ``L``.

    Shapes:
        see the module -> ()

    Raises:
        PomonaError: for an unknown metric, ``L`` not above 0, or a threshold outside (0, 1).

    Source: AnyLoss: Transforming Classification Metrics into Loss Functions, arXiv 2405.14745.
    """

    def __init__(
        self,
        metric: str | Metric = "f1",
        L: float = 73.0,
        threshold: float = 0.5,
        reduction: Literal["batch", "ema"] = "batch",
        average: Literal["macro", "matrix"] = "macro",
        decay: float = 0.9,
        L_schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(metric, reduction, decay)
        if not L > 0:
            raise PomonaError(f"L={L} must be above 0; the paper uses 73")
        if not 0 < threshold < 1:
            raise PomonaError(f"threshold={threshold} must be a probability between 0 and 1")
        if average not in {"macro", "matrix"}:
            raise unknown("average", average, ["macro", "matrix"])
        self.sharpness, self.threshold, self.average, self.metric_name = L, threshold, average, metric
        self.schedule, self.calls = L_schedule, 0

    def amplify(self, logit: Tensor) -> Tensor:
        """A(sigmoid(logit))."""
        return torch.sigmoid(self.sharpness * (torch.sigmoid(logit) - self.threshold))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss."""
        if self.schedule is not None:
            self.sharpness = self.schedule(self.calls)
            self.calls += self.training
        if self.average == "matrix" and output.shape != target.shape and output.shape[-1] > 2:
            return self._matrix(output, target)
        return super().forward(output, target)

    def _matrix(self, output: Tensor, target: Tensor) -> Tensor:
        logit, y = one_versus_rest(output, target)
        matrix = y.T @ torch.softmax(self.sharpness * torch.log_softmax(logit, -1), -1)  # (true, predicted)
        tp, total = matrix.diagonal(), matrix.sum()
        if self.metric_name == "accuracy":  # of the K-class problem, not the mean of K binary ones
            return 1 - ratio(tp.sum(), total)
        fn, fp = matrix.sum(1) - tp, matrix.sum(0) - tp
        return self.score(Counts(tp, fn, fp, total - tp - fn - fp), logit, y)


class SigmoidF1(ConfusionLoss):
    """1 - F1 of soft counts with A = sigmoid(slope (logit + shift)).

    Source: sigmoidF1: A Smooth F1 Score Surrogate Loss for Multilabel Classification, arXiv 2108.10566.
    """

    def __init__(self, slope: float = 1.0, shift: float = 0.0) -> None:
        super().__init__("f1")
        self.slope, self.shift = slope, shift

    def amplify(self, logit: Tensor) -> Tensor:
        """sigmoid(slope (logit + shift))."""
        return torch.sigmoid(self.slope * (logit + self.shift))


class ScoreOrientedLoss(ConfusionLoss):
    """1 - metric of the confusion matrix expected over a random threshold: A(p) = P(threshold < p).

    Args:
        metric: see :class:`ConfusionLoss`.
        threshold: its distribution: ``uniform`` on [0, 1], so that A = p, or ``raised_cosine`` around ``mean``.
        mean: centre of the raised cosine.
        half_width: its half width.

    Source: Score-oriented loss (SOL) functions, arXiv 2103.15522.
    """

    def __init__(
        self,
        metric: str | Metric = "f1",
        threshold: Literal["uniform", "raised_cosine"] = "uniform",
        mean: float = 0.5,
        half_width: float = 0.3,
    ) -> None:
        super().__init__(metric)
        if threshold not in {"uniform", "raised_cosine"}:
            raise unknown("threshold", threshold, ["uniform", "raised_cosine"])
        self.distribution, self.mean, self.half_width = threshold, mean, half_width

    def amplify(self, logit: Tensor) -> Tensor:
        """The threshold's distribution function at p."""
        p = torch.sigmoid(logit)
        if self.distribution == "uniform":
            return p
        u = ((p - self.mean) / self.half_width).clamp(-1, 1)
        return (1 + u + torch.sin(math.pi * u) / math.pi) / 2


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with weight n / (columns n_c) for a class c that n_c of the batch's n examples have.

    Args:
        positive_weight: a fixed weight of positives (of each class, one against the rest) in place of the balanced one.
    """

    def __init__(self, positive_weight: float | None = None) -> None:
        super().__init__()
        if positive_weight is not None and not positive_weight > 0:
            raise PomonaError(f"positive_weight={positive_weight} must be above 0")
        self.positive_weight = positive_weight

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss."""
        logit, y = one_versus_rest(output, target)
        classes = output.shape[-1] if output.ndim == target.ndim + 1 else 1
        if classes > 2 and self.positive_weight is None:
            share = y.mean(0)
            weight = (y / share.clamp_min(1 / max(len(y), 1))).sum(-1) / classes
            return (weight * -(y * torch.log_softmax(logit, -1)).sum(-1)).mean()
        if self.positive_weight is not None:
            return F.binary_cross_entropy_with_logits(logit, y, pos_weight=logit.new_tensor(self.positive_weight))
        share = y.mean(0).clamp(1 / max(len(y), 1), 1 - 1 / max(len(y), 2))
        weight = y / (2 * share) + (1 - y) / (2 * (1 - share))
        return (weight * F.binary_cross_entropy_with_logits(logit, y, reduction="none")).mean()


class FocalLoss(nn.Module):
    """-alpha_y (1 - p_y)^gamma log p_y, with p_y the probability of the true class; gamma = 0 is cross-entropy.

    Args:
        gamma: how much well-classified examples are discounted.
        alpha: weight of positives against 1 - alpha of negatives, for binary problems; ``None`` for equal weights of 1.

    Source: Focal Loss for Dense Object Detection, arXiv 1708.02002.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        if not gamma >= 0:
            raise PomonaError(f"gamma={gamma} must be 0 or more")
        if alpha is not None and not 0 < alpha < 1:
            raise PomonaError(f"alpha={alpha} must be between 0 and 1")
        self.gamma, self.alpha = gamma, alpha

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss."""
        logit, y = one_versus_rest(output, target)
        if output.ndim == target.ndim + 1 and output.shape[-1] > 2:
            log_p = (y * torch.log_softmax(logit, -1)).sum(-1)
            return -((1 - log_p.exp()) ** self.gamma * log_p).mean()
        log_p = -F.binary_cross_entropy_with_logits(logit, y, reduction="none")
        weight = 1.0 if self.alpha is None else self.alpha * y + (1 - self.alpha) * (1 - y)
        # -expm1 keeps 1 - p exact where p is near 1
        return -(weight * (-torch.expm1(log_p)) ** self.gamma * log_p).mean()


class CrossEntropy(FocalLoss):
    """Binary or K-class cross-entropy, in every form that this module takes."""

    def __init__(self) -> None:
        super().__init__(gamma=0.0)


class BrierLoss(nn.Module):
    """Mean squared error of the predicted probabilities."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss."""
        logit, y = one_versus_rest(output, target)
        several = output.ndim == target.ndim + 1 and output.shape[-1] > 2
        return F.mse_loss(torch.softmax(logit, -1) if several else torch.sigmoid(logit), y)


def fit_threshold(score: Tensor, target: Tensor, metric: str | Metric = "f1") -> tuple[float, float]:
    """The cut of ``score`` that makes a hard metric largest, for comparison with losses that aim at the metric.

    Args:
        score: (B,) probabilities or logits of the positive class, from validation data.
        target: (B,) 0 or 1.
        metric: as for :class:`ConfusionLoss`.

    Returns:
        (threshold, metric there); predict positive where score >= threshold. Cuts lie midway between two scores.

    Raises:
        PomonaError: if either class is missing.
    """
    order = score.double().argsort(descending=True)
    score, y = score.double()[order], target.double()[order]
    positives, negatives = y.sum(), (1 - y).sum()
    if not (positives > 0 and negatives > 0):
        raise PomonaError("target needs both classes to choose a threshold")
    tp, fp = y.cumsum(0), (1 - y).cumsum(0)
    value = metric_function(metric)(tp, positives - tp, fp, negatives - fp)
    lower = torch.cat([score[1:], score[-1:] - 1e-6])
    value = value.where(lower < score, torch.full_like(value, -math.inf))  # no cut between equal scores
    best = int(value.argmax())
    return float((score[best] + lower[best]) / 2), float(value[best])
