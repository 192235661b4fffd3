"""Networks of token blocks: ``mixer`` on patches or columns, ``sequence`` on the steps of a series."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pomona.nets.encoders import ColumnTokens, Patches, Steps
from pomona.nets.fill import Fill, make_head, make_memory
from pomona.nets.specs import Inputs, Outputs


class TokenBlock(nn.Module):
    """x = residual(x, mixer(norm(x))); x = residual(x, ffn(norm(x)))

    Shapes:
        (B, N, D) -> (B, N, D)
    """

    def __init__(self, fill: Fill, dim: int, tokens: int, hidden: int, dropout: float) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.Identity() if fill.empty("norm") else fill.make("norm", features=dim, dims=0)

        self.norm_mixer, self.norm_ffn = norm(), norm()
        self.mixer = fill.make("mixer", dim=dim, tokens=tokens)
        self.ffn = fill.make("ffn", dim=dim, hidden=hidden, make_linear=fill.linear, make_act=fill.act)
        self.join_mixer = fill.make("residual", features=dim)
        self.join_ffn = fill.make("residual", features=dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.join_mixer(x, self.dropout(self.mixer(self.norm_mixer(x))))
        return self.join_ffn(x, self.dropout(self.ffn(self.norm_ffn(x))))


class _TokenNet(nn.Module):
    """stem -> ``depth`` token blocks -> norm -> mean over tokens -> memory -> head."""

    def __init__(
        self, stem: nn.Module, outputs: Outputs, fill: Fill, width: int, depth: int, expand: float, dropout: float
    ) -> None:
        super().__init__()
        self.stem = stem
        hidden = max(1, round(expand * width))
        tokens = int(stem.tokens)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(*(TokenBlock(fill, width, tokens, hidden, dropout) for _ in range(depth)))
        self.norm = nn.Identity() if fill.empty("norm") else fill.make("norm", features=width, dims=0)
        self.memory = make_memory(fill, width)
        self.head = make_head(fill, width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *input shape) -> (B, outputs)"""
        return self.head(self.memory(self.norm(self.blocks(self.stem(x))).mean(1)))


class Mixer(_TokenNet):
    """Token mixing over the patches of an image or series, or over the columns of a table.

    Args:
        width: features of a token.
        depth: blocks.
        expand: hidden features of the feed-forward part, in widths.
        patch: side of a patch; by default images give at most 8 patches a side and series at most 32.
        dropout: probability on each branch.
    """

    slots: ClassVar[dict[str, str]] = {
        "mixer": "mlp",
        "ffn": "mlp",
        "linear": "linear",
        "act": "gelu",
        "norm": "layer",
        "residual": "add",
        "memory": "none",
        "head": "linear",
    }
    kinds: ClassVar[tuple[str, ...]] = ("image", "series", "table")

    def __init__(
        self,
        inputs: Inputs,
        outputs: Outputs,
        fill: Fill,
        *,
        width: int = 64,
        depth: int = 2,
        expand: float = 2.0,
        patch: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        stem = ColumnTokens(inputs, width) if inputs.kind == "table" else Patches(inputs, width, patch)
        super().__init__(stem, outputs, fill, width, depth, expand, dropout)


class Sequence(_TokenNet):
    """Token blocks over the steps of a series or text, with learned positions.

    Args:
        width: features of a step.
        depth: blocks.
        expand: hidden features of the feed-forward part, in widths.
        longest: a longer series is strided down to at most this many steps.
        dropout: probability on each branch.
    """

    slots: ClassVar[dict[str, str]] = {**Mixer.slots, "mixer": "attention"}
    kinds: ClassVar[tuple[str, ...]] = ("series", "tokens")

    def __init__(
        self,
        inputs: Inputs,
        outputs: Outputs,
        fill: Fill,
        *,
        width: int = 64,
        depth: int = 2,
        expand: float = 2.0,
        longest: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(Steps(inputs, width, longest), outputs, fill, width, depth, expand, dropout)
