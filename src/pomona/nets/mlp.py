"""The multilayer perceptron, with slots."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pomona.nets.encoders import vector_encoder
from pomona.nets.fill import Fill, make_head, make_memory
from pomona.nets.specs import Inputs, Outputs


class Block(nn.Module):
    """residual(x, unit(x)), where the widths agree; else unit(x)."""

    def __init__(self, unit: nn.Module, residual: nn.Module | None) -> None:
        super().__init__()
        self.unit, self.residual = unit, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out)"""
        out = self.unit(x)
        return out if self.residual is None else self.residual(x, out)


class MLP(nn.Module):
    """encoder -> ``depth`` blocks of (linear, norm, act, dropout) -> memory -> head.

    Takes any input: tables through their column encoders, images and series flattened.

    Args:
        width: hidden features.
        depth: hidden blocks; 0 is a linear model.
        dropout: probability after each activation.
    """

    slots: ClassVar[dict[str, str]] = {
        "linear": "linear",
        "act": "relu",
        "norm": "none",
        "residual": "none",
        "memory": "none",
        "head": "linear",
    }
    kinds: ClassVar[tuple[str, ...]] = ("table", "image", "series", "tokens")

    def __init__(
        self, inputs: Inputs, outputs: Outputs, fill: Fill, *, width: int = 128, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = vector_encoder(inputs)
        features = int(self.stem.features)  # type: ignore[arg-type]
        blocks = []
        for _ in range(depth):
            unit = fill.unit(lambda out, n=features: fill.linear(n, out), width, dropout=dropout)  # type: ignore[misc]
            joins = features == width and not fill.empty("residual")
            blocks.append(Block(unit, fill.make("residual", features=width) if joins else None))
            features = width
        self.blocks = nn.Sequential(*blocks)
        self.memory = make_memory(fill, features)
        self.head = make_head(fill, features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *input shape) -> (B, outputs)"""
        return self.head(self.memory(self.blocks(self.stem(x))))
