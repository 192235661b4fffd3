"""Kolmogorov-Arnold layers that choose, node by node, the kind of function on their edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.basis import BASES
from pomona.nn.check import check_input
from pomona.nn.kan import BASE_FUNCTIONS, KANLayer
from pomona.nn.swap import swap

POOL = ("bspline", "rbf", "chebyshev", "gram", "mexican_hat", "fourier", "relu_power", "base")
"""The kinds of functions to choose among; 'base' is the base function alone."""


class BaseLayer(nn.Module):
    """phi_oi(x) = w_oi b(x): the base branch of a `KANLayer` without its basis.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Activation Space Selectable Kolmogorov-Arnold Networks, arXiv 2408.08338.
    """

    def __init__(
        self, in_features: int, out_features: int, base: str = "silu", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if base not in BASE_FUNCTIONS:
            raise unknown("base", base, BASE_FUNCTIONS)
        self.base = base
        scale = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-scale, scale, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(BASE_FUNCTIONS[self.base](x), self.weight)

    def update_grid(self, x: Tensor) -> None:
        """There is no grid."""

    @torch.no_grad()
    def take(self, rows: Tensor, columns: Tensor) -> BaseLayer:
        """A new layer with only these outputs and inputs (index tensors)."""
        new = BaseLayer(len(columns), len(rows), self.base).to(self.weight)
        new.weight.copy_(self.weight[rows][:, columns])
        return new

    def extra_repr(self) -> str:
        """Sizes."""
        out, inner = self.weight.shape
        return f"{inner}, {out}, base={self.base}"


class SelectableKANLayer(nn.Module):
    """y_o = sum_p alpha_op y_o^(p)(x),  alpha_o = softmax(theta_o / tau): a mixture of KAN layers of several bases.

    Train it with `pomona.train.selectable.fit_selectable`, which keeps each node's best members, then its best
    one, and `prune` makes the smaller layer of what was chosen.

    Args:
        in_features, out_features: sizes.
        pool: names of bases (`pomona.nn.basis.BASES`) and 'base'.
        select: 'node', or 'layer' for one choice that all nodes share.
        hard: use the largest alpha alone; its gradient is that of the softmax (straight-through).
        tau: temperature.
        choice_lr: learning rate of theta over that of the other weights.
        grid: grid intervals, degree or frequencies of all members, or of each by name (5 where none is given).
        norm: of the input: 'layer', or 'none', since a normalised input of one or two features is constant
            but for signs.
        base, options: of `KANLayer`.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Activation Space Selectable Kolmogorov-Arnold Networks, arXiv 2408.08338.
    """

    tunable = {"grid": [3, 5, 8], "norm": ["none", "layer"]}
    kept: Tensor
    tau: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pool: Sequence[str] = POOL,
        select: Literal["node", "layer"] = "node",
        hard: bool = False,
        tau: float = 1.0,
        choice_lr: float = 5.0,
        grid: int | Mapping[str, int] = 5,
        norm: Literal["none", "layer"] = "none",
        base: str = "silu",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features, tau=tau, choice_lr=choice_lr)
        if not pool:
            raise PomonaError(f"pool={pool!r} must name at least one kind of function")
        sized = grid if isinstance(grid, Mapping) else ()
        for field, value, known in (
            *((field, name, [*BASES, "base"]) for field, names in (("pool", pool), ("grid", sized)) for name in names),
            ("select", select, ["node", "layer"]),
            ("norm", norm, ["none", "layer"]),
        ):
            if value not in known:
                raise unknown(field, value, known)
        self.in_features, self.out_features = in_features, out_features
        self.pool, self.select, self.hard, self.choice_lr = tuple(pool), select, hard, choice_lr
        self.norm = nn.LayerNorm(in_features) if norm == "layer" else nn.Identity()

        def make(name: str) -> nn.Module:
            if name == "base":
                return BaseLayer(in_features, out_features, base, generator)
            size = grid if isinstance(grid, int) else grid.get(name, 5)
            return KANLayer(in_features, out_features, grid=size, basis=name, base=base, generator=generator, **options)

        self.members = nn.ModuleList(make(name) for name in pool)
        self.theta = nn.Parameter(torch.zeros(out_features if select == "node" else 1, len(pool)))
        self.register_buffer("kept", torch.ones_like(self.theta, dtype=torch.bool))
        self.register_buffer("tau", torch.tensor(float(tau)))

    def alpha(self) -> Tensor:
        """Weights of the members, each row summing to 1: (out_features or 1, members)."""
        soft = (self.theta / self.tau).masked_fill(~self.kept, -torch.inf).softmax(-1)
        if not self.hard:
            return soft
        best = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return best + (soft - soft.detach())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        x = self.norm(x)
        return (torch.stack([member(x) for member in self.members], -1) * self.alpha()).sum(-1)

    @torch.no_grad()
    def update_grid(self, x: Tensor) -> None:
        """Move the members' grids to the inputs ``x`` (*, in_features)."""
        for member in self.members:
            member.update_grid(self.norm(x))  # type: ignore[operator]

    @torch.no_grad()
    def keep_top(self, count: int) -> None:
        """Keep each row's ``count`` members of largest weight; the others weigh nothing from now on."""
        check_positive(top=count)
        best = self.alpha().topk(min(count, len(self.pool)), -1).indices
        self.kept.copy_(self.kept & torch.zeros_like(self.kept).scatter(-1, best, True))

    def choice_map(self) -> Tensor:
        """The weights of ``pool`` at every node, (out_features, members), without gradients."""
        return self.alpha().detach().expand(self.out_features, -1)

    @torch.no_grad()
    def prune(self) -> PrunedKANLayer:
        """A layer that computes for each node its member of largest weight, and holds nothing else."""
        chosen, columns = self.choice_map().argmax(-1), torch.arange(self.in_features, device=self.theta.device)
        rows = {name: (chosen == p).nonzero().flatten() for p, name in enumerate(self.pool)}
        members = {
            name: member.take(rows[name], columns)  # type: ignore[operator]
            for name, member in zip(self.pool, self.members, strict=True)
            if len(rows[name])
        }
        return PrunedKANLayer(members, [rows[name] for name in members], self.norm)

    def param_groups(self) -> list[dict[str, Any]]:
        """The choice is not decayed and has a learning rate of its own."""
        return [{"params": [self.theta], "lr_scale": self.choice_lr, "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, pool={'/'.join(self.pool)}, select={self.select}"


class PrunedKANLayer(nn.Module):
    """What `SelectableKANLayer.prune` leaves: for each kind of function a layer with the nodes that chose it.

    Args:
        members: kind -> its layer.
        rows: the nodes of each, (nodes,); together they are all nodes, once.
        norm: of the input.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Activation Space Selectable Kolmogorov-Arnold Networks, arXiv 2408.08338.
    """

    order: Tensor

    def __init__(self, members: Mapping[str, nn.Module], rows: Sequence[Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.members, self.norm = nn.ModuleDict(members), norm
        self.register_buffer("order", torch.cat(list(rows)).argsort())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        x = self.norm(x)
        return torch.cat([member(x) for member in self.members.values()], -1).index_select(-1, self.order)


class SelectableKANConv2d(nn.Module):
    """A `SelectableKANLayer` on every patch: each entry of the patch goes through an edge function.

    Padding is a zero like any other, so that phi(0) counts.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as in `torch.nn.Conv2d`.
        options: of `SelectableKANLayer`.

    Shape:
        (batch, in_channels, height, width) -> (batch, out_channels, height', width')

    Source: Activation Space Selectable Kolmogorov-Arnold Networks, arXiv 2408.08338.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.kernel_size, self.stride, self.padding, self.dilation = (
            value if isinstance(value, tuple) else (value, value) for value in (kernel_size, stride, padding, dilation)
        )
        self.layer: nn.Module = SelectableKANLayer(
            in_channels * self.kernel_size[0] * self.kernel_size[1], out_channels, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_channels, -3)
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        sides = (
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, pad, dilation, kernel, stride in zip(
                x.shape[-2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return self.layer(patches.mT).mT.unflatten(-1, tuple(sides))

    def prune(self) -> SelectableKANConv2d:
        """The convolution with its layer pruned."""
        return prune_selectable(self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def prune_selectable(net: nn.Module) -> nn.Module:
    """A copy of a network with every `SelectableKANLayer` pruned, in convolutions too."""
    return swap(net, SelectableKANLayer, lambda old: old.prune()).net  # type: ignore[operator]
