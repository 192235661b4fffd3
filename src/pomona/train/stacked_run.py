"""Training in progress of a stack of networks: the loop of :mod:`pomona.train.loop`, for many members at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pomona import options
from pomona.data.task import Task
from pomona.train.budget import Budget
from pomona.train.loop import Fit, _full, _Run
from pomona.train.rule import Tensors, split_tensors
from pomona.train.stacked_data import Orders, gather, scores
from pomona.train.stacked_optim import Clipping, FlatOptimizer, Layout
from pomona.train.stacked_step import StepMaker, Stepped, TracedStep, trace
from pomona.train.stacked_trace import Untraceable

if TYPE_CHECKING:
    from pomona.train.population import Member

WORTH_TRACING = 10
"""Steps from which on the traced step repays its making."""

ROWS = 2048
"""Rows of all members together in one pass over the validation split."""


class Stack:
    """Members of one structure that take their steps together.

    Args:
        members: what to train.
        task: on what.
        budget: for members without their own.
        validations, keep, on_validation: as in :func:`pomona.train.population.fit_population`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        task: Task,
        budget: Budget,
        validations: int = 0,
        keep: Literal["best", "last"] = "best",
        on_validation: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.runs: list[_Run] = []
        for member in members:
            run = _Run(member.net, task, member.training, member.budget or budget, member.seed, None, None, [])
            if not self.runs:  # the data are placed and converted once
                task = copy.copy(task)
                task.splits = {"train": run.train, "valid": run.valid}
            self.runs.append(run)
        first = self.runs[0]
        self.task, self.keep, self.on_validation = task, keep, on_validation
        self.train, self.valid, self.device = first.train, first.valid, first.device
        self.ids = list(range(len(members)))  # row of the stack -> member
        self.active = [True] * len(members)

        template = copy.deepcopy(first.net).train()  # layers may leave traced tensors on themselves
        rule = options.make("rule", first.training.rule)
        rule.init(template, first.loss, (self.train.x[:2], self.train.y[:2]))
        self.maker = StepMaker(template, rule, first.loss, first.autocast)

        split = [split_tensors(run.net) for run in self.runs]
        own = {name: torch.stack([params[name] for params, _ in split]) for name in split[0][0]}
        self.buffers = {name: torch.stack([buffers[name] for _, buffers in split]) for name in split[0][1]}
        self.state: Tensors = {
            name: torch.stack([run.state[name].detach() for run in self.runs]) for name in first.state
        }
        trained = {name for name, p in first.net.named_parameters() if p.requires_grad}
        learned = [name for name in self._learned(own, trained) if name in trained]
        self.fixed = {name: value for name, value in own.items() if name not in learned}
        self.layout = Layout([run.net for run in self.runs], [run.training for run in self.runs], learned)
        self.flat = torch.empty(len(members), self.layout.size, device=self.device, dtype=_float(own))
        for name, view in self.layout.views(self.flat).items():
            view.copy_(own[name])

        self._budgets(members, validations)
        self.transformed = any(run.transforms for run in self.runs)
        trainings = [run.training for run in self.runs]
        self.optimizer = FlatOptimizer(
            trainings[0].optimizer, self.flat, self.layout, [training.momentum for training in trainings]
        )
        self.clip = Clipping([training.clip for training in trainings], self.flat)
        self.orders = Orders(
            len(self.train), first.training.batch_size, [member.seed for member in members], self.device
        )
        self.generators = [torch.Generator(self.device).manual_seed(member.seed) for member in members]
        self.results = [Fit(run.net, rule=run.rule) for run in self.runs]
        self.best_score, self.stale = [math.inf] * len(members), [0] * len(members)
        self.params = self.layout.views(self.flat)
        self.best = [t.clone() for t in self._kept()]
        self.draws = self._draws()
        self.running = torch.zeros(len(members), device=self.device)
        self.since = [0] * len(members)
        self.trace_seconds = 0.0
        self._bind()

    # -- making ------------------------------------------------------------------------------------------------------

    def _learned(self, own: Tensors, trained: set[str]) -> list[str]:
        """Names of the parameters that the rule gives gradients, found by a step of one member on two examples."""
        params, buffers, state = (
            {name: value[:1] for name, value in part.items()} for part in (own, self.buffers, self.state)
        )
        x, y = self.train.x[:2], self.train.y[:2]
        noise = self.maker.rule_noise(x).unsqueeze(0)
        self.dry_draws = self.maker.record(_first(params), _first(buffers), _first(state), (x, y))
        draws = [torch.ones(1, *draw.shape, dtype=draw.dtype, device=self.device) for draw in self.dry_draws]
        stepped = self.maker.step(shared=True)(params, buffers, state, x, y, noise, draws)
        return [name for name in own if name in stepped.grads]

    def _draws(self) -> list[Any]:
        """What a step draws at the real batch size."""
        if not self.dry_draws:
            return []
        size = self.orders.size
        params = {**self.params, **self.fixed}
        batch = self.train.x[:size], self.train.y[:size]
        return self.maker.record(_first(params), _first(self.buffers), _first(self.state), batch)

    def _budgets(self, members: Sequence[Member], validations: int) -> None:
        """Steps, validation intervals and learning rates of every member."""
        count = len(self.train)
        size = min(self.runs[0].training.batch_size, count)
        per_epoch = max(1, count // size)
        self.totals = [
            run.budget.steps(count, size, member.flops_per_example) or 1
            for run, member in zip(self.runs, members, strict=True)
        ]
        self.every = [
            run._interval(total, per_epoch, validations) for run, total in zip(self.runs, self.totals, strict=True)
        ]
        factors: dict[Any, list[float]] = {}
        longest = max(self.totals)
        rates = torch.empty(longest, len(members), 1, dtype=torch.float64)
        for i, (run, total) in enumerate(zip(self.runs, self.totals, strict=True)):
            key = (run.training.schedule, run.training.warmup, total)
            if key not in factors:
                factors[key] = [run.schedule(min(1.0, step / total), step) for step in range(total)]
            row = torch.tensor(factors[key], dtype=torch.float64) * run.training.lr
            rates[:total, i, 0] = row
            rates[total:, i, 0] = 0.0
        self.rates = rates.to(self.device, self.flat.dtype)
        same = bool((rates == rates[:, :1]).all())
        self.rate: list[float | None] = rates[:, 0, 0].tolist() if same else [None] * longest

    def _bind(self) -> None:
        """Views and working buffers for the members that are in the stack now."""
        self.params = self.layout.views(self.flat)
        self.grad = torch.zeros_like(self.flat)
        self.rows = [self.layout.views(row) for row in self.grad]
        self.live = self.maker.step(self.orders.shared)
        self.given = {**self.params, **self.fixed}
        count = (1 if self.orders.shared else len(self.ids)) * self.orders.size
        self.batch = [t.new_empty(count, *t.shape[1:]) for t in self.train]  # one memory for all steps' batches
        self.noise = torch.empty(len(self.ids), self.orders.size, self.maker.rule.noise, device=self.device)
        self.traced: Callable[..., Stepped] | None = None
        self.predicting: dict[int, Callable[..., Tensor]] = {}
        self.project = self.maker.project() if self.maker.hooked else None

    # -- running -----------------------------------------------------------------------------------------------------

    def gradients(self, x: Tensor, y: Tensor, noise: Tensor, draws: list[Tensor]) -> Tensor:
        """All members' gradients into the flat buffer, by the traced step where there is one; returns the losses."""
        args = (self.given, self.buffers, self.state, x, y, noise, draws)
        if self.traced is None and self.remaining >= WORTH_TRACING:
            start = time.perf_counter()
            try:
                self.traced = TracedStep(self.live, args)
            except Untraceable:
                self.traced = self.live
            self.trace_seconds = time.perf_counter() - start
        stepped = (self.traced or self.live)(*args)
        self.layout.gather(stepped.grads, self.grad)
        self.buffers, self.state = stepped.buffers, stepped.state
        return stepped.losses

    def step(self, number: int) -> None:
        """One optimiser step of every member."""
        index = self.orders.next()
        x, y = gather(self.train.x, index, self.batch[0]), gather(self.train.y, index, self.batch[1])
        noise = self.noise
        if noise.numel():
            for row, i in zip(noise, self.ids, strict=True):
                row.uniform_(generator=self.runs[i].generator)
        draws = [draw.members([self.generators[i] for i in self.ids]) for draw in self.draws]
        losses = self.gradients(x, y, noise, draws)
        if self.transformed:
            self._transform(number, after_clip=False)
        self.clip(self.grad)
        if self.transformed:
            self._transform(number, after_clip=True)
        self.optimizer.step(self.grad, self.rates[number], self.rate[number])
        if self.project is not None:
            params, self.buffers = self.project(self.given, self.buffers)
            for name, view in self.params.items():
                view.copy_(params[name])
        self.running += losses

    def _transform(self, number: int, after_clip: bool) -> None:
        """Each member's gradient transforms on its own row, with its own generator, as it does alone."""
        for row, i in zip(self.rows, self.ids, strict=True):
            for transform in self.runs[i].transforms:
                if bool(getattr(transform, "after_clip", False)) == after_clip:
                    for name, grad in transform(row, number, self.runs[i].generator).items():
                        if grad is not row[name]:
                            row[name].copy_(grad)

    def run(self) -> list[Fit]:
        """Train to the end."""
        size = self.orders.size
        clock = time.perf_counter()
        began = clock
        taken, last = 0, max(self.totals)
        with torch.no_grad():
            while taken < last and any(self.active):
                quiet = self._until_due(taken)
                for number in range(taken, taken + quiet):
                    self.remaining = last - number
                    self.step(number)
                taken += quiet
                for i in self.ids:
                    self.since[i] += quiet
                due = [(row, i) for row, i in enumerate(self.ids) if self.active[i] and self._is_due(i, taken)]
                found = self.validate()
                running = self.running.tolist()
                now = time.perf_counter()
                for i in self.ids:  # the time is shared by those in training
                    self.results[i].seconds += (now - clock) / sum(self.active) if self.active[i] else 0.0
                clock = now
                for row, i in due:
                    entry = {
                        "step": float(taken),
                        "examples": float(taken * size),
                        "seconds": self.results[i].seconds,
                        "train_loss": running[row] / self.since[i],
                        "valid_loss": found[row].pop("loss"),
                        **found[row],
                    }
                    self.results[i].steps, self.results[i].examples = taken, taken * size
                    self.running[row], self.since[i] = 0.0, 0
                    self._judge(row, i, entry, taken == self.totals[i])
                last = max((self.totals[i] for i in self.ids if self.active[i]), default=taken)
                self._compact((now - began) / taken, last - taken)
        return self._finish()

    def _until_due(self, taken: int) -> int:
        """Steps until the next validation of any member."""
        return min(
            min(self.every[i] - self.since[i], self.totals[i] - taken) for i in self.ids if self.active[i]
        )  # fmt: skip

    def _is_due(self, i: int, taken: int) -> bool:
        return self.since[i] >= self.every[i] or taken == self.totals[i]

    def _judge(self, row: int, i: int, entry: dict[str, float], last: bool) -> None:
        """Enter a validation of member ``i``, and see whether it goes on."""
        result, run = self.results[i], self.runs[i]
        if not (math.isfinite(entry["train_loss"]) and math.isfinite(entry["valid_loss"])):
            result.stopped, self.active[i] = "diverged", False
            return
        result.curve.append(entry)
        if self.on_validation is not None:
            self.on_validation(i, entry)
        score = run._score(entry)
        if score < self.best_score[i] or self.keep == "last":
            self.best_score[i], self.stale[i], result.best = score, 0, len(result.curve) - 1
            for kept, now in zip(self.best, self._kept(), strict=True):
                kept[i] = now[row]
        else:
            self.stale[i] += 1
            if run.training.patience is not None and self.stale[i] >= run.training.patience:
                result.stopped, self.active[i] = "patience", False
        if last:
            self.active[i] = False

    def _kept(self) -> list[Tensor]:
        """What a member's best weights are: parameters, buffers and the rule's tensors."""
        return [self.flat, *self.buffers.values(), *self.state.values()]

    def validate(self) -> list[dict[str, float]]:
        """Loss and ranking metric of every member in the stack on the validation split."""
        args = self.given, self.buffers, self.state
        parts = self.valid.x.split(max(1, min(4096, ROWS // len(self.ids))))
        outputs = torch.cat([_full(self._predict(x, *args)) for x in parts], 1)
        return scores(self.task, outputs.cpu(), self.valid.y.cpu())

    def _predict(self, x: Tensor, *args: Tensors) -> Tensor:
        """Outputs of every member; traced when the same is asked for often enough."""
        self.maker.net.eval()
        if len(x) not in self.predicting:
            live = self.maker.predict()
            often = self.remaining >= 2 * min(self.every)
            self.predicting[len(x)] = live
            if often:
                with suppress(Untraceable):
                    self.predicting[len(x)] = trace(live, *args, x)
        outputs = self.predicting[len(x)](*args, x)
        self.maker.net.train()
        return outputs

    def _compact(self, step_seconds: float, left: int) -> None:
        """Let members that have stopped go, when that saves more than tracing the step again costs.

        Those that diverged stay, idle: in a smaller stack the others' last bits would change.
        """
        stays = [self.active[i] or self.results[i].stopped == "diverged" for i in self.ids]
        gone = 1 - sum(stays) / len(self.ids)
        if not gone or gone * left * step_seconds <= self.trace_seconds:
            return
        rows = torch.tensor([row for row, stay in enumerate(stays) if stay], device=self.device)
        self.ids = [i for i, stay in zip(self.ids, stays, strict=True) if stay]
        self.flat = self.flat[rows]
        self.buffers, self.state, self.fixed = (
            {name: value[rows] for name, value in part.items()} for part in (self.buffers, self.state, self.fixed)
        )
        self.optimizer.take(rows, self.flat)
        self.clip.take(rows)
        self.orders.take(rows)
        self.rates, self.running = self.rates[:, rows], self.running[rows]
        self._bind()

    def _finish(self) -> list[Fit]:
        """Every member's own network with its best weights."""
        names = [*self.buffers, *self.state]
        for i, (run, result) in enumerate(zip(self.runs, self.results, strict=True)):
            flat, *rest = (kept[i] for kept in self.best)
            others = dict(zip(names, rest, strict=True))
            with torch.no_grad():
                for name, value in self.layout.views(flat).items():
                    run.net.get_parameter(name).copy_(value)
                for name, buffer in run.net.named_buffers():
                    buffer.copy_(others[name])
            result.net = run.net.eval().cpu()
            result.state = {name: others[name].clone().cpu() for name in self.state}
        return self.results


def _float(tensors: Tensors) -> torch.dtype:
    return next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)


def _first(tensors: Tensors) -> Tensors:
    """The first member's."""
    return {name: value[0] for name, value in tensors.items()}
