"""Columns to packed tensors and back: every feature with its metadata and its place in the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pomona.data.tables import plain_frame
from pomona.errors import PomonaError, nearest
from pomona.recipe.ludwig.cells import is_missing
from pomona.recipe.ludwig.check import STACK
from pomona.recipe.ludwig.combiners import Encoded, make_combiner
from pomona.recipe.ludwig.config import Config, Input, OutputFeature
from pomona.recipe.ludwig.decoders import DECODERS, Generator, Tagger, masked_mean
from pomona.recipe.ludwig.ecd import ECD, Output
from pomona.recipe.ludwig.encoders import fc_stack, make_encoder
from pomona.recipe.ludwig.features import TYPES, FeatureType, Meta, fill, fill_value


def column_of(data: pd.DataFrame, name: str, kind: FeatureType) -> pd.Series:
    """A column in plain types, with row numbers counted from 0.

    Raises:
        PomonaError: if it is not there.
    """
    if name not in data:
        near = nearest(name, data.columns)
        hint = f"; nearest are {', '.join(near)}" if near else f"; there are {', '.join(map(str, data.columns[:12]))}"
        raise PomonaError(f"column {name!r} is missing{hint}")
    if kind.cells:
        column = data[name].astype(object).reset_index(drop=True)
        return column.mask(column.map(is_missing).astype(bool), None)
    return plain_frame(data[[name]])[0][name]


@dataclass
class Feature:
    """A column of the config with what was fitted on training rows.

    Attributes:
        config: its entry in the config.
        meta: the type's metadata, and how gaps are filled.
    """

    config: Input | OutputFeature
    meta: Meta

    @property
    def name(self) -> str:
        """The column."""
        return self.config.name

    @property
    def type(self) -> FeatureType:
        """The feature type."""
        return TYPES[self.config.type]

    @classmethod
    def fit(cls, config: Input | OutputFeature, train: pd.DataFrame, folder: Path) -> Feature:
        """Metadata from training rows."""
        kind, options = TYPES[config.type], dict(config.preprocessing)
        strategy, value = options.pop("missing_value_strategy", None), options.pop("fill_value", None)
        column = column_of(train, config.name, kind)
        gaps = {"strategy": strategy, "value": fill_value(column, strategy, value)}
        meta = kind.fit_meta(fill(column, gaps["strategy"], gaps["value"]), folder, **options)
        found = cls(config, {**meta, "missing": gaps})
        if isinstance(config, OutputFeature):
            kind.target(column.iloc[:0], found.meta, folder)  # a single class is no output: say so before training
        return found

    def column(self, data: pd.DataFrame) -> pd.Series:
        """The column of new rows, gaps filled."""
        gaps = self.meta["missing"]
        return fill(column_of(data, self.name, self.type), gaps["strategy"], gaps["value"])


@dataclass
class Schema:
    """All inputs and outputs of a declaration, fitted.

    Attributes:
        inputs: in the config's order.
        outputs: in the config's order.
    """

    inputs: list[Feature]
    outputs: list[Feature]

    @classmethod
    def fit(cls, config: Config, train: pd.DataFrame, folder: Path) -> Schema:
        """Metadata of every column from training rows; tied inputs share those of the first."""
        inputs: dict[str, Feature] = {}
        for item in config.input_features:
            found = Feature(item, inputs[item.tied].meta) if item.tied else Feature.fit(item, train, folder)
            inputs[item.name] = found
        return cls([*inputs.values()], [Feature.fit(item, train, folder) for item in config.output_features])

    def pack_inputs(self, data: pd.DataFrame, folder: Path) -> Tensor:
        """Raw rows as one row of numbers each (n, width)."""
        parts = [f.type.transform(f.column(data), f.meta, folder) for f in self.inputs]
        return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))

    def pack_targets(self, data: pd.DataFrame, folder: Path) -> Tensor:
        """Targets (n, width), nan where missing."""
        parts = [f.type.target(f.column(data), f.meta, folder) for f in self.outputs]
        return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))

    def split_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """Packed rows as a tensor an input; entries beyond the inputs are left."""
        widths = [f.type.field(f.meta).width for f in self.inputs]
        return dict(zip((f.name for f in self.inputs), x[:, : sum(widths)].split(widths, 1), strict=True))

    def split_targets(self, y: Tensor) -> dict[str, Tensor]:
        """Packed targets as a tensor an output."""
        return _split(y, {f.name: f.type.width(f.meta) for f in self.outputs})

    def split_outputs(self, output: Tensor) -> dict[str, Tensor]:
        """Concatenated outputs as a tensor an output."""
        return _split(output, {f.name: f.type.size(f.meta) for f in self.outputs})

    def losses(self, output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each output's loss, averaged over the rows where its target is there."""
        found = {}
        for f in self.outputs:
            assert isinstance(f.config, OutputFeature)
            options = {k: v for k, v in f.config.loss.items() if k not in {"type", "weight"}}
            loss = f.type.losses[f.config.loss["type"]]

            def each(o: Tensor, t: Tensor, loss: Any = loss, options: dict[str, Any] = options) -> Tensor:
                return loss(o, t, **options)

            found[f.name] = masked_mean(each, output[f.name].to(target[f.name].dtype), target[f.name])
        return found

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """sum_k weight_k * loss_k."""
        weights = [f.config.loss.get("weight", 1.0) for f in self.outputs]  # type: ignore[union-attr]
        return sum((w * losses[f.name] for w, f in zip(weights, self.outputs, strict=True)), torch.zeros(()))

    def metrics(self, output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Each output's metrics on the rows where its target is there."""
        found = {}
        for f in self.outputs:
            there = target[f.name].isfinite().all(-1)
            if there.any():
                found[f.name] = f.type.metrics(output[f.name][there], target[f.name][there], f.meta)
        return found

    def decode(self, output: Mapping[str, Tensor]) -> pd.DataFrame:
        """Outputs as the columns of a prediction."""
        frames = [f.type.postprocess(f.name, output[f.name], f.meta) for f in self.outputs]
        return pd.concat(frames, axis=1)

    def build(self, config: Config) -> ECD:
        """The untrained network, from the global generator.

        Raises:
            PomonaError: for what does not fit together.
        """
        encoders: dict[str, nn.Module] = {}
        kinds: dict[str, Encoded] = {}
        for position, f in enumerate(self.inputs):
            assert isinstance(f.config, Input)
            where, field = f"input_features[{position}].encoder", f.type.field(f.meta)
            encoder = encoders[f.config.tied] if f.config.tied else make_encoder(where, field, f.config.encoder)
            encoders[f.name] = encoder
            kinds[f.name] = Encoded(int(encoder.features), int(getattr(encoder, "tokens", 0)), f.config.type)  # type: ignore[arg-type]
        combiner = make_combiner(config.combiner, kinds)
        features, tokens = int(combiner.features), int(combiner.tokens)  # type: ignore[arg-type]
        widths: dict[str, int] = {}
        outputs: dict[str, Output] = {}
        waiting = {f.name: f for f in self.outputs}
        while waiting:  # widths follow from the dependencies', which the config has checked to be without circles
            name = next(n for n, f in waiting.items() if not set(f.config.dependencies) & set(waiting))  # type: ignore[union-attr]
            outputs[name], widths[name] = _output(waiting.pop(name), features, tokens, widths)
        return ECD(encoders, combiner, {f.name: outputs[f.name] for f in self.outputs})

    def to_json(self) -> dict[str, Any]:
        """All metadata, JSON-able."""
        return {"inputs": [f.meta for f in self.inputs], "outputs": [f.meta for f in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], config: Config) -> Schema:
        """The inverse of :meth:`to_json`."""
        pairs = (("inputs", config.input_features), ("outputs", config.output_features))
        inputs, outputs = (
            [Feature(item, meta) for item, meta in zip(items, data[key], strict=True)]  # type: ignore[arg-type]
            for key, items in pairs
        )
        return cls(inputs, outputs)


def _split(values: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(widths, values.split(list(widths.values()), 1), strict=True))


def _output(f: Feature, features: int, tokens: int, widths: Mapping[str, int]) -> tuple[Output, int]:
    """An output's module and the width of its hidden layer."""
    assert isinstance(f.config, OutputFeature)
    spec = dict(f.config.decoder)
    make = DECODERS[spec.pop("type")]
    stack = {key: spec.pop(key) for key in STACK if key in spec}
    layers = stack.pop("layers", [])
    width = features + sum(widths[name] for name in f.config.dependencies)
    fc = fc_stack(width, layers, **stack)
    hidden = (layers or [width])[-1]
    decoder = make(hidden, f.type.size(f.meta), steps=f.type.steps(f.meta), tokens=tokens, **spec)
    output = Output(fc, decoder, f.config.dependencies, f.config.reduce, isinstance(decoder, Tagger))
    return output, hidden


class Packed(nn.Module):
    """A network of named tensors as one of packed rows, which the training loop takes.

    While training, entries of ``x`` beyond the inputs are the targets, for generators.

    Shapes:
        (B, width) -> (B, sum of the outputs' sizes)
    """

    def __init__(self, net: ECD, schema: Schema) -> None:
        super().__init__()
        self.net, self.schema = net, schema
        self.inputs = sum(f.type.field(f.meta).width for f in schema.inputs)

    @property
    def needs_targets(self) -> bool:
        """Whether some decoder is led by the targets while training."""
        return any(isinstance(module, Generator) for module in self.net.modules())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        extra = x[:, self.inputs :]
        targets = self.schema.split_targets(extra) if extra.shape[1] else None
        return torch.cat([*self.net(self.schema.split_inputs(x), targets).values()], -1)
