"""Whether neurons with positions can stand for the weights between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from pomona.claims.lab import Arm, compare_arms, grid, log
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.nn.point_cloud_linear import PointCloudNet
from pomona.nn.structured import LowRankLinear
from pomona.train.budget import Budget
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"digits": 200, "fashion": 200, "epochs": 1, "width": 32, "dims": (16,), "rates": [3e-3]},
    "full": {
        "digits": 1797,
        "fashion": 5000,
        "epochs": 15,
        "width": 256,
        "dims": (4, 8, 16, 32),
        "rates": [1e-2, 3e-3, 1e-3],
    },
    "gpu": {
        "digits": 1797,
        "fashion": 20000,
        "epochs": 40,
        "width": 256,
        "dims": (4, 8, 16, 32),
        "rates": [1e-2, 3e-3, 1e-3, 3e-4],
    },
}
DIMS = 16
Maker = Callable[[Sequence[int]], nn.Module]


def point_cloud_linear(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: behind convolutions, linear layers of positions in 16 dimensions lose less than 2 points.

    Digits; two convolutions, then layers 512-256-10. In the details, on digits and Fashion-MNIST, perceptrons with two
    hidden layers whose weights all come from positions (4, 8, 16, 32 dimensions); and everywhere the controls with as
    many parameters as 16 dimensions have: low-rank layers and a narrow dense network (expected to be better).
    """
    sizes = SIZES[scale]
    width, settings = sizes["width"], grid(lr=sizes["rates"])
    digits, fashion = load("digits", limit=sizes["digits"]), load("fashion_mnist", limit=sizes["fashion"])
    details: dict[str, Any] = {}

    def compare(name: str, task: Any, makers: dict[str, Maker], widths: Sequence[int], epochs: int, conv: bool) -> Any:
        arms = {arm: Arm(_net(make, widths, conv), Training(optimizer="adam")) for arm, make in makers.items()}
        found = compare_arms(arms, task, seeds, budget=Budget("epochs", epochs), settings=settings)
        details[name] = {arm: outcome.summary() for arm, outcome in found.items()}
        log.info("%s: %s", name, details[name])
        return found

    few = makers_of((DIMS,))
    compare("digits, perceptron", digits, makers_of(sizes["dims"]), (64, width, width, 10), sizes["epochs"], False)
    compare("Fashion-MNIST, perceptron", fashion, few, (784, width, width, 10), sizes["epochs"] // 3 or 1, False)
    outcomes = compare("digits, behind convolutions", digits, few, (512, width, 10), sizes["epochs"], True)
    return Comparison(
        method=outcomes[f"positions, {DIMS} dimensions"].values("accuracy"),
        baseline=outcomes["dense"].values("accuracy"),
        metric="test accuracy on digits",
        method_name=f"point cloud layers behind convolutions, {DIMS} dimensions",
        baseline_name="dense layers behind the same convolutions",
        margin=-0.02,
        paper="an AlexNet with 99.5 % fewer parameters in its linear layers is as good on CIFAR-10 and CIFAR-100",
        note="See the details for what as many parameters do in low-rank or narrow dense layers.",
        details=details,
    )


def makers_of(dims: Sequence[int]) -> dict[str, Maker]:
    """Makers of perceptrons of given widths: dense, of positions, and controls with the parameters of 16 dimensions."""

    def target(widths: Sequence[int]) -> int:
        return (DIMS + 1) * sum(widths)

    def low_rank(widths: Sequence[int]) -> nn.Module:
        spare = target(widths) - sum(widths[1:])
        rank = max(1, round(spare / sum(n + m for n, m in pairwise(widths))))
        return _perceptron(widths, lambda n, m: LowRankLinear(n, m, min(rank, n, m)))

    def narrow(widths: Sequence[int]) -> nn.Module:
        def scaled(k: int) -> list[int]:
            return [widths[0], *[k] * (len(widths) - 2), widths[-1]]

        def count(k: int) -> int:
            return sum((n + 1) * m for n, m in pairwise(scaled(k)))

        return _perceptron(scaled(min(range(1, max(widths)), key=lambda k: abs(count(k) - target(widths)))), nn.Linear)

    return {
        "dense": lambda widths: _perceptron(widths, nn.Linear),
        **{f"positions, {d} dimensions": lambda widths, d=d: PointCloudNet(widths, d) for d in dims},  # type: ignore[misc]
        "low rank": low_rank,
        "narrow": narrow,
    }


def _perceptron(widths: Sequence[int], make: Callable[[int, int], nn.Module]) -> nn.Module:
    layers = [part for n, m in pairwise(widths) for part in (make(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _net(make: Maker, widths: Sequence[int], conv: bool) -> Callable[[], nn.Module]:
    """The perceptron on pixels, or on what two convolutions make of 8 x 8 images: 32 channels of 4 x 4."""

    def trunk() -> list[nn.Module]:
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)]

    return lambda: nn.Sequential(*(trunk() if conv else []), nn.Flatten(), make(widths))
