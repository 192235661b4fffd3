"""Full-batch AdamW for many small networks at once, as the literature on grokking trains them.

Source: Grokking Tickets: Lottery Tickets Accelerate Grokking (arXiv 2310.19470).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pomona.data.task import Task
from pomona.edit.masks import Masks
from pomona.errors import PomonaError, check_positive
from pomona.train.stacked_functions import StackedFunctions
from pomona.train.stacked_step import trace

Weights = dict[str, Tensor]

MOMENTS = ("init", "memorize", "transition", "generalize", "grok")
"""Points of a training at which weights are kept: before it; first with (nearly) all training examples right; first
with half of the others right; first with 95 % of them right; the end."""


@dataclass
class FullBatchRun:
    """What became of one network.

    Attributes:
        net: trained, with its masks.
        curve: a dict an entry: ``step``, ``train_loss``, and the accuracy on every split (``train_accuracy``, ...).
        kept: moment -> (step, weights), of the moments that came; see ``MOMENTS``.
    """

    net: nn.Module
    curve: list[dict[str, float]]
    kept: dict[str, tuple[int, Weights]] = field(repr=False, default_factory=dict)

    def reached(self, split: str, level: float = 0.95) -> int | None:
        """The first recorded step with at least this accuracy on a split."""
        return next((int(e["step"]) for e in self.curve if e[f"{split}_accuracy"] >= level), None)

    @property
    def delay(self) -> int | None:
        """Steps from memorising (95 % of training examples) to generalising (95 % of test examples)."""
        memorized, generalized = self.reached("train"), self.reached("test")
        return None if memorized is None or generalized is None else generalized - memorized

    @property
    def final(self) -> dict[str, float]:
        """The last entry of the curve."""
        return self.curve[-1]


def train_full_batch(
    nets: Sequence[nn.Module],
    tasks: Task | Sequence[Task],
    *,
    steps: int,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 1.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    every: int = 50,
    keep: Sequence[str] = MOMENTS,
) -> list[FullBatchRun]:
    r"""Train every network by AdamW on the whole of its training split, all in one stack.

    .. math:: w \leftarrow (1 - \eta \lambda) w - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)

    Pruned weights stay exactly zero: their gradients are masked from the first step on.

    Args:
        nets: of one structure and on one device, with masks (:class:`pomona.edit.Masks`) or without; not changed.
        tasks: one for all or one each, with splits of equal sizes, among them ``train`` and ``test``.
        steps: of each network.
        lr, weight_decay: one for all or one each.
        every: steps between two entries of the curve.
        keep: the moments at which to keep weights, see ``MOMENTS``; "memorize" and "transition" are found among the
            recorded steps.

    Raises:
        PomonaError: if networks or splits do not match.
    """
    check_positive(steps=steps, every=every)
    tasks = [tasks] * len(nets) if isinstance(tasks, Task) else list(tasks)
    rates, decays = ([v] * len(nets) if isinstance(v, (int, float)) else list(v) for v in (lr, weight_decay))
    if not len(nets) == len(tasks) == len(rates) == len(decays):
        raise PomonaError(
            f"{len(nets)} networks, {len(tasks)} tasks, {len(rates)} rates and {len(decays)} decays do not match"
        )
    masks = [Masks(net).state() for net in nets]
    plain = [Masks(copy.deepcopy(net)).fold().train() for net in nets]
    params = _stack([dict(net.named_parameters()) for net in plain])
    kept_by = {name: torch.stack([m.get(name, torch.ones_like(w[0], dtype=torch.bool)) for m in masks])
               for name, w in params.items() if any(name in m for m in masks)}  # fmt: skip
    buffers = _stack([dict(net.named_buffers()) for net in plain])
    device = next(iter(params.values())).device
    data = {split: [_stacked([getattr(t.splits[split], part) for t in tasks], split).to(device) for part in "xy"]
            for split in tasks[0].splits}  # fmt: skip
    template = copy.deepcopy(plain[0])

    def output(params: Weights, buffers: Weights, x: Tensor) -> Tensor:
        return functional_call(template, {**params, **buffers}, (x,))

    def loss(params: Weights, buffers: Weights, x: Tensor, y: Tensor) -> Tensor:
        with StackedFunctions([], fast=True):
            return F.cross_entropy(output(params, buffers, x), y)

    def gradients(params: Weights, x: Tensor, y: Tensor) -> tuple[Weights, Tensor]:
        with torch.enable_grad():
            leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
            losses = vmap(loss)(leaves, buffers, x, y)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True)), losses.detach()

    def accuracy(split: str) -> Tensor:
        x, y = data[split]
        return (vmap(output)(params, buffers, x).argmax(-1) == y).float().mean(-1)

    step_of = trace(gradients, params, *data["train"]) if steps > 100 else gradients
    weights = list(params.values())
    first, second, change = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    counts = [torch.zeros((), device=w.device) for w in weights]
    columns = [[torch.tensor(v, dtype=w.dtype, device=w.device).view(-1, *[1] * (w.ndim - 1)) for w in weights]
               for v in (rates, [1 - r * d for r, d in zip(rates, decays, strict=True)])]  # fmt: skip
    runs = [FullBatchRun(net, []) for net in plain]

    @torch.no_grad()
    def record(step: int, losses: Tensor) -> None:
        found = {f"{split}_accuracy": accuracy(split).tolist() for split in data}
        for i, run in enumerate(runs):
            run.curve.append({"step": step, "train_loss": float(losses[i]), **{k: v[i] for k, v in found.items()}})
            now = {
                "init": step == 0,
                "memorize": run.final["train_accuracy"] >= 0.999,
                "transition": run.final["test_accuracy"] >= 0.5,
                "generalize": run.final["test_accuracy"] >= 0.95,
                "grok": step == steps,
            }
            for moment in keep:
                if now[moment] and moment not in run.kept:
                    run.kept[moment] = step, {name: w[i].clone() for name, w in params.items()}

    for step in range(steps):
        grads, losses = step_of(params, *data["train"])
        if step % every == 0:
            record(step, losses)
        for name, mask in kept_by.items():
            grads[name] = grads[name] * mask
        for delta in change:
            delta.zero_()
        torch._foreach_add_(counts, 1)
        # the fused kernel at rate 1 on zeros gives the direction, which each member scales by its own rate; it reads
        # memory as it lies
        torch._fused_adam_(
            change, [grads[name].contiguous() for name in params], first, second, [], counts, lr=1.0, beta1=betas[0],
            beta2=betas[1], weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        for w, delta, rate, shrink in zip(weights, change, *columns, strict=True):
            w.mul_(shrink).addcmul_(delta, rate)
    record(steps, gradients(params, *data["train"])[1])
    for i, run in enumerate(runs):
        run.net.load_state_dict({name: w[i] for name, w in {**params, **buffers}.items()})
        Masks(run.net.eval(), masks[i])
    return runs


def _stack(states: Sequence[Weights]) -> Weights:
    return {name: _stacked([s[name].detach() for s in states], name) for name in states[0]}


def _stacked(tensors: Sequence[Tensor], name: str) -> Tensor:
    shapes = sorted({tuple(t.shape) for t in tensors})
    if len(shapes) > 1:
        raise PomonaError(f"{name} must have one shape in all members of a stack, not {shapes[0]} and {shapes[1]}")
    return torch.stack(list(tensors))
