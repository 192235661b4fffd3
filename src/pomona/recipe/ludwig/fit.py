"""From a declaration and a table to a trained network that takes raw rows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pomona.data.tables import read_table
from pomona.data.task import Split, Task
from pomona.errors import PomonaError, unknown
from pomona.nets.specs import Inputs, Outputs
from pomona.recipe.ludwig.check import with_value
from pomona.recipe.ludwig.config import Config, Input, OutputFeature, Trainer
from pomona.recipe.ludwig.ecd import ECD
from pomona.recipe.ludwig.features import TYPES
from pomona.recipe.ludwig.schema import Packed, Schema, column_of
from pomona.recipe.ludwig.splits import split_rows
from pomona.train.budget import Budget
from pomona.train.loop import Fit, predict
from pomona.train.loop import fit as train
from pomona.train.settings import Training

FEWEST_STEPS = 300
"""Small tables get at least so many steps."""
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "weights.safetensors"


@dataclass
class DeclaredTask(Task):
    """Packed rows with the losses of a declaration; the network is a :class:`Packed`."""

    schema: Schema = field(default_factory=lambda: Schema([], []))
    watched: str = "loss"

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the watched metric is better."""
        return self.watched.rpartition(".")[2] not in {"loss", "log_loss", "ece", "rmse", "mae"}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The weighted sum of the outputs' losses."""
        parts = self.schema.losses(self.schema.split_outputs(output), self.schema.split_targets(target))
        return self.schema.total(parts).to(output.device)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """``output.metric`` for each output."""
        found = self.schema.metrics(self.schema.split_outputs(output), self.schema.split_targets(target))
        return {f"{name}.{metric}": value for name, part in found.items() for metric, value in part.items()}

    def score(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """The loss, and the watched metric if it is another."""
        loss = {"loss": float(self.loss(output, target))}
        if self.watched == "loss":
            return loss
        found = self.metrics(output, target)
        if self.watched not in found:
            raise unknown("trainer.validation_metric", self.watched, ["loss", *found])
        return loss | {self.watched: found[self.watched]}


@dataclass
class Fitted:
    """A trained declaration.

    Attributes:
        net: the encoder-combiner-decoder network: {input: tensor} -> {output: tensor}.
        config: the declaration with all defaults filled in.
        schema: metadata fitted on the training rows.
        curve: one entry a validation.
        test: metrics of each output on the test rows, where the split left some.
        trials: of a search, the values tried and the validation score of each.
        folder: where relative paths of images start.
    """

    net: ECD
    config: Config
    schema: Schema
    curve: list[dict[str, float]] = field(default_factory=list)
    test: dict[str, dict[str, float]] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    folder: Path = Path()

    def outputs(self, data: Any) -> dict[str, Tensor]:
        """Raw rows to each output's tensor (n, size); in double precision, so that a row's does not hang on others."""
        frame, folder = read(data, self.folder)
        x = self.schema.pack_inputs(frame, folder).double()
        packed = Packed(copy.deepcopy(self.net).double().eval(), self.schema)
        return self.schema.split_outputs(predict(packed, x))

    def predict(self, data: Any) -> pd.DataFrame:
        """Predictions for raw rows (a frame or a file), one or more columns an output.

        Raises:
            PomonaError: for a column that is missing or a cell that cannot be read.
        """
        return self.schema.decode(self.outputs(data))

    def evaluate(self, data: Any) -> dict[str, dict[str, float]]:
        """Each output's metrics on rows with targets, and ``combined`` with the total loss.

        Raises:
            PomonaError: as :meth:`predict`.
        """
        frame, folder = read(data, self.folder)
        outputs = self.outputs(frame)
        targets = self.schema.split_targets(self.schema.pack_targets(frame, folder).double())
        losses = self.schema.losses(outputs, targets)
        found = self.schema.metrics(outputs, targets)
        result = {name: {"loss": float(loss), **found.get(name, {})} for name, loss in losses.items()}
        return {**result, "combined": {"loss": float(self.schema.total(losses))}}

    def save(self, folder: str | Path) -> Path:
        """Write config, metadata and results as JSON and the weights as safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config.model_dump(mode="json"), indent=1), encoding="utf-8")
        extra = {"curve": self.curve, "test": self.test, "trials": self.trials}
        text = json.dumps({**self.schema.to_json(), **extra})
        (folder / METADATA).write_text(text, encoding="utf-8")
        save_file({name: t.contiguous() for name, t in self.net.state_dict().items()}, folder / WEIGHTS)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Fitted:
        """The inverse of :meth:`save`; needs no training data.

        Raises:
            PomonaError: if the folder does not hold a saved declaration.
        """
        folder = Path(folder)
        for name in (CONFIG, METADATA, WEIGHTS):
            if not (folder / name).is_file():
                raise PomonaError(f"folder {str(folder)!r} has no {name}; give one that pomona fit wrote")
        config = Config.parse(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        data = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        schema = Schema.from_json(data, config)
        with torch.random.fork_rng():
            net = schema.build(config)
        net.load_state_dict(load_file(folder / WEIGHTS))
        return cls(net.eval(), config, schema, data["curve"], data["test"], data["trials"])


def read(data: Any, folder: Path = Path()) -> tuple[pd.DataFrame, Path]:
    """A frame, or a file of a table, and where its relative paths start.

    Raises:
        PomonaError: if it is neither.
    """
    if isinstance(data, pd.DataFrame):
        return data.reset_index(drop=True).rename(columns=lambda name: str(name).strip()), folder
    if isinstance(data, (str, Path)):
        return read_table(Path(data))[0], Path(data).parent
    if isinstance(data, Mapping):
        return pd.DataFrame({key: list(values) for key, values in data.items()}), folder
    raise PomonaError(f"data of type {type(data).__name__} cannot be read; give a DataFrame or a file")


def fit(config: Any, data: Any, *, seed: int | None = None, device: str | None = None) -> Fitted:
    """Train what a config declares on a table.

    Args:
        config: a mapping, YAML text, the path of a YAML file, or a :class:`Config`.
        data: a DataFrame, a dict of columns, or a CSV, TSV or Parquet file. Cells of vectors, series, sets, bags,
            sequences and images may be lists or arrays.
        seed: in place of the config's ``trainer.seed``.
        device: in place of the config's ``trainer.device``.

    Raises:
        PomonaError: one sentence that names the path in the config, or the column and row.

    Source: Ludwig: a type-based declarative deep learning toolbox, arXiv 1909.07930.
    """
    parsed = Config.parse(config)
    changes = {key: value for key, value in (("seed", seed), ("device", device)) if value is not None}
    parsed = parsed.model_copy(update={"trainer": parsed.trainer.model_copy(update=changes)})
    frame, folder = read(data)
    frame = _rows(parsed, frame)
    rows = split_rows(parsed.preprocessing.split, frame, parsed.trainer.seed)
    parts = {name: frame.iloc[index].reset_index(drop=True) for name, index in rows.items()}
    if parsed.search is not None:
        return _search(parsed, parts, folder)
    return _fit(parsed, parts, folder)[0]


def _rows(config: Config, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows to use: a sample, less those with gaps where a feature says ``drop_row``."""
    ratio = config.preprocessing.sample_ratio
    if ratio < 1:
        frame = frame.sample(frac=ratio, random_state=config.trainer.seed).sort_index().reset_index(drop=True)
    features: list[Input | OutputFeature] = [*config.input_features, *config.output_features]
    for item in features:
        if item.preprocessing.get("missing_value_strategy") == "drop_row":
            there = column_of(frame, item.name, TYPES[item.type]).notna().to_numpy()
            frame = frame[there].reset_index(drop=True)
    return frame


def _fit(config: Config, parts: dict[str, pd.DataFrame], folder: Path) -> tuple[Fitted, float]:
    """One training, and its score on validation (smaller is better)."""
    schema = Schema.fit(config, parts["train"], folder)
    with torch.random.fork_rng():
        torch.manual_seed(config.trainer.seed)
        net = schema.build(config)
    task = _task(config, schema, parts, folder, Packed(net, schema).needs_targets)
    result = _train(config.trainer, Packed(net, schema), task)
    if result.stopped == "diverged" and result.best < 0:
        raise PomonaError("the training diverged; try a smaller trainer.lr, such as 0.0005")
    trained: Any = result.net
    fitted = Fitted(trained.net, config, schema, result.curve, folder=folder)
    if len(parts["test"]):
        fitted.test = fitted.evaluate(parts["test"])
    value = result.curve[result.best].get(config.trainer.validation_metric, result.valid["valid_loss"])
    return fitted, -value if task.higher_is_better else value


def _task(config: Config, schema: Schema, parts: dict[str, pd.DataFrame], folder: Path, led: bool) -> DeclaredTask:
    splits = {}
    for name in ("train", "valid"):
        x, y = schema.pack_inputs(parts[name], folder), schema.pack_targets(parts[name], folder)
        splits[name] = Split(torch.cat([x, y], 1) if led else x, y)
    width = splits["train"].x.shape[1]
    size = sum(f.type.size(f.meta) for f in schema.outputs)
    watched = config.trainer.validation_metric
    return DeclaredTask(
        "declared", Inputs("table", (width,)), Outputs("number", size), splits,
        metric=watched, schema=schema, watched=watched,
    )  # fmt: skip


def _train(trainer: Trainer, net: Packed, task: DeclaredTask) -> Fit:
    settings = Training(**{key: getattr(trainer, key) for key in Training.model_fields})
    count = len(task.splits["train"])
    batch = min(settings.batch_size, count)
    budget = Budget("examples", max(100 * count, FEWEST_STEPS * batch))
    if trainer.epochs is not None:
        budget = Budget("epochs", trainer.epochs)
    elif trainer.seconds is not None:
        budget = Budget("seconds", trainer.seconds)
    return train(net, task, settings, budget=budget, seed=trainer.seed)


def _search(config: Config, parts: dict[str, pd.DataFrame], folder: Path) -> Fitted:
    """The best of several trainings whose config values Optuna's TPE proposes."""
    import optuna

    assert config.search is not None
    search = config.search
    base = config.model_copy(update={"search": None}).model_dump(mode="json")
    best: Fitted | None = None
    trials: list[dict[str, Any]] = []
    lowest = math.inf

    def objective(trial: optuna.Trial) -> float:
        nonlocal best, lowest
        values = {path: _suggest(trial, path, given) for path, given in search.parameters.items()}
        data = copy.deepcopy(base)
        for path in sorted(
            values, key=lambda path: not path.endswith(".type")
        ):  # a new type drops the old one's options
            with_value(data, path, values[path])
        fitted, score = _fit(Config.parse(data), parts, folder)
        trials.append({"values": values, "score": score})
        if best is None or score < lowest:
            best, lowest = fitted, score
        return score

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=config.trainer.seed)
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=search.trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    assert best is not None
    best.trials = trials
    return best


def _suggest(trial: Any, path: str, given: Any) -> Any:
    """A value from choices (which may be lists) or a range."""
    if given.choices is not None:
        return given.choices[trial.suggest_categorical(path, list(range(len(given.choices))))]
    if float(given.low).is_integer() and float(given.high).is_integer() and given.high - given.low >= 2:
        return trial.suggest_int(path, int(given.low), int(given.high), log=given.log)
    return trial.suggest_float(path, given.low, given.high, log=given.log)
