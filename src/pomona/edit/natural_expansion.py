r"""How much a natural-gradient step would gain, to first order: a score by which networks of any size compare.

.. math:: \eta = g^\top F^{-1} g, \qquad F = \frac1N \sum_i g_i g_i^\top

Source: Self Expanding Neural Networks (arXiv 2307.04526).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from pomona.errors import PomonaError, unknown

Loss = Callable[[Tensor, Tensor], Tensor]
Fisher = Literal["diag", "kfac", "full", "woodbury"]
FISHERS = ("diag", "kfac", "full", "woodbury")
DAMPING = {"diag": 1e-12, "kfac": 1e-3, "full": 1e-3, "woodbury": 1e-3}
UNIT = 1e4
"""Parameters that the penalty counts as one."""


def example_gradients(net: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """(N, P) gradients of each example's loss, in evaluation mode."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())
    still = copy.deepcopy(net).eval()

    def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(still, (params, buffers), (x[None],)), y[None])

    found = vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def expansion_score(gradients: Tensor, fisher: Literal["diag", "full", "woodbury"], damping: float) -> Tensor:
    r"""``g^T (F + damping I)^{-1} g`` of the mean gradient and the empirical Fisher, or its diagonal.

    ``woodbury`` is ``full`` from the gram matrix ``K = G G^T / N``: :math:`1^\top K (K + \delta I)^{-1} 1 / N`.

    Args:
        gradients: (N, P) of the examples.
        fisher: the form.
        damping: 0 takes the pseudo-inverse. Undamped, the full score is 1 as soon as the rank is N.
    """
    n = len(gradients)
    if fisher == "diag":
        mean, second = gradients.mean(0), gradients.square().mean(0)
        return (mean.square() / (second + damping)).nan_to_num(0.0).sum()
    matrix = gradients.T @ gradients / n if fisher == "full" else gradients @ gradients.T / n
    values, vectors = torch.linalg.eigh(matrix)
    above = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    if fisher == "full":
        terms = (vectors.T @ gradients.mean(0)).square() / (values + damping)
    else:
        terms = vectors.sum(0).square() * values / (values + damping) / n
    return terms[above].sum()


def kfac_score(net: nn.Module, x: Tensor, y: Tensor, loss: Loss, damping: float) -> Tensor:
    r"""The score with a Fisher of one Kronecker product a layer, and the diagonal one of all other parameters.

    .. math:: F_l = A \otimes S, \quad A = E \sum_t a_t a_t^\top, \quad S = E\, \overline{d_t d_t^\top}, \qquad
              \eta_l = \mathrm{tr}\, S^{-1} \bar G A^{-1} \bar G^\top

    with inputs a (and a 1 for the bias) and output gradients d at positions t; the root of ``damping`` is added to
    each factor's diagonal.

    Source: Optimizing Neural Networks with Kronecker-factored Approximate Curvature (arXiv 1503.05671).
    """
    still = copy.deepcopy(net).eval()
    chosen: dict[str, Any] = {
        name: module
        for name, module in still.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[name].append(args[0].detach())
            out.register_hook(seen[name].append)

        return hook

    for name, module in chosen.items():
        module.register_forward_hook(watch(name))
    (loss(still(x), y) * len(x)).backward()
    score = x.new_zeros(())
    used = set()
    for name, module in chosen.items():
        if len(seen[name]) != 2 or module.weight.grad is None:
            continue  # called more than once, or not at all
        a, d = seen[name]
        if isinstance(module, nn.Conv2d):
            patch: dict[str, Any] = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
            a = F.unfold(a, module.kernel_size, **patch).transpose(1, 2)  # type: ignore[arg-type]
            d = d.flatten(2).transpose(1, 2)
        positions = a.numel() // a.shape[-1] // len(x)
        mean = module.weight.grad.flatten(1) / len(x)
        a, d = a.reshape(-1, a.shape[-1]), d.reshape(-1, d.shape[-1])
        used.add(f"{name}.weight".lstrip("."))
        if module.bias is not None:
            a, mean = F.pad(a, (0, 1), value=1.0), torch.cat([mean, module.bias.grad[:, None] / len(x)], 1)
            used.add(f"{name}.bias".lstrip("."))
        root = math.sqrt(damping)
        inner = a.T @ a / len(x) + root * torch.eye(a.shape[1]).to(a)
        outer = d.T @ d / (len(x) * positions) + root * torch.eye(d.shape[1]).to(d)
        score = score + (mean * torch.linalg.solve(outer, torch.linalg.solve(inner, mean.T).T)).sum()
    rest = [name not in used for name, p in net.named_parameters() for _ in range(p.numel())]
    if any(rest):
        score = score + expansion_score(example_gradients(net, x, y, loss)[:, torch.tensor(rest)], "diag", damping)
    return score


def natural_expansion_score(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss = F.cross_entropy,
    fisher: Fisher = "diag",
    damping: float | None = None,
) -> float:
    """How much a natural-gradient step would gain, to first order; see the module's text.

    Args:
        net: its batch norms use their running statistics.
        x: (N, *) inputs.
        y: (N, *) targets.
        loss: a mean over examples.
        fisher: ``diag`` as in the paper, ``kfac``, or the whole empirical Fisher, dense (``full``) or from the
            N x N gram matrix (``woodbury``), which is exact and cheap where there are more parameters than examples.
        damping: added to the Fisher's diagonal; by default next to nothing for ``diag``, 1e-3 for the others.

    Raises:
        PomonaError: an unknown form, or a negative damping.
    """
    if fisher not in FISHERS:
        raise unknown("fisher", fisher, FISHERS)
    damping = DAMPING[fisher] if damping is None else damping
    if damping < 0 or (fisher == "kfac" and damping == 0):
        raise PomonaError(f"damping={damping} must be 0 or more, and above 0 for kfac")
    if fisher == "kfac":
        return float(kfac_score(net, x, y, loss, damping))
    return float(expansion_score(example_gradients(net, x, y, loss), fisher, damping))


def regularized(score: float, added: int, lam: float) -> float:
    """``score exp(-lam (added / 10^4)^2)``: many new parameters must gain more."""
    return score * math.exp(-lam * (added / UNIT) ** 2)
