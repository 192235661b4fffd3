"""Whether one PReLU neuron learns XOR over a wider range of learning rates than what XOR is usually given to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pomona.claims.lab import log
from pomona.claims.verdict import Comparison, Scale
from pomona.nn.prelu import PReLU
from pomona.theory.prelu_xor import MODELS, SingleNeuron, xor_study

SIZES: dict[Scale, dict[str, int]] = {
    "smoke": {"rates": 3, "inits": 20, "steps": 50},
    "full": {"rates": 9, "inits": 100, "steps": 3000},
    "gpu": {"rates": 25, "inits": 1000, "steps": 10000},
}
CODINGS = ("pm1", "01")


def prelu_xor(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: a PReLU neuron without bias succeeds over a larger share of learning rates than any other model.

    XOR with inputs -1 and 1, all four points at every step, learning rates from 0.01 to 1 and weights from U(-1, 1),
    slope 0.25 at first; the measure is the success rate averaged over the logarithm of the learning rate, and the
    baseline the best of a GCU neuron and 2-2-1 networks with tanh and ReLU, chosen anew at each seed. In the details:
    every model, also with inputs 0 and 1, and a first slope of -0.25.
    """
    sizes = SIZES[scale]
    rates = torch.logspace(-2, 0, sizes["rates"]).tolist()
    models = {**MODELS, "prelu, slope -0.25": lambda: SingleNeuron(PReLU(init=-0.25))}
    areas: dict[str, dict[str, list[float]]] = {}
    details: dict[str, Any] = {"rates": rates}
    for coding in CODINGS:
        areas[coding] = {}
        for name, make in models.items():
            studies = [
                xor_study(make, rates, sizes["inits"], sizes["steps"], coding=coding, seed=seed)  # type: ignore[arg-type]
                for seed in seeds
            ]
            areas[coding][name] = [study.area() for study in studies]
            rate = torch.stack([study.rate for study in studies]).mean(0)
            details[f"{name}, inputs {coding}"] = {
                "area": sum(areas[coding][name]) / len(seeds),
                "success rate": rate.tolist(),
                "rates of success above 99 %": int((rate > 0.99).sum()),
            }
            log.info("%s, %s: %s", name, coding, details[f"{name}, inputs {coding}"])
    return Comparison(
        method=areas["pm1"]["prelu"],
        baseline=[max(found) for found in zip(*(areas["pm1"][n] for n in MODELS if n != "prelu"), strict=True)],
        metric="success rate, mean over the logarithm of the learning rate",
        method_name="one PReLU neuron, 3 parameters",
        baseline_name="the best of a GCU neuron and two 2-2-1 networks",
        paper="100 % success over a wider range of learning rates than an MLP and a GCU neuron",
        note="The abstract gives neither the inputs' coding nor the initialisation; both codings stand in the details.",
        details=details,
    )
