"""Optimisers of torch over the parameters of many networks in one flat buffer, with rates and decays a member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from pomona.train.optim import parameter_groups
from pomona.train.rule import Tensors
from pomona.train.settings import Training


@dataclass(frozen=True)
class Segment:
    """Neighbouring columns of the flat buffer that are trained alike.

    Attributes:
        start, stop: columns.
        scales: factor on the learning rate, one a member.
        decays: weight decay, one a member.
    """

    start: int
    stop: int
    scales: tuple[float, ...]
    decays: tuple[float, ...]


class Layout:
    """Where each parameter lies in a flat (members, P) buffer: parameters of one group are neighbours.

    Args:
        nets: the members, of one structure.
        trainings: their settings.
        learned: names of the parameters that get gradients.
    """

    def __init__(self, nets: Sequence[nn.Module], trainings: Sequence[Training], learned: Sequence[str]) -> None:
        alike: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        of_members = [_groups(net, t.weight_decay) for net, t in zip(nets, trainings, strict=True)]
        for name in learned:
            pairs = [groups[name] for groups in of_members]
            alike[name] = tuple(s for s, _ in pairs), tuple(d for _, d in pairs)
        shapes = {name: p.shape for name, p in nets[0].named_parameters()}
        self.places: dict[str, tuple[int, int, torch.Size]] = {}
        self.segments: list[Segment] = []
        end = 0
        for (scales, decays), names in groupby(sorted(learned, key=lambda n: repr(alike[n])), key=lambda n: alike[n]):
            begin = end
            for name in names:
                self.places[name] = end, end + shapes[name].numel(), shapes[name]
                end += shapes[name].numel()
            self.segments.append(Segment(begin, end, scales, decays))
        self.size = end
        self.names = [name for name in shapes if name in self.places]  # in the networks' own order

    def views(self, flat: Tensor) -> Tensors:
        """Parameter name -> (members, *shape), or of one row (*shape), in ``flat``'s own storage."""
        rows = flat.shape[:-1]
        return {
            name: flat[..., self.places[name][0] : self.places[name][1]].view(*rows, *self.places[name][2])
            for name in self.names
        }

    def gather(self, grads: Tensors, out: Tensor) -> None:
        """Gradients (members, *shape) into the flat buffer."""
        torch.cat([grads[name].reshape(len(out), -1) for name in self.places], 1, out=out)


def _groups(net: nn.Module, weight_decay: float) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        names[id(p)]: (float(group["lr_scale"]), float(group["weight_decay"]))
        for group in parameter_groups(net, weight_decay)
        for p in group["params"]
    }


class FlatOptimizer:
    """AdamW, Adam, SGD (Nesterov) or RMSprop of ``torch.optim`` with its defaults, or Lion, one row a member.

    Args:
        name: as in :class:`~pomona.train.settings.Training`.
        flat: the parameters (members, P), changed in place.
        layout: of the buffer.
        momentum: one a member, for SGD.
    """

    def __init__(self, name: str, flat: Tensor, layout: Layout, momentum: Sequence[float]) -> None:
        self.name, self.flat, self.layout = name, flat, layout
        self.momentum = torch.tensor(momentum, dtype=flat.dtype, device=flat.device).unsqueeze(1)
        has_momentum = name in {"sgd", "nesterov"} and any(momentum)
        self.first = torch.zeros_like(flat) if name in {"adam", "adamw", "lion"} or has_momentum else None
        self.second = torch.zeros_like(flat) if name in {"adam", "adamw", "rmsprop"} else None
        self.delta = torch.zeros_like(flat) if name in {"adam", "adamw"} else None
        self.steps = torch.zeros((), device=flat.device)
        self._columns()

    def _columns(self) -> None:
        def column(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=self.flat.dtype, device=self.flat.device).unsqueeze(1)

        self.decayed = [(slice(s.start, s.stop), column(s.scales), column(s.decays))
                        for s in self.layout.segments if any(s.decays)]  # fmt: skip
        plain = all(scale == 1 for s in self.layout.segments for scale in s.scales)
        self.scaled: list[tuple[slice, Tensor | None]] = (
            [(slice(None), None)]
            if plain
            else [(slice(s.start, s.stop), column(s.scales)) for s in self.layout.segments]
        )

    def step(self, grad: Tensor, lr: Tensor, same: float | None = None) -> None:
        """Update the parameters; ``grad`` (members, P) is used up, ``lr`` is (members, 1), ``same`` if it is one."""
        if self.name in {"adamw", "lion"}:
            for columns, scale, decay in self.decayed:
                self.flat[:, columns].mul_(1 - lr * scale * decay)
        else:
            for columns, _, decay in self.decayed:
                grad[:, columns].addcmul_(self.flat[:, columns], decay)
        if same is not None and self.scaled[0][1] is None and self.delta is not None:
            self._adam(self.flat, grad, same)
            return
        direction = self._direction(grad)
        for columns, factor in self.scaled:
            rate = lr if factor is None else lr * factor
            self.flat[:, columns].addcmul_(direction[:, columns], rate)

    def _direction(self, grad: Tensor) -> Tensor:
        """What is added to the parameters at a rate of 1."""
        if self.name in {"adam", "adamw"}:
            # the fused kernel at rate 1 on zeros leaves the negative direction, which each member scales by its rate
            self._adam(self.delta.zero_(), grad, 1.0)  # type: ignore[union-attr]
            return self.delta  # type: ignore[return-value]
        if self.name == "rmsprop":
            self.second.mul_(0.99).addcmul_(grad, grad, value=0.01)  # type: ignore[union-attr]
            return grad.div_(self.second.sqrt().add_(1e-8)).neg_()  # type: ignore[union-attr]
        if self.first is None:
            return grad.neg_()
        if self.name == "lion":
            direction = torch.lerp(self.first, grad, 0.1).sign_().neg_()
            self.first.lerp_(grad, 0.01)
            return direction
        self.first.mul_(self.momentum).add_(grad)
        return grad.addcmul_(self.first, self.momentum).neg_() if self.name == "nesterov" else self.first.neg()

    def _adam(self, params: Tensor, grad: Tensor, lr: float) -> None:
        self.steps += 1
        torch._fused_adam_(
            [params], [grad], [self.first], [self.second], [], [self.steps], lr=lr,  # type: ignore[list-item]
            beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def take(self, rows: Tensor, flat: Tensor) -> None:
        """Keep only these members; ``flat`` holds their parameters."""
        picked = rows.tolist()
        self.flat, self.momentum = flat, self.momentum[rows]
        self.first, self.second = (None if t is None else t[rows] for t in (self.first, self.second))
        self.delta = None if self.delta is None else torch.zeros_like(flat)
        self.layout.segments = [
            Segment(s.start, s.stop, *(tuple(values[i] for i in picked) for values in (s.scales, s.decays)))
            for s in self.layout.segments
        ]
        self._columns()


class Clipping:
    """Scales each member's gradient to a norm of at most its own limit, as ``clip_grad_norm_`` does.

    Args:
        limits: one a member; ``None`` for none.
        like: a tensor of the gradients' kind.
    """

    def __init__(self, limits: Sequence[float | None], like: Tensor) -> None:
        self.any = any(limit is not None for limit in limits)
        given = [torch.inf if limit is None else limit for limit in limits]
        self.limits = torch.tensor(given, dtype=like.dtype, device=like.device).unsqueeze(1)
        self.free = self.limits.isinf() if None in limits else None

    def __call__(self, grad: Tensor) -> None:
        """Clip ``grad`` (members, P) in place."""
        if self.any:
            norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
            factor = (self.limits / norms.add_(1e-6)).clamp_(max=1.0)
            # a member without a limit stays untouched even when its norm is not a number
            grad.mul_(factor if self.free is None else factor.masked_fill_(self.free, 1.0))

    def take(self, rows: Tensor) -> None:
        """Keep only these members."""
        self.limits = self.limits[rows]
        self.free = None if self.free is None else self.free[rows]
