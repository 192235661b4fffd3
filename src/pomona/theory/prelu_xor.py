"""XOR by a single neuron: many initialisations and learning rates trained at once, and why a learned slope suffices.

Source: PReLU: Yet Another Single-Layer Solution to the XOR Problem (arXiv 2409.10821).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.activation import act as activation
from pomona.nn.check import check_input

CODINGS = {"01": (0.0, 1.0), "pm1": (-1.0, 1.0)}
INITS = ("uniform", "normal", "default")
OPTIMISERS = ("gd", "sgd", "adam")
BETAS, EPS = (0.9, 0.999), 1e-8


def xor_points(coding: str = "01", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The four inputs (4, 2), false and true being 0 and 1 (``01``) or -1 and 1 (``pm1``), and their XOR, 0 or 1."""
    if coding not in CODINGS:
        raise unknown("coding", coding, CODINGS)
    bits = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    return torch.tensor(CODINGS[coding], dtype=dtype)[bits], (bits[:, 0] != bits[:, 1]).to(dtype)


class SingleNeuron(nn.Module):
    """y = act(w . x [+ b]): (batch, 2) -> (batch,).

    With PReLU and no bias three numbers are learned, and w = (c, -c), a = -1 gives c |x_1 - x_2|.

    Args:
        act: name of the activation, or a module.
        bias: whether there is a b.

    Source: PReLU: Yet Another Single-Layer Solution to the XOR Problem (arXiv 2409.10821).
    """

    def __init__(self, act: str | nn.Module = "prelu", bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.zeros(())) if bias else None
        self.act = activation(act) if isinstance(act, str) else act

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, 2)
        z = x @ self.weight
        return self.act(z if self.bias is None else z + self.bias)


class TwoLayerXOR(nn.Module):
    """The network that XOR is usually given, 2-2-1 with nine numbers: (batch, 2) -> (batch,)."""

    def __init__(self, act: str = "tanh") -> None:
        super().__init__()
        self.hidden, self.act, self.out = nn.Linear(2, 2), activation(act), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, 2)
        return self.out(self.act(self.hidden(x)))[..., 0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "prelu": SingleNeuron,
    "gcu": lambda: SingleNeuron("gcu", bias=True),
    "mlp_tanh": TwoLayerXOR,
    "mlp_relu": lambda: TwoLayerXOR("relu"),
}


@dataclass(frozen=True)
class XORStudy:
    """What became of every training.

    Attributes:
        lrs: (rates,)
        solved: (rates, inits), whether all four outputs are on the right side of 1/2 at the end.
        converged: (rates, inits), the step from which on they always were; -1 where unsolved.
        loss: (rates, inits), mean squared error at the end.
        parameters: name -> (rates, inits, *shape), at the end.
    """

    lrs: Tensor
    solved: Tensor
    converged: Tensor
    loss: Tensor
    parameters: dict[str, Tensor]

    @property
    def rate(self) -> Tensor:
        """Share of initialisations solved at each learning rate: (rates,)."""
        return self.solved.double().mean(1)

    def area(self, members: slice = slice(None)) -> float:
        """Mean success rate over the logarithm of the learning rate, by trapezoids, of some of the initialisations."""
        rate, log = self.solved[:, members].double().mean(1), self.lrs.log()
        return float(torch.trapezoid(rate, log) / (log[-1] - log[0])) if len(log) > 1 else float(rate[0])


def xor_study(
    model: str | Callable[[], nn.Module] = "prelu",
    lrs: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    n_init: int = 200,
    steps: int = 3000,
    *,
    coding: Literal["01", "pm1"] = "01",
    optimiser: Literal["gd", "sgd", "adam"] = "gd",
    init: Literal["uniform", "normal", "default"] = "uniform",
    seed: int = 0,
) -> XORStudy:
    """Train a model on XOR from many initialisations at many learning rates, all at once, on the mean squared error.

    Args:
        model: a name of ``MODELS`` or a maker of a module (batch, 2) -> (batch,).
        lrs: learning rates, increasing; each has the same initialisations.
        n_init: how many.
        steps: of training.
        coding: of the inputs; see ``xor_points``.
        optimiser: ``gd`` on all four points, ``sgd`` on one drawn point (the same for all), or ``adam`` on all four.
        init: ``uniform`` on [-1, 1] or ``normal`` for every weight and bias, the activation's own parameters as the
            maker sets them; ``default`` as the maker sets all.
        seed: of every draw.

    Raises:
        PomonaError: for unknown names or sizes not above 0.

    Source: PReLU: Yet Another Single-Layer Solution to the XOR Problem (arXiv 2409.10821).
    """
    check_positive(n_init=n_init, steps=steps)
    for field, value, known in (("optimiser", optimiser, OPTIMISERS), ("init", init, INITS)):
        if value not in known:
            raise unknown(field, value, known)
    if isinstance(model, str) and model not in MODELS:
        raise unknown("model", model, MODELS)
    rates = torch.tensor([float(lr) for lr in lrs], dtype=torch.float64)
    if not len(rates) or not bool((rates > 0).all() & (rates.diff() > 0).all()):
        raise PomonaError(f"lrs={tuple(lrs)} must be increasing numbers above 0")
    x, y = xor_points(coding)
    generator = torch.Generator().manual_seed(seed)
    base, start = _initial(MODELS[model] if isinstance(model, str) else model, n_init, init, generator)
    shapes = {name: p.shape[1:] for name, p in start.items()}
    weights = {name: p.repeat(len(rates), *(1,) * len(shapes[name])) for name, p in start.items()}
    rate = rates.repeat_interleave(n_init)

    def objective(w: dict[str, Tensor], share: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(base, w, (x,))
        return (share * (output - y).square()).sum(), output

    share = torch.full_like(y, 1 / 4)  # each point's part in the mean
    # traced once, for steps so small that the tracing would take all the time
    slopes = make_fx(vmap(grad(objective, has_aux=True), (0, None)))(weights, share)
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    failed = torch.full((len(rate),), -1)  # the last step at which an output was wrong
    for step in range(steps + 1):
        if optimiser == "sgd":
            share = F.one_hot(torch.randint(4, (), generator=generator), 4).to(share)
        grads, output = slopes(weights, share)
        failed[((output > 0.5) != (y > 0.5)).any(1) | ~output.isfinite().all(1)] = step
        if step == steps:
            break
        if optimiser == "adam":
            for name, g in grads.items():
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g.square()
                corrected = second[name] / (1 - BETAS[1] ** (step + 1))
                grads[name] = first[name] / (1 - BETAS[0] ** (step + 1)) / (corrected.sqrt() + EPS)
        weights = {name: p - rate.view(-1, *(1,) * len(shapes[name])) * grads[name] for name, p in weights.items()}
    solved = failed < steps
    grid = (len(rates), n_init)
    return XORStudy(
        rates,
        solved.view(grid),
        torch.where(solved, failed + 1, -1).view(grid),
        (output - y).square().mean(1).view(grid),
        {name: p.view(*grid, *shapes[name]) for name, p in weights.items()},
    )


def _initial(
    make: Callable[[], nn.Module], count: int, init: str, generator: torch.Generator
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module to call and ``count`` stacked sets of its parameters, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        made = [make().double() for _ in range(count if init == "default" else 1)]
    base = copy.deepcopy(made[0]).to("meta")
    start = {name: p.detach() for name, p in stack_module_state(made)[0].items()}
    if init == "default":
        return base, start
    own = {
        f"{name}.{p}" for name, m in made[0].named_modules() if name.endswith("act") for p, _ in m.named_parameters()
    }
    for name, p in start.items():
        size = (count, *p.shape[1:])
        if name in own:
            start[name] = p.expand(size).clone()
        elif init == "uniform":
            start[name] = 2 * torch.rand(size, generator=generator, dtype=p.dtype) - 1
        else:
            start[name] = torch.randn(size, generator=generator, dtype=p.dtype)
    return base, start


def separates(outputs: Tensor, target: Tensor) -> Tensor:
    """Whether some threshold puts the outputs (..., 4) of true points above and of false ones below it: (...)."""
    true = target > 0.5
    return outputs[..., true].amin(-1) > outputs[..., ~true].amax(-1) + 1e-12


def grid_solutions(
    function: Callable[[Tensor], Tensor], reach: float = 3.0, points: int = 25, coding: Literal["01", "pm1"] = "01"
) -> int:
    """For how many (w_1, w_2, b) on a grid over [-reach, reach]^3 function(w . x + b) separates XOR's classes.

    Source: PReLU: Yet Another Single-Layer Solution to the XOR Problem (arXiv 2409.10821).
    """
    x, y = xor_points(coding)
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis, axis)
    with torch.no_grad():
        return int(separates(function(w[:, :2] @ x.T + w[:, 2:]), y).sum())


def level_crossings(slope: float, level: float = 0.5) -> list[float]:
    """The z at which PReLU with that slope equals ``level``, in increasing order: two of them where slope < 0 < level.

    Raises:
        PomonaError: if ``level`` is 0, which a slope of 0 meets everywhere below 0.
    """
    if level == 0:
        raise PomonaError("level=0 is met by every slope at z=0; give a level other than 0")
    negative = [level / slope] if slope and level / slope < 0 else []
    return [*negative, *([level] if level > 0 else [])]


@dataclass(frozen=True)
class HalfPlanes:
    """Why one neuron is enough: f(w . x) > level holds on two half planes, beyond two parallel lines.

    Attributes:
        crossings: z = w . x at those lines.
        distances: of each line from the origin, along w.
        x: (points,) coordinates of both inputs.
        output: (points, points), f(w . x) with x_1 along the first axis.
        above: (points, points), whether it is above the level.
        corners: (4, 2) XOR's points.
        solved: whether exactly those of them that are true lie above.
    """

    crossings: list[float]
    distances: list[float]
    x: Tensor
    output: Tensor
    above: Tensor
    corners: Tensor
    solved: bool


def explain(
    w: tuple[float, float] = (1.0, -1.0),
    slope: float = -1.0,
    level: float = 0.5,
    coding: Literal["01", "pm1"] = "01",
    points: int = 61,
) -> HalfPlanes:
    """The two half planes of a PReLU neuron: with a slope below 0 it falls and rises, so it crosses a level twice.

    Source: PReLU: Yet Another Single-Layer Solution to the XOR Problem (arXiv 2409.10821).
    """
    if not any(w):
        raise PomonaError("w=(0, 0) gives a constant output; give a weight other than 0")
    corners, y = xor_points(coding)
    low, high = CODINGS[coding]
    x = torch.linspace(low - (high - low) / 2, high + (high - low) / 2, points, dtype=torch.float64)
    weight = torch.tensor(w, dtype=torch.float64)

    def neuron(at: Tensor) -> Tensor:
        z = at @ weight
        return torch.where(z > 0, z, slope * z)

    output = neuron(torch.cartesian_prod(x, x)).view(points, points)
    crossings = level_crossings(slope, level)
    solved = bool(((neuron(corners) > level) == (y > 0.5)).all())
    return HalfPlanes(crossings, [z / math.hypot(*w) for z in crossings], x, output, output > level, corners, solved)
