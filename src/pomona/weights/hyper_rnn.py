"""Dynamic hypernetworks: a small recurrent cell rescales the weights of a larger one at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive

State = tuple[Tensor, ...]


class GateNorm(nn.Module):
    """Layer norm of each gate by itself, ``(batch, gates, features)``; or nothing, without ``layer_norm``."""

    def __init__(self, gates: int, features: int, layer_norm: bool) -> None:
        super().__init__()
        self.features, self.layer_norm = features, layer_norm
        if layer_norm:
            self.weight = nn.Parameter(torch.ones(gates, features))
            self.bias = nn.Parameter(torch.zeros(gates, features))

    def forward(self, y: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.layer_norm:
            return y
        return F.layer_norm(y, (self.features,)) * self.weight + self.bias


class RNNCore(nn.Module):
    """What a recurrent cell does after its matrix products: ``core(a_h, a_x, b, state)`` gives the new state.

    ``a_h``, ``a_x`` and ``b`` are the recurrent, input and bias parts of the pre-activations ``(batch,
    gates, features)``. The main cell and its hypernetwork use the same core. This one is the plain cell, ``h
    = tanh(LN(a_h + a_x + b))``.
    """

    gates, states = 1, 1

    def __init__(self, features: int, layer_norm: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = GateNorm(self.gates, features, layer_norm)

    def forward(self, a_h: Tensor, a_x: Tensor, b: Tensor, state: State) -> State:
        """One step."""
        return (torch.tanh(self.norm(a_h + a_x + b)).squeeze(-2),)

    def drop(self, candidate: Tensor) -> Tensor:
        """Dropout of the new content only, so that the memory is never dropped."""
        return F.dropout(candidate, self.dropout, self.training)


class LSTMCore(RNNCore):
    """``i, g, f, o = LN(a_h+a_x+b)``; ``c = sig(f) c + sig(i) drop(tanh(g))``; ``h = sig(o) tanh(LN(c))``."""

    gates, states = 4, 2

    def __init__(self, features: int, layer_norm: bool, dropout: float) -> None:
        super().__init__(features, layer_norm, dropout)
        self.cell_norm = GateNorm(1, features, layer_norm)

    def forward(self, a_h: Tensor, a_x: Tensor, b: Tensor, state: State) -> State:
        """One step."""
        i, g, f, o = self.norm(a_h + a_x + b).unbind(-2)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * self.drop(torch.tanh(g))
        h = torch.sigmoid(o) * torch.tanh(self.cell_norm(c.unsqueeze(-2)).squeeze(-2))
        return h, c


class GRUCore(RNNCore):
    """``r, u = sig(LN(a_h + a_x + b))``; ``n = tanh(LN(r a_h + a_x + b))``; ``h = (1 - u) drop(n) + u h``."""

    gates, states = 3, 1

    def forward(self, a_h: Tensor, a_x: Tensor, b: Tensor, state: State) -> State:
        """One step."""
        reset = torch.sigmoid(self.norm(a_h + a_x + b)[..., :1, :])
        gated = torch.cat([a_h[..., :2, :], reset * a_h[..., 2:, :]], dim=-2)
        _, u, n = self.norm(gated + a_x + b).unbind(-2)
        u = torch.sigmoid(u)
        return ((1 - u) * self.drop(torch.tanh(n)) + u * state[0],)


class RowScale(nn.Module):
    r"""Scales of the rows of both weight matrices, and a bias, from the hypernetwork's state.

    .. math:: z = A \hat h + a, \qquad d_h = D_h z_h, \quad d_x = D_x z_x, \quad b = D_b z_b + b_0

    At the start ``A`` is zero for the scales and its bias one, so that ``d`` is ``gain`` in every row, and
    ``D_b`` is zero. With constant ``D`` (``noise=0``, the paper's choice) the components of an embedding get
    equal gradients and stay equal for ever; ``noise`` adds normal numbers that sum to zero over the
    embedding, which leaves ``d`` as it is and lets them part.

    Shape: ``(batch, hyper_hidden)`` to ``(batch, 3, gates, hidden)``, the three being ``d_h``, ``d_x`` and
    ``b``.
    """

    def __init__(self, hyper_hidden: int, hidden: int, gates: int, z_dim: int, gain: float, noise: float) -> None:
        super().__init__()
        self.gates, self.z_dim, self.gain, self.noise = gates, z_dim, gain, noise
        self.embed = nn.Linear(hyper_hidden, 3 * gates * z_dim)
        self.expand = nn.Parameter(torch.empty(3, gates, hidden, z_dim))
        self.bias = nn.Parameter(torch.empty(gates, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's start: all scales equal to ``gain``."""
        weight, bias = self.embed.weight.view(3, -1), self.embed.bias.view(3, -1)
        nn.init.zeros_(weight[:2])
        nn.init.ones_(bias[:2])
        nn.init.normal_(weight[2:], std=0.01)
        nn.init.zeros_(bias[2:])
        nn.init.normal_(self.expand, std=self.noise)
        zero_sum = self.expand - self.expand.mean(-1, keepdim=True)
        self.expand.copy_((1 + zero_sum) * self.gain / self.z_dim)
        nn.init.zeros_(self.expand[2])
        nn.init.zeros_(self.bias)

    def forward(self, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``d_h``, ``d_x`` and ``b``, each ``(batch, gates, hidden)``."""
        z = self.embed(hyper_h).unflatten(-1, (3, self.gates, self.z_dim))
        d_h, d_x, b = torch.einsum("...kgz,kghz->...kgh", z, self.expand).unbind(-3)
        return d_h, d_x, b + self.bias


class HyperRecurrent(nn.Module):
    r"""A recurrent network whose weights are rescaled, row by row and step by step, by a smaller recurrent
    network.

    .. math::
        \hat h_t = \text{cell}(\hat h_{t-1}, [h_{t-1}; x_t]), \qquad
        y_t = \text{LN}(d_h(\hat h_t) \odot W_h h_{t-1} + d_x(\hat h_t) \odot W_x x_t + b(\hat h_t))

    for each gate ``y``; then the usual gating. Scaling rows is what is left of generating ``W`` in full when
    each weight matrix is ``diag(d) W``: memory O(hidden), not O(hidden^2).

    Args:
        input_size, hidden_size: as for ``nn.LSTM``.
        hyper_hidden: size of the small cell; an eighth of ``hidden_size`` if left out.
        z_dim: size of the embedding behind each scale vector.
        layer_norm: normalise gates (and LSTM memory) of both cells; scales then start at 0.1, otherwise at 1.
        recurrent_dropout: of the new content, in both cells (not in the plain RNN).
        noise: of the embeddings' expansion at the start (see ``RowScale``); 0 is the paper's.
        batch_first: ``(batch, time, features)`` instead of ``(time, batch, features)``.

    Call it as ``output, state = net(x, state=None)``: ``x (time, batch, input_size)``, ``output (time,
    batch, hidden_size)``, ``state`` the tuple of the main cell's and then the small cell's states, ``(h,
    hyper_h)``, for the LSTM ``(h, c, hyper_h, hyper_c)``, each ``(batch, size)``.

    Raises:
        PomonaError: for sizes below one, an empty sequence or a state of the wrong length.

    Source: HyperNetworks, sections 3.2 and A.2 (arXiv 1609.09106).
    """

    core_class: type[RNNCore] = RNNCore

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hyper_hidden: int | None = None,
        z_dim: int = 4,
        layer_norm: bool = True,
        recurrent_dropout: float = 0.1,
        noise: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        hyper_hidden = max(1, hidden_size // 8) if hyper_hidden is None else hyper_hidden
        check_positive(input_size=input_size, hidden_size=hidden_size, hyper_hidden=hyper_hidden, z_dim=z_dim)
        if not 0 <= recurrent_dropout < 1:
            raise PomonaError(f"recurrent_dropout={recurrent_dropout} must lie in [0, 1)")
        gates = self.core_class.gates
        self.input_size, self.hidden_size, self.hyper_hidden = input_size, hidden_size, hyper_hidden
        self.batch_first = batch_first
        self.core = self.core_class(hidden_size, layer_norm, recurrent_dropout)
        self.weight_h = nn.Parameter(torch.empty(gates, hidden_size, hidden_size))
        self.weight_x = nn.Parameter(torch.empty(gates, hidden_size, input_size))
        self.scale = RowScale(hyper_hidden, hidden_size, gates, z_dim, 0.1 if layer_norm else 1.0, noise)

        self.hyper_core = self.core_class(hyper_hidden, layer_norm, recurrent_dropout)
        self.hyper_weight_h = nn.Parameter(torch.empty(gates, hyper_hidden, hyper_hidden))
        self.hyper_weight_x = nn.Parameter(torch.empty(gates, hyper_hidden, hidden_size + input_size))
        self.hyper_bias = nn.Parameter(torch.empty(gates, hyper_hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal weights, unit forget bias (in the norm's shift where there is one)."""
        for weight in (self.weight_h, self.weight_x, self.hyper_weight_h, self.hyper_weight_x):
            for gate in weight:
                nn.init.orthogonal_(gate)
        nn.init.zeros_(self.hyper_bias)
        for core, bias in ((self.core, self.scale.bias), (self.hyper_core, self.hyper_bias)):
            if isinstance(core, LSTMCore):
                (core.norm.bias if core.norm.layer_norm else bias)[2] = 1.0

    def initial_state(self, x: Tensor) -> State:
        """Zeros for a step's input ``(batch, input_size)``."""
        n = self.core_class.states
        sizes = [self.hidden_size] * n + [self.hyper_hidden] * n
        return tuple(x.new_zeros(*x.shape[:-1], size) for size in sizes)

    def hyper_step(self, from_x: Tensor, h: Tensor, hyper_state: State) -> State:
        """The small cell's next state, from the input's share, the main cell's output and its own state."""
        weight = self.hyper_weight_x[..., : self.hidden_size]
        return self.hyper_core(
            apply_gates(self.hyper_weight_h, hyper_state[0]),
            from_x + apply_gates(weight, h),
            self.hyper_bias,
            hyper_state,
        )

    def inputs(self, x: Tensor) -> Tensor:
        """The main cell's products with the inputs, for all steps at once."""
        return apply_gates(self.weight_x, x)

    def parts(self, from_x: Tensor, h: Tensor, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Recurrent, input and bias part of the main cell's pre-activations."""
        d_h, d_x, b = self.scale(hyper_h)
        return d_h * apply_gates(self.weight_h, h), d_x * from_x, b

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run a sequence."""
        if self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise PomonaError("x has no time step; give a sequence of at least one")
        n = self.core_class.states
        state = self.initial_state(x[0]) if state is None else state
        if len(state) != 2 * n:
            raise PomonaError(f"state has {len(state)} tensors; {type(self).__name__} needs {2 * n}")
        main, hyper = state[:n], state[n:]
        to_main = self.inputs(x)
        to_hyper = apply_gates(self.hyper_weight_x[..., self.hidden_size :], x)
        outputs = []
        for main_x, hyper_x in zip(to_main.unbind(), to_hyper.unbind(), strict=True):
            hyper = self.hyper_step(hyper_x, main[0], hyper)
            main = self.core(*self.parts(main_x, main[0], hyper[0]), main)
            outputs.append(main[0])
        return torch.stack(outputs, dim=1 if self.batch_first else 0), (*main, *hyper)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.input_size}, {self.hidden_size}, hyper_hidden={self.hyper_hidden}"


def apply_gates(weight: Tensor, x: Tensor) -> Tensor:
    """``(gates, out, in)`` times ``(*, in)`` is ``(*, gates, out)``."""
    return F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


class HyperLSTM(HyperRecurrent):
    """An LSTM whose weights an eight times smaller LSTM rescales at every step; see ``HyperRecurrent``."""

    core_class = LSTMCore


class HyperGRU(HyperRecurrent):
    """A GRU whose weights a smaller GRU rescales at every step; see ``HyperRecurrent``.

    The reset gate acts on the scaled recurrent product. (The paper has RNN and LSTM; this is their analogue.)
    """

    core_class = GRUCore


class HyperRNN(HyperRecurrent):
    r"""A plain RNN with weights from a smaller RNN; see ``HyperRecurrent``.

    With ``full=True`` the weights are generated in full, :math:`W_h = \sum_k z_k W_{hz}[k]`, and so for
    ``W_x``, from matrices ``(z_dim, hidden, hidden)``: ``z_dim`` times the memory, for small networks. Rows
    scaled are the case ``W_hz[k] = diag(D[:, k]) W``.
    """

    def __init__(self, input_size: int, hidden_size: int, *, full: bool = False, **options: object) -> None:
        self.full = False
        super().__init__(input_size, hidden_size, **options)  # type: ignore[arg-type]
        self.full = full
        if full:
            z_dim = self.scale.z_dim
            self.weight_h = nn.Parameter(torch.empty(z_dim, hidden_size, hidden_size))
            self.weight_x = nn.Parameter(torch.empty(z_dim, hidden_size, input_size))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal; in the full form so that the sum of the ``z_dim`` matrices has the scale of one."""
        super().reset_parameters()
        if self.full:
            for weight in (self.weight_h, self.weight_x):
                weight.mul_(len(weight) ** -0.5)

    def parts(self, from_x: Tensor, h: Tensor, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Recurrent, input and bias part; in the full form sums over ``z``."""
        if not self.full:
            return super().parts(from_x, h, hyper_h)
        scale = self.scale
        z_h, z_x, z_b = scale.embed(hyper_h).unflatten(-1, (3, 1, scale.z_dim)).unbind(-3)  # (batch, 1, z)
        b = z_b @ scale.expand[2, 0].T + scale.bias
        return z_h @ apply_gates(self.weight_h, h), z_x @ from_x, b
