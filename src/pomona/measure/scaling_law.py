"""How error falls with compute: power laws, frontiers, the best split between data and parameters, and the runs for it.

Source: Scaling MLPs: A Tale of Inductive Bias, arXiv 2306.13575.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.measure.reading import Reading, lines
from pomona.nets.cost import flops
from pomona.train.budget import Budget
from pomona.train.loop import evaluate, fit
from pomona.train.settings import Training

Floats = NDArray[np.float64]


def train_compute(net: nn.Module, example: Tensor, examples: float) -> float:
    """FLOPs of training on that many examples, all epochs together: 3 x forward x examples."""
    return 3.0 * flops(net, example) * examples


@dataclass
class ScalingLaw:
    """E(C) = a (b + C)^-alpha + e_inf.

    Attributes:
        r2: share of the variance of log E that the law explains.
        bootstrap: (resamples, 4) of (a, b, alpha, e_inf) over resampled runs.
    """

    a: float
    b: float
    alpha: float
    e_inf: float
    r2: float = float("nan")
    bootstrap: Floats = field(default_factory=lambda: np.empty((0, 4)), repr=False)

    def __call__(self, compute: ArrayLike) -> Floats:
        """E at this compute."""
        return self.a * (self.b + np.asarray(compute, float)) ** -self.alpha + self.e_inf

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of alpha.

        Raises:
            PomonaError: if the fit was made without bootstrap.
        """
        if not len(self.bootstrap):
            raise PomonaError("bootstrap=0 gives no interval; fit with bootstrap=200")
        low, high = np.quantile(self.bootstrap[:, 2], [0.5 - level / 2, 0.5 + level / 2])
        return float(low), float(high)


def scaling_law(
    compute: ArrayLike, error: ArrayLike, *, shift: bool = True, floor: bool = True, bootstrap: int = 0, seed: int = 0
) -> ScalingLaw:
    """Fit E(C) = a (b + C)^-alpha + e_inf by least squares on log E, from several starts.

    Args:
        compute, error: one entry a run, above 0.
        shift: fit b; else it is 0.
        floor: fit e_inf; else it is 0.
        bootstrap: refits on runs drawn with replacement.
        seed: of those draws.

    Raises:
        PomonaError: if there are fewer runs than parameters, or a value not above 0.
    """
    c, e = np.asarray(compute, float), np.asarray(error, float)
    if c.shape != e.shape or len(c) < 2 + shift + floor:
        raise PomonaError(
            f"{len(c)} values of compute and {len(e)} of error; the law needs as many, at least {2 + shift + floor}"
        )
    if not (c.min() > 0 and e.min() > 0):
        raise PomonaError(f"compute and error must be above 0; the smallest are {c.min()} and {e.min()}")
    law = _fit(c, e, shift, floor)
    log = np.log(e)
    spread = float(((log - log.mean()) ** 2).sum())
    law.r2 = 1 - float(((log - np.log(law(c))) ** 2).sum()) / spread if spread else float("nan")
    random = np.random.default_rng(seed)
    draws = [random.integers(len(c), size=len(c)) for _ in range(bootstrap)]
    laws = [_fit(c[i], e[i], shift, floor, law) for i in draws if len(np.unique(c[i])) > 1]
    if laws:
        law.bootstrap = np.array([[w.a, w.b, w.alpha, w.e_inf] for w in laws])
    return law


def _fit(c: Floats, e: Floats, shift: bool, floor: bool, start: ScalingLaw | None = None) -> ScalingLaw:
    unit = float(np.exp(np.log(c).mean()))
    x, log = c / unit, np.log(e)

    def unpack(v: Floats) -> tuple[float, float, float, float]:
        """(log A, b, alpha, e_inf) in units of compute."""
        return v[0], v[2] if shift else 0.0, v[1], v[-1] if floor else 0.0

    def residual(v: Floats) -> Floats:
        log_a, b, alpha, e_inf = unpack(v)
        return np.log(np.exp(log_a - alpha * np.log(b + x)) + e_inf) - log

    most = e.min() * (1 - 1e-9)
    lower, upper = [-np.inf, 0.0, *[0.0] * shift, *[0.0] * floor], [np.inf, 20.0, *[np.inf] * shift, *[most] * floor]
    if start is None:
        starts = [(alpha, share) for alpha in (0.1, 0.3, 1.0) for share in ((0.0, 0.5, 0.9) if floor else (0.0,))]
    else:
        starts = [(min(start.alpha, 19.0), min(start.e_inf / most, 0.999))]
    best: Any = None
    for alpha, share in starts:
        first = [float(np.log(e - share * most).mean()), alpha, *[0.01] * shift, *[share * most] * floor]
        found = optimize.least_squares(
            residual, first, bounds=(lower, upper), x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=500
        )
        best = found if best is None or found.cost < best.cost else best
    log_a, b, alpha, e_inf = unpack(best.x)
    return ScalingLaw(float(np.exp(log_a) * unit**alpha), float(b * unit), float(alpha), float(e_inf))


def frontier(compute: ArrayLike, error: ArrayLike) -> NDArray[np.int64]:
    """Runs on the falling part of the lower convex hull of log error over log compute: indices, cheapest first."""
    c, e = np.log(np.asarray(compute, float)), np.log(np.asarray(error, float))
    hull: list[int] = []
    for i in np.lexsort((e, c)):
        if hull and e[i] >= e[hull[-1]]:
            continue  # costs more and is no better
        while len(hull) > 1:
            p, q = hull[-2:]
            if (c[q] - c[p]) * (e[i] - e[p]) > (e[q] - e[p]) * (c[i] - c[p]):
                break
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


@dataclass
class Allocation:
    """What compute-optimal runs spend: examples ~ C^data, parameters ~ C^parameters."""

    data: float
    parameters: float
    runs: NDArray[np.int64]


def optimal_allocation(compute: ArrayLike, error: ArrayLike, examples: ArrayLike, parameters: ArrayLike) -> Allocation:
    """Exponents of examples and parameters on the `frontier`, by least squares on logarithms.

    Raises:
        PomonaError: if fewer than two runs are on the frontier.
    """
    runs = frontier(compute, error)
    if len(runs) < 2:
        raise PomonaError(f"{len(runs)} run is on the frontier; exponents need at least 2")
    x = np.log(np.asarray(compute, float)[runs])
    p, q = (np.polyfit(x, np.log(np.asarray(of, float)[runs]), 1)[0] for of in (examples, parameters))
    return Allocation(float(p), float(q), runs)


@torch.no_grad()
def transfer(
    net: nn.Module, task: Task, *, decays: Sequence[float] = (1e-4, 1e-2, 1.0), seed: int = 0
) -> dict[str, float]:
    """Linear probe: logistic regression on the features of a trained network, its decay chosen on validation.

    Args:
        net: has ``features(x)``: (B, width).
        task: of classes.
        decays: strengths of the squared penalty.

    Returns:
        ``accuracy`` on validation and test as ``valid`` and ``test``, and the ``decay``
    """
    if not hasattr(net, "features"):
        raise PomonaError(f"{type(net).__name__} has no method features(x), which must give what its head receives")
    training = net.training
    net.eval()
    parts = {name: (net.features(split.x).numpy(), split.y.numpy()) for name, split in task.splits.items()}  # type: ignore[operator]
    net.train(training)
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=1 / decay, max_iter=200, random_state=seed))
        for decay in decays
    ]
    scores = [float(probe.fit(*parts["train"]).score(*parts["valid"])) for probe in probes]
    best = int(np.argmax(scores))
    return {"valid": scores[best], "test": float(probes[best].score(*parts["test"])), "decay": decays[best]}


def double_descent(
    make: Callable[[int], nn.Module],
    task: Task,
    widths: Sequence[int],
    *,
    budget: Budget,
    training: Training | None = None,
    seed: int = 0,
) -> Reading:
    """Train a network of each width to its last step: error on training and test data over width.

    Args:
        make: width -> network, drawn from the global generator.
        task: of classes.
        budget: of each training; long enough that wide networks fit the training data.

    Returns:
        ``width``, ``train``, ``test`` (error rates), and a figure
    """
    settings = (training or Training()).model_copy(update={"patience": None})
    errors: dict[str, list[float]] = {"train": [], "test": []}
    for width in widths:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = make(width)
        done = fit(net, task, settings, budget=budget, seed=seed, keep="last")
        for split, found in errors.items():
            found.append(1 - evaluate(done.predict, task, split)["accuracy"])
    figure = lines({split: (widths, found) for split, found in errors.items()}, x_title="width", y_title="error")
    return Reading({"width": list(widths), **errors}, figure)
