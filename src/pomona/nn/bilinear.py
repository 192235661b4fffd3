"""Bilinear layers and gated linear units: the product of two linear maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import check_positive, unknown
from pomona.nn.check import check_input

GATES: dict[str | None, Callable[[Tensor], Tensor] | None] = {
    None: None,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


class Bilinear(nn.Module):
    """The elementwise product of two linear maps of the same input, one of which may pass a gate.

    y = gate(W x) * (V x)

    Without a gate every output is a quadratic form of the input, which the functions of
    `pomona.nn.bilinear_analysis` take apart.

    Args:
        in_features, out_features: sizes.
        bias: add a learned constant to W x and to V x.
        gate: None for the bilinear layer, 'sigmoid' (GLU), 'relu' (ReGLU), 'silu' (SwiGLU) or 'gelu' (GEGLU).

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: if the gate is unknown.

    Source:
        Bilinear MLPs enable weight-based mechanistic interpretability, arXiv 2410.08417; the gates from GLU
        Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        gate: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        if gate not in GATES:
            raise unknown("gate", gate, GATES)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.gate = gate
        self.both = nn.Linear(in_features, 2 * out_features, bias, device, dtype)

    @property
    def w(self) -> Tensor:
        """W, (out_features, in_features); the gated map."""
        return self.both.weight[: self.out_features]

    @property
    def v(self) -> Tensor:
        """V, (out_features, in_features)."""
        return self.both.weight[self.out_features :]

    def forward(self, x: Tensor) -> Tensor:
        """gate(W x) * (V x)."""
        check_input(self, x, self.in_features)
        wx, vx = self.both(x).chunk(2, dim=-1)
        gate = GATES[self.gate]
        return (wx if gate is None else gate(wx)) * vx

    def extra_repr(self) -> str:
        """The gate, for `repr`."""
        return f"gate={self.gate!r}"


class GLUMLP(nn.Module):
    """The gated feed-forward block of transformers.

    y = P (gate(W x) * (V x))

    Args:
        dim: width of input and output.
        hidden: width of the product, 4 dim by default.
        gate: as in `Bilinear`.
        bias: of all three maps.
        match: take two thirds of ``hidden``, so that the three maps have as many parameters as the two of an
            ordinary block of that width.

    Shape:
        (*, dim) -> (*, dim)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        gate: str | None = "silu",
        bias: bool = False,
        *,
        match: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        check_positive(dim=dim, hidden=hidden)
        if match:
            hidden = max(1, round(2 * hidden / 3))
        self.product = Bilinear(dim, hidden, bias, gate, device=device, dtype=dtype)
        self.project = nn.Linear(hidden, dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """P (gate(W x) * (V x))."""
        return self.project(self.product(x))


def glu(dim: int, hidden: int | None = None, bias: bool = False, match: bool = False) -> GLUMLP:
    """`GLUMLP` with the sigmoid gate."""
    return GLUMLP(dim, hidden, "sigmoid", bias, match=match)


def reglu(dim: int, hidden: int | None = None, bias: bool = False, match: bool = False) -> GLUMLP:
    """`GLUMLP` with the ReLU gate."""
    return GLUMLP(dim, hidden, "relu", bias, match=match)


def swiglu(dim: int, hidden: int | None = None, bias: bool = False, match: bool = False) -> GLUMLP:
    """`GLUMLP` with the SiLU gate."""
    return GLUMLP(dim, hidden, "silu", bias, match=match)


def geglu(dim: int, hidden: int | None = None, bias: bool = False, match: bool = False) -> GLUMLP:
    """`GLUMLP` with the GELU gate."""
    return GLUMLP(dim, hidden, "gelu", bias, match=match)


def bilinear_ffn(dim: int, hidden: int | None = None, bias: bool = False, match: bool = False) -> GLUMLP:
    """`GLUMLP` without a gate."""
    return GLUMLP(dim, hidden, None, bias, match=match)


class BilinearNet(nn.Module):
    """An embedding, bilinear layers and a linear head, with nothing else between input and logits.

    h = E x;  h = B_l(h) or h + B_l(h) for each layer;  logits = U h

    Args:
        in_features, hidden, out_features: sizes of x, h and the logits.
        depth: number of bilinear layers.
        residual: add each layer to its input.
        noise: standard deviation of Gaussian noise added to the input while training; about 0.4 to 1 for
            digits (and weight decay of 0.5 to 1) make the eigenvectors readable.
        gate: as in `Bilinear`; a gated net is a control that cannot be analysed.

    Shape:
        (batch, *) with in_features numbers an example -> (batch, out_features)

    Source:
        arXiv 2410.08417.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        depth: int = 1,
        residual: bool = False,
        noise: float = 0.0,
        gate: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(in_features=in_features, hidden=hidden, out_features=out_features, depth=depth)
        super().__init__()
        self.residual = residual
        self.noise = noise
        self.embed = nn.Linear(in_features, hidden, False, device, dtype)
        self.layers = nn.ModuleList(
            Bilinear(hidden, hidden, gate=gate, device=device, dtype=dtype) for _ in range(depth)
        )
        self.head = nn.Linear(hidden, out_features, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """U B_L(... B_1(E x))."""
        check_input(self, x)
        x = x.flatten(1)
        if self.training and self.noise > 0:
            x = x + self.noise * torch.randn_like(x)
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h) if self.residual else layer(h)
        return self.head(h)
