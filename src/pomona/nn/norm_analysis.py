"""What norms do to a layer: which changes of weights and data they cancel, their statistics, their geometry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.nn.norm import (
    NORMS,
    DyT,
    GroupNorm,
    LayerNorm,
    Norm,
    RMSNorm,
    ScaleNorm,
    WeightNorm,
    is_norm,
)

KINDS = (*NORMS, "weight")
_EPS = 1e-14


def _normalized_layer(kind: str, features: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(W, x) -> the normalised layer norm(W x), in float64 with next to no eps."""
    if kind not in KINDS:
        raise unknown("norm", kind, KINDS)
    if kind == "weight":
        return lambda w, x: x @ WeightNorm()(torch.ones_like(w[:, :1]), w).T
    options: dict[str, Any] = {} if kind in ("none", "dyt") else {"eps": _EPS}
    if kind == "instance":
        raise PomonaError("norm='instance' has no positions on (batch, features); its table is that of group norm")
    norm = Norm(kind, features, **options).double().train()
    return lambda w, x: norm(x @ w.T)


def invariance_table(kind: str, *, seed: int = 0) -> dict[str, bool]:
    """Whether the output of norm(W x) stays the same under each change, tried on random weights and data in float64.

    - ``weight_matrix_scale``: W -> 1.7 W.   ``weight_matrix_shift``: W -> W + 1 c^T, one c added to all rows.
    - ``weight_vector_scale``: each row of W by a factor of its own.
    - ``dataset_scale``: x -> 1.7 x.   ``dataset_shift``: x -> x + c.   ``example_scale``: each x by its own.

    Args:
        kind: a norm of ``NORMS`` other than 'instance', or 'weight' for weight norm.
        seed: of the weights and data.

    Source: Layer Normalization (arXiv 1607.06450), table 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = _normalized_layer(kind, 16)
    w, x = draw(16, 8), draw(32, 8)
    changes: dict[str, tuple[Tensor, Tensor]] = {
        "weight_matrix_scale": (1.7 * w, x),
        "weight_matrix_shift": (w + draw(8), x),
        "weight_vector_scale": (w * draw(16, 1).exp(), x),
        "dataset_scale": (w, 1.7 * x),
        "dataset_shift": (w, x + draw(8)),
        "example_scale": (w, x * draw(32, 1).exp()),
    }
    with torch.no_grad():
        y = layer(w, x)
        return {name: torch.allclose(layer(*changed), y, rtol=0, atol=1e-6) for name, changed in changes.items()}


def fisher_scale(
    kind: str, scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0), *, seed: int = 0
) -> dict[float, float]:
    """Trace of the Fisher information of a Gaussian model of mean norm(s W x), over that at s = 1, for each s.

    A norm that cancels the length of the weights makes it fall as 1/s^2: as the weights grow the same step turns the
    function less, an effective learning rate that falls by itself. Without a norm it does not depend on s.

    Args:
        kind: as in ``invariance_table``.
        scales: the s, above 0.
        seed: of the weights and data.

    Source: Layer Normalization (arXiv 1607.06450), section 5.2.
    """
    if not all(s > 0 for s in scales):
        raise PomonaError(f"scales={tuple(scales)} must all be above 0")
    generator = torch.Generator().manual_seed(seed)
    layer = _normalized_layer(kind, 8)
    w = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)

    def trace(scale: float) -> float:
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v, x), scale * w)
        return float(jacobian.square().sum())

    unit = trace(1.0)
    return {scale: trace(scale) / unit for scale in scales}


@torch.no_grad()
def fold_into_linear(norm: nn.Module, linear: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    """Move the gain and bias of a norm into the linear layer behind it: (bare norm, new linear), both new.

        W (g * xhat + b) + c = (W diag(g)) xhat + (W b + c)

    Batch norm in evaluation is affine as a whole, so all of it moves and the bare norm is ``nn.Identity``.

    Args:
        norm: layer, RMS, scale, group, batch norm or DyT (ours or torch's), on the last axis of its input.
        linear: the layer that reads its output.

    Raises:
        PomonaError: for another kind of module, a batch norm in training mode, or widths that differ.
    """
    kinds = (LayerNorm, RMSNorm, ScaleNorm, DyT, GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    if not isinstance(norm, (*kinds, nn.modules.batchnorm._BatchNorm)):
        raise PomonaError(f"norm={type(norm).__name__} has no gain and bias that could be folded into a linear layer")
    weight = linear.weight
    gain = torch.ones_like(weight[0]) if norm.weight is None else norm.weight.to(weight.dtype)
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(weight[0]) if bias is None else bias
    if gain.shape not in ((), (linear.in_features,)):
        raise PomonaError(
            f"norm of width {tuple(gain.shape)} does not fit a linear of in_features={linear.in_features}"
        )
    bare: nn.Module = copy.deepcopy(norm)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        if norm.training or norm.running_mean is None or norm.running_var is None:
            raise PomonaError("batch norm folds in evaluation mode with running statistics: call .eval() first")
        gain = gain * torch.rsqrt(norm.running_var + norm.eps)
        bias = bias - norm.running_mean * gain
        bare = nn.Identity()
    else:
        for name, neutral in (("weight", 1.0), ("bias", 0.0)):
            own = getattr(bare, name, None)
            if isinstance(own, Tensor):
                own.fill_(neutral)
    folded = nn.Linear(linear.in_features, linear.out_features, True, weight.device, weight.dtype)
    folded.weight.copy_(weight * gain)
    folded.bias.copy_(weight @ bias + (0.0 if linear.bias is None else linear.bias))
    return bare, folded


@torch.no_grad()
def norm_stats(net: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """What each norm module of a copy of ``net`` sees and gives on a batch.

    For every norm, by name: mean and standard deviation of all values before (``in_mean``, ``in_std``) and after
    (``out_mean``, ``out_std``), and ``gain_mean``, the mean |g| of its gain (nan if it has none).

    Raises:
        PomonaError: if ``net`` has no norm.
    """
    net = copy.deepcopy(net)
    stats: dict[str, dict[str, float]] = {}
    norms = {module: name for name, module in net.named_modules() if is_norm(module)}
    if not norms:
        raise PomonaError("net has no norm module to measure")

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(module, "weight", None)
        stats[norms[module]] = {
            "in_mean": float(inputs[0].mean()),
            "in_std": float(inputs[0].std(correction=0)),
            "out_mean": float(output.mean()),
            "out_std": float(output.std(correction=0)),
            "gain_mean": float(weight.abs().mean()) if isinstance(weight, Tensor) else math.nan,
        }

    handles = [module.register_forward_hook(record) for module in norms]
    net(x)
    for handle in handles:
        handle.remove()
    return stats
