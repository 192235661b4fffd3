"""Factories of the slot ``edit``: functions from network to network, each with the trainings that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from pomona.edit.lottery_ticket import LotteryTicket
from pomona.edit.masks import Masks
from pomona.edit.masks import prune as mask_least
from pomona.recipe.edits import Made, Step, Trainer


def lottery_ticket(
    rounds: int = 3,
    rate: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    criterion: str = "magnitude",
) -> Step:
    """``edit=lottery_ticket``: prune by magnitude, rewind to the first weights, train again, round by round (arXiv
    1803.03635).

    The network that comes out is a plain one, with zeros where it was pruned.
    """

    def apply(_: nn.Module, trainer: Trainer) -> Made:
        def train(net: nn.Module, seed: int, **settings: Any) -> Any:
            settings.pop("start", None)
            return trainer.train(net, seed, keep="last", **settings)

        search = LotteryTicket(
            trainer.make, train, rounds=rounds, rate=rate, scope=scope, criterion=criterion, seed=trainer.seed
        )
        return Made(Masks(search.run()[-1].net).fold())

    return Step(apply, trainings=rounds + 1, first=True)


def prune(
    density: float = 0.5,
    criterion: str = "magnitude",
    scope: Literal["layer", "global"] = "global",
    rewind: bool = False,
) -> Step:
    """``edit=prune``: weights of least worth become zero and stay so in one more training, from the values that they
    have or, with ``rewind``, from their first ones (arXiv 1803.03635).
    """

    def apply(net: nn.Module, trainer: Trainer) -> Made:
        initial = dict(trainer.make().named_parameters())
        generator = torch.Generator().manual_seed(trainer.seed)
        masks = mask_least(net, criterion, density, scope, initial=initial, generator=generator)
        if rewind:
            masks = masks.carry(trainer.make())
        return Made(Masks(trainer.train(masks.net).net).fold())

    return Step(apply)


REBUILD: dict[str, Callable[..., nn.Module]] = {}
"""Edits that change shapes -> (fresh network, example, what the edit left) -> network of the edited shape."""
