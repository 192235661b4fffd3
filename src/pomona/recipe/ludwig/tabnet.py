"""TabNet: at each decision step a sparse mask chooses which features are looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.kan_attention import project_simplex


class GhostBatchNorm(nn.Module):
    """Batch normalisation by the moments of chunks of at most ``group`` rows.

    Shapes:
        (B, features) -> (B, features)
    """

    def __init__(self, features: int, group: int = 128) -> None:
        super().__init__()
        self.norm, self.group = nn.BatchNorm1d(features, momentum=0.02), group

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if not self.training or len(x) <= self.group:
            return self.norm(x)
        # chunks of nearly equal size, so that none is left with a single row
        return torch.cat([self.norm(chunk) for chunk in x.tensor_split(-(-len(x) // self.group))])


class GatedUnit(nn.Module):
    """GLU(BN(W x)); with ``shared`` W is another unit's.

    Shapes:
        (B, inputs) -> (B, width)
    """

    def __init__(self, inputs: int, width: int, group: int, shared: nn.Linear | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * width, bias=False) if shared is None else shared
        self.norm = GhostBatchNorm(2 * width, group)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.glu(self.norm(self.linear(x)), -1)


class FeatureTransformer(nn.Module):
    """Two units whose weights all steps share, then two of the step's own: x <- sqrt(1/2) (x + unit(x)).

    Shapes:
        (B, inputs) -> (B, width)
    """

    def __init__(self, inputs: int, width: int, group: int, shared: list[nn.Linear]) -> None:
        super().__init__()
        units = [GatedUnit(inputs, width, group, shared[0]), GatedUnit(width, width, group, shared[1])]
        self.units = nn.ModuleList([*units, GatedUnit(width, width, group), GatedUnit(width, width, group)])

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.units[0](x)
        for unit in self.units[1:]:
            x = 0.5**0.5 * (x + unit(x))
        return x


class TabNet(nn.Module):
    """Decision steps, each looking at the features that a sparse mask lets through.

        h = sum_i ReLU(d_i),  [d_i, a_i] = f_i(M_i * BN(x)),
        M_i = sparsemax(P_{i-1} * BN(W_i a_{i-1})),  P_i = P_{i-1} (gamma - M_i)

    Args:
        features: entries of a row.
        width: of the result.
        attention: width of a_i, from which the next mask is made.
        steps: decision steps.
        relaxation: gamma; 1 lets a feature be used in one step only.
        sparsity: weight of the masks' entropy in the loss.
        batch_group: rows whose moments normalise them.

    Shapes:
        (B, features) -> (B, width)

    Source: TabNet: Attentive Interpretable Tabular Learning, arXiv 1908.07442.
    """

    def __init__(
        self, features: int, width: int = 32, attention: int = 8, steps: int = 3, relaxation: float = 1.5,
        sparsity: float = 1e-4, batch_group: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(features=features, width=width, attention=attention, steps=steps)
        if relaxation < 1:
            raise PomonaError(f"relaxation={relaxation!r} must be 1 or more")
        self.width, self.relaxation, self.sparsity = width, relaxation, sparsity
        both = width + attention
        shared = [nn.Linear(features, 2 * both, bias=False), nn.Linear(both, 2 * both, bias=False)]
        self.norm = nn.BatchNorm1d(features, momentum=0.02)
        self.transformers = nn.ModuleList(
            FeatureTransformer(features, both, batch_group, shared) for _ in range(steps + 1)
        )
        self.attend = nn.ModuleList(
            nn.Sequential(nn.Linear(attention, features, bias=False), GhostBatchNorm(features, batch_group))
            for _ in range(steps)
        )
        self._entropy: Tensor | None = None

    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result (B, width) and the masks (steps, B, features)."""
        x = self.norm(x)
        hidden = self.transformers[0](x)
        prior, total, masks = torch.ones_like(x), x.new_zeros(len(x), self.width), []
        for attend, transform in zip(self.attend, self.transformers[1:], strict=True):
            mask = project_simplex(prior * attend(hidden[:, self.width :]))
            masks.append(mask)
            prior = prior * (self.relaxation - mask)
            hidden = transform(mask * x)
            total = total + hidden[:, : self.width].relu()
        return total, torch.stack(masks)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        total, masks = self.masks(x)
        self._entropy = -(masks * (masks + 1e-15).log()).sum(-1).mean() if self.training else None
        return total

    def aux_loss(self) -> Tensor:
        """Entropy of the masks of the last batch, times ``sparsity``."""
        if self._entropy is None:
            return self.norm.weight.new_zeros(())
        return self.sparsity * self._entropy
