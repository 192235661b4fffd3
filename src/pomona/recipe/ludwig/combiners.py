"""Combiners: the encodings of all inputs to one vector (B, features), or one sequence (B, tokens, features)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.encoders import (
    ParallelCNN,
    Recurrent,
    StackedCNN,
    Transformer,
    Untouched,
    fc_stack,
    reduce_steps,
    reduction,
    transformer_stack,
)
from pomona.recipe.ludwig.tabnet import TabNet


@dataclass(frozen=True)
class Encoded:
    """What a combiner is told of an input.

    Attributes:
        features: width of the encoding.
        tokens: steps of the encoding, 0 for a vector.
        type: the feature type.
    """

    features: int
    tokens: int = 0
    type: str = ""

    @property
    def size(self) -> int:
        """Entries of the encoding, flattened."""
        return self.features * max(self.tokens, 1)


Inputs = Mapping[str, Encoded]
Encodings = dict[str, Tensor]


class Concat(nn.Module):
    """h = FC([e_1, ..., e_k]): all encodings flattened, concatenated, then ``layers`` fully connected layers.

    Source: Ludwig: a type-based declarative deep learning toolbox, arXiv 1909.07930.

    Shapes:
        {name: (B, features)} -> (B, layers[-1])
    """

    tokens = 0

    def __init__(
        self, inputs: Inputs, layers: list[int] | None = None, linear: str = "linear", act: str = "relu",
        norm: str = "none", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        layers, width = layers or [], sum(encoded.size for encoded in inputs.values())
        self.fc = fc_stack(width, layers, linear=linear, act=act, norm=norm, dropout=dropout)
        self.features = layers[-1] if layers else width

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        return self.fc(torch.cat([e.flatten(1) for e in encoded.values()], -1))


class SequenceConcat(nn.Module):
    """Step t of the result is [s_1[t], ..., s_k[t], v_1, ..., v_m]: vectors are repeated at each step of the sequences.

    Args:
        inputs: what is combined; sequences must have equally many steps.
        main_sequence_feature: the sequence whose steps the vectors are repeated over; the first by default.
        reduce: sum, mean, max or last over the steps, or none.

    Shapes:
        {name: (B, T, features) or (B, features)} -> (B, T, features), or (B, features) reduced
    """

    def __init__(self, inputs: Inputs, main_sequence_feature: str | None = None, reduce: str | None = "none") -> None:
        super().__init__()
        reduce = reduction("combiner.reduce", reduce)
        lengths = {name: e.tokens for name, e in inputs.items() if e.tokens}
        if not lengths:
            raise PomonaError("combiner sequence_concat needs a sequence; give an encoder reduce: none")
        if main_sequence_feature is not None and main_sequence_feature not in lengths:
            raise unknown("combiner.main_sequence_feature", main_sequence_feature, lengths)
        self.length = lengths[main_sequence_feature or next(iter(lengths))]
        if set(lengths.values()) != {self.length}:
            raise PomonaError(f"combiner sequence_concat needs sequences of one length, not {lengths}")
        self.reduce, self.tokens = reduce, self.length if reduce == "none" else 0
        self.features = sum(e.features for e in inputs.values())

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        parts = [e if e.ndim == 3 else e.unsqueeze(1).expand(-1, self.length, -1) for e in encoded.values()]
        steps = torch.cat(parts, -1)
        return steps if self.reduce == "none" else reduce_steps(steps, self.reduce)


class Sequence(nn.Module):
    """:class:`SequenceConcat`, then an encoder of sequences over its steps.

    Args:
        inputs: what is combined.
        encoder: ``parallel_cnn``, ``stacked_cnn``, ``rnn``, ``transformer`` or ``embed`` (steps as they are).
        width: of the encoder.
        main_sequence_feature: see :class:`SequenceConcat`.
        reduce: see :class:`SequenceConcat`.
    """

    def __init__(
        self, inputs: Inputs, encoder: str = "parallel_cnn", width: int = 32,
        main_sequence_feature: str | None = None, reduce: str | None = "max",
    ) -> None:  # fmt: skip
        super().__init__()
        reduce = reduction("combiner.reduce", reduce)
        self.join = SequenceConcat(inputs, main_sequence_feature)
        bodies: dict[str, Callable[[int], nn.Module]] = {
            "parallel_cnn": lambda n: ParallelCNN(n, width),
            "stacked_cnn": lambda n: StackedCNN(n, width),
            "rnn": lambda n: Recurrent(n, width),
            "transformer": lambda n: Transformer(n, self.join.length, width),
            "embed": Untouched,
        }
        if encoder not in bodies:
            raise unknown("combiner.encoder", encoder, bodies)
        self.body, self.reduce = bodies[encoder](self.join.features), reduce
        self.features = int(self.body.features)  # type: ignore[arg-type]
        self.tokens = self.join.length if reduce == "none" else 0

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        steps = self.join(encoded)
        steps = self.body(steps, torch.ones(steps.shape[:2], dtype=torch.bool, device=steps.device))
        return steps if self.reduce == "none" else reduce_steps(steps, self.reduce)


class Tokens(nn.Module):
    """Each encoding, flattened, mapped to ``width`` features: {name: (B, features)} -> (B, inputs, width)."""

    def __init__(self, inputs: Inputs, width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(encoded.size, width) for encoded in inputs.values())

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        flat = [e.flatten(1) for e in encoded.values()]
        return torch.stack([project(e) for project, e in zip(self.projections, flat, strict=True)], 1)


class ColumnTransformer(nn.Module):
    """Inputs as tokens of one width, transformer layers over them, a reduction, fully connected layers.

    Shapes:
        {name: (B, features)} -> (B, layers[-1] or width)
    """

    tokens = 0

    def __init__(
        self, inputs: Inputs, width: int = 64, depth: int = 1, heads: int = 8, ffn: int = 256, dropout: float = 0.1,
        reduce: str | None = "mean", layers: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        reduce = reduction("combiner.reduce", reduce)
        self.project = Tokens(inputs, width)
        self.layers = transformer_stack(width, depth, heads, ffn, dropout)
        self.reduce = "mean" if reduce == "none" else reduce
        self.fc = fc_stack(width, layers or [])
        self.features = (layers or [width])[-1]

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        x = self.project(encoded)
        for layer in self.layers:
            x = layer(x)
        return self.fc(reduce_steps(x, self.reduce))


class TabTransformer(nn.Module):
    """Categories attend to each other; numbers go round: FC([Transformer(e_category), LayerNorm(x_number)]).

    A category's token is its projected encoding beside ``identity`` learned features that tell columns apart.

    Source: TabTransformer: Tabular Data Modeling Using Contextual Embeddings, arXiv 2012.06678.

    Shapes:
        {name: (B, features)} -> (B, layers[-1])
    """

    tokens = 0

    def __init__(
        self, inputs: Inputs, width: int = 32, depth: int = 1, heads: int = 4, ffn: int = 128, dropout: float = 0.1,
        identity: int = 4, layers: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        numbers = [n for n, e in inputs.items() if e.type in {"number", "binary", "vector", "date"} and not e.tokens]
        self.numbers, self.others = numbers, [name for name in inputs if name not in numbers]
        if not self.others:
            raise PomonaError("combiner tabtransformer needs a category or other input to attend to; use concat")
        if not 0 <= identity < width:
            raise PomonaError(f"combiner.identity={identity} must be at least 0 and below width={width}")
        self.project = Tokens({name: inputs[name] for name in self.others}, width - identity)
        self.identity = nn.Parameter(0.02 * torch.randn(len(self.others), identity))
        self.layers = transformer_stack(width, depth, heads, ffn, dropout)
        plain = sum(inputs[name].size for name in numbers)
        self.norm = nn.LayerNorm(plain) if plain else None
        total = plain + width * len(self.others)
        self.fc = fc_stack(total, layers or [], dropout=dropout)
        self.features = (layers or [total])[-1]

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        x = self.project({name: encoded[name] for name in self.others})
        x = torch.cat([x, self.identity.expand(len(x), -1, -1).to(x.dtype)], -1)
        for layer in self.layers:
            x = layer(x)
        if self.norm is None:
            return self.fc(x.flatten(1))
        numbers = torch.cat([encoded[name].flatten(1) for name in self.numbers], -1)
        return self.fc(torch.cat([x.flatten(1), self.norm(numbers)], -1))


class TabNetCombiner(nn.Module):
    """:class:`~pomona.recipe.ludwig.tabnet.TabNet` on all encodings, concatenated."""

    tokens = 0

    def __init__(
        self, inputs: Inputs, width: int = 32, attention: int = 8, steps: int = 3, relaxation: float = 1.5,
        sparsity: float = 1e-4, batch_group: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        total = sum(encoded.size for encoded in inputs.values())
        self.net = TabNet(total, width, attention, steps, relaxation, sparsity, batch_group)
        self.features = width

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        return self.net(torch.cat([e.flatten(1) for e in encoded.values()], -1))


class Comparator(nn.Module):
    """Two entities compared: [a . b, a * b, |a - b|, a^T W b] with a = FC(inputs of entity 1), b = FC(of entity 2).

    Args:
        inputs: what is combined.
        entity_1: names of the inputs of one entity.
        entity_2: of the other.
        layers: fully connected layers of each entity.

    Shapes:
        {name: (B, features)} -> (B, 2 * layers[-1] + 2)
    """

    tokens = 0

    def __init__(
        self, inputs: Inputs, entity_1: list[str], entity_2: list[str], layers: list[int] | None = None
    ) -> None:
        super().__init__()
        for key, names in (("entity_1", entity_1), ("entity_2", entity_2)):
            for name in names:
                if name not in inputs:
                    raise unknown(f"combiner.{key}", name, inputs)
        if not entity_1 or not entity_2 or sorted(entity_1 + entity_2) != sorted(inputs):
            raise PomonaError("combiner.entity_1 and entity_2 must share out all inputs, each in one of them")
        self.entities = (list(entity_1), list(entity_2))
        width = (layers := [64] if layers is None else layers)[-1]
        widths = [sum(inputs[name].size for name in names) for names in self.entities]
        self.fc = nn.ModuleList(fc_stack(w, layers) for w in widths)
        self.weight = nn.Parameter(torch.randn(width, width) / width)
        self.features = 2 * width + 2

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        a, b = (
            fc(torch.cat([encoded[name].flatten(1) for name in names], -1))
            for fc, names in zip(self.fc, self.entities, strict=True)
        )
        product = a * b
        bilinear = ((a @ self.weight) * b).sum(-1, keepdim=True)
        return torch.cat([product.sum(-1, keepdim=True), product, (a - b).abs(), bilinear], -1)


class ProjectAggregate(nn.Module):
    """h = FC(mean_i act(P_i e_i)): every encoding projected to one width, averaged, fully connected layers.

    Shapes:
        {name: (B, features)} -> (B, layers[-1] or width)
    """

    tokens = 0

    def __init__(self, inputs: Inputs, width: int = 128, layers: list[int] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = Tokens(inputs, width)
        self.fc = fc_stack(width, layers or [], dropout=dropout)
        self.features = (layers or [width])[-1]

    def forward(self, encoded: Encodings) -> Tensor:
        """See the class."""
        return self.fc(self.project(encoded).relu().mean(1))


COMBINERS: dict[str, Callable[..., nn.Module]] = {
    "concat": Concat,
    "sequence_concat": SequenceConcat,
    "sequence": Sequence,
    "transformer": ColumnTransformer,
    "tabtransformer": TabTransformer,
    "tabnet": TabNetCombiner,
    "comparator": Comparator,
    "project_aggregate": ProjectAggregate,
}
"""Combiners by name; add your own: ``COMBINERS["mine"] = MyModule``, which takes ``inputs`` and options."""


def make_combiner(spec: Mapping[str, Any], inputs: Inputs) -> nn.Module:
    """The combiner that ``{"type": name, option: value}`` describes (its options already checked)."""
    return COMBINERS[spec["type"]](inputs, **{key: value for key, value in spec.items() if key != "type"})
