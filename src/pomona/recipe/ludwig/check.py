"""Checks of a declaration: every name and option in it, with its path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pomona.errors import PomonaError, unknown
from pomona.options import check_options
from pomona.recipe.ludwig.combiners import COMBINERS
from pomona.recipe.ludwig.decoders import DECODERS
from pomona.recipe.ludwig.ecd import ordered
from pomona.recipe.ludwig.encoders import check_encoder
from pomona.recipe.ludwig.features import TYPES, FeatureType, Missing, get_type
from pomona.recipe.ludwig.reductions import REDUCTIONS

if TYPE_CHECKING:
    from pomona.recipe.ludwig.config import Config, Input, OutputFeature, SplitConfig


def check(config: Config) -> None:
    """Every name and option, with its path.

    Raises:
        PomonaError: for the first that is wrong.
    """
    inputs: dict[str, Input] = {}
    for position, item in enumerate(config.input_features):
        where = f"input_features[{position}]"
        kind = _check_feature(where, item, [*inputs])
        if item.tied is not None:
            if item.tied not in inputs:
                raise unknown(f"{where}.tied", item.tied, inputs)
            if inputs[item.tied].type != item.type:
                raise PomonaError(f"{where}.tied={item.tied!r} is a {inputs[item.tied].type}, not a {item.type}")
        item.encoder = {"type": kind.encoder, **item.encoder}
        check_encoder(f"{where}.encoder", FORMS[item.type], item.encoder)
        inputs[item.name] = item
    outputs: list[str] = []
    for position, output in enumerate(config.output_features):
        where = f"output_features[{position}]"
        kind = _check_feature(where, output, outputs)
        if output.name in inputs:
            raise PomonaError(f"{where}.name={output.name!r} is an input too; a target must not be one")
        if not kind.decoders:
            able = [name for name, other in TYPES.items() if other.decoders]
            raise PomonaError(f"{where}.type={output.type!r} cannot be an output; use one of {', '.join(able)}")
        output.decoder = _known(f"{where}.decoder", output.decoder, kind.decoders)
        output.loss = _known(f"{where}.loss", output.loss, kind.losses)
        _check_loss_and_decoder(where, output, kind)
        if output.reduce not in REDUCTIONS[:-1]:
            raise unknown(f"{where}.reduce", output.reduce, REDUCTIONS[:-1])
        outputs.append(output.name)
    ordered({output.name: output.dependencies for output in config.output_features})
    if config.combiner["type"] not in COMBINERS:
        raise unknown("combiner.type", config.combiner["type"], COMBINERS)
    options = {key: value for key, value in config.combiner.items() if key != "type"}
    _only("combiner", COMBINERS[config.combiner["type"]], options, ("inputs",))
    if config.trainer.epochs is not None and config.trainer.seconds is not None:
        raise PomonaError("trainer.epochs and trainer.seconds: give one budget, not both")
    watched = config.trainer.validation_metric
    if watched != "loss" and watched.rpartition(".")[0] not in outputs:
        raise unknown("trainer.validation_metric", watched, ["loss", *(f"{name}.<metric>" for name in outputs)])
    _check_split(config.preprocessing.split)
    _check_search(config)


FORMS: dict[str, Any] = {
    **dict.fromkeys(("number", "binary", "date", "vector"), "values"),
    **dict.fromkeys(("set", "bag"), "counts"),
    **dict.fromkeys(("sequence", "text"), "tokens"),
    "category": "code",
    "timeseries": "series",
    "image": "image",
}
"""Form in which a type's columns reach its encoder."""


def _check_feature(where: str, item: Input | OutputFeature, before: Sequence[str]) -> FeatureType:
    kind = get_type(f"{where}.type", item.type)
    if item.name in before:
        raise PomonaError(f"{where}.name={item.name!r} is there twice")
    options = dict(item.preprocessing)
    strategy = options.pop("missing_value_strategy", None)
    if strategy is not None and strategy not in Missing.__args__:  # type: ignore[attr-defined]
        raise unknown(f"{where}.preprocessing.missing_value_strategy", strategy, Missing.__args__)  # type: ignore[attr-defined]
    value = options.pop("fill_value", None)
    if strategy == "fill_with_const" and value is None:
        raise PomonaError(f"{where}.preprocessing.missing_value_strategy='fill_with_const' needs a fill_value")
    _only(f"{where}.preprocessing", kind.fit_meta, options, ("column", "folder"))
    return kind


def _known(where: str, spec: Mapping[str, Any], choices: Any) -> dict[str, Any]:
    """The spec with its type, the first choice by default."""
    spec = {"type": next(iter(choices)), **spec}
    if spec["type"] not in choices:
        raise unknown(f"{where}.type", spec["type"], choices)
    return spec


STACK = ("layers", "linear", "act", "norm", "dropout")
"""Keys of a decoder that describe the fully connected layers before it."""


def _check_loss_and_decoder(where: str, output: OutputFeature, kind: FeatureType) -> None:
    loss = {k: v for k, v in output.loss.items() if k not in {"type", "weight"}}
    weight = output.loss.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
        raise PomonaError(f"{where}.loss.weight={weight!r} must be a number of at least 0")
    _only(f"{where}.loss", kind.losses[output.loss["type"]], loss, ("output", "target"))
    decoder = {k: v for k, v in output.decoder.items() if k != "type" and k not in STACK}
    _only(f"{where}.decoder", DECODERS[output.decoder["type"]], decoder, ("size", "steps"))


def _only(where: str, make: Any, options: Mapping[str, Any], own: Sequence[str]) -> None:
    """Check options against a signature whose arguments ``own`` a person cannot set."""
    for key in own:
        if key in options:
            raise unknown(f"option of {where}", key, [n for n in inspect.signature(make).parameters if n not in own])
    check_options(where, make, options)


def _check_split(split: SplitConfig) -> None:
    if split.type != "random" and not split.column:
        raise PomonaError(f"preprocessing.split.type={split.type!r} needs a column; say preprocessing.split.column")
    shares = split.probabilities
    if min(shares) < 0 or not shares[0] > 0 or not shares[1] > 0 or abs(sum(shares) - 1) > 1e-6:
        raise PomonaError(
            f"preprocessing.split.probabilities={list(shares)} must add up to 1, train and valid above 0, "
            "as in [0.7, 0.1, 0.2]"
        )


def _check_search(config: Config) -> None:
    for path, given in (config.search.parameters if config.search else {}).items():
        where = f"search.parameters.{path}"
        if (given.choices is None) == (given.low is None or given.high is None):
            raise PomonaError(f"{where} needs either choices, or low and high")
        if given.low is not None and given.high is not None and not given.low < given.high:
            raise PomonaError(f"{where}: low={given.low:g} must be below high={given.high:g}")
        with_value(config.model_dump(), path, (given.choices or [given.low])[0])


def with_value(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``data`` with the value at a dotted path changed, in place; items of a list go by name or position.

    Raises:
        PomonaError: for a path that leads nowhere.
    """
    *parents, last = path.split(".")
    here: Any = data
    for part in parents:
        if isinstance(here, list):
            names = [item["name"] for item in here]
            if part not in names and not (part.isdigit() and int(part) < len(here)):
                raise unknown(f"search.parameters: part of {path!r},", part, names)
            here = here[names.index(part)] if part in names else here[int(part)]
        elif isinstance(here, dict) and part in here:
            here = here[part]
        else:
            raise unknown(f"search.parameters: part of {path!r},", part, here if isinstance(here, dict) else [])
    if not isinstance(here, dict):
        raise PomonaError(f"search.parameters.{path} does not lead to a value of the config")
    if last == "type" and here.get("type") != value:
        here.clear()  # options of one type are not those of another
    here[last] = value
    return data
