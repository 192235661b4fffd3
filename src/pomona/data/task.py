"""A task: tensors split for training, validation and test, with the loss and metrics that judge a network on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pomona.data.metrics import classification_metrics, regression_metrics
from pomona.nets.specs import Inputs, Outputs

if TYPE_CHECKING:
    from pomona.data.card import DataCard
    from pomona.data.pipeline import Pipeline


class Split(NamedTuple):
    """Inputs (n, ...) and targets: (n,) class indices as int64, or (n, size) values as float32."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Task:
    """All that is needed to size, train and judge a network.

    Attributes:
        name: a short name for tables.
        inputs: shape and type of an example.
        outputs: what the network must give.
        splits: ``train``, ``valid`` and ``test``.
        pipeline: turns raw rows into ``x`` and outputs into predictions (``None`` for ready tensors).
        card: what was found in the data and done about it.
        metric: the metric that a study ranks by.
    """

    name: str
    inputs: Inputs
    outputs: Outputs
    splits: dict[str, Split]
    pipeline: Pipeline | None = None
    card: DataCard | None = None
    metric: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.metric:
            self.metric = "accuracy" if self.outputs.kind == "classes" else "rmse"
        if self.outputs.kind == "number":
            self._scale = torch.tensor(self.outputs.scale or (1.0,) * self.outputs.size)

    @property
    def higher_is_better(self) -> bool:
        """Whether more of ``metric`` is better."""
        return self.metric not in {"log_loss", "ece", "rmse", "mae"}

    @property
    def example(self) -> Tensor:
        """Two training inputs, to trace or size a network with."""
        return self.splits["train"].x[:2]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy for classes; squared error in units of the training standard deviation for numbers."""
        if self.outputs.kind == "classes":
            return F.cross_entropy(output, target)
        scale = self._scale.to(output)
        return F.mse_loss(output / scale, target / scale)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """Every metric of this kind of task, in the target's own units."""
        if self.outputs.kind == "classes":
            return classification_metrics(output, target)
        return regression_metrics(output, target)

    def score(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """The loss and the ranking metric alone: what training watches, cheap enough for every validation."""
        loss = float(self.loss(output, target))
        if self.metric == "accuracy":
            value = float((output.argmax(-1) == target).float().mean())
        elif self.metric == "log_loss":
            value = loss
        elif self.metric == "rmse":
            value = float((output - target).square().mean(0).sqrt().mean())
        else:
            value = self.metrics(output, target)[self.metric]
        return {"loss": loss, self.metric: value}

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when any input, target or split does."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(f"{name}{tuple(split.x.shape)}{split.x.dtype}".encode())
            for tensor in split:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def tensors(
    name: str,
    inputs: Inputs,
    outputs: Outputs,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    metric: str = "",
) -> Task:
    """A task from ready tensors."""
    splits = {"train": Split(*train), "valid": Split(*valid), "test": Split(*test)}
    return Task(name, inputs, outputs, splits, metric=metric)
