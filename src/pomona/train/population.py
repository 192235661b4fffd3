"""Populations: many networks of one structure trained as one stacked network, each with its own seed and settings."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pomona import options
from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.train.budget import Budget
from pomona.train.loop import Fit, _Run
from pomona.train.rule import Backprop, split_tensors
from pomona.train.settings import Training
from pomona.train.stacked_data import difference, signature
from pomona.train.stacked_run import WORTH_TRACING, Stack

SHARED = ("rule", "optimizer", "batch_size", "loss", "precision", "device")
"""Settings that all members of a population have in common."""

SMALLEST = 8
"""Members from which on a stack is worth its overhead; smaller chunks are not tried."""

LONG = 20_000
"""Steps times members from which on the work repays measuring how many to train at once."""

REPAY = 20
"""How many times longer than another measurement the training must be."""


class CannotStack(PomonaError):
    """Members cannot be trained as one; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """One network to train.

    Attributes:
        net: not changed.
        training: its settings.
        seed: of its batches, dropout and every other draw.
        budget: its own, in place of the population's.
        flops_per_example: of one forward pass; needed by a budget in FLOPs.
    """

    net: nn.Module
    training: Training = field(default_factory=Training)
    seed: int = 0
    budget: Budget | None = None
    flops_per_example: float = 0.0


def can_stack(members: Sequence[Member], task: Task | None = None, *, budget: Budget | None = None) -> str | None:
    """Why these members cannot be trained as one, in a sentence; ``None`` if they can.

    With a task one stacked step of two members on two examples is tried, too.
    """
    if any((member.budget or budget or Budget()).kind == "seconds" for member in members):
        return "a budget in seconds is each network's own, so they are trained one at a time"
    first = members[0]
    for name in SHARED:
        values = {getattr(member.training, name) for member in members}
        if len(values) > 1:
            return f"{name} differs: {', '.join(sorted(map(str, values)))}"
    if not all(isinstance(member.net, nn.Module) for member in members):
        return "a member is not an nn.Module"
    for member in members:
        if member.training.transform is not None:
            transform = options.make("transform", member.training.transform)
            if not hasattr(transform, "noise_scale"):
                return f"transform={member.training.transform} is not known to work on members one by one"
    known = signature(first.net)
    for i, member in enumerate(members[1:], 1):
        where = difference(known, signature(member.net))
        if where is not None:
            return f"networks 0 and {i} differ in {where}"
    return _try(members[:2], task, budget) if task is not None else None


def _try(members: Sequence[Member], task: Task, budget: Budget | None) -> str | None:
    """A stacked step, projection and prediction on two examples."""
    small = copy.copy(task)
    small.splits = {name: type(split)(split.x[:2], split.y[:2]) for name, split in task.splits.items()}
    trials = [Member(m.net, m.training.model_copy(update={"batch_size": 2}), m.seed) for m in members]
    functorch: Any = torch._C._functorch  # an operation that vmap can only loop over gains nothing in a stack
    fallback = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        stack = Stack(trials, small, Budget("examples", 2))
        learnable = any(t.requires_grad for run in stack.runs for t in run.state.values())
        before = signature(stack.maker.net, tensors=False)
        with torch.no_grad():
            stack.remaining = 1
            stack.step(0)
            stack.validate()
    except Exception as error:  # whatever vmap refuses: the reason is the message
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if "vmap fallback" in text:
            return f"{str(error).split()[0]} has no batched form"
        return f"vmap refuses the network ({text[:160]})" if not isinstance(error, PomonaError) else str(error)
    finally:
        functorch._set_vmap_fallback_enabled(fallback)
    if learnable:
        return f"rule={members[0].training.rule} learns tensors of its own"
    changed = difference(before, signature(stack.maker.net, tensors=False))
    return None if changed is None else f"a forward pass changes {changed}, which is not a tensor"


def fit_population(
    members: Sequence[Member],
    task: Task,
    *,
    budget: Budget | None = None,
    validations: int = 0,
    keep: Literal["best", "last"] = "best",
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
    stack_size: int | None = None,
) -> list[Fit]:
    """Train every member as :func:`pomona.train.fit` would train it alone, all at once.

    Weights, seed, learning rate, weight decay, momentum, clipping, patience, schedule, budget, the transform's
    settings and every draw are each member's own. A member's ``seconds`` are its share of the stack's.

    Args:
        members: of one structure.
        task: data, loss and metrics.
        budget: of each member without its own; 20 epochs by default.
        validations: as in :func:`pomona.train.fit`.
        keep: ``best`` weights on validation, or the ``last``.
        on_validation: called as ``on_validation(member, entry)``.
        stack_size: how many are trained at once; by default what a short measurement finds, within memory.

    Raises:
        CannotStack: with the reason.
    """
    if not members:
        return []
    if stack_size is not None and stack_size < 1:
        raise PomonaError(f"stack_size={stack_size} must be 1 or more")
    budget = budget or Budget()
    reason = can_stack(members, task, budget=budget)
    if reason is not None:
        raise CannotStack(reason)
    size = stack_size or choose_stack_size(members, task, budget)
    fits: list[Fit] = []
    for start in range(0, len(members), size):
        told = None if on_validation is None else _shifted(on_validation, start)
        fits += Stack(members[start : start + size], task, budget, validations, keep, told).run()
    return fits


def _shifted(told: Callable[[int, dict[str, float]], None], by: int) -> Callable[[int, dict[str, float]], None]:
    return lambda i, entry: told(by + i, entry)


def choose_stack_size(members: Sequence[Member], task: Task, budget: Budget | None = None) -> int:
    """How many members to train at once: as many as memory allows, or fewer where a few measured steps are faster so.

    A chunk that memory cuts short is told of by a warning.
    """
    bytes_each = member_bytes(members[0], task)
    on_gpu = torch.cuda.is_available() and members[0].training.device in {"auto", "cuda"}
    room = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory()
    possible = max(1, int(room // (2 * bytes_each)))
    if possible < len(members):
        warnings.warn(
            f"{len(members)} members need {len(members) * bytes_each / 2**30:.1f} GiB; they are trained "
            f"{possible} at a time",
            stacklevel=3,
        )
    fewest = -(-len(members) // min(possible, len(members)))
    # chunks of one size are traced alike and waste nothing
    first, *others = (-(-len(members) // (fewest * factor)) for factor in (1, 2, 4))
    sizes = [first, *(size for size in others if size >= SMALLEST)]
    steps = (members[0].budget or budget or Budget()).steps(
        len(task.splits["train"]), members[0].training.batch_size, members[0].flops_per_example
    )
    if on_gpu or len(sizes) == 1 or not steps or steps * len(members) < LONG:
        return first
    best, pace = first, math.inf
    for size in sizes:
        start = time.perf_counter()
        found = _pace(members[:size], task, budget or Budget())
        if found >= pace:
            break
        best, pace = size, found
        if REPAY * (time.perf_counter() - start) > pace * steps * len(members):
            break
    return best


def _pace(members: Sequence[Member], task: Task, budget: Budget) -> float:
    """Seconds a member and step, the best of a few steps; the members are as before."""
    stack = Stack(members, task, budget)
    stack.remaining, seconds = WORTH_TRACING, []
    with torch.no_grad():
        for number in range(min(10, max(stack.totals))):
            start = time.perf_counter()
            stack.step(number)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / len(members)


def member_bytes(member: Member, task: Task) -> int:
    """Memory of one member in a stack: weights, gradients and optimiser's state, and what a step keeps for backward."""
    run = _Run(member.net, task, member.training, member.budget or Budget("examples", 1), 0, None, None, [])
    weights = sum(p.numel() * p.element_size() for p in run.net.parameters())
    x, y = run.train.x[:2], run.train.y[:2]
    own = {p.untyped_storage().data_ptr() for p in run.net.parameters()} | {x.untyped_storage().data_ptr()}
    kept = 0

    def count(t: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if t.untyped_storage().data_ptr() in own else t.numel() * t.element_size()
        return t

    if type(run.rule) is Backprop:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            run.loss(run.net(x), y)
    else:
        update = run.rule.grads(*split_tensors(run.net), run.state, (x, y), torch.rand(2, run.rule.noise))
        kept = 4 * sum(g.numel() * g.element_size() for g in update.grads.values())
    size = min(member.training.batch_size, len(run.train))
    return 6 * weights + kept * size // 2 + 1


def _free_memory() -> int:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30
