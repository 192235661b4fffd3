"""Decoders: from an output's hidden vectors to its flat outputs; and losses, one value a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.nets.encoders import embedding_size

Loss = Callable[..., Tensor]


class Projector(nn.Linear):
    """y = W h + b: the regressor, classifier and projector of outputs that are not sequences.

    Shapes:
        (B, features) -> (B, size)
    """

    def __init__(self, features: int, size: int, steps: int = 0, tokens: int = 0) -> None:
        super().__init__(features, size)


class Tagger(nn.Module):
    """One label for each step of an input sequence of the same length.

    Shapes:
        (B, steps, features) -> (B, steps * labels)
    """

    def __init__(self, features: int, size: int, steps: int = 0, tokens: int = 0) -> None:
        super().__init__()
        if not tokens:
            raise PomonaError(
                "decoder 'tagger' needs a combiner that keeps a sequence; use combiner sequence_concat and "
                "encoders with reduce: none"
            )
        if tokens != steps:
            raise PomonaError(f"decoder 'tagger' needs as many labels ({steps}) as the combiner has steps ({tokens})")
        self.project = nn.Linear(features, size // steps)

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        return self.project(h).flatten(1)


class Generator(nn.Module):
    """A GRU that writes a sequence word by word: h_0 = tanh(W h), s_t = GRU(embed(y_{t-1}), s_{t-1}), logits U s_t.

    While training y_{t-1} is the true word (teacher forcing), where targets are given; otherwise the likeliest one.

    Shapes:
        (B, features) -> (B, steps * words)
    """

    def __init__(self, features: int, size: int, steps: int = 1, tokens: int = 0, width: int = 64) -> None:
        super().__init__()
        self.steps, self.words = steps, size // steps
        embedding = embedding_size(self.words)
        self.start = nn.Linear(features, width)
        self.embed = nn.Embedding(self.words + 1, embedding)  # the last is the mark of a beginning
        self.cell = nn.GRUCell(embedding, width)
        self.project = nn.Linear(width, self.words)

    def forward(self, h: Tensor, target: Tensor | None = None) -> Tensor:
        """See the class; ``target`` (B, steps) holds codes."""
        state = self.start(h).tanh()
        word = torch.full((len(h),), self.words, dtype=torch.long, device=h.device)
        forced = None if target is None else target.nan_to_num(0.0).long()
        logits = []
        for step in range(self.steps):
            state = self.cell(self.embed(word), state)
            logits.append(self.project(state))
            word = logits[-1].argmax(-1) if forced is None else forced[:, step]
        return torch.cat(logits, 1)


DECODERS: Mapping[str, Callable[..., nn.Module]] = {
    "regressor": Projector,
    "classifier": Projector,
    "projector": Projector,
    "tagger": Tagger,
    "generator": Generator,
}


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row."""
    return (output - target).square().mean(-1)


def absolute(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each row."""
    return (output - target).abs().mean(-1)


def huber(output: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Huber's loss of each row: squared up to ``delta``, linear beyond."""
    return F.huber_loss(output, target, reduction="none", delta=delta).mean(-1)


def logistic(output: Tensor, target: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of each row, averaged over entries (a set's members)."""
    weight = output.new_tensor(positive_weight)
    return F.binary_cross_entropy_with_logits(output, target, reduction="none", pos_weight=weight).mean(-1)


def softmax(output: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row; 0 for a class that training rows lack (code -1)."""
    return F.cross_entropy(
        output, target[:, 0].long(), reduction="none", ignore_index=-1, label_smoothing=label_smoothing
    )


def sequence_softmax(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each row, averaged over its words and the first padding after them, which ends it."""
    codes = target.long()
    counted = ((codes == 0).cumsum(1) <= 1).to(output.dtype)
    logits = output.unflatten(1, (codes.shape[1], -1)).transpose(1, 2)
    each = F.cross_entropy(logits, codes, reduction="none")
    return (each * counted).sum(1) / counted.sum(1)


NUMBER_LOSSES: dict[str, Loss] = {"mean_squared_error": squared, "mean_absolute_error": absolute, "huber": huber}


def masked_mean(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Mean of ``loss`` over the rows whose target is not missing (nan); 0 when all are."""
    there = target.isfinite().all(-1)
    each = loss(output, torch.where(there[:, None], target, 0.0))
    weight = there.to(each.dtype)
    return torch.where(there, each, 0.0).sum() / weight.sum().clamp(min=1)
