"""How much an activation keeps of a Gaussian signal, by quadrature.

For z ~ N(0, 1) an activation f multiplies the mean square of a signal by E[f(z)^2] on the way forward and
that of a gradient by E[f'(z)^2] on the way back. ``gain`` = 1/sqrt(E[f(z)^2]) is the factor on the weights
that undoes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError

Function = Callable[[Tensor], Tensor]
# z beyond 12 standard deviations carries less than 1e-32 of the mass
_REACH = 12.0
_MOST_POINTS = 512
# torch's own activations with a kink; ours say it themselves in an attribute ``kinks``
_KINKS: dict[type, tuple[float, ...]] = {
    nn.ReLU: (0.0,),
    nn.LeakyReLU: (0.0,),
    nn.PReLU: (0.0,),
    nn.RReLU: (0.0,),
    nn.ELU: (0.0,),
    nn.SELU: (0.0,),
    nn.CELU: (0.0,),
    nn.ReLU6: (0.0, 6.0),
    nn.Hardswish: (-3.0, 3.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Hardsigmoid: (-3.0, 3.0),
}


def _golub_welsch(off_diagonal: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss rule of a symmetric density from its Jacobi matrix."""
    jacobi = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    weights = mass * vectors[0].square()
    # the exact rule is symmetric about 0; making it so keeps odd moments at exactly 0
    return (nodes - nodes.flip(0)) / 2, (weights + weights.flip(0)) / 2


def gauss_hermite(points: int = 64) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite rule for the standard normal: E[f(z)] = sum_i weights[i] f(nodes[i]).

    Exact for polynomials of degree up to 2 ``points`` - 1. Returns two float64 tensors of shape (points,).

    Raises:
        PomonaError: if ``points`` is below 1.

    Source: Golub and Welsch, Calculation of Gauss Quadrature Rules (1969).
    """
    if points < 1:
        raise PomonaError(f"points={points} must be at least 1")
    return _golub_welsch(torch.arange(1, points, dtype=torch.float64).sqrt(), 1.0)


@lru_cache(maxsize=64)
def gaussian_rule(points: int = 64, kinks: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
    """Nodes and weights for E[f(z)], z ~ N(0, 1), when f is smooth except at ``kinks``.

    Without kinks this is ``gauss_hermite``. With them the line [-12, 12] is cut there, and each piece gets a
    Gauss-Legendre rule of ``points`` nodes times the normal density, so that no rule straddles a kink.
    """
    if not kinks:
        return gauss_hermite(points)
    k = torch.arange(1, points, dtype=torch.float64)
    nodes, weights = _golub_welsch(k / (4 * k.square() - 1).sqrt(), 2.0)
    inner = sorted({kink for kink in kinks if abs(kink) < _REACH})
    edges = torch.tensor([-_REACH, *inner, _REACH], dtype=torch.float64)
    half, middle = edges.diff()[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    z = (middle + half * nodes).flatten()
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z, (half * weights).flatten() * density


def _kinks(f: Function, scale: float) -> tuple[float, ...]:
    kinks = getattr(f, "kinks", None) or _KINKS.get(type(f), ())
    return tuple(kink / scale for kink in kinks)


def _mean_over_gaussian(
    f: Function, statistic: Callable[[Function, Tensor], Tensor], points: int, scale: float
) -> float:
    """E[statistic(f, scale z)]: doubles the number of points until two rules agree to 1e-7."""
    if not scale > 0:
        raise PomonaError(f"scale={scale} must be a number above 0")
    if isinstance(f, nn.Module):
        f = copy.deepcopy(f).to("cpu", torch.float64).eval()
    # an activation that narrows (GLU, maxout) sees several independent inputs: a product rule over them
    inputs = max(1, round(1 / getattr(f, "out_factor", 1.0)))
    width = getattr(f, "features", None) or getattr(f, "num_parameters", None) or 1
    previous = math.nan
    while True:
        z, weights = gaussian_rule(points, _kinks(f, scale))
        if inputs > 1:
            z = torch.cartesian_prod(*[z] * inputs)
            weights = torch.cartesian_prod(*[weights] * inputs).prod(1)
        else:
            z = z[:, None].expand(-1, width)
        value = float(weights @ statistic(f, scale * z))
        points *= 2
        settled = abs(value - previous) <= 1e-7 * abs(value)
        if settled or points > _MOST_POINTS or len(weights) * 2**inputs > 2**20:
            return value
        previous = value


def _square(f: Function, z: Tensor) -> Tensor:
    with torch.no_grad():
        return f(z).square().mean(1)


def _square_slope(f: Function, z: Tensor) -> Tensor:
    """Sum over inputs, mean over outputs of the squared partial derivatives, shape (points,)."""
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        y = f(z)
        if y.shape == z.shape:
            parts = [torch.autograd.grad(y.sum(), z)[0].square().mean(1)] if y.requires_grad else []
        else:
            columns = y.unbind(1)
            grads = [torch.autograd.grad(c.sum(), z, retain_graph=True)[0] for c in columns]
            parts = [grad.square().sum(1) / len(columns) for grad in grads]
    return sum(parts, torch.zeros(len(z), dtype=z.dtype))


def second_moment(f: Function, *, scale: float = 1.0, points: int = 64) -> float:
    """E[f(scale z)^2] for z ~ N(0, 1).

    Modules are measured as a float64 copy in eval mode (so a stochastic activation counts as its mean),
    averaged over channels when they have one function a channel. An activation with ``out_factor`` other than
    1 sees independent inputs, and the result is the mean over its outputs.

    Args:
        f: an elementwise function or activation module.
        scale: standard deviation of the input.
        points: nodes of the first rule; doubled (to 512 at most) until two successive rules agree to 1e-7.

    Raises:
        PomonaError: if ``scale`` is not above 0.
    """
    return _mean_over_gaussian(f, _square, points, scale)


def derivative_second_moment(f: Function, *, scale: float = 1.0, points: int = 64) -> float:
    """E[f'(scale z)^2] for z ~ N(0, 1); arguments as in ``second_moment``."""
    return _mean_over_gaussian(f, _square_slope, points, scale)


def gain(f: Function, *, points: int = 64) -> float:
    """1/sqrt(E[f(z)^2]) for z ~ N(0, 1): sqrt(2) for ReLU, sqrt(2/(1 + a^2)) for slope a, 1 for the identity.

    Source: Delving Deep into Rectifiers (arXiv 1502.01852) for rectifiers; the quadrature makes it general.

    Raises:
        PomonaError: if f is 0 on all of the line, so that no weight can undo it.
    """
    moment = second_moment(f, points=points)
    if not moment > 0:
        raise PomonaError(f"act={f!r} has E[f(z)^2]={moment}; a gain needs a number above 0")
    return moment**-0.5
