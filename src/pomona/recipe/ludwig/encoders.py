"""Encoders: one column's tensor to a vector or a sequence of vectors.

An encoder maps (B, width) to (B, features), or to (B, tokens, features) where its ``tokens`` is above 0. Besides
the ones named here any backbone of :mod:`pomona.nets` is an encoder: ``"mlp linear=kan width=32"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona import catalog
from pomona.errors import PomonaError, check_divisible, unknown
from pomona.nets.build import BACKBONES, backbone, make, split_settings
from pomona.nets.encoders import CodeEmbedding, Flatten, ImageEncoder, OneHotEncoder, Pass, embedding_size
from pomona.nets.fill import Fill
from pomona.nets.specs import Column, Inputs, Outputs
from pomona.nets.tokens import Mixer
from pomona.nets.tokens import Sequence as SequenceNet
from pomona.options import check_options, parse_candidate
from pomona.recipe.ludwig.reductions import reduce_steps, reduction

Form = Literal["values", "code", "counts", "tokens", "series", "image"]


@dataclass(frozen=True)
class Field:
    """What a column looks like to a network.

    Attributes:
        form: numbers, one category's code, a count a word, codes of words in order (0 is padding), series or image.
        width: entries of the packed row.
        codes: how many codes there are (``code`` and ``tokens``).
        shape: of an image (channels, height, width) or of series (channels, steps).
    """

    form: Form
    width: int
    codes: int = 0
    shape: tuple[int, ...] = ()

    @property
    def inputs(self) -> Inputs:
        """The same, as a backbone is told."""
        if self.form == "tokens":
            return Inputs("tokens", (self.width,), vocabulary=self.codes)
        if self.form in {"series", "image"}:
            return Inputs("series" if self.form == "series" else "image", self.shape)
        column = Column("x", "category", 1, self.codes) if self.form == "code" else Column("x", "number", self.width)
        return Inputs("table", (self.width,), (column,))


def fc_stack(
    features: int,
    layers: Sequence[int],
    *,
    linear: str = "linear",
    act: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Fully connected layers ``layers`` wide: linear, norm, activation, dropout; each may be any name of its slot."""
    fill, units = Fill({"linear": linear, "act": act, "norm": norm}), []
    for width in layers:
        if width < 1:
            raise PomonaError(f"layers={list(layers)} must be numbers of features above 0")
        units.append(fill.unit(lambda out, n=features: fill.linear(n, out), width, dropout=dropout))  # type: ignore[misc]
        features = width
    return nn.Sequential(*units)


class Dense(nn.Sequential):
    """Fully connected layers on a column's numbers.

    Shapes:
        (B, width) -> (B, layers[-1])
    """

    def __init__(
        self, field: Field, layers: list[int] | None = None, linear: str = "linear", act: str = "relu",
        norm: str = "none", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        layers = [64] if layers is None else layers
        super().__init__(fc_stack(field.width, layers, linear=linear, act=act, norm=norm, dropout=dropout))
        self.features = layers[-1] if layers else field.width


class Counts(nn.Module):
    """Mean of the embeddings of a set's or bag's members, each as often as it occurs.

    Shapes:
        (B, width) of counts -> (B, features)
    """

    def __init__(self, field: Field, width: int = 0) -> None:
        super().__init__()
        self.features = width or embedding_size(field.width)
        self.weight = nn.Parameter(torch.randn(field.width, self.features))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.to(self.weight.dtype) @ self.weight / x.sum(-1, keepdim=True).clamp(min=1)


class Recurrent(nn.Module):
    """GRU, LSTM or RNN.

    Shapes:
        (B, T, inputs) -> (B, T, features)
    """

    def __init__(
        self, inputs: int, width: int = 64, depth: int = 1, cell: str = "gru", bidirectional: bool = False
    ) -> None:
        super().__init__()
        cells = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
        if cell not in cells:
            raise unknown("cell", cell, cells)
        self.body = cells[cell](inputs, width, depth, batch_first=True, bidirectional=bidirectional)  # type: ignore[operator]
        self.features = width * (1 + bidirectional)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        return self.body(x)[0]


class ParallelCNN(nn.Module):
    """Convolutions of several kernel sizes side by side, concatenated.

    Shapes:
        (B, T, inputs) -> (B, T, len(kernels) * width)

    Source: Convolutional Neural Networks for Sentence Classification, arXiv 1408.5882.
    """

    def __init__(self, inputs: int, width: int = 32, kernels: tuple[int, ...] = (2, 3, 4, 5)) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(inputs, width, kernel) for kernel in kernels)
        self.pads = [((kernel - 1) // 2, kernel // 2) for kernel in kernels]
        self.features = width * len(kernels)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        x = x.transpose(1, 2)
        padded = (nn.functional.pad(x, pad) for pad in self.pads)
        return torch.cat([conv(p).relu() for conv, p in zip(self.convs, padded, strict=True)], 1).transpose(1, 2)


class StackedCNN(nn.Module):
    """``depth`` convolutions over time, one on the other.

    Shapes:
        (B, T, inputs) -> (B, T, width)
    """

    def __init__(self, inputs: int, width: int = 64, depth: int = 2, kernel: int = 5) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv1d(a, width, kernel, padding="same") for a in sizes[:-1])
        self.features = sizes[-1]

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = conv(x).relu()
        return x.transpose(1, 2)


def transformer_stack(width: int, depth: int, heads: int, ffn: int, dropout: float) -> nn.ModuleList:
    """``depth`` pre-norm transformer layers on (B, T, width)."""
    check_divisible("width", width, "heads", heads)
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, ffn, dropout, batch_first=True, norm_first=True) for _ in range(depth)
    )


class Transformer(nn.Module):
    """Transformer layers with learned positions; attention leaves padding out.

    Shapes:
        (B, T, inputs) -> (B, T, width)
    """

    def __init__(
        self, inputs: int, length: int, width: int = 64, depth: int = 1, heads: int = 4, ffn: int = 128,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = transformer_stack(width, depth, heads, ffn, dropout)
        self.features = width

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        x = self.project(x) + self.positions
        if len(x) == 0:  # torch's attention cannot shape the mask of no rows
            return x
        first = torch.arange(x.shape[1], device=x.device) == 0
        masked = ~(present | first)  # softmax over no step at all would be nan
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=masked)
        return x


class Untouched(nn.Module):
    """Steps as they are.

    Shapes:
        (B, T, inputs) -> (B, T, inputs)
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.features = inputs

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        return x


class Steps(nn.Module):
    """A column of text, of a sequence or of series: steps -> body -> reduction.

    Words are embedded in ``embedding`` features; a series' channels are a step's features.

    Shapes:
        (B, width) -> (B, features), or (B, tokens, features) with reduce="none"
    """

    def __init__(
        self, field: Field, body: Callable[..., nn.Module], reduce: str | None, embedding: int, **options: Any
    ) -> None:
        super().__init__()
        self.shape, self.reduce = field.shape, reduction("reduce", reduce)
        self.embed = nn.Embedding(field.codes, embedding, padding_idx=0) if field.form == "tokens" else None
        inputs, length = (embedding, field.width) if self.embed is not None else field.shape
        if body is Transformer:
            options["length"] = length
        self.body = body(inputs, **options)
        self.features = int(self.body.features)  # type: ignore[arg-type]
        self.tokens = length if self.reduce == "none" else 0

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.embed is not None:
            codes = x.long()
            steps, present = self.embed(codes), codes > 0
        else:
            steps = x.reshape(len(x), *self.shape).transpose(1, 2)
            present = torch.ones(steps.shape[:2], dtype=torch.bool, device=x.device)
        steps = self.body(steps, present)
        return steps if self.reduce == "none" else reduce_steps(steps, self.reduce, present)


class Backbone(nn.Module):
    """A backbone of :mod:`pomona.nets` without its head, on one column.

    Args:
        field: the column.
        candidate: as in ``"mlp linear=kan width=32"`` or ``"sequence mixer=fourier"``.
        reduce: ``none`` keeps the tokens of a backbone of token blocks; otherwise their mean is taken.

    Shapes:
        (B, width) -> (B, features) or (B, tokens, features)
    """

    def __init__(self, field: Field, candidate: str, reduce: Literal["mean", "none"] | None = "mean") -> None:
        super().__init__()
        name, given = parse_candidate(candidate)
        slots, settings = split_settings(name, given)
        self.field = field
        self.net = make(name, slots, settings, field.inputs, Outputs("number", 1))
        self.net.head = nn.Identity()
        reduce = reduce or "none"
        if reduce == "none" and not isinstance(self.net, (Mixer, SequenceNet)):
            raise PomonaError(f"reduce='none' needs a backbone of tokens (mixer, sequence), not {name}")
        self.tokens = int(self.net.stem.tokens) if reduce == "none" else 0  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            self.features = int(self.eval()(torch.zeros(2, field.width)).shape[-1])
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.field.form == "tokens":
            x = x.long()
        elif self.field.shape:
            x = x.reshape(len(x), *self.field.shape)
        if self.tokens:
            net: Any = self.net
            return net.memory(net.norm(net.blocks(net.stem(x))))
        return self.net(x)


def _on_steps(body: Callable[..., nn.Module], reduce: str) -> Callable[..., nn.Module]:
    """A factory of :class:`Steps` whose signature offers the body's options, for their check."""
    import inspect

    def build(field: Field, **options: Any) -> nn.Module:
        return Steps(field, body, options.pop("reduce", reduce), options.pop("embedding", 64), **options)

    def parameter(name: str, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)

    own = [p for p in inspect.signature(body).parameters.values() if p.name not in {"inputs", "length"}]
    offered = [parameter("reduce", reduce), parameter("embedding", 64), *(parameter(p.name, p.default) for p in own)]
    first = inspect.Parameter("field", inspect.Parameter.POSITIONAL_ONLY)
    build.__signature__ = inspect.Signature([first, *offered])  # type: ignore[attr-defined]
    return build


def _embedding(field: Field, width: int = 0) -> nn.Module:
    return CodeEmbedding(field.codes, width or embedding_size(field.codes))


def _image(field: Field, width: int = 32) -> nn.Module:
    return ImageEncoder(field.shape, width)


_STEPS: dict[str, Callable[..., nn.Module]] = {
    "embed": _on_steps(Untouched, "mean"),
    "parallel_cnn": _on_steps(ParallelCNN, "max"),
    "stacked_cnn": _on_steps(StackedCNN, "max"),
    "rnn": _on_steps(Recurrent, "last"),
    "transformer": _on_steps(Transformer, "mean"),
}
ENCODERS: Mapping[Form, dict[str, Callable[..., nn.Module]]] = {
    "values": {"passthrough": lambda field: Pass(field.width), "dense": Dense},
    "code": {"dense": _embedding, "onehot": lambda field: OneHotEncoder(field.codes)},
    "counts": {"embed": Counts, "passthrough": lambda field: Pass(field.width), "dense": Dense},
    "tokens": _STEPS,
    "series": {**_STEPS, "passthrough": lambda field: Flatten(field.width), "dense": Dense},
    "image": {"stacked_cnn": _image, "dense": Dense},
}
"""Encoders of each form of column by name; add your own: ``ENCODERS["image"]["mine"] = lambda field: ...``."""


def is_backbone(name: str) -> bool:
    """Whether a name is a candidate of :mod:`pomona.nets`, such as ``mlp linear=kan``."""
    word = name.split()[0].partition(":")[0] if name.split() else ""
    return word in BACKBONES or word in catalog.short_names()


def check_encoder(where: str, form: Form, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The checked options of ``{"type": name, option: value, ...}`` for a form of column.

    Raises:
        PomonaError: naming the path, for an unknown encoder or option.
    """
    options = {key: value for key, value in spec.items() if key != "type"}
    name = spec["type"]
    if name in ENCODERS[form]:
        factory = ENCODERS[form][name]
    elif is_backbone(name):
        head, given = parse_candidate(name)
        split_settings(head, given)
        kind = {"tokens": "tokens", "series": "series", "image": "image"}.get(form, "table")
        if kind not in backbone(head).kinds:  # type: ignore[operator]
            raise PomonaError(
                f"{where}.type={name!r} does not take {kind} input; use {', '.join(ENCODERS[form])} or mlp"
            )
        options = {"candidate": name, **options}
        factory = Backbone
    else:
        raise unknown(f"{where}.type", name, [*ENCODERS[form], *BACKBONES, *catalog.short_names()])
    if "field" in options:
        raise unknown(f"option of {where}", "field", [])
    return check_options(where, factory, options)


def make_encoder(where: str, field: Field, spec: Mapping[str, Any]) -> nn.Module:
    """The encoder that ``spec`` describes, for a column."""
    options = check_encoder(where, field.form, spec)
    return ENCODERS[field.form].get(spec["type"], Backbone)(field, **options)
