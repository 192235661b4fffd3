"""Recurrent networks with layer normalisation inside the recurrence, in the shape of ``nn.RNN``/``nn.GRU``/``nn.LSTM``.

LN_k(v) is a layer norm with a gain and bias of its own, over all of v (for a stack of gates: over all gates together,
as in the paper). Statistics are taken anew at each time step, so a sequence may be of any length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input

State = tuple[Tensor, ...]


class _LayerNorms(nn.Module):
    """Gains and biases of the norms of one cell; called as norm(k, v)."""

    def __init__(self, sizes: tuple[int, ...], gain: float, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gains = nn.ParameterList(torch.full((size,), gain) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, k: int, v: Tensor) -> Tensor:
        """LN_k(v)."""
        return F.layer_norm(v, v.shape[-1:], self.gains[k], self.biases[k], self.eps)


class _Cell(nn.Module):
    """Weights of one layer in one direction; a subclass says how many gates, norms and states there are."""

    gates: int
    states = 1
    # width of each norm in units of hidden_size
    norm_widths: tuple[int, ...]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, gain: float, eps: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.hidden_weight = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.gates * hidden_size)) if bias else None
        self.norm = _LayerNorms(tuple(width * hidden_size for width in self.norm_widths), gain, eps)
        bound = 1 / math.sqrt(hidden_size)
        with torch.no_grad():
            nn.init.uniform_(self.input_weight, -bound, bound, generator=generator)
            for block in self.hidden_weight.chunk(self.gates):
                nn.init.orthogonal_(block, generator=generator)

    def inputs(self, x: Tensor) -> Tensor:
        """What the input alone contributes, for all time steps at once: (time, batch, input) -> (time, batch, ...)."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> State:
        """One time step; the first state is the output."""
        raise NotImplementedError

    def _biased(self, v: Tensor) -> Tensor:
        return v if self.bias is None else v + self.bias

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """(time, batch, input) and a state of (batch, hidden) each -> outputs (time, batch, hidden) and last state."""
        outputs = []
        for x_t in self.inputs(x).unbind(0):
            state = self.step(x_t, state)
            outputs.append(state[0])
        return torch.stack(outputs), state


class _RNNCell(_Cell):
    gates, norm_widths = 1, (1,)

    def inputs(self, x: Tensor) -> Tensor:
        return x @ self.input_weight.T

    def step(self, x: Tensor, state: State) -> State:
        (h,) = state
        a = x + h @ self.hidden_weight.T
        return (torch.tanh(self._biased(self.norm(0, a))),)


class _GRUCell(_Cell):
    gates, norm_widths = 3, (2, 2, 1, 1)

    def inputs(self, x: Tensor) -> Tensor:
        size = self.hidden_weight.shape[1]
        gates, candidate = (x @ self.input_weight.T).split([2 * size, size], -1)
        return self._biased(torch.cat([self.norm(1, gates), self.norm(2, candidate)], -1))

    def step(self, x: Tensor, state: State) -> State:
        (h,) = state
        size = h.shape[-1]
        hidden_gates, hidden_candidate = (h @ self.hidden_weight.T).split([2 * size, size], -1)
        input_gates, input_candidate = x.split([2 * size, size], -1)
        z, r = torch.sigmoid(self.norm(0, hidden_gates) + input_gates).chunk(2, -1)
        candidate = torch.tanh(input_candidate + r * self.norm(3, hidden_candidate))
        return ((1 - z) * h + z * candidate,)


class _LSTMCell(_Cell):
    gates, states, norm_widths = 4, 2, (4, 4, 1)

    def inputs(self, x: Tensor) -> Tensor:
        return self._biased(self.norm(1, x @ self.input_weight.T))

    def step(self, x: Tensor, state: State) -> State:
        h, c = state
        f, i, o, g = (self.norm(0, h @ self.hidden_weight.T) + x).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.norm(2, c)), c


class _NormRecurrent(nn.Module):
    """Layers and directions around a cell, with the interface of torch's recurrent networks."""

    cell: type[_Cell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        gain: float = 1.0,
        eps: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, eps=eps)
        if not 0 <= dropout <= 1:
            raise PomonaError(f"dropout={dropout} must be between 0 and 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.directions = batch_first, dropout, 2 if bidirectional else 1
        widths = [input_size, *[hidden_size * self.directions] * (num_layers - 1)]
        self.cells = nn.ModuleList(
            self.cell(width, hidden_size, bias, gain, eps, generator)
            for width in widths
            for _ in range(self.directions)
        )

    def _run(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        check_input(self, x)
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise PomonaError(
                f"input of shape {tuple(x.shape)} must have 2 (unbatched) or 3 axes, the last of input_size="
                f"{self.input_size}"
            )
        batched = x.ndim == 3
        if not batched:
            x = x.unsqueeze(1)
            state = None if state is None else tuple(s.unsqueeze(1) for s in state)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if not len(x):
            raise PomonaError("input has 0 time steps; a recurrent network needs at least 1")
        expected = (len(self.cells), x.shape[1], self.hidden_size)
        if state is None:
            state = (x.new_zeros(expected),) * self.cell.states
        if any(s.shape != expected for s in state):
            raise PomonaError(
                f"state of shape {tuple(state[0].shape)} must be (layers * directions, batch, hidden)={expected}"
            )
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.directions):
                k = layer * self.directions + direction
                y, final = self.cells[k](x.flip(0) if direction else x, tuple(s[k] for s in state))
                outputs.append(y.flip(0) if direction else y)
                finals.append(final)
            x = torch.cat(outputs, -1)
        last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if not batched:
            return x.squeeze(1), tuple(s.squeeze(1) for s in last)
        return x.transpose(0, 1) if self.batch_first else x, last

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (time, batch, directions * hidden) and last state (layers * directions, batch, hidden)."""
        output, (h,) = self._run(x, None if state is None else (state,))
        return output, h

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"


class LayerNormRNN(_NormRecurrent):
    """Elman network with layer norm: h_t = tanh(LN(W_h h_{t-1} + W_x x_t) + b).

    Args:
        input_size: width of the input.
        hidden_size: width of the state.
        num_layers: layers, each reading the outputs of the one below.
        bias: whether there is a b beside the biases of the norms.
        batch_first: (batch, time, ...) in place of (time, batch, ...), for input and output.
        dropout: on the outputs of every layer but the last.
        bidirectional: a second set of cells reads backwards.
        gain: first value of every gain (1; 0.1 is used for plain RNNs at times). Biases start at 0.
        eps: of the norms.
        generator: source of the initial weights: recurrent ones orthogonal, input ones uniform to 1/sqrt(hidden_size).

    Called as module(x, state=None) -> (outputs, last state); x may be unbatched, (time, input_size).

    Raises:
        PomonaError: for a size that is not above 0, a wrong shape, or 0 time steps.

    Source: Layer Normalization (arXiv 1607.06450).
    """

    cell = _RNNCell


class LayerNormGRU(_NormRecurrent):
    """GRU with layer norm; arguments as in ``LayerNormRNN``.

        (z, r) = sigmoid(LN_0(W_h h) + LN_1(W_x x) + b)
        h' = (1 - z) h + z tanh(LN_2(W x) + b' + r LN_3(U h))

    Source: Layer Normalization (arXiv 1607.06450), supplement.
    """

    cell = _GRUCell


class LayerNormLSTM(_NormRecurrent):
    """LSTM with layer norm; arguments as in ``LayerNormRNN``, the state is (h, c).

        (f, i, o, g) = LN_0(W_h h) + LN_1(W_x x) + b
        c' = sigmoid(f) c + sigmoid(i) tanh(g),        h' = sigmoid(o) tanh(LN_2(c'))

    Source: Layer Normalization (arXiv 1607.06450), supplement.
    """

    cell = _LSTMCell

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As ``LayerNormRNN``, with the state a pair (h, c) of (layers * directions, batch, hidden)."""
        output, (h, c) = self._run(x, state)
        return output, (h, c)
