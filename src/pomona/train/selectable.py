"""Training networks that choose among kinds of edge functions: all of them, a few a node, then one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pomona.data.task import Task
from pomona.errors import PomonaError, check_positive
from pomona.nn.selectable_kan import SelectableKANLayer, prune_selectable
from pomona.train.budget import Budget
from pomona.train.loop import Fit, fit
from pomona.train.settings import Training


@dataclass
class SelectableFit:
    """A finished selection.

    Attributes:
        fit: the pruned network, trained, with the curve of all phases; the best weights are those of the last.
        choices: layer -> weight of each member of its pool at each node before pruning, (nodes, members).
    """

    fit: Fit
    choices: dict[str, Tensor]

    @property
    def net(self) -> nn.Module:
        """The pruned network."""
        return self.fit.net


def fit_selectable(
    net: nn.Module,
    task: Task,
    training: Training | None = None,
    *,
    phases: tuple[float, float, float] = (0.5, 0.3, 0.2),
    top: int = 2,
    tau: tuple[float, float] = (1.0, 0.1),
    budget: Budget | None = None,
    seed: int = 0,
    **fitting: Any,
) -> SelectableFit:
    """Train a copy of a network with `SelectableKANLayer`s in three phases, and return it pruned.

    1. All members and the choice are trained together.
    2. Each node keeps its ``top`` members, whose weights sum to 1 again.
    3. Each node keeps its best member; the rest is deleted and the small network trained on.

    The temperature falls geometrically over the first two phases; each phase has a learning-rate schedule of its own.

    Args:
        net: any module with at least one `SelectableKANLayer`, also inside a `SelectableKANConv2d`.
        task, training, budget, seed: as in `pomona.train.fit`; the budget, of all phases, not in seconds.
        phases: shares of the budget, summing to 1.
        top: members that a node keeps in the second phase.
        tau: temperature at first and at last.
        fitting: further arguments of `pomona.train.fit`.

    Raises:
        PomonaError: if there is nothing to select, or for phases or a budget that cannot be shared out.

    Source: Activation Space Selectable Kolmogorov-Arnold Networks, arXiv 2408.08338.
    """
    training, budget = training or Training(), budget or Budget()
    check_positive(top=top, tau=min(tau))
    if len(phases) != 3 or min(phases) <= 0 or abs(sum(phases) - 1) > 1e-6:
        raise PomonaError(f"phases={phases} must be three shares above 0 that sum to 1")
    count, size = len(task.splits["train"]), min(training.batch_size, len(task.splits["train"]))
    total = budget.steps(count, size, fitting.get("flops_per_example", 0.0))
    if total is None:
        raise PomonaError("budget in seconds cannot be shared out among phases; give epochs, examples or flops")
    if not _layers(net):
        raise PomonaError(f"net={type(net).__name__} has no SelectableKANLayer to select from")
    keep = fitting.pop("keep", "best")
    callbacks = list(fitting.pop("callbacks", ()))
    fits: list[Fit] = []
    done = 0
    choices: dict[str, Tensor] = {}
    for phase, share in enumerate(phases):
        steps = max(1, total - done if phase == 2 else round(share * total))
        anneal = [_annealing(tau, done, total * (phases[0] + phases[1]))] if phase < 2 else []
        fits.append(
            fit(
                net,
                task,
                training,
                budget=replace(budget, kind="examples", amount=steps * size),
                seed=seed + phase,
                callbacks=[*anneal, *callbacks],
                keep=keep if phase == 2 else "last",
                **fitting,
            )
        )
        net, done = fits[-1].net, done + steps
        if phase == 0:
            for layer in _layers(net).values():
                layer.keep_top(top)
        elif phase == 1:
            choices = {name: layer.choice_map() for name, layer in _layers(net).items()}
            net = prune_selectable(net)
    return SelectableFit(_joined(fits), choices)


def _layers(net: nn.Module) -> dict[str, SelectableKANLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, SelectableKANLayer)}


def _annealing(tau: tuple[float, float], done: int, until: float) -> Callable[[nn.Module, int], None]:
    def callback(net: nn.Module, step: int) -> None:
        now = tau[0] * (tau[1] / tau[0]) ** min(1.0, (done + step) / until)
        for layer in _layers(net).values():
            layer.tau.fill_(now)

    return callback


def _joined(fits: Sequence[Fit]) -> Fit:
    """The last fit with what came before it."""
    last = fits[-1]
    for past in reversed(fits[:-1]):
        shift = {"step": past.steps, "examples": past.examples, "seconds": past.seconds}
        later = [{k: v + shift.get(k, 0) for k, v in entry.items()} for entry in last.curve]
        last.curve, last.best = past.curve + later, last.best + len(past.curve)
        last.steps, last.examples = last.steps + past.steps, last.examples + past.examples
        last.seconds += past.seconds
    return last
