"""A study on a Ray cluster: workers train, this process chooses what to try and keeps what is finished.

A job is a chunk of one candidate's trainings. What travels to a worker are the task as arrays (once), recipes and
the protocol as JSON; what comes back are records as plain data and weights as safetensors bytes.

Source: Ray: A Distributed Framework for Emerging AI Applications, arXiv 1712.05889.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from torch import Tensor

from pomona.errors import PomonaError, require, unknown
from pomona.recipe.recipe import Recipe
from pomona.study.protocol import TUNING_SEED
from pomona.study.runner import Progress, Runner, Unit, structure
from pomona.study.tuning import proposals
from pomona.study.worker import pack, work
from pomona.zoo import Record
from pomona.zoo.weights import decode

CONNECT_SECONDS, PORT = 5.0, 10001
"""How long a cluster may take to answer, and where Ray's client server listens unless told otherwise."""


def check_on(on: str | None) -> None:
    """Whether a study can be sent there at all; nothing is started.

    Raises:
        PomonaError: if ``on`` is neither ``ray`` nor ``ray://HOST[:PORT]``, or Ray is not installed.
    """
    if on not in {None, "ray"}:
        _address(str(on))
    if on is not None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        require("ray", "ray")


def _address(on: str) -> tuple[str, int]:
    known = unknown("on", on, ["ray", "ray://HOST:PORT"])
    try:
        parts = urlsplit(on)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        raise known from None
    if parts.scheme != "ray" or not host or parts.path or parts.query:
        raise known
    return host, PORT if port is None else port


@contextmanager
def connected(on: str | None) -> Iterator[None]:
    """A connection to the cluster; a local one is started, and stopped at the end, unless the caller has one already.

    Raises:
        PomonaError: if it cannot be reached.
    """
    check_on(on)
    if on is None:
        yield
        return
    ray = require("ray", "ray")
    ours = on != "ray" or not ray.is_initialized()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if on != "ray":
            host, port = _address(on)
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()  # Ray itself would try for long
            ray.init(f"ray://{f'[{host}]' if ':' in host else host}:{port}", **quiet)
        elif ours:
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except Exception as error:  # whatever keeps Ray from starting; its messages are long
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise PomonaError(f"on={on!r}: the Ray cluster cannot be reached ({reason})") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


class Job(NamedTuple):
    """A chunk of a candidate's trainings, and how often its worker was lost."""

    units: list[Unit]
    lost: int = 0


class ClusterRunner(Runner):
    """The trainings of one study on the cluster that :func:`connected` reached; arguments as for :class:`Runner`.

    All candidates are under way at once. A candidate's tuning trials stay in order, because what is proposed depends
    on the scores before, and its seeds come last. A lost worker's jobs run again, once.
    """

    def run(self) -> None:
        """Tune every candidate, then train its chosen settings once a seed.

        Raises:
            PomonaError: if the cluster is lost or its workers cannot run Pomona.
        """
        self.ray = ray = require("ray", "ray")
        self.jobs: dict[Any, Job] = {}
        self.batches: dict[str, list[Unit]] = {}
        self.plans = {label: self.plan(label, recipe) for label, recipe in self.recipes.items()}
        try:
            cluster = ray.cluster_resources()
            gpu = self.device.startswith("cuda") or (self.device == "auto" and cluster.get("GPU", 0) >= 1)
            self.workers = max(1, int(cluster.get("GPU" if gpu else "CPU", 1)))
            self.remote = ray.remote(work).options(num_cpus=1, num_gpus=int(gpu), max_retries=0)  # Job.lost counts
            self.data = ray.put(pack(self.task))
            for label in self.plans:
                self.advance(label, None)
            while self.jobs:
                (reference,), _ = ray.wait(list(self.jobs), num_returns=1)
                label = self.jobs[reference].units[0].label
                self.collect(reference)
                if all(job.units[0].label != label for job in self.jobs.values()):
                    self.advance(label, [self.unit(*unit) for unit in self.batches[label]])
        except ConnectionError as error:
            raise PomonaError(
                f"the connection to the Ray cluster was lost ({error}); resume goes on from there"
            ) from error
        except BaseException:  # Ctrl-C above all
            self.cancel()
            raise

    def plan(self, label: str, recipe: Recipe) -> Generator[list[Unit], list[float] | None, None]:
        """Batches of a candidate's trainings; each is answered by its scores."""
        seed = self.protocol.seeds[0] + TUNING_SEED
        asking = proposals(recipe, self.protocol.tuning_trials, seed)
        scores: list[float] | None = None
        while True:
            try:
                batch = asking.send(scores)
            except StopIteration as end:
                chosen = recipe.with_values(end.value)
                break
            scores = yield [Unit(label, tried, "tune", index, seed) for index, tried in batch]
        yield [Unit(label, chosen, "seed", index, seed) for index, seed in enumerate(self.protocol.seeds)]

    def advance(self, label: str, scores: list[float] | None) -> None:
        """Send a candidate's next batch; what the zoo has of it already is not sent."""
        while True:
            try:
                batch = self.plans[label].send(scores)
            except StopIteration:
                return
            missing = [unit for unit in batch if (unit.label, unit.phase, unit.number) not in self.done]
            if missing:
                self.batches[label] = batch
                for chunk in self.chunks(missing):
                    self.submit(Job(chunk))
                return
            scores = [self.unit(*unit) for unit in batch]

    def chunks(self, units: list[Unit]) -> list[list[Unit]]:
        """Trainings that can be stacked stay together, as far as that leaves no worker idle."""
        together = self.population and self.protocol.budget_kind != "seconds"
        size = math.ceil(len(units) * len(self.recipes) / self.workers) if together else 1
        groups: dict[str, list[Unit]] = {}
        for unit in units:
            groups.setdefault(structure(unit.recipe), []).append(unit)
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def submit(self, job: Job) -> None:
        """Send a job."""
        for unit in job.units:
            if self.report is not None:
                self.report(Progress(len(self.done), self.total, unit.label, unit.phase, self.best))
        units = json.dumps([unit._asdict() | {"recipe": unit.recipe.model_dump(mode="json")} for unit in job.units])
        protocol = self.protocol.model_dump_json()
        self.jobs[self.remote.remote(self.data, units, protocol, self.device, self.population)] = job

    def collect(self, reference: Any) -> None:
        """Keep what a job gave; send it again if its worker was lost for the first time."""
        job, raised = self.jobs[reference], self.ray.exceptions
        lost = raised.WorkerCrashedError, raised.NodeDiedError, raised.OutOfMemoryError, raised.ObjectLostError
        try:
            finished, notes = self.ray.get(reference)
        except lost as error:
            if not job.lost:
                self.submit(Job(job.units, lost=1))
            for unit in job.units if job.lost else []:
                record = self.blank(*unit)
                record.status, record.error = "error", f"its worker was lost twice ({type(error).__name__})"
                self.store(record, None)
        except raised.RayError as error:
            del self.jobs[reference]
            cause = getattr(error, "cause", None) or error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise PomonaError(f"a worker of the Ray cluster cannot go on: {reason}") from error
        else:
            self.notes += [note for note in notes if note not in self.notes]
            for data, state in finished:
                record = Record(**data | {"study": self.study, "task": self.task_json})
                self.store(record, None if state is None else decode(state))
        del self.jobs[reference]

    def store(self, record: Record, state: dict[str, Tensor] | None) -> None:
        """Put a finished unit into the zoo."""
        kept = self.zoo.get(self.zoo.add(record, state))  # another process on the same study may have been first
        self.done[kept.candidate, kept.phase, kept.index] = kept

    def cancel(self) -> None:
        """Keep what is finished and cancel the rest."""
        jobs = list(self.jobs)
        finished = self.ray.wait(jobs, num_returns=len(jobs), timeout=0)[0] if jobs else []
        try:
            for reference in finished:
                self.collect(reference)
        finally:
            for reference in self.jobs:
                self.ray.cancel(reference, force=True)
