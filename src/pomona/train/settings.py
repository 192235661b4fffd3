"""How a network is trained, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """Everything about training except the budget, the data and the network.

    Attributes:
        rule: learning rule, a name with options (``pomona list --slot rule``).
        optimizer: which optimiser applies the update: one of ``torch.optim``, or Lion.
        lr: base learning rate.
        weight_decay: decay of weight matrices and kernels; biases, norms and scales are not decayed.
        momentum: for ``sgd`` and ``nesterov``.
        batch_size: examples a step.
        schedule: learning-rate schedule, a name with options.
        warmup: fraction of training over which the rate rises linearly.
        clip: largest gradient norm, or ``None``.
        patience: validations without improvement after which training stops, or ``None`` for never.
        loss: a name with options in place of the task's own loss.
        transform: a gradient transform applied before the optimiser, a name with options.
        precision: ``auto`` uses bfloat16 on CUDA and float32 elsewhere.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str = "backprop"
    optimizer: Literal["adamw", "adam", "sgd", "nesterov", "rmsprop", "lion"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch_size: int = Field(default=64, ge=1)
    schedule: str = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    clip: float | None = Field(default=1.0, gt=0)
    patience: int | None = Field(default=10, ge=1)
    loss: str | None = None
    transform: str | None = None
    precision: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    device: str = "auto"
