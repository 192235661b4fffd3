"""The declaration: inputs, outputs, combiner, preprocessing, training and search, checked before any data are read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from pomona.data.target import clean_target, target_kind
from pomona.data.types import infer as infer_kind
from pomona.errors import PomonaError, unknown
from pomona.options import Option, check_options
from pomona.recipe.ludwig.cells import is_missing
from pomona.recipe.ludwig.combiners import COMBINERS
from pomona.recipe.ludwig.decoders import DECODERS
from pomona.recipe.ludwig.ecd import ordered
from pomona.recipe.ludwig.encoders import REDUCTIONS, check_encoder, is_backbone
from pomona.recipe.ludwig.features import TYPES, FeatureType, Missing, get_type
from pomona.recipe.recipe import read_yaml
from pomona.train.settings import Training


def _as_spec(value: Any) -> Any:
    """``"rnn:width=32"`` or ``"mlp linear=kan"`` as ``{"type": ..., ...}``."""
    if not isinstance(value, str):
        return value
    if is_backbone(value):
        return {"type": value}
    option = Option.parse(value)
    return {"type": option.name, **option.options}


Spec = Annotated[dict[str, Any], BeforeValidator(_as_spec)]
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Input(_Model):
    """An input: a column and its type.

    Attributes:
        name: the column.
        type: feature type.
        preprocessing: ``missing_value_strategy``, ``fill_value`` and the type's own options.
        encoder: name of an encoder with options, or a backbone as in ``"mlp linear=kan"``.
        tied: name of an earlier input whose encoder (and metadata) this one shares.
    """

    name: str
    type: str
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    encoder: Spec = Field(default_factory=dict)
    tied: str | None = None


class OutputFeature(_Model):
    """An output: a column, its type, decoder and loss.

    Attributes:
        name: the column.
        type: feature type.
        preprocessing: as for an input; missing targets are masked unless a strategy is named.
        decoder: name of a decoder with options; ``layers`` (and ``linear``, ``act``, ``norm``, ``dropout``) stand before it.
        loss: name of a loss with options; ``weight`` multiplies it.
        dependencies: outputs whose last hidden layer this one is given.
        reduce: how a sequence from the combiner becomes a vector.
    """

    name: str
    type: str
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    decoder: Spec = Field(default_factory=dict)
    loss: Spec = Field(default_factory=dict)
    dependencies: Names = Field(default_factory=list)
    reduce: str = "sum"


class SplitConfig(_Model):
    """How rows are divided.

    Attributes:
        type: ``random``, ``stratify`` (by the classes of ``column``), ``datetime`` (the latest rows of ``column`` are
            the test) or ``fixed`` (``column`` holds train, valid or test, or 0, 1, 2).
        column: see ``type``.
        probabilities: shares of train, valid and test.
    """

    type: Literal["random", "stratify", "datetime", "fixed"] = "random"
    column: str | None = None
    probabilities: tuple[float, float, float] = (0.7, 0.1, 0.2)


class Preprocessing(_Model):
    """What concerns all columns."""

    split: SplitConfig = Field(default_factory=SplitConfig)
    sample_ratio: float = Field(default=1.0, gt=0, le=1)


class Trainer(Training):
    """Training settings, the budget, and what is watched on validation.

    Attributes:
        epochs: passes over the training rows, or 300 steps where that is more.
        seconds: a budget in seconds instead.
        validation_metric: ``loss``, or ``output.metric`` as in ``species.accuracy``.
        seed: of the split, initialisation and batches.
    """

    epochs: float = Field(default=100, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    validation_metric: str = "loss"
    seed: int = 0


class Parameter(_Model):
    """A searched value: ``choices``, or a range from ``low`` to ``high`` (whole numbers stay whole)."""

    choices: list[Any] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False


class Search(_Model):
    """A search of config values by Optuna's TPE, on the validation split.

    Attributes:
        parameters: path in the config -> values, as in ``trainer.lr`` or ``input_features.age.encoder.width``.
        trials: trainings.
    """

    parameters: dict[str, Parameter]
    trials: int = Field(default=10, ge=1)


class Config(_Model):
    """The whole declaration; :meth:`parse` fills in defaults and checks every name.

    Attributes:
        input_features: the inputs.
        output_features: the outputs.
        combiner: name of a combiner with options.
        defaults: type -> fields that features of that type have unless they say otherwise.
        preprocessing: split and sampling.
        trainer: training.
        search: a search, if any.
    """

    input_features: list[Input] = Field(min_length=1)
    output_features: list[OutputFeature] = Field(min_length=1)
    combiner: Spec = Field(default_factory=lambda: {"type": "concat"})
    defaults: dict[str, dict[str, Any]] = Field(default_factory=dict)
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    trainer: Trainer = Field(default_factory=Trainer)
    search: Search | None = None

    @field_validator("combiner")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {"type": "concat", **value}

    @classmethod
    def parse(cls, source: str | Path | Mapping[str, Any] | Config) -> Config:
        """From a mapping, YAML text, or the path of a YAML file.

        Raises:
            PomonaError: one sentence that names the path in the config, the value and what would do.
        """
        if isinstance(source, Config):
            return source
        data = _mapping(source)
        try:
            config = cls.model_validate(_merged(data))
        except ValidationError as error:
            raise _sentence(error) from error
        _check(config)
        return config

    def to_yaml(self) -> str:
        """The declaration with all that was filled in."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _mapping(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        return read_yaml(Path(source))
    if isinstance(source, str):
        try:
            source = yaml.safe_load(source)
        except yaml.YAMLError as error:
            raise PomonaError("the config is not YAML; see the line and column above") from error
    if not isinstance(source, Mapping):
        raise PomonaError(f"a config is a mapping, YAML text or a YAML file, not {type(source).__name__}")
    return dict(source)


def _merged(data: dict[str, Any]) -> dict[str, Any]:
    """The data with ``defaults`` merged into the features of their type, one level deep."""
    defaults = data.get("defaults") or {}
    for name in defaults if isinstance(defaults, Mapping) else ():
        get_type("defaults", name)
    result = dict(data)
    for key in ("input_features", "output_features"):
        allowed = (Input if key == "input_features" else OutputFeature).model_fields
        features = []
        for given in data.get(key) or []:
            if isinstance(given, Mapping) and given.get("type") in defaults:
                base = {k: _as_spec(v) for k, v in defaults[given["type"]].items() if k in allowed}
                given = {**base, **{k: _over(base.get(k), v) for k, v in given.items()}}
            features.append(given)
        result[key] = features
    return result


def _over(base: Any, value: Any) -> Any:
    """``value`` over ``base``, where both are mappings of one ``type``."""
    value = _as_spec(value) if isinstance(base, Mapping) else value
    same = isinstance(base, Mapping) and isinstance(value, Mapping)
    return {**base, **value} if same and value.get("type") in (None, base.get("type")) else value


def _sentence(error: ValidationError) -> PomonaError:
    """The first of pydantic's complaints as one sentence."""
    first = error.errors()[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    if first["type"] == "extra_forbidden":
        model: Any = Config
        for part in first["loc"][:-1]:
            model = _inner(model, part)
        return unknown(f"config key {path}:", first["loc"][-1], model.model_fields)
    if first["type"] == "missing":
        return PomonaError(f"{path} is missing in the config")
    message = first["msg"][0].lower() + first["msg"][1:]
    return PomonaError(f"{path}={first['input']!r} is not valid: {message.removeprefix('value error, ')}")


def _inner(model: Any, part: Any) -> Any:
    """The model that a field of ``model`` holds, alone, in a list or beside None."""
    if isinstance(part, int) or not hasattr(model, "model_fields"):
        return model
    found = model.model_fields[part].annotation if part in model.model_fields else model
    inside = [a for a in getattr(found, "__args__", ()) if hasattr(a, "model_fields")]
    return found if hasattr(found, "model_fields") else inside[-1] if inside else model


def _check(config: Config) -> None:
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
        raise PomonaError(f"{where}.preprocessing.missing_value_strategy='fill_with_const' needs a fill_value beside it")
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


def infer(data: pd.DataFrame, target: str | Sequence[str]) -> dict[str, Any]:
    """A config for a table: a type for each column that is worth using, and the targets as outputs.

    Args:
        data: the table.
        target: the column to predict, or several.

    Raises:
        PomonaError: for a target that is not there, or when no column is left as an input.
    """
    targets = [target] if isinstance(target, str) else list(target)
    for name in targets:
        if name not in data:
            raise unknown("target", name, data.columns)
    inputs = [
        {"name": str(name), "type": kind}
        for name in data.columns
        if name not in targets and (kind := _kind(data[name])) != "drop"
    ]
    if not inputs:
        raise PomonaError("no usable column is left beside the target")
    outputs = []
    for name in targets:
        column = clean_target(data[name]).dropna()
        kind = target_kind(column)
        kind_name = "number" if kind == "number" else "binary" if column.nunique() == 2 else "category"
        outputs.append({"name": name, "type": kind_name})
    return {"input_features": inputs, "output_features": outputs}


def _kind(column: pd.Series) -> str:
    """A column's type; lists of numbers are vectors where all have one length, else timeseries; lists of words sets."""
    first = next((cell for cell in column if not is_missing(cell)), None)
    if not hasattr(first, "__len__") or isinstance(first, str):
        return infer_kind(column).kind
    cells = [cell for cell in column if not is_missing(cell)]
    if isinstance(next(iter(first), None), str):
        return "set"
    shape = getattr(first, "shape", (len(first),))
    if len(shape) == 3:
        return "image"
    return "vector" if len(shape) == 1 and len({len(cell) for cell in cells}) == 1 else "timeseries"
