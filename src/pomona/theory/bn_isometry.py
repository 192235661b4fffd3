"""How far the examples of a batch are from orthogonal, layer by layer, and what that does to gradients at depth.

Source: Towards Training Without Depth Limits: Batch Normalization Without Gradient Explosion (arXiv 2310.02012).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pomona.errors import PomonaError, check_positive
from pomona.nets.iso_mlp import IsoMLP

Loss = Callable[[Tensor, Tensor], Tensor]


def isometry_gap(x: Tensor) -> Tensor:
    """phi(X) = log(tr G / n) - log det(G) / n, G = X X^T: 0 just where the rows are orthogonal and of one length.

    Infinite for linearly dependent rows. Scale and orthogonal maps do not change it.

    Shape:
        (*, n, d) -> (*)

    Source: arXiv 2310.02012.
    """
    n, d = x.shape[-2:]
    if n > d:
        return x.new_full(x.shape[:-2], torch.inf)
    squares = torch.linalg.svdvals(x).square()
    return squares.mean(-1).log() - squares.log().mean(-1)


def ortho_gap(x: Tensor) -> Tensor:
    """|G / tr G - I / n|_F, G = X X^T: (*, n, d) -> (*)"""
    gram = x @ x.mT
    n = gram.shape[-1]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return (gram / trace - torch.eye(n, dtype=x.dtype, device=x.device) / n).norm(dim=(-2, -1))


def expected_gap(gap: float, width: int, layers: Sequence[int] | np.ndarray) -> np.ndarray:
    """The bound phi_0 exp(-l / k), k = d^2 (1 + d phi_0), on the expected gap after l layers of the linear net."""
    check_positive(width=width)
    return gap * np.exp(-np.asarray(layers) / (width**2 * (1 + width * gap)))


def gradient_bound(gap: float, width: int, constant: float = 1.0) -> float:
    """The bound C d^5 (phi_0^3 + 1) on log |dL/dW_l|_F in the linear net, whatever its depth."""
    check_positive(width=width, constant=constant)
    return constant * width**5 * (gap**3 + 1)


def _check_batch(net: IsoMLP, x: Tensor) -> None:
    n, rank = len(x), int(torch.linalg.matrix_rank(x.flatten(1).double()))
    if rank < n:
        warnings.warn(
            f"the {n} examples span {rank} dimensions: gradients diverge with depth unless they are linearly "
            f"independent, so take at most {net.d_in} of them, all different",
            stacklevel=3,
        )


@torch.no_grad()
def gaps(net: IsoMLP, x: Tensor) -> Tensor:
    """The isometry gap of the batch at the input and after every layer, in float64: (depth + 1,)"""
    return torch.stack([isometry_gap(h.double()) for h in net.hidden(x)])


def layer_gradients(net: IsoMLP, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """|dL/dW_l|_F of every hidden layer on one batch, first layer first; nan or inf where they overflow: (depth,)

    A batch whose examples depend on each other linearly is warned of.
    """
    _check_batch(net, x)
    grads = torch.autograd.grad(loss(net(x), y), list(net.weights))
    return torch.stack([grad.norm() for grad in grads])


def jacobian_log_norm(net: IsoMLP, x: Tensor, probes: int = 8, generator: torch.Generator | None = None) -> float:
    """The logarithm of |d X_L / d X_0|_F of the hidden layers on a batch, by |J|_F^2 = E |J^T v|^2, v random."""
    check_positive(probes=probes)
    x = x.flatten(1).detach().requires_grad_()
    out = net.hidden(x)[-1]
    v = torch.randn(probes, *out.shape, generator=generator, dtype=x.dtype, device=x.device)
    (rows,) = torch.autograd.grad(out, x, v, is_grads_batched=True)
    return math.log(float(rows.double().square().sum()) / probes) / 2


def gradient_growth(depths: Sequence[float], norms: Sequence[float]) -> float:
    """Slope of the logarithm of a gradient norm over depth, per layer, by least squares; inf where one overflowed.

    Raises:
        PomonaError: for fewer than two depths.
    """
    if len(depths) < 2 or len(depths) != len(norms):
        raise PomonaError(f"depths has {len(depths)} and norms {len(norms)} entries; give two or more of each")
    if not np.isfinite(norms).all():
        return math.inf
    return float(np.polyfit(depths, np.log(norms), 1)[0])


def compare_depths(
    configs: Mapping[str, Mapping[str, Any]],
    depths: Sequence[int],
    width: int = 64,
    classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Any]]:
    """First-layer gradient norms at initialisation, for several networks and depths on one Gaussian batch.

    Args:
        configs: name -> options of `IsoMLP`.
        depths: numbers of hidden layers.
        width: of the layers, of the inputs and of the batch.
        classes: of the random labels.
        seed: of batch and weights.
        dtype: of everything.

    Returns:
        name -> ``norms`` (one a depth), ``growth`` per layer, and ``gaps``, the isometry gap at the last layer.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, options in configs.items():
        norms, last = [], []
        for depth in depths:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(width, width, generator=generator).to(dtype)
            y = torch.randint(classes, (width,), generator=generator)
            net = IsoMLP(width, width, depth, classes, **options, generator=generator).to(dtype)
            norms.append(float(layer_gradients(net, x, y)[0]))
            last.append(float(gaps(net, x)[-1]))
        table[name] = {
            "norms": norms,
            "growth": gradient_growth(depths, norms) if len(depths) > 1 else 0.0,
            "gaps": last,
        }
    return table
