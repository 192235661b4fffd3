"""What a worker of a cluster does: train a chunk of one candidate's units, away from the data's files and the zoo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pomona.data.task import Split, Task
from pomona.nets.specs import inputs_from_json, outputs_from_json, to_json
from pomona.recipe.recipe import Recipe
from pomona.study.protocol import Protocol
from pomona.study.runner import Runner, Unit
from pomona.zoo import Record
from pomona.zoo.weights import encode

Finished = tuple[list[tuple[dict[str, Any], bytes | None]], list[str]]
"""Records with their weights, and the runner's notes."""


def pack(task: Task) -> dict[str, Any]:
    """A task as arrays and plain data."""
    return {
        "name": task.name,
        "metric": task.metric,
        "inputs": to_json(task.inputs),
        "outputs": to_json(task.outputs),
        "splits": {name: [tensor.cpu().numpy() for tensor in split] for name, split in task.splits.items()},
    }


def unpack(data: Mapping[str, Any]) -> Task:
    """The inverse of :func:`pack`, without the pipeline and the card."""
    splits = {name: Split(*map(torch.tensor, arrays)) for name, arrays in data["splits"].items()}
    inputs, outputs = inputs_from_json(data["inputs"]), outputs_from_json(data["outputs"])
    return Task(data["name"], inputs, outputs, splits, metric=data["metric"])


class Basket:
    """What a worker's runner has for a zoo: units to be sent back."""

    def __init__(self) -> None:
        self.finished: list[tuple[Record, bytes | None]] = []

    def records(self, study: str) -> list[Record]:
        """None: what is done already is not sent to a worker."""
        return []

    def add(self, record: Record, state: Mapping[str, Tensor] | None = None) -> str:
        """Put in a unit."""
        self.finished.append((record, None if state is None else encode(state)))
        return str(len(self.finished) - 1)

    def get(self, id: str) -> Record:
        """The record of a unit put in."""
        return self.finished[int(id)][0]


def work(data: dict[str, Any], units_json: str, protocol_json: str, device: str, population: bool) -> Finished:
    """What a worker does: the trainings of one chunk, each as it would be done without a cluster."""
    torch.set_num_threads(1)  # a worker has one processor
    units = [Unit(**{**unit, "recipe": Recipe.parse(unit["recipe"])}) for unit in json.loads(units_json)]
    protocol, basket = Protocol.model_validate_json(protocol_json), Basket()
    runner = Runner(unpack(data), {}, protocol, basket, "", device=device, population=population)  # type: ignore[arg-type]
    runner.units(units)
    return [(asdict(record) | {"task": {}}, state) for record, state in basket.finished], runner.notes
