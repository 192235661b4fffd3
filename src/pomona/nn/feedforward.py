"""The two-layer network that token blocks apply to every token."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pomona.nn.check import check_input


class FeedForward(nn.Module):
    """y = W_2 act(W_1 x + b_1) + b_2, on the last dimension.

    Args:
        dim: features in and out.
        hidden: features between.
        make_linear: (in_features, out_features) -> linear layer.
        make_act: (features) -> activation; its ``out_factor``, where it has one, says how it changes the width.
        dropout: probability after the activation.

    Shapes:
        (*, dim) -> (*, dim)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        make_linear: Callable[[int, int], nn.Module] = nn.Linear,
        make_act: Callable[[int], nn.Module] = lambda features: nn.GELU(),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        act = make_act(hidden)
        factor = getattr(act, "out_factor", 1)
        if factor != 1:  # keep the width after the activation at `hidden`
            act = make_act(round(hidden / factor))
        self.up = make_linear(dim, round(hidden / factor))
        self.act = act
        self.dropout = nn.Dropout(dropout)
        self.down = make_linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        return self.down(self.dropout(self.act(self.up(x))))
