"""The path of training seen from the straight line between its ends, and the product of layers in closed form.

Source: "Qualitatively characterizing neural network optimization problems" (arXiv 1412.6544).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from pomona.errors import PomonaError, check_positive
from pomona.measure.linear_path import Evaluator, State, combine, default_alphas, flatten

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class StoreCheckpoints:
    """A callback ``callback(net, step)`` that keeps the first weights, some between, and the last.

    Between, it keeps steps that are about ``ratio`` times the one before (``ratio=1``: every step).

    Attributes:
        steps: of the kept checkpoints.
    """

    def __init__(self, ratio: float = 1.5) -> None:
        if ratio < 1:
            raise PomonaError(f"ratio={ratio} must be at least 1; 1 keeps every step")
        self.ratio = ratio
        self.kept: list[tuple[int, dict[str, Tensor]]] = []
        self.last: tuple[int, nn.Module] | None = None

    def __call__(self, net: nn.Module, step: int) -> None:
        self.last = step, net
        if not self.kept or step >= max(self.kept[-1][0] + 1, self.ratio * self.kept[-1][0]):
            self.kept.append((step, _copy(net)))

    def _all(self) -> list[tuple[int, dict[str, Tensor]]]:
        if self.last is None or self.last[0] == self.kept[-1][0]:
            return self.kept
        return [*self.kept, (self.last[0], _copy(self.last[1]))]

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints."""
        return [step for step, _ in self._all()]

    @property
    def checkpoints(self) -> list[dict[str, Tensor]]:
        """Weights at those steps; the last are those the network has now."""
        return [theta for _, theta in self._all()]


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@dataclass
class Trajectory:
    """Training in the coordinates of the line from its first to its last weights.

    Attributes:
        along: ``(T,)`` component of ``theta_t - theta_0`` along ``d = theta_T - theta_0``, in units of ``||d||``.
        residual: ``(T,)`` distance from the line, in the same unit.
        length: ``||d||``.
        loss: ``(T,)``, or ``None`` without an evaluator.
        best_alpha: ``(T,)`` where along the line the loss is least with the residual of time t added, or ``None``.
    """

    along: Tensor
    residual: Tensor
    length: float
    loss: Tensor | None = None
    best_alpha: Tensor | None = None

    def figure(self) -> Figure:
        """The path, with the loss as height where it is known."""
        from plotly.graph_objects import Figure, Scatter, Scatter3d

        x, y = self.along.tolist(), self.residual.tolist()
        if self.loss is None:
            return Figure(Scatter(x=x, y=y, mode="lines+markers"))
        return Figure(Scatter3d(x=x, y=y, z=self.loss.tolist(), mode="lines+markers"))


def trajectory_view(
    checkpoints: Sequence[State], evaluate: Evaluator | None = None, *, alphas: Tensor | None = None
) -> Trajectory:
    """Where training went relative to the straight line between its ends.

    Args:
        checkpoints: weights ``theta_0 .. theta_T``.
        evaluate: gives ``loss`` and ``best_alpha``.
        alphas: grid of ``best_alpha``.

    Raises:
        PomonaError: with fewer than two checkpoints, or equal ends.
    """
    direction, offsets, along = _project(checkpoints)
    length = direction.norm()
    residual = (offsets - along[:, None] * direction).norm(dim=1) / length
    out = Trajectory(along, residual, float(length))
    if evaluate is not None:
        alphas = default_alphas() if alphas is None else alphas.double()
        out.loss, _ = evaluate(checkpoints)
        out.best_alpha = alphas[residual_walk(evaluate, checkpoints, alphas=alphas).argmin(1)]
    return out


def _project(checkpoints: Sequence[State]) -> tuple[Tensor, Tensor, Tensor]:
    """``d = theta_T - theta_0``, offsets from theta_0 ``(T, P)``, and their component along d in units of d."""
    if len(checkpoints) < 2:
        raise PomonaError(f"checkpoints has {len(checkpoints)} entries; give the first and the last at least")
    vectors = torch.stack([flatten(theta) for theta in checkpoints])
    offsets = vectors - vectors[0]
    direction = offsets[-1]
    square = direction @ direction
    if not square > 0:
        raise PomonaError("checkpoints begin and end at the same weights; there is no line between them")
    return direction, offsets, (offsets @ direction) / square


def _residual(checkpoints: Sequence[State], t: int, along: float) -> dict[str, Tensor]:
    """``theta_t`` minus its projection on the line."""
    return combine((1.0, checkpoints[t]), (along - 1, checkpoints[0]), (-along, checkpoints[-1]))


def residual_walk(evaluate: Evaluator, checkpoints: Sequence[State], *, alphas: Tensor | None = None) -> Tensor:
    """Loss ``(T, points)`` at ``theta_0 + alpha d + r_t``: the line shifted by the residual of every checkpoint."""
    alphas = default_alphas() if alphas is None else alphas.double()
    first, last = checkpoints[0], checkpoints[-1]
    rows = []
    for t, along in enumerate(_project(checkpoints)[2].tolist()):
        shift = _residual(checkpoints, t, along)
        points = [combine((1 - a, first), (a, last), (1.0, shift)) for a in alphas.tolist()]
        rows.append(evaluate(points)[0])
    return torch.stack(rows)


def residual_plane(
    evaluate: Evaluator,
    checkpoints: Sequence[State],
    t: int,
    *,
    alphas: Tensor | None = None,
    betas: Tensor | None = None,
) -> Tensor:
    """Loss ``(len(betas), len(alphas))`` at ``theta_0 + alpha d + beta r_t``; training at time t is at beta = 1."""
    alphas = default_alphas() if alphas is None else alphas.double()
    betas = alphas if betas is None else betas.double()
    shift = _residual(checkpoints, t, float(_project(checkpoints)[2][t]))
    first, last = checkpoints[0], checkpoints[-1]
    points = [combine((1 - a, first), (a, last), (b, shift)) for b in betas.tolist() for a in alphas.tolist()]
    return evaluate(points)[0].unflatten(0, (len(betas), len(alphas)))


def gradient_alignment(evaluate: Evaluator, checkpoints: Sequence[State]) -> Tensor:
    """Cosine ``(T - 1,)`` of the descent direction ``-grad J(theta_t)`` with ``theta_T - theta_t``."""
    trained = {name for name, _ in evaluate.net.named_parameters()}
    out = []
    for theta in checkpoints[:-1]:
        fixed = {name: value for name, value in theta.items() if name not in trained}
        moving = {name: value for name, value in theta.items() if name in trained}

        def loss(weights: State, fixed: State = fixed) -> Tensor:
            terms = (
                evaluate.loss_fn(functional_call(evaluate.net, {**weights, **fixed}, (x,)), y)
                * (len(y) / evaluate.total)
                for x, y in evaluate.batches
            )
            return torch.stack(list(terms)).sum()

        descent = -flatten(grad(loss)(moving))
        to_end = flatten({name: checkpoints[-1][name] - value for name, value in moving.items()})
        out.append(torch.cosine_similarity(descent, to_end, dim=0))
    return torch.stack(out)


class DeepLinearToy(nn.Module):
    """``J = ||Y - W_L ... W_1||_F^2 / 2``: flat near 0, a saddle there, then a steep fall.

    Args:
        depth: number of factors L.
        target: Y, a number or a square matrix ``(d, d)``.
        std: standard deviation of the initial entries.
        generator: of the initial entries.
    """

    target: Tensor

    def __init__(
        self, depth: int, target: float | Tensor, *, std: float = 0.1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_positive(depth=depth)
        y = torch.atleast_2d(torch.as_tensor(target, dtype=torch.float64))
        if y.shape[0] != y.shape[1]:
            raise PomonaError(f"target has shape {tuple(y.shape)}; give a number or a square matrix")
        self.register_buffer("target", y)
        self.weight = nn.Parameter(std * torch.randn(depth, *y.shape, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        """The loss."""
        product = self.weight[0]
        for factor in self.weight[1:]:
            product = factor @ product
        return (self.target - product).square().sum() / 2

    def path(self, weight_a: Tensor, weight_b: Tensor, alphas: Tensor) -> Tensor:
        """Loss along the line in closed form: every factor is ``A + alpha (B - A)``, the product a polynomial.

        Args:
            weight_a: ``(depth, d, d)`` at alpha = 0.
            weight_b: at alpha = 1.
            alphas: ``(points,)``.
        """
        coefficients = [torch.eye(len(self.target), dtype=weight_a.dtype)]  # of 1, alpha, alpha^2, ...
        for a, b in zip(weight_a, weight_b, strict=True):
            low, high = [a @ c for c in coefficients], [(b - a) @ c for c in coefficients]
            zero = torch.zeros_like(low[0])
            coefficients = [x + y for x, y in zip([*low, zero], [zero, *high], strict=True)]
        powers = alphas[:, None] ** torch.arange(len(coefficients), dtype=alphas.dtype)
        product = torch.einsum("pk,kij->pij", powers, torch.stack(coefficients))
        return (self.target - product).square().sum((1, 2)) / 2
