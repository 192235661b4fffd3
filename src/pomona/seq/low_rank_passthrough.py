"""Recurrent and deep networks with a large state that passes through gates, and recurrent matrices of low rank.

Every state follows s' = tau * s + gamma * pi, with carry gate tau, transform gate gamma and proposal pi functions of
s. A state of n units needs its n x n matrices only to compute the gates and the proposal; of rank d they cost 2 n d in
the place of n^2, while the state itself passes through untouched.

Source: Low-rank passthrough neural networks, arXiv 1603.03116.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input
from pomona.nn.structured import LowRankLinear

State = tuple[Tensor, ...]


def state_maps(
    n: int,
    count: int,
    rank: int | None,
    diag: bool,
    share: bool,
    *,
    orthogonal: bool = False,
    generator: torch.Generator | None = None,
) -> list[Any]:
    """``count`` maps (n -> n) without bias: L Q, L Q + diag(D) or, with rank None, dense; all of Glorot's variance.

    Args:
        share: one Q for all maps.
        orthogonal: orthogonal columns of L and rows of Q.
    """
    if rank is None:
        dense = [nn.Linear(n, n, bias=False) for _ in range(count)]
        for linear in dense:
            nn.init.xavier_normal_(linear.weight, generator=generator)
        return dense
    low = [LowRankLinear(n, n, rank, False, diag=diag, generator=generator) for _ in range(count)]
    if orthogonal:
        for layer in low:
            for factor in (layer.left, layer.right):
                nn.init.orthogonal_(factor, (n / rank) ** 0.25, generator=generator)
    for layer in low[1:] if share else []:
        layer.right = low[0].right
    return low


def fuse(maps: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Several maps as one: f(h (batch, n), given (batch, k n)) = given + all maps of h side by side.

    The factors are stacked once, for use at each step of a sequence.
    """
    if isinstance(maps[0], nn.Linear):
        dense = torch.cat([layer.weight for layer in maps]).T
        return lambda h, given: torch.addmm(given, h, dense)
    one = all(layer.right is maps[0].right for layer in maps)
    down = maps[0].right.T if one else torch.cat([layer.right for layer in maps]).T
    lefts = [layer.left.T for layer in maps]
    up = torch.cat(lefts, 1) if one else torch.block_diag(*lefts)
    if maps[0].diagonal is None:
        return lambda h, given: torch.addmm(given, h @ down, up)
    diagonal = torch.stack([layer.diagonal for layer in maps])
    return lambda h, given: torch.addmm(given, h @ down, up) + (h[:, None] * diagonal).flatten(1)


@torch.no_grad()
def balance(net: nn.Module) -> None:
    """Rescale the factors of all low-rank maps in place so that |L| = |Q|; the maps stay the same.

    Only the product of the scales of L and Q is determined by the loss, so that they can drift apart. Maps that share Q
    share the scale.
    """
    groups: dict[int, list[LowRankLinear]] = {}
    for module in net.modules():
        if isinstance(module, LowRankLinear):
            groups.setdefault(id(module.right), []).append(module)
    for layers in groups.values():
        left = math.sqrt(sum(float(layer.left.square().sum()) for layer in layers))
        right = float(layers[0].right.norm())
        if left > 0 and right > 0:
            for layer in layers:
                layer.left.mul_(math.sqrt(right / left))
            layers[0].right.mul_(math.sqrt(left / right))


@torch.no_grad()
def limit_columns(maps: Iterable[Any], most: float) -> None:
    """Max-norm: columns of L and Q longer than ``most`` are shortened to it, in place."""
    for layer in maps:
        if isinstance(layer, LowRankLinear):
            for factor in (layer.left, layer.right):
                factor.copy_(torch.renorm(factor, 2, 1, most))


def budget(
    input_size: int, hidden_size: int, dense_size: int, *, gates: int = 3, diag: bool = True, share: bool = False
) -> int:
    """The rank at which a recurrent network of ``hidden_size`` has about the parameters of a dense one.

    Args:
        input_size: of both.
        hidden_size: n.
        dense_size: units of the dense one.
        gates: state maps of the cell: 3 of a GRU, 4 of an LSTM.
        diag, share: of the low-rank one.

    Raises:
        PomonaError: if the parameters do not suffice for rank 1.
    """
    parameters = gates * dense_size * (dense_size + input_size + 1)
    left = parameters - gates * hidden_size * (input_size + 1 + diag)
    rank = round(left / (hidden_size * (gates + 1 if share else 2 * gates)))
    if rank < 1:
        raise PomonaError(
            f"hidden_size={hidden_size} is too large for the {parameters:,} parameters of dense_size={dense_size}"
        )
    return min(rank, hidden_size)


class _LowRankRecurrent(nn.Module):
    """What `LowRankGRU` and `LowRankLSTM` share; see the former."""

    gates: int
    carry: int
    """Which gate keeps the state: its bias starts at ``carry_bias``."""
    states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rank: int | None,
        *,
        diag: bool = True,
        share: bool = False,
        orthogonal: bool = False,
        carry_bias: float = 1.0,
        gate_diag: float | None = None,
        dropout: float = 0.0,
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size)
        if not 0 <= dropout < 1:
            raise PomonaError(f"dropout={dropout} must be at least 0 and below 1")
        self.input_size, self.hidden_size, self.dropout, self.max_norm = input_size, hidden_size, dropout, max_norm
        self.input_map = nn.Linear(input_size, self.gates * hidden_size)
        for block in self.input_map.weight.chunk(self.gates):
            nn.init.xavier_normal_(block, generator=generator)
        nn.init.zeros_(self.input_map.bias)
        nn.init.constant_(self.input_map.bias.chunk(self.gates)[self.carry], carry_bias)
        self.maps = nn.ModuleList(
            state_maps(hidden_size, self.gates, rank, diag, share, orthogonal=orthogonal, generator=generator)
        )
        for layer in list(self.maps)[:-1]:  # the last map is the proposal's, whose diagonal starts at 0
            diagonal = getattr(layer, "diagonal", None)
            if isinstance(diagonal, nn.Parameter):
                bounds = (-0.01, 0.01) if gate_diag is None else (gate_diag, gate_diag)
                nn.init.uniform_(diagonal, *bounds, generator=generator)

    def stepper(self) -> Callable[[Tensor, State, Tensor | None], State]:
        """The function (W x + b, state, dropout mask) -> state of a step, its matrices ready."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs (batch, time, hidden_size) and the last state."""
        check_input(self, x, self.input_size)
        if x.dim() != 3 or not x.shape[1]:
            raise PomonaError(f"input of shape {tuple(x.shape)} must be (batch, time, input_size) with time above 0")
        if state is None:
            state = (x.new_zeros(len(x), self.hidden_size),) * self.states
        mask = None
        if self.training and self.dropout:  # one mask for the whole sequence
            mask = F.dropout(torch.ones_like(state[0]), self.dropout)
        step, outputs = self.stepper(), []
        for given in self.input_map(x).unbind(1):
            state = step(given, state, mask)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state

    def post_step(self) -> None:
        """The max-norm constraint, where there is one."""
        if self.max_norm is not None:
            limit_columns(self.maps, self.max_norm)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.input_size}, {self.hidden_size}"


class LowRankGRU(_LowRankRecurrent):
    """A GRU whose recurrent matrices are of low rank, or low rank plus a diagonal: R = L Q (+ diag(D)).

    r = sigmoid(R_r h + W_r x + b_r),  u = sigmoid(R_u h + W_u x + b_u)
    h' = u h + (1 - u) tanh(R_c (r h) + W_c x + b_c)

    u keeps the state, and the reset gate acts before the matrix. With ``rank=None`` the matrices are dense.

    Args:
        input_size: width of the input.
        hidden_size: n.
        rank: d; None for dense matrices.
        diag: add the diagonals.
        share: one Q for all three matrices.
        orthogonal: orthogonal columns of L and rows of Q at the start.
        carry_bias: of b_u at the start; the paper uses up to 4 for long memories.
        gate_diag: D of the gates at the start, by default uniform within 0.01; that of the candidate starts at 0.
        dropout: of h where it enters the matrices, with one mask for a sequence.
        max_norm: longest column of L and Q, held after each step of the optimiser.
        generator: source of the initial values.

    L and Q are normal with standard deviation (1 / (n d))^(1/4), so that L Q has the variance of a dense Glorot matrix.

    Shape:
        x (batch, time, input_size), state ((batch, n),) or None -> (batch, time, n), ((batch, n),)

    Raises:
        PomonaError: for a size, rank or probability out of range.

    Source: Low-rank passthrough neural networks, arXiv 1603.03116.
    """

    gates, carry, states = 3, 1, 1

    def stepper(self) -> Callable[[Tensor, State, Tensor | None], State]:
        """See the class."""
        n = self.hidden_size
        gates, candidate = fuse(self.maps[:2]), fuse(self.maps[2:])  # type: ignore[arg-type]

        def step(given: Tensor, state: State, mask: Tensor | None) -> State:
            (h,) = state
            seen = h if mask is None else h * mask
            r, u = torch.sigmoid(gates(seen, given[:, : 2 * n])).chunk(2, 1)
            c = torch.tanh(candidate(r * seen, given[:, 2 * n :]))
            return (u * h + (1 - u) * c,)

        return step


class LowRankLSTM(_LowRankRecurrent):
    """An LSTM whose recurrent matrices are of low rank, or low rank plus a diagonal; arguments as in `LowRankGRU`.

    i, f, o = sigmoid(R h + W x + b),  c' = f c + i tanh(R_g h + W_g x + b_g),  h' = o tanh(c')

    ``carry_bias`` is that of f; the state is (h, c).

    Source: Low-rank passthrough neural networks, arXiv 1603.03116.
    """

    gates, carry, states = 4, 1, 2

    def stepper(self) -> Callable[[Tensor, State, Tensor | None], State]:
        """See the class."""
        maps = fuse(list(self.maps))

        def step(given: Tensor, state: State, mask: Tensor | None) -> State:
            h, c = state
            i, f, o, g = maps(h if mask is None else h * mask, given).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

        return step


class LowRankHighway(nn.Module):
    """Layers y = T(x) H(x) + (1 - T(x)) x, with T = sigmoid(R_T x + b_T), H = act(R_H x + b_H) and R of low rank.

    Args:
        features: n.
        rank: d of every R; None for dense ones.
        diag: R = L Q + diag(D), D starting at 0.
        layers: how many.
        carry_bias: b_T at the start, from -1 to -4 the deeper the network: it then passes its input on.
        act: of H.
        gated: without gates the layers are residual, y = x + H(x).
        max_norm: longest column of L and Q, held after each step of the optimiser.
        generator: source of the initial values.

    Shape:
        (*, features) -> (*, features)

    Source: Low-rank passthrough neural networks, arXiv 1603.03116.
    """

    def __init__(
        self,
        features: int,
        rank: int | None,
        diag: bool = True,
        layers: int = 1,
        *,
        carry_bias: float = -2.0,
        act: Callable[[Tensor], Tensor] = torch.relu,
        gated: bool = True,
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(features=features, layers=layers)
        self.features, self.act, self.gated, self.max_norm = features, act, gated, max_norm
        self.proposals = nn.ModuleList(state_maps(features, layers, rank, diag, False, generator=generator))
        gates = state_maps(features, layers if gated else 0, rank, diag, False, generator=generator)
        self.gates = nn.ModuleList(gates)
        self.proposal_bias = nn.Parameter(torch.zeros(layers, features))
        self.gate_bias = nn.Parameter(torch.full((len(gates), features), float(carry_bias)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.features)
        for layer, proposal in enumerate(self.proposals):
            h = self.act(proposal(x) + self.proposal_bias[layer])
            if self.gated:
                t = torch.sigmoid(self.gates[layer](x) + self.gate_bias[layer])
                x = t * h + (1 - t) * x
            else:
                x = x + h
        return x

    def post_step(self) -> None:
        """The max-norm constraint, where there is one."""
        if self.max_norm is not None:
            limit_columns([*self.proposals, *self.gates], self.max_norm)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.features}, layers={len(self.proposals)}, gated={self.gated}"


def low_rank_residual(
    features: int, rank: int | None, diag: bool = True, layers: int = 1, **options: Any
) -> LowRankHighway:
    """Residual layers y = x + act(R x + b) with R of low rank: a `LowRankHighway` without gates."""
    return LowRankHighway(features, rank, diag, layers, gated=False, **options)
