"""Which spatial operation does best where: one position at a time, and all of them by gradient.

Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.nets.cost import flops, latency, parameters
from pomona.nets.parameter_free import PFResNet
from pomona.nn.parameter_free import MixedSpatialOp, SpatialOp, named_op
from pomona.train.budget import Budget
from pomona.train.loop import fit
from pomona.train.settings import Training


def op_costs(net: nn.Module, example: torch.Tensor, repeats: int = 20) -> dict[str, float]:
    """Median seconds of a forward pass of ``example``, parameters, and operations of one example.

    A maximum is not a multiply-add: max-pooling counts 0 operations.
    """
    return {
        "latency": latency(net, example, repeats),
        "parameters": parameters(net),
        "flops": flops(net, example),
    }


def op_study(
    task: Task,
    position: int,
    ops: Sequence[str] = ("conv", "depthwise", "max", "avg", "identity"),
    *,
    budget: Budget,
    training: Training | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Train a convolutional `PFResNet` with each operation in the block at ``position``, all else the same.

    Args:
        task: images and classes.
        position: index of the block.
        ops: kinds of `SpatialOp`.
        budget, training, seed: of each training.
        **options: of the network.

    Returns:
        {operation: validation metrics, latency, parameters and flops}
    """

    def make(kind: str) -> PFResNet:
        def make_op(index: int, channels: int, stride: int) -> nn.Module:
            return SpatialOp(kind if index == position else "conv", channels, stride=stride)

        return _seeded(task, seed, make_op=make_op, **options)

    blocks = len(make("conv").blocks)
    if not 0 <= position < blocks:
        raise PomonaError(f"position={position} must be the index of one of {blocks} blocks")
    results = {}
    for kind in ops:
        done = fit(make(kind), task, training, budget=budget, seed=seed)
        results[kind] = {**done.valid, **op_costs(done.net, task.splits["valid"].x[:16])}
    return results


def search_ops(
    task: Task,
    ops: Sequence[str] = ("conv3", "dw3", "max3", "avg3", "identity"),
    *,
    budget: Budget,
    training: Training | None = None,
    gumbel: bool = True,
    seed: int = 0,
    **options: Any,
) -> tuple[list[str], list[dict[str, float]]]:
    """Choose the operation of every block by gradient, weights and choices in one level.

    Args:
        task, budget, training, seed: of the training, whose last choices count.
        ops: names as in `named_op`.
        gumbel: sample the choices, instead of mixing by the softmax.
        **options: of `PFResNet`.

    Returns:
        The chosen operation of each block, and the weight of every operation there.
    """

    def make_op(_index: int, channels: int, stride: int) -> nn.Module:
        return MixedSpatialOp(channels, ops, stride=stride, gumbel=gumbel)

    done = fit(_seeded(task, seed, make_op=make_op, **options), task, training, budget=budget, seed=seed, keep="last")
    gates = [m for m in done.net.modules() if isinstance(m, MixedSpatialOp)]
    shares = [dict(zip(gate.names, gate.weights().tolist(), strict=True)) for gate in gates]
    return [gate.chosen() for gate in gates], shares


def build_chosen(task: Task, chosen: Sequence[str], *, seed: int = 0, **options: Any) -> nn.Module:
    """A new network with the operations that `search_ops` chose."""

    def make_op(index: int, channels: int, stride: int) -> nn.Module:
        return named_op(chosen[index], channels, stride)

    return _seeded(task, seed, make_op=make_op, **options)


def _seeded(task: Task, seed: int, **options: Any) -> PFResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PFResNet(task.inputs.shape[0], task.outputs.size, **options)
