import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.train.anyloss import (
    AnyLoss,
    BrierLoss,
    CrossEntropy,
    FocalLoss,
    ScoreOrientedLoss,
    SigmoidF1,
    WeightedCrossEntropy,
    fit_threshold,
)
from pomona.train.soft_metrics import METRICS

G = torch.Generator().manual_seed(0)
Y = (torch.rand(200, generator=G) < 0.3).double()
LOGIT = torch.randn(200, generator=G, dtype=torch.float64) + Y
EVERY = [AnyLoss, SigmoidF1, ScoreOrientedLoss, WeightedCrossEntropy, FocalLoss, CrossEntropy, BrierLoss]


def soft_counts(loss, logit, y):
    a = loss.amplify(logit)
    return (y * a).sum(), (y * (1 - a)).sum(), ((1 - y) * a).sum(), ((1 - y) * (1 - a)).sum()


def caught(loss, logit, y):
    """The counts that the loss hands to its metric."""
    seen = []

    def metric(*counts):
        seen.extend(counts)
        return counts[0]

    loss.metric = metric
    loss(logit, y)
    return [float(c) for c in seen]


@pytest.mark.parametrize("loss", [AnyLoss(), AnyLoss(L=5.0, threshold=0.3), SigmoidF1(), ScoreOrientedLoss()])
def test_soft_counts_sum_to_positives_and_negatives(loss):
    tp, fn, fp, tn = caught(loss, LOGIT, Y)
    assert tp + fn == pytest.approx(float(Y.sum()))
    assert fp + tn == pytest.approx(float((1 - Y).sum()))
    assert [tp, fn, fp, tn] == pytest.approx([float(c) for c in soft_counts(loss, LOGIT, Y)])


SKLEARN = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "f1": sk.f1_score,
    "f2": lambda y, p: sk.fbeta_score(y, p, beta=2),
    "f05": lambda y, p: sk.fbeta_score(y, p, beta=0.5),
    "jaccard": sk.jaccard_score,
    "mcc": sk.matthews_corrcoef,
    "precision": sk.precision_score,
    "recall": sk.recall_score,
    "specificity": lambda y, p: sk.recall_score(y, p, pos_label=0),
    "kappa": sk.cohen_kappa_score,
    "gmean": lambda y, p: (sk.recall_score(y, p) * sk.recall_score(y, p, pos_label=0)) ** 0.5,
    "youden": lambda y, p: 2 * sk.balanced_accuracy_score(y, p) - 1,
    "informedness": lambda y, p: sk.balanced_accuracy_score(y, p, adjusted=True),
}


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_away_from_the_threshold_soft_metrics_equal_hard_ones(metric):
    p = torch.sigmoid(LOGIT)
    p = torch.where((p - 0.5).abs() > 0.2, p, torch.where(p > 0.5, 0.71, 0.29))
    value = 1 - float(AnyLoss(metric)(torch.logit(p), Y))
    assert value == pytest.approx(SKLEARN[metric](Y.numpy(), (p > 0.5).numpy()), abs=1e-5)


def test_the_amplifier_is_a_half_at_the_threshold_and_its_slope_is_L_A_1_minus_A():
    loss = AnyLoss(L=73.0, threshold=0.3)
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    a = loss.amplify(torch.logit(p))
    (slope,) = torch.autograd.grad(a.sum(), p)
    assert float(loss.amplify(torch.logit(torch.tensor(0.3, dtype=torch.float64)))) == pytest.approx(0.5)
    torch.testing.assert_close(slope, (73 * a * (1 - a)).detach())
    assert float(slope.max()) == pytest.approx(73 / 4)
    near = (p.detach() - 0.3).abs() < 0.4
    assert bool((a.detach()[near].diff() > 0).all())


def test_f1_gradient_is_the_closed_form():
    loss = AnyLoss("f1", L=7.0)
    logit = LOGIT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logit, Y), logit)
    p = torch.sigmoid(LOGIT)
    a = loss.amplify(LOGIT)
    slope = 7 * a * (1 - a) * p * (1 - p)
    whole, tp = Y.sum() + a.sum(), (Y * a).sum()
    torch.testing.assert_close(gradient, -2 * (Y * whole - tp) * slope / whole**2)


def test_accuracy_loss_is_the_mean_distance():
    loss = AnyLoss("accuracy", L=3.0)
    torch.testing.assert_close(loss(LOGIT, Y), (Y - loss.amplify(LOGIT)).abs().mean())


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_gradients(metric):
    logit = LOGIT[:12].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: AnyLoss(metric, L=4.0)(z, Y[:12]), (logit,))


@pytest.mark.parametrize("make", EVERY)
def test_two_logits_equal_one_logit_difference(make):
    first = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    two = torch.stack([first, first + LOGIT], 1)
    loss = make()
    expected = loss(LOGIT, Y)
    torch.testing.assert_close(loss(two, Y.long()), expected)
    torch.testing.assert_close(loss(LOGIT[:, None], Y.long()), expected)
    torch.testing.assert_close(loss(two.reshape(2, 100, 2), Y.long().reshape(2, 100)), expected)


@pytest.mark.parametrize("make", [*EVERY, *(lambda m=m: AnyLoss(m, average="matrix") for m in ("f1", "accuracy"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss_trains_three_classes(make, dtype):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = 2 * torch.randn(3, 5, generator=g)[y] + torch.randn(90, 5, generator=g)
    x = torch.cat([x, torch.ones(90, 1)], 1)  # an intercept
    weight = torch.zeros(6, 3, requires_grad=True)
    loss = make()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        value = loss((x @ weight).to(dtype), y)
        assert value.dtype == torch.float32
        value.backward()
        optimizer.step()
    assert float(((x @ weight).argmax(1) == y).float().mean()) > 0.9


def test_matrix_average_at_high_sharpness_is_the_hard_multiclass_metric():
    y = torch.arange(60) % 4
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.8 * F.one_hot(y, 4)
    hard = logits.argmax(1)
    accuracy = 1 - float(AnyLoss("accuracy", L=1e4, average="matrix")(logits, y))
    macro = 1 - float(AnyLoss("f1", L=1e4, average="matrix")(logits, y))
    assert accuracy == pytest.approx(sk.accuracy_score(y, hard), abs=1e-4)
    assert macro == pytest.approx(sk.f1_score(y, hard, average="macro"), abs=1e-4)


def test_multilabel_is_the_mean_over_columns():
    logits = torch.stack([LOGIT, LOGIT.flip(0), -LOGIT], 1)
    y = torch.stack([Y, Y, 1 - Y], 1)
    loss = AnyLoss("f1")
    columns = [loss(logits[:, i], y[:, i]) for i in range(3)]
    torch.testing.assert_close(loss(logits, y), torch.stack(columns).mean())


@pytest.mark.parametrize("metric", ["f1", "gmean", "mcc", "kappa", "f1+balanced_accuracy"])
def test_a_batch_of_one_class_falls_back_to_cross_entropy(metric):
    logit = LOGIT.clone().requires_grad_()
    for y in (torch.zeros_like(Y), torch.ones_like(Y)):
        value = AnyLoss(metric)(logit, y)
        torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logit, y))
        assert bool(torch.autograd.grad(value, logit)[0].isfinite().all())
    assert float(AnyLoss(metric)(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))) == 0


def test_sums_of_metrics_are_their_mean_and_functions_are_taken():
    f1, gmean = AnyLoss("f1")(LOGIT, Y), AnyLoss("gmean")(LOGIT, Y)
    torch.testing.assert_close(AnyLoss("f1+gmean")(LOGIT, Y), (f1 + gmean) / 2)
    torch.testing.assert_close(AnyLoss(lambda tp, fn, fp, tn: 2 * tp / (2 * tp + fn + fp))(LOGIT, Y), f1)


def test_running_counts_decay_and_carry_no_gradient():
    loss = AnyLoss("f1", reduction="ema", decay=0.5)
    first, second = LOGIT[:100], LOGIT[100:].clone().requires_grad_()
    loss(first, Y[:100])
    value = loss(second, Y[100:])
    old = soft_counts(loss, first, Y[:100])
    tp, fn, fp, _ = (new + 0.5 * past for new, past in zip(soft_counts(loss, second, Y[100:]), old, strict=True))
    torch.testing.assert_close(value, 1 - 2 * tp / (2 * tp + fn + fp))
    value.backward()
    assert bool(second.grad.any())
    loss.eval()
    kept = loss.running.clone()
    loss(first, Y[:100])
    assert torch.equal(loss.running, kept)
    # a batch without positives is no longer a special case
    loss(first, torch.zeros(100, dtype=torch.float64))
    loss.reset()
    torch.testing.assert_close(loss(first, Y[:100]), AnyLoss("f1")(first, Y[:100]))


def test_sharpness_can_follow_a_schedule():
    loss = AnyLoss("f1", L_schedule=lambda call: 1.0 + call)
    values = [float(loss(LOGIT, Y)) for _ in range(3)]
    assert values == pytest.approx([float(AnyLoss("f1", L=k)(LOGIT, Y)) for k in (1.0, 2.0, 3.0)])


def test_score_oriented_loss_averages_over_random_thresholds():
    p = torch.sigmoid(LOGIT)
    torch.testing.assert_close(ScoreOrientedLoss().amplify(LOGIT), p)
    loss = ScoreOrientedLoss(threshold="raised_cosine", mean=0.4, half_width=0.2)
    grid = torch.linspace(0.2, 0.6, 40001, dtype=torch.float64)
    density = (1 + torch.cos(np.pi * (grid - 0.4) / 0.2)) / 0.4
    for q in (0.1, 0.3, 0.45, 0.9):
        below = torch.where(grid < q, density, 0.0)
        expected = float(torch.trapezoid(below, grid))
        assert float(loss.amplify(torch.logit(torch.tensor(q)))) == pytest.approx(expected, abs=1e-3)


def test_sigmoid_f1_uses_the_probability_itself():
    torch.testing.assert_close(SigmoidF1()(LOGIT, Y), ScoreOrientedLoss("f1")(LOGIT, Y))


def test_baselines_equal_their_textbook_forms():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(50) % 4
    torch.testing.assert_close(CrossEntropy()(logits, y), F.cross_entropy(logits, y))
    torch.testing.assert_close(CrossEntropy()(LOGIT, Y), F.binary_cross_entropy_with_logits(LOGIT, Y))
    torch.testing.assert_close(BrierLoss()(logits, y), (logits.softmax(1) - F.one_hot(y, 4)).square().mean())
    p = torch.sigmoid(LOGIT)
    py = torch.where(Y > 0, p, 1 - p)
    alpha = torch.where(Y > 0, 0.25, 0.75)
    torch.testing.assert_close(FocalLoss(2.0, 0.25)(LOGIT, Y), -(alpha * (1 - py) ** 2 * py.log()).mean())
    pk = logits.softmax(1)[torch.arange(50), y]
    torch.testing.assert_close(FocalLoss(1.5)(logits, y), -((1 - pk) ** 1.5 * pk.log()).mean())
    bce = F.binary_cross_entropy_with_logits(LOGIT, Y, reduction="none")
    torch.testing.assert_close(WeightedCrossEntropy()(LOGIT, Y), (bce[Y > 0].mean() + bce[Y == 0].mean()) / 2)
    counts = torch.bincount(y).double()
    ce = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(WeightedCrossEntropy()(logits, y), (ce * (50 / 4 / counts)[y]).mean())


@pytest.mark.parametrize("metric", ["f1", "gmean", "balanced_accuracy", "mcc"])
def test_fitted_threshold_is_the_best_of_all_cuts(metric):
    score = (torch.sigmoid(LOGIT) * 20).round() / 20  # with ties
    threshold, value = fit_threshold(score, Y, metric)
    found = SKLEARN[metric](Y.numpy(), (score >= threshold).numpy())
    every = [SKLEARN[metric](Y.numpy(), (score >= t).numpy()) for t in score.unique()]
    assert value == pytest.approx(found, abs=1e-4) and found == pytest.approx(max(every), abs=1e-4)


def test_losses_can_be_vmapped():
    logits = torch.stack([LOGIT, -LOGIT])
    value = torch.vmap(AnyLoss("gmean"), in_dims=(0, None))(logits, Y)
    torch.testing.assert_close(value, torch.stack([AnyLoss("gmean")(z, Y) for z in logits]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnyLoss("jacard"), "metric='jacard' is not known; did you mean jaccard"),
        (lambda: AnyLoss(L=0), "L=0 must be above 0"),
        (lambda: AnyLoss(threshold=1.0), "threshold=1.0 must be a probability"),
        (lambda: AnyLoss()(torch.zeros(5, 2), torch.zeros(4).long()), r"output \(5, 2\) does not match target \(4,\)"),
        (lambda: FocalLoss(alpha=2.0), "alpha=2.0 must be between"),
        (lambda: fit_threshold(LOGIT, torch.zeros(200)), "needs both classes"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
