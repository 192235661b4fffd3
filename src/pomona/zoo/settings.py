"""What a trial of the corpus is made of besides the network: hyperparameters, input transforms and scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pomona.errors import PomonaError, unknown

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Transform = Callable[[Tensor, "Generator | None"], Tensor]

MAPS: dict[str, Callable[[float], float]] = {
    "lr": lambda u: 1e-3 * 10 ** (3 * u),
    "momentum": lambda u: 1 - 10 ** (-2 * u),
    "dropout": lambda u: 0.6 * u,
    "weight_decay": lambda u: 1e-6 * 10 ** (4 * u),
    "width": lambda u: round(16 * 2 ** (3 * u)),
    "depth": lambda u: 1 + round(3 * u),
}
"""From [0, 1] to what the network is given.

``lr`` 0.001 to 1 and ``weight_decay`` 1e-6 to 1e-2 on a logarithmic scale, ``momentum`` 0 to 0.99 (0.5 gives 0.9),
``dropout`` 0 to 0.6, ``width`` 16 to 128 in octaves, ``depth`` 1 to 4. Any other name is passed as it is.
"""

EXPONENTS = (4, 7)
"""Least and largest b of the mini-batch size 2**b that the search chooses from."""


def mapped(prm: Mapping[str, Any]) -> dict[str, Any]:
    """``prm`` as the network receives it."""
    return {name: MAPS[name](value) if name in MAPS else value for name, value in prm.items()}


def check_prm(prm: Mapping[str, Any], supported: set[str]) -> None:
    """Raise unless ``prm`` has a value in [0, 1] for each supported name, and nothing else but batch and transform."""
    lacking = sorted(supported - prm.keys())
    if lacking:
        raise PomonaError(f"prm lacks {', '.join(lacking)}, which the network's supported_hyperparameters() names")
    for name, value in prm.items():
        if name == "batch":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
                raise PomonaError(f"prm['batch']={value!r} must be a power of two, such as 32")
        elif name == "transform":
            transform(value)
        elif name not in supported:
            raise unknown("prm", name, sorted(supported | {"batch", "transform"}))
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise PomonaError(f"prm[{name!r}]={value!r} must lie in [0, 1]")


def plain(train: Tensor) -> Transform:
    """Inputs as they are."""
    return lambda x, generator: x


def standardize(train: Tensor) -> Transform:
    """(x - mean) / std of each input over the training examples; constant inputs become 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    return lambda x, generator: (x - mean) / std.clamp_min(1e-6)


def minmax(train: Tensor) -> Transform:
    """Each input to [0, 1] by its range over the training examples."""
    low, high = train.amin(0), train.amax(0)
    return lambda x, generator: ((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def noise(train: Tensor) -> Transform:
    """Standardised; in training, Gaussian noise of standard deviation 0.1 is added."""
    scaled = standardize(train)

    def apply(x: Tensor, generator: Generator | None) -> Tensor:
        x = scaled(x, None)
        return x if generator is None else x + 0.1 * x.new_empty(x.shape).normal_(generator=generator)

    return apply


def mask(train: Tensor) -> Transform:
    """Standardised; in training, each input is set to its mean with probability 0.1."""
    scaled = standardize(train)

    def apply(x: Tensor, generator: Generator | None) -> Tensor:
        x = scaled(x, None)
        return x if generator is None else x * (x.new_empty(x.shape).uniform_(generator=generator) >= 0.1)

    return apply


def norm(train: Tensor) -> Transform:
    """Each example to zero mean and unit variance over its own inputs."""

    def apply(x: Tensor, generator: Generator | None) -> Tensor:
        flat = x.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return (centred / centred.std(1, correction=0, keepdim=True).clamp_min(1e-6)).reshape(x.shape)

    return apply


TRANSFORMS: dict[str, Callable[[Tensor], Transform]] = {
    function.__name__: function for function in (plain, standardize, minmax, noise, mask, norm)
}


def acc(output: Tensor, target: Tensor) -> float:
    """Share of examples whose largest logit is the right class."""
    return (output.argmax(-1) == target).double().mean().item()


def f1(output: Tensor, target: Tensor) -> float:
    """F1 = 2 tp / (2 tp + fp + fn), averaged over the classes that occur in ``target``."""
    scores = []
    for label in target.unique():
        said, true = output.argmax(-1) == label, target == label
        scores.append(2 * (said & true).sum() / (said.sum() + true.sum()))
    return sum(scores).item() / len(scores)


def r2(output: Tensor, target: Tensor) -> float:
    """1 - squared error / variance, averaged over targets."""
    error = (output - target).double().square().mean(0)
    return (1 - error / target.double().var(0, correction=0)).mean().item()


SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {function.__name__: function for function in (acc, f1, r2)}


def transform(name: str) -> Callable[[Tensor], Transform]:
    """The input transform of this name."""
    if name not in TRANSFORMS:
        raise unknown("transform", name, TRANSFORMS)
    return TRANSFORMS[name]


def score(name: str) -> Callable[[Tensor, Tensor], float]:
    """The metric of this name; more is better."""
    if name not in SCORES:
        raise unknown("metric", name, SCORES)
    return SCORES[name]


@cache
def source_of(function: Callable[..., Any]) -> str:
    """The code of a transform or score, for the corpus's rows."""
    return inspect.getsource(function)
