"""Factories for the slots of a recipe that are neither layers nor training: initialisation, weights, edits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from pomona.data.task import Task
from pomona.edit.lottery_ticket import LotteryTicket, fitting
from pomona.edit.masks import Masks
from pomona.nn.init import init_
from pomona.train.loop import Fit
from pomona.train.settings import Training
from pomona.weights.hypernetworks import hyperize

NetChange = Callable[[nn.Module], nn.Module]
Edit = Callable[[Callable[[], nn.Module], Task, Training, int, int], Fit]
"""(maker of the untrained network, task, settings, steps in all, seed) -> the edited network and its training."""


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


def lottery_ticket(
    rounds: int = 3,
    rate: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    criterion: str = "magnitude",
) -> Edit:
    """``edit=lottery_ticket``: prune by magnitude, rewind to the first weights, train again, round by round (arXiv
    1803.03635).

    The steps of the budget are shared by the ``rounds + 1`` trainings, so that a ticket costs no more than its rivals.
    The network that comes out is a plain one, with zeros where it was pruned.
    """

    def run(make: Callable[[], nn.Module], task: Task, training: Training, steps: int, seed: int) -> Fit:
        each = max(1, steps // (rounds + 1))
        found: list[Fit] = []

        def train(net: nn.Module, seed: int, **options: object) -> Fit:
            done = fitting(task, training, each)(net, seed, **options)  # type: ignore[arg-type]
            found.append(done)  # type: ignore[arg-type]
            return done  # type: ignore[return-value]

        search = LotteryTicket(make, train, rounds=rounds, rate=rate, scope=scope, criterion=criterion, seed=seed)
        ticket = search.run()[-1]
        last = found[-1]
        last.net = Masks(ticket.net).fold().eval()
        last.steps = sum(done.steps for done in found)
        last.examples = sum(done.examples for done in found)
        last.seconds = sum(done.seconds for done in found)
        return last

    return run
