"""Modern Hopfield networks with continuous states: associative memory by one softmax, and the layers made of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input

MOST_STEPS = 256
"""Updates after which ``steps=None`` gives up waiting for convergence."""


def association(state: Tensor, patterns: Tensor, beta: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """P = softmax(beta xi X^T), the weight of each pattern for each state.

    Args:
        state: xi, (*, S, d).
        patterns: X, (*, N, d).
        beta: inverse temperature, a number or a tensor that broadcasts to (*, S, N).
        mask: True where a pattern may be used, broadcasts to (*, S, N).

    Returns:
        (*, S, N)
    """
    score = beta * (state @ patterns.mT)
    return torch.softmax(score if mask is None else score.masked_fill(~mask, -torch.inf), -1)


def hopfield_retrieve(
    state: Tensor,
    patterns: Tensor,
    beta: Tensor | float = 1.0,
    *,
    steps: int | None = 1,
    eps: float = 1e-4,
    mask: Tensor | None = None,
) -> Tensor:
    """Updates xi <- X^T softmax(beta X xi), which never raise the energy.

    Args:
        state: xi, (*, S, d).
        patterns: X, (*, N, d).
        beta: inverse temperature, a number or a tensor that broadcasts to (*, S, N).
        steps: number of updates; None: until no state of a leading index (batch, head) moves by ``eps`` or more,
            each leading index stopping for itself (at most 256 updates).
        eps: distance that counts as converged.
        mask: True where a pattern may be used, broadcasts to (*, S, N).

    Returns:
        (*, S, d)

    Source: Hopfield Networks is All You Need, arXiv 2008.02217.
    """
    if steps is not None and steps < 0:
        raise PomonaError(f"steps={steps} must be 0 or more, or None to iterate until convergence")
    if steps is not None:
        for _ in range(steps):
            state = association(state, patterns, beta, mask) @ patterns
        return state
    moving = torch.ones_like(state[..., :1, :1], dtype=torch.bool)
    for _ in range(MOST_STEPS):
        new = association(state, patterns, beta, mask) @ patterns
        change = (new - state).norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
        state = torch.where(moving, new, state)
        moving = moving & (change >= eps)
        if not moving.any():
            break
    return state


def energy(state: Tensor, patterns: Tensor, beta: Tensor | float = 1.0, mask: Tensor | None = None) -> Tensor:
    """E = -lse(beta, X xi) + xi^T xi / 2 + log(N) / beta + M^2 / 2, lse(beta, v) = log(sum exp(beta v)) / beta, M =
    max |x_i|.

    Args:
        state: xi, (*, S, d).
        patterns: X, (*, N, d).
        beta: inverse temperature, a number or a tensor that broadcasts to (*, S, N) with last size 1.
        mask: True where a pattern may be used, broadcasts to (*, S, N).

    Returns:
        (*, S)
    """
    beta = torch.as_tensor(beta, dtype=state.dtype, device=state.device)
    score = beta * (state @ patterns.mT)
    allowed = torch.ones_like(score, dtype=torch.bool) if mask is None else mask.expand_as(score)
    lse = torch.logsumexp(score.masked_fill(~allowed, -torch.inf), -1, keepdim=True) / beta
    count = allowed.sum(-1, keepdim=True).to(state.dtype)
    square = patterns.square().sum(-1)[..., None, :].expand_as(score)
    largest = square.masked_fill(~allowed, 0).amax(-1, keepdim=True)
    return (-lse + state.square().sum(-1, keepdim=True) / 2 + count.log() / beta + largest / 2)[..., 0]


class Hopfield(nn.Module):
    """Z = softmax(beta R W_Q (Y W_K)^T) Y W_K W_V W_O per head, the association repeated ``steps`` times on the query.

    R are states, Y stored patterns. W_V acts on the keys Y W_K, as in the paper; if ``projected`` is a third input
    P, the values are P W_V, as in attention (with steps=1 and without norms this is then multi-head attention).

    Args:
        features: of the states R.
        stored_features: of the stored patterns Y; as the states by default.
        projected_features: of P; as the stored patterns by default. Only used where P is given.
        hidden: size of a head's association space; features / heads by default.
        value: size of a head's values; as ``hidden`` by default.
        out_features: of Z; as the states by default.
        heads: number of heads.
        beta: inverse temperature, a number or one a head; 1 / sqrt(hidden) by default.
        steps: updates of the query; None iterates until it moves by less than ``eps``.
        eps: see ``steps``.
        norm: LayerNorm, affine, on the states, stored patterns and P before their projections.
        static: which of ``state``, ``stored``, ``projected`` are used as they are, without a projection.
        from_stored: values are Y W_K W_V (True) or P W_V (False, P being Y where it is not given).
        out_projection: apply W_O; otherwise the heads' values are returned side by side.
        bias: biases of the projections.
        bias_pattern: one more stored pattern, trained.
        zero_association: one more stored pattern and value, zero, so that a state may retrieve nothing.
        dropout: probability on the association.

    Shape:
        (B, S, features), stored (B, N, stored_features) -> (B, S, out_features)

    Source: Hopfield Networks is All You Need, arXiv 2008.02217.
    """

    beta: Tensor

    def __init__(
        self,
        features: int,
        *,
        stored_features: int | None = None,
        projected_features: int | None = None,
        hidden: int | None = None,
        value: int | None = None,
        out_features: int | None = None,
        heads: int = 1,
        beta: float | list[float] | None = None,
        steps: int | None = 1,
        eps: float = 1e-4,
        norm: bool = True,
        static: tuple[str, ...] = (),
        from_stored: bool = True,
        out_projection: bool = True,
        bias: bool = True,
        bias_pattern: bool = False,
        zero_association: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(features=features, heads=heads)
        if steps is not None and steps < 1:
            raise PomonaError(f"steps={steps} must be 1 or more, or None to iterate until convergence")
        wrong = set(static) - {"state", "stored", "projected"}
        if wrong:
            raise PomonaError(f"static={static} may only hold 'state', 'stored' and 'projected'")
        if hidden is None and not {"state", "stored"} & set(static):
            check_divisible("features", features, "heads", heads)
        stored_features = stored_features or features
        projected_features = projected_features or stored_features
        width = features if "state" in static else stored_features if "stored" in static else 0
        inner = width or (hidden or features // heads) * heads
        check_divisible("width of a static input" if width else "hidden * heads", inner, "heads", heads)
        value_in = inner if from_stored else projected_features
        if "projected" in static:
            check_divisible("values", value_in, "heads", heads)
        value_inner = value_in if "projected" in static else (value or inner // heads) * heads
        for name, size in (("state", features), ("stored", stored_features)):
            if name in static and size != inner:
                raise PomonaError(
                    f"static={static} needs {name} patterns of the association's size {inner}, got {size}"
                )
        self.heads, self.steps, self.eps, self.from_stored = heads, steps, eps, from_stored
        self.zero_association = zero_association

        def make_norm(size: int) -> nn.Module:
            return nn.LayerNorm(size) if norm else nn.Identity()

        def linear(name: str, n: int, m: int) -> nn.Module:
            if name in static:
                return nn.Identity()
            layer = nn.Linear(n, m, bias)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if bias:
                nn.init.zeros_(layer.bias)
            return layer

        self.norm_state, self.norm_stored = make_norm(features), make_norm(stored_features)
        self.norm_projected = nn.Identity() if from_stored else make_norm(projected_features)
        self.query = linear("state", features, inner)
        self.key = linear("stored", stored_features, inner)
        self.value = linear("projected", value_in, value_inner)
        self.out_features = (out_features or features) if out_projection else value_inner
        self.out = linear("", value_inner, self.out_features) if out_projection else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.bias_key = self.bias_value = None
        if bias_pattern:
            self.bias_key = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, inner), generator=generator))
            self.bias_value = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, value_inner), generator=generator))
        scale = 1 / math.sqrt(inner // heads) if beta is None else beta
        per_head = torch.as_tensor(scale, dtype=torch.get_default_dtype()).reshape(-1, 1, 1)
        if len(per_head) not in (1, heads) or not (per_head > 0).all():
            raise PomonaError(f"beta={beta} must be one number above 0, or one for each of the heads={heads}")
        self.register_buffer("beta", per_head)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, -3)

    def attend(
        self,
        state: Tensor,
        stored: Tensor | None = None,
        projected: Tensor | None = None,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output (B, S, out_features) and the association (B, heads, S, stored patterns) of the last update.

        Arguments as in `forward`.
        """
        stored = state if stored is None else stored
        key = self.key(self.norm_stored(stored))
        source = key if self.from_stored else self.norm_projected(stored if projected is None else projected)
        q, k, v = self.query(self.norm_state(state)), key, self.value(source)
        allowed = None if padding is None else padding[..., None, None, :].bool()
        if mask is not None:
            mask = mask.bool()[..., None, :, :] if mask.dim() == state.dim() else mask.bool()
            allowed = mask if allowed is None else allowed & mask
        if self.bias_key is not None:
            k, v, allowed = _append(k, v, self.bias_key, self.bias_value, allowed)
        if self.zero_association:
            k, v, allowed = _append(k, v, k.new_zeros(1, k.shape[-1]), v.new_zeros(1, v.shape[-1]), allowed)
        q, k, v = self._split(q), self._split(k), self._split(v)
        beta = self.beta.to(q)
        steps = None if self.steps is None else self.steps - 1  # the last update is the one that reads the values
        q = hopfield_retrieve(q, k, beta, steps=steps, eps=self.eps, mask=allowed)
        weight = association(q, k, beta, allowed)
        z = (self.dropout(weight) @ v).movedim(-3, -2).flatten(-2)
        return self.out(z), weight

    def forward(
        self,
        state: Tensor,
        stored: Tensor | None = None,
        projected: Tensor | None = None,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See the class.

        Args:
            state: R, (B, S, features).
            stored: Y, (B, N, stored_features); the states by default.
            projected: P, (B, N, projected_features); the stored patterns by default.
            padding: (B, N), True at real stored patterns.
            mask: (S, N) or (B, S, N), True where a state may use a pattern.
        """
        if self.from_stored and projected is not None:
            raise PomonaError(
                "projected is given, but from_stored=True takes the values from stored; set from_stored=False"
            )
        return self.attend(state, stored, projected, padding, mask)[0]


def _append(
    k: Tensor, v: Tensor, key: Tensor, value: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One more pattern and value at the end, always allowed."""
    assert value is not None
    k = torch.cat([k, key.expand(*k.shape[:-2], 1, -1)], -2)
    v = torch.cat([v, value.expand(*v.shape[:-2], 1, -1)], -2)
    return k, v, None if allowed is None else F.pad(allowed, (0, 1), value=True)


class HopfieldPooling(nn.Module):
    """Pooling of a set: ``quantity`` trained states each retrieve from the stored input, (B, N, D) -> (B, quantity
    * D).

    Args:
        features: D of the set's members.
        quantity: trained states.
        state_features: their size; D by default.
        options: keyword arguments of `Hopfield`.

    Shape:
        (B, N, D), padding (B, N) or None -> (B, quantity * out_features)

    Source: Hopfield Networks is All You Need, arXiv 2008.02217.
    """

    def __init__(
        self,
        features: int,
        *,
        quantity: int = 1,
        state_features: int | None = None,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        check_positive(features=features, quantity=quantity)
        size = state_features or features
        options = {"out_features": features, **options}
        self.hopfield = Hopfield(size, stored_features=features, generator=generator, **options)  # type: ignore[arg-type]
        self.state = nn.Parameter(0.02 * torch.randn(quantity, size, generator=generator))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """See the class."""
        state = self.state.expand(*x.shape[:-2], -1, -1)
        return self.hopfield(state, x, padding=padding).flatten(-2)


class HopfieldLayer(nn.Module):
    """Lookup: the input's vectors retrieve from ``quantity`` trained patterns, with trained values of their own.

    Args:
        features: of the input.
        quantity: stored patterns.
        stored_features: their size; as the input by default.
        lookup: a trained value vector for each pattern (True), or values from the stored patterns (False).
        options: keyword arguments of `Hopfield`.

    Shape:
        (*, features) -> (*, out_features)

    Source: Hopfield Networks is All You Need, arXiv 2008.02217.
    """

    def __init__(
        self,
        features: int,
        *,
        quantity: int = 64,
        stored_features: int | None = None,
        lookup: bool = True,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        check_positive(features=features, quantity=quantity)
        size = stored_features or features
        self.hopfield = Hopfield(
            features,
            stored_features=size,
            from_stored=not lookup,
            generator=generator,
            **options,  # type: ignore[arg-type]
        )
        self.stored = nn.Parameter(0.02 * torch.randn(quantity, size, generator=generator))
        self.content = nn.Parameter(0.02 * torch.randn(quantity, size, generator=generator)) if lookup else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        y = self.hopfield(x.reshape(-1, x.shape[-1]), self.stored, self.content)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class HopfieldMemory(HopfieldLayer):
    """y = x + HopfieldLayer(x): a memory of ``quantity`` trained patterns beside the stream.

    Args:
        features: of input and output.
        quantity: stored patterns.
        heads: number of heads, which must divide the features.
        beta: inverse temperature; 1 / sqrt(head size) by default.
        steps: updates of the query.
        dropout: probability on the association.

    Shape:
        (*, features) -> (*, features)
    """

    def __init__(
        self,
        features: int,
        *,
        quantity: int = 64,
        heads: int = 1,
        beta: float | None = None,
        steps: int = 1,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            features, quantity=quantity, heads=heads, beta=beta, steps=steps, dropout=dropout, generator=generator
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + super().forward(x)
