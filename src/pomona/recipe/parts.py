"""Factories for two slots of a recipe that are neither layers nor training: initialisation and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from pomona.nn.init import init_
from pomona.weights.hypernetworks import hyperize

NetChange = Callable[[nn.Module], nn.Module]


def he_init(mode: Literal["fan_in", "fan_out"] = "fan_in") -> NetChange:
    """``init=he``: variance 2/n behind rectifiers (arXiv 1502.01852); see :func:`pomona.nn.init.init_`."""
    return partial(init_, scheme="he", mode=mode)


def glorot_init() -> NetChange:
    """``init=glorot``: variance 2/(fan_in + fan_out)."""
    return partial(init_, scheme="glorot")


def lecun_init() -> NetChange:
    """``init=lecun``: variance 1/fan_in."""
    return partial(init_, scheme="lecun")


def orthogonal_init() -> NetChange:
    """``init=orthogonal``: orthogonal matrices scaled by the gain of the activation (arXiv 1312.6120)."""
    return partial(init_, scheme="orthogonal")


def fixup_init() -> NetChange:
    """``init=fixup``: residual branches scaled down by their number (arXiv 1901.09321)."""
    return partial(init_, scheme="fixup")


def hypernetwork(z_dim: int = 64, base: int = 16) -> NetChange:
    """``weights=hypernetwork``: one small network makes all kernels but the first (arXiv 1609.09106)."""
    return partial(hyperize, z_dim=z_dim, base=base)
