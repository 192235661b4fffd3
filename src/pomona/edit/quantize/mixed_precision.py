"""Mixed precision: how many bits each layer is given, by the curvature of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from pomona.edit.quantize.calibrate import layers_of
from pomona.edit.quantize.quantizer import Quantizer
from pomona.errors import PomonaError

Loss = Callable[[Tensor, Tensor], Tensor]


def hessian_traces(
    net: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    samples: int = 32,
    seed: int = 0,
) -> dict[str, float]:
    """Mean diagonal entry of the loss's Hessian in each layer's weight: ``E[v' H v] / n``, ``v`` of random signs.

    Args:
        net: a trained network.
        loss: ``loss(output, target)``, a mean over the batch.
        batches: (x, y) pairs; the Hessian is that of their mean loss.
        samples: random vectors for each batch.
        seed: of the vectors.

    Source: HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks (arXiv 1911.03852).
    """
    training = net.training
    net.eval()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: layer.weight for name, layer in layers_of(net).items()}
    params: list[Tensor] = list(weights.values())  # type: ignore[arg-type]
    total = np.zeros(len(params))
    count = 0
    for x, y in batches:
        grads = torch.autograd.grad(loss(net(x), y), params, create_graph=True, allow_unused=True)
        used = [(i, g) for i, g in enumerate(grads) if g is not None]
        for _ in range(samples):
            signs = [(torch.randint(2, g.shape, generator=generator) * 2 - 1).to(g) for _, g in used]
            products = torch.autograd.grad(
                [g for _, g in used], [params[i] for i, _ in used], signs, retain_graph=True, materialize_grads=True
            )
            for (i, _), v, hv in zip(used, signs, products, strict=True):
                total[i] += float((v * hv).sum()) / params[i].numel()
            count += 1
    net.train(training)
    if not count:
        raise PomonaError("batches holds no (x, y) pair, from which curvature could be measured")
    return dict(zip(weights, (total / count).tolist(), strict=True))


def allocate(
    net: nn.Module,
    budget: float,
    traces: Mapping[str, float],
    bits: Sequence[int] = (2, 4, 8),
    quantizer: Quantizer | None = None,
) -> dict[str, Quantizer]:
    r"""The bits of each layer that disturb the loss least within a budget: ``weights=`` of ``quantize``.

    .. math:: \min_b \sum_l \Omega_l(b_l), \quad \Omega_l(b) = \overline{\mathrm{Tr}}(H_l) \, \|Q_b(W_l) - W_l\|^2,
              \quad \sum_l n_l b_l \le \mathrm{budget} \sum_l n_l

    a knapsack with one choice a layer, solved exactly.

    Args:
        net: the network that will be quantised, batch norms folded.
        budget: bits a weight, on average over all layers of ``traces``.
        traces: by layer, of :func:`hessian_traces`; all 1 weighs squared errors alone.
        bits: what a layer may have.
        quantizer: everything but the bits; by default symmetric, by channel, with the range of least squared error.

    Raises:
        PomonaError: if even the fewest bits exceed the budget, or a name is no layer.

    Source: HAWQ-V2 (arXiv 1911.03852); HAWQ-V3 (arXiv 2011.10680) for the linear programme.
    """
    quantizer = quantizer or Quantizer(granularity="channel", range="mse")
    options = [replace(quantizer, bits=b) for b in sorted(bits)]
    layers = layers_of(net)
    if unheard := [name for name in traces if name not in layers]:
        raise PomonaError(f"traces name {', '.join(unheard)}, which the network has no layer for")
    if budget < min(bits):
        raise PomonaError(f"budget={budget} bits a weight is below the fewest that a layer may have, {min(bits)}")
    weights = [layers[name].weight.detach() for name in traces]  # type: ignore[union-attr, operator]
    harm = np.array([[float((q(w) - w).square().sum()) for q in options] for w in weights])
    harm *= np.maximum(list(traces.values()), 0)[:, None]  # at a minimum no trace is negative but by noise
    sizes = np.array([w.numel() for w in weights], float)
    cost = sizes[:, None] * [q.bits for q in options]
    one_each = LinearConstraint(np.kron(np.eye(len(weights)), np.ones(len(options))), 1, 1)
    within = LinearConstraint(cost.reshape(1, -1) / sizes.sum(), -np.inf, budget)
    scaled = harm.ravel() / max(harm.max(), 1e-300) + 1e-12 * cost.ravel() / cost.max()  # ties go to fewer bits
    solved = milp(scaled, constraints=[one_each, within], bounds=Bounds(0, 1), integrality=np.ones(harm.size))
    if not solved.success:
        raise PomonaError(f"no allocation was found: {solved.message}")
    best = solved.x.reshape(harm.shape).argmax(1)
    return {name: options[i] for name, i in zip(traces, best, strict=True)}
