"""One training step of many equal networks at once: gradients, buffers and losses, by vmap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from pomona.train.rule import Backprop, Loss, Rule, Tensors, _WithAuxiliary, with_hook
from pomona.train.stacked_functions import Draw, StackedFunctions
from pomona.train.stacked_trace import Trace as trace

__all__ = ["StepMaker", "Stepped", "TracedStep", "trace"]


class Stepped(NamedTuple):
    """What a step of a stack gives; every tensor has the members first.

    Attributes:
        grads: parameter name -> gradient; missing names are frozen.
        buffers: after the batch.
        state: the rule's tensors after the batch.
        losses: (members,).
    """

    grads: Tensors
    buffers: Tensors
    state: Tensors
    losses: Tensor


class StepMaker:
    """The step of one structure of network under one rule.

    Args:
        net: any member, in training mode; its weights are not used.
        rule: bound to ``net``.
        loss: (output, target) -> scalar.
        autocast: the loop's.
    """

    def __init__(self, net: nn.Module, rule: Rule, loss: Loss, autocast: Callable[[], AbstractContextManager[Any]]):
        self.net, self.rule, self.loss, self.autocast = net, rule, loss, autocast
        self.backprop = type(rule) is Backprop
        self.auxiliary = with_hook(net, "aux_loss")
        self.hooked = with_hook(net, "post_step")

    def record(self, params: Tensors, buffers: Tensors, state: Tensors, batch: tuple[Tensor, Tensor]) -> list[Draw]:
        """Take one step of one member, to learn what it draws."""
        with StackedFunctions() as functions:
            if self.backprop:
                with torch.no_grad():
                    self.objective(params, buffers, *batch)
            else:
                self.rule.grads(params, buffers, state, batch, self.rule_noise(batch[0]))
        return functions.draws

    def rule_noise(self, x: Tensor) -> Tensor:
        """Numbers of the right shape for a dry run of the rule."""
        return torch.full((len(x), self.rule.noise), 0.5, device=x.device)

    def objective(self, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
        """One member's loss, and its buffers after the batch."""
        after = {name: buffer.clone() for name, buffer in buffers.items()}
        prefixed = {f"net.{name}": value for name, value in {**params, **after}.items()}
        with self.autocast():
            output, extra = functional_call(_WithAuxiliary(self.net, self.auxiliary), prefixed, (x,))
            value = self.loss(output, y)
        return (value + extra if self.auxiliary else value), after

    def step(self, shared: bool) -> Callable[..., Stepped]:
        """step(params, buffers, state, x, y, rule noise, draws) -> :class:`Stepped`, every argument stacked.

        Args:
            shared: x and y have no member axis: all members see the same batch.
        """
        data = None if shared else 0
        return self._by_backprop(data) if self.backprop else self._by_rule(data)

    def _by_backprop(self, data: int | None) -> Callable[..., Stepped]:
        def member(
            params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, draws: list[Tensor]
        ) -> tuple[Tensor, Tensors]:
            with StackedFunctions(draws, fast=True):
                return self.objective(params, buffers, x, y)

        def step(
            params: Tensors, buffers: Tensors, state: Tensors, x: Tensor, y: Tensor, noise: Tensor, draws: list[Tensor]
        ) -> Stepped:
            with torch.enable_grad():
                leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
                losses, after = vmap(member, in_dims=(0, 0, data, data, 0))(leaves, buffers, x, y, draws)
                # each member's loss depends on its own weights alone, so the sum's gradient is each one's own
                found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
            grads = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
            return Stepped(grads, {k: v.detach() for k, v in after.items()}, state, losses.detach())

        return step

    def _by_rule(self, data: int | None) -> Callable[..., Stepped]:
        def member(
            params: Tensors, buffers: Tensors, state: Tensors, x: Tensor, y: Tensor, noise: Tensor, draws: list[Tensor]
        ) -> tuple[Tensors, Tensors, Tensors, Tensor]:
            with StackedFunctions(draws):
                update = self.rule.grads(params, buffers, state, (x, y), noise)
            return update.grads, update.buffers, update.state, update.loss

        stacked = vmap(member, in_dims=(0, 0, 0, data, data, 0, 0))
        return lambda *args: Stepped(*stacked(*args))

    def project(self) -> Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]:
        """project(params, buffers) after every module's ``post_step``, all stacked; nothing given is changed."""

        def member(params: Tensors, buffers: Tensors) -> tuple[Tensors, Tensors]:
            copied = {name: value.clone() for name, value in {**params, **buffers}.items()}
            functional_call(_Projection(self.net, self.hooked), {f"net.{k}": v for k, v in copied.items()}, ())
            return {k: copied[k] for k in params}, {k: copied[k] for k in buffers}

        return vmap(member)

    def predict(self) -> Callable[[Tensors, Tensors, Tensors, Tensor], Tensor]:
        """predict(params, buffers, state, x), x the same for all; the network must be in evaluation mode."""

        def member(params: Tensors, buffers: Tensors, state: Tensors, x: Tensor) -> Tensor:
            with StackedFunctions([], fast=self.backprop):
                return self.rule.predict(params, buffers, state, x)

        return vmap(member, in_dims=(0, 0, 0, None))


class _Projection(nn.Module):
    def __init__(self, net: nn.Module, hooked: list[nn.Module]) -> None:
        super().__init__()
        self.net, self._hooked = net, (hooked,)

    def forward(self) -> None:
        with torch.no_grad():
            for module in self._hooked[0]:
                module.post_step()  # type: ignore[operator]


class TracedStep:
    """A step of :meth:`StepMaker.step`, traced; called often, so without nests.

    Args:
        step: the step.
        args: its arguments.
    """

    def __init__(self, step: Callable[..., Stepped], args: tuple[Any, ...]) -> None:
        self.trace = trace(step, *args)
        example = pytree.tree_unflatten([None] * self.trace.spec.num_leaves, self.trace.spec)
        self.names = [list(part) for part in example[:3]]

    def __call__(self, params: Tensors, buffers: Tensors, state: Tensors, *others: Any) -> Stepped:
        """As the step itself."""
        *tensors, draws = others
        given = (*params.values(), *buffers.values(), *state.values(), *tensors, *draws)
        *found, losses = self.trace.run(*given)
        each = iter(found)
        grads, buffers, state = ({name: next(each) for name in names} for names in self.names)
        return Stepped(grads, buffers, state, losses)
