"""A corpus of runnable networks, each one file of code, with uniform records of every epoch of every training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from sqlalchemy import insert, select

from pomona.errors import PomonaError, check_positive, unknown
from pomona.zoo import code as codes
from pomona.zoo import settings, weights
from pomona.zoo.record import Record
from pomona.zoo.runner import Runner
from pomona.zoo.tables import dumps, networks, records
from pomona.zoo.trials import STUDY, Search, as_record, pipeline

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from pomona.data.task import Task
    from pomona.zoo.store import Zoo

ROW = ("task", "dataset", "metric", "metric_code", "nn", "nn_code", "epoch", "accuracy", "duration", "prm")
COLUMNS = (*ROW, "transform_code", "seed", "id")
KINDS = {"image": "img", "series": "series", "table": "table", "tokens": "text"}


class Checked(NamedTuple):
    """What :meth:`Corpus.check_nn` found: ``accuracy_to_time`` is accuracy over seconds of training."""

    name: str
    accuracy: float
    accuracy_to_time: float
    code_quality: float


class Corpus:
    """Networks as single files of code, and what became of every epoch that they were trained.

    A file holds a class ``Net(in_shape, out_shape, prm, device)``, an ``nn.Module`` with ``train_setup(prm)`` and
    ``learn(train_data)`` (one pass over mini-batches ``(x, y)``), and a function ``supported_hyperparameters()`` that
    returns the names it reads from ``prm``. ``in_shape`` is that of one example and ``out_shape`` is ``(size,)``. Each
    hyperparameter is searched in [0, 1] and reaches the network through :data:`pomona.zoo.settings.MAPS`. A ``Net``
    without a training procedure, or a factory ``(in_shape, out_shape[, prm])``, is given SGD with momentum.

    Code runs in another process with limits on time and memory, which bounds accidents but is no sandbox.

    Args:
        zoo: where codes, records and weights are kept.
        seconds: longest time for an epoch.
        memory: megabytes for a training.
        device: where to train.
        threads: processor threads for a training.

    Source: LEMUR Neural Network Dataset: Towards Seamless AutoML (arXiv 2504.10552).
    """

    def __init__(
        self, zoo: Zoo, seconds: float = 60.0, memory: int = 2048, device: str = "cpu", threads: int = 1
    ) -> None:
        check_positive(seconds=seconds, memory=memory, threads=threads)
        self.zoo = zoo
        self.limits: dict[str, Any] = {"seconds": seconds, "memory": memory, "device": device, "threads": threads}
        self._tasks: dict[str, Task] = {}
        self._supported: dict[str, set[str]] = {}

    @cached_property
    def runner(self) -> Runner:
        """The process that runs networks, started when first needed."""
        return Runner(**self.limits)

    def register(self, code: str | ModuleType | Callable[..., Any], name: str | None = None, task: str = "") -> str:
        """Store a network's code; returns its identity: the name and twelve digits of the hash of its syntax tree.

        Args:
            code: text of a file, a module, or a factory function.
            name: what to call it; ``None`` takes the module's or function's name.
            task: the only kind of task it is for, such as ``"img-classification"``; empty for any.

        Raises:
            PomonaError: if the code breaks the contract, or is there already under whatever name.
        """
        text, given = codes.source(code)
        text = codes.contract(text)
        label = name or given or "net"
        if not re.fullmatch(r"[A-Za-z]\w{0,63}", label):
            raise PomonaError(f"name={label!r} must be a letter followed by letters, digits or underscores")
        digest = codes.identity(text)
        same = self.zoo._rows(select(networks.c.name).where(networks.c.hash == digest))
        if same:
            raise PomonaError(f"this code is in the corpus already, as {same[0].name}")
        row = {"name": f"{label}-{digest}", "code": text, "hash": digest, "task": task}
        with self.zoo._writing("registering a network") as connection:
            connection.execute(insert(networks), row | {"created": datetime.now(UTC).isoformat()})
        return str(row["name"])

    def networks(self) -> list[str]:
        """Identities of all registered networks."""
        return [row.name for row in self.zoo._rows(select(networks.c.name).order_by(networks.c.name))]

    def find(self, nn: str) -> tuple[str, str, str]:
        """Identity, code and task of a network, by identity or name; one that Pomona ships is registered."""
        rows = self._named(nn)
        if not rows:
            shipped = codes.shipped()
            if nn not in shipped:
                raise unknown("nn", nn, sorted({*shipped, *self.networks()}))
            try:
                self.register(shipped[nn], nn)
            except PomonaError:
                if not self._named(nn):  # else another process has just registered it
                    raise
            rows = self._named(nn)
        if len(rows) > 1:
            raise PomonaError(f"nn={nn!r} fits {', '.join(row.name for row in rows)}; give the whole name")
        return rows[0].name, rows[0].code, rows[0].task

    def _named(self, nn: str) -> list[Any]:
        pattern = networks.c.name.startswith(f"{nn}-", autoescape=True)
        query = select(networks.c.name, networks.c.code, networks.c.task)
        return self.zoo._rows(query.where((networks.c.name == nn) | pattern))

    def run(
        self,
        task: str | None,
        dataset: str | Task,
        metric: str,
        nn: str,
        prm: Mapping[str, Any] | None = None,
        trials: int = 10,
        epochs: int = 5,
        seed: int = 0,
        prune: bool = False,
    ) -> list[Record]:
        """Search the network's hyperparameters, mini-batch size and input transform with Optuna's TPE.

        Earlier trials of the same length on the same data are taken into account. A trial that fails
        is stored with its error.

        Args:
            task: such as ``"img-classification"``; ``None`` reads it off the data.
            dataset: a name that :func:`pomona.data.load` knows, or a task.
            metric: ``"acc"``, ``"f1"`` or ``"r2"``, measured on the validation split after each epoch.
            nn: name or identity of a network.
            prm: fixed values in [0, 1] for all that the network supports, with optional ``batch`` and ``transform``;
                ``None`` searches. The trials then differ by seed only.
            trials: how many trainings.
            epochs: how many passes over the training split each.
            seed: of the search and of the first trial; trial i has ``seed + i``.
            prune: stop trials that are below the median of earlier ones at the same epoch.

        Returns:
            One record a trial, with ``metrics["valid"]`` and ``metrics["test"]`` after the last epoch.

        Raises:
            PomonaError: for names that are not known, or a ``prm`` that does not fit the network.
        """
        check_positive(trials=trials, epochs=epochs)
        settings.score(metric)
        data = self._load(dataset)
        label = self._label(task, data)
        identity, text, only = self.find(nn)
        if only and only != label:
            raise PomonaError(f"nn={identity!r} is for task={only!r}, and {data.name!r} is {label!r}")
        supported = self.supported(identity)
        base = {"task": label, "dataset": data.name, "metric": metric, "nn": identity}
        if prm is not None:
            settings.check_prm(prm, supported)
            chosen = {"batch": 32, "transform": "plain"} | dict(prm)
            return [self._trial(text, data, base, chosen, seed + i, epochs) for i in range(trials)]
        known = [record for record in self.trials(pipeline(base)) if len(record.curve) == epochs]
        past = [record for record in known if record.task["fingerprint"] == data.fingerprint()]
        search = Search(supported, past, trials, seed, prune)
        done = []
        for number in range(trials):
            chosen = search.ask()
            done.append(self._trial(text, data, base, chosen, seed + number, epochs, search.stop))
            search.tell(done[-1])
        return done

    def _trial(
        self,
        text: str,
        data: Task,
        base: dict[str, Any],
        prm: dict[str, Any],
        seed: int,
        epochs: int,
        stop: Callable[[int, float], bool] | None = None,
    ) -> Record:
        outcome = self.runner.run(text, data, base["metric"], prm, seed, epochs, stop)
        record = as_record(outcome, data, base, prm, seed, epochs)
        record.extra["device"] = self.runner.device
        self._store(record, outcome.weights)
        return record

    def _store(self, record: Record, data: bytes | None = None) -> None:
        found = self.zoo._unit(record)
        if found and record.status == "ok" and self.zoo.get(found[0]).status != "ok":
            self.zoo.remove(found[0])  # it failed before, for want of time or memory
        self.zoo.add(record, None if data is None else weights.decode(data))

    def supported(self, nn: str) -> set[str]:
        """The hyperparameters that a network names."""
        identity, text, _ = self.find(nn)
        if identity not in self._supported:
            self._supported[identity] = self.runner.supported(text)
        return self._supported[identity]

    def _load(self, dataset: str | Task) -> Task:
        if not isinstance(dataset, str):
            return dataset
        if dataset not in self._tasks:
            from pomona.data import load

            self._tasks[dataset] = load(dataset)
        return self._tasks[dataset]

    @staticmethod
    def _label(task: str | None, data: Task) -> str:
        ending = "classification" if data.outputs.kind == "classes" else "regression"
        label = f"{KINDS[data.inputs.kind]}-{ending}"
        if task not in {None, label}:
            raise PomonaError(f"task={task!r} does not fit {data.name!r}, which is {label!r}")
        return label

    def check_nn(
        self,
        code: str | ModuleType | Callable[..., Any],
        task: str | None,
        dataset: str | Task,
        metric: str,
        prm: Mapping[str, Any],
        save: bool = True,
        epochs: int = 1,
        seed: int = 0,
        name: str | None = None,
    ) -> Checked:
        """Train new code once and judge it; with ``save`` it is registered and its training recorded.

        Raises:
            PomonaError: if it breaks the contract, ``prm`` does not fit, it fails, or it is there already.
        """
        settings.score(metric)
        check_positive(epochs=epochs)
        data = self._load(dataset)
        label = self._label(task, data)
        text = codes.contract(codes.source(code)[0])
        settings.check_prm(prm, self.runner.supported(text))
        chosen = {"batch": 32, "transform": "plain"} | dict(prm)
        outcome = self.runner.run(text, data, metric, chosen, seed, epochs)
        if outcome.status != "ok":
            raise PomonaError(f"the network failed: {outcome.error}")
        identity = f"{name or codes.source(code)[1] or 'net'}-{codes.identity(text)}"
        if save:
            identity = self.register(code, name, label)
            base = {"task": label, "dataset": data.name, "metric": metric, "nn": identity}
            self._store(as_record(outcome, data, base, chosen, seed, epochs), outcome.weights)
        accuracy = outcome.curve[-1]["accuracy"]
        seconds = sum(point["duration"] for point in outcome.curve)
        return Checked(identity, accuracy, accuracy / seconds, codes.quality(text))

    def data(
        self,
        only_best: bool = False,
        task: str | None = None,
        dataset: str | None = None,
        metric: str | None = None,
        nn: str | None = None,
        epoch: int | None = None,
        max_rows: int | None = None,
        prefix: str | None = None,
    ) -> pd.DataFrame:
        """One row an epoch of every training that went well, with all code that it needs.

        Args:
            only_best: of rows alike in task, dataset, metric, nn and epoch, the one with the highest accuracy.
            task: only this one, as for the next four.
            dataset: see ``task``.
            metric: see ``task``.
            nn: name or identity.
            epoch: counted from 1.
            max_rows: the first so many.
            prefix: what ``nn`` begins with.

        Returns:
            Columns task, dataset, metric, metric_code, nn, nn_code, epoch, accuracy, duration (seconds), prm (dict),
            transform_code, seed, id.
        """
        asked = {"task": task, "dataset": dataset, "metric": metric}
        columns = (records.c.id, records.c.recipe, records.c.curve, records.c.seed)
        query = select(*columns).where(records.c.study == STUDY, records.c.status == "ok")
        query = query.order_by(records.c.candidate, records.c.id)
        code_of = {row.name: row.code for row in self.zoo._rows(select(networks.c.name, networks.c.code))}
        rows = []
        for id, recipe, curve, seed in map(tuple, self.zoo._rows(query)):
            name = recipe["nn"]
            if any(value is not None and recipe[key] != value for key, value in asked.items()):
                continue
            if (nn and nn not in {name, name.partition("-")[0]}) or not name.startswith(prefix or ""):
                continue
            metric_code = settings.source_of(settings.score(recipe["metric"]))
            transform_code = settings.source_of(settings.transform(recipe["prm"]["transform"]))
            whole = {"metric_code": metric_code, "nn_code": code_of.get(name, ""), "seed": int(seed), "id": id}
            whole |= {**recipe, "transform_code": transform_code}
            rows += [whole | point for point in curve if epoch in {None, point["epoch"]}]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        if only_best and len(frame):
            best = frame.groupby(["task", "dataset", "metric", "nn", "epoch"], sort=False)["accuracy"].idxmax()
            frame = frame.loc[best].reset_index(drop=True)
        return frame if max_rows is None else frame.head(max_rows)

    def trials(self, pipeline: str | None = None) -> list[Record]:
        """Records of all trials, or of those of one ``<task>_<dataset>_<metric>_<nn>``; failed ones say why."""
        return self.zoo.records(STUDY, pipeline)

    def stats(self) -> pd.DataFrame:
        """One row a pipeline: trials, how many failed or were pruned, best and mean last accuracy, seconds."""
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in self.trials():
            groups.setdefault(tuple(record.recipe[key] for key in ("task", "dataset", "metric", "nn")), []).append(
                record
            )
        rows = []
        for key, group in sorted(groups.items()):
            last = [record.curve[-1]["accuracy"] for record in group if record.status == "ok"]
            counts = (
                len(group),
                sum(r.status != "ok" for r in group),
                sum(r.extra.get("pruned", False) for r in group),
            )
            scores = (max(last), sum(last) / len(last)) if last else (math.nan, math.nan)
            rows.append((*key, *counts, *scores, sum(record.cost["seconds"] for record in group)))
        columns = ["task", "dataset", "metric", "nn", "trials", "failed", "pruned", "best", "mean", "seconds"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self) -> go.Figure:
        """Last accuracies of every network's trials, a colour for each data set."""
        import plotly.graph_objects as go

        frame = self.data()
        if frame.empty:
            raise PomonaError("the corpus has no records to plot; call run() first")
        last = frame.loc[frame.groupby("id")["epoch"].idxmax()]
        order = last.groupby("nn")["accuracy"].median().sort_values(ascending=False).index
        figure = go.Figure()
        for (dataset, metric), part in last.groupby(["dataset", "metric"]):
            label = f"{dataset}, {metric}"
            figure.add_box(x=part["nn"], y=part["accuracy"], name=label, boxpoints="all", jitter=0.4)
        figure.update_xaxes(categoryorder="array", categoryarray=list(order), title="network")
        figure.update_yaxes(title="score on the validation split after the last epoch")
        return figure.update_layout(boxmode="group", legend_title="data, metric")

    def export(self, format: str, path: str | Path) -> Path:
        """Write everything: ``"csv"`` one file with the rows of :meth:`data`; ``"json"`` a folder.

        The folder holds ``nn/<identity>.py``, and for each pipeline ``<epoch>.json`` (accuracy, duration, prm and seed
        of each trial) and ``trials.json`` (the rest).
        """
        path = Path(path)
        if format == "csv":
            frame = self.data()
            frame.assign(prm=frame["prm"].map(dumps)).to_csv(path, index=False)
        elif format == "json":
            from pomona.zoo.exchange import write

            write(self, path)
        else:
            raise unknown("format", format, ["csv", "json"])
        return path

    def import_(self, path: str | Path) -> int:
        """Add what :meth:`export` wrote as JSON; returns how many trials were new."""
        from pomona.zoo.exchange import read

        return read(self, Path(path))

    def close(self) -> None:
        """End the process that runs networks."""
        if "runner" in self.__dict__:
            self.runner.close()
            del self.runner

    def __enter__(self) -> Corpus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
