"""Batches, scores and signatures of many networks that are trained as one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.data.task import Task


class Orders:
    """Index batches of many members: (batch,) where all have one seed, else (members, batch).

    Each member's are those of :func:`pomona.train.loop.batches` with its seed.
    """

    def __init__(self, count: int, batch_size: int, seeds: Sequence[int], device: torch.device) -> None:
        self.count, self.size, self.device = count, min(batch_size, count), device
        self.shared = len(set(seeds)) == 1
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds[:1] if self.shared else seeds)]
        self.epoch, self.at = torch.empty(0), 0

    def next(self) -> Tensor:
        """The next batch of every member."""
        if self.at == len(self.epoch):
            orders = torch.stack([torch.randperm(self.count, generator=g) for g in self.generators])
            steps = self.count // self.size
            kept = orders[:, : steps * self.size].reshape(-1, steps, self.size)
            self.epoch, self.at = kept.transpose(0, 1).contiguous().to(self.device), 0
        index = self.epoch[self.at]
        self.at += 1
        return index[0] if self.shared else index

    def take(self, rows: Tensor) -> None:
        """Keep only these members."""
        if not self.shared:
            self.generators = [self.generators[i] for i in rows.tolist()]
            self.epoch = self.epoch[:, rows.to(self.epoch.device)]


def gather(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Rows of ``x`` at ``index`` (...,) as (..., *row), in the memory of ``out``."""
    return torch.index_select(x, 0, index.reshape(-1), out=out).view(*index.shape, *x.shape[1:])


def scores(task: Task, outputs: Tensor, y: Tensor) -> list[dict[str, float]]:
    """``task.score`` of every member's outputs (members, n, ...)."""
    if type(task).score is not Task.score or task.metric not in {"accuracy", "log_loss"}:
        return [task.score(output, y) for output in outputs]
    if type(task).loss is Task.loss and task.outputs.kind == "classes":
        rows = F.cross_entropy(outputs.flatten(0, 1), y.repeat(len(outputs)), reduction="none")
        losses = rows.view(len(outputs), -1).mean(1).tolist()
    else:
        losses = [float(task.loss(output, y)) for output in outputs]
    if task.metric == "log_loss":
        return [{"loss": loss, "log_loss": loss} for loss in losses]
    right = (outputs.argmax(-1) == y).float().mean(1).tolist()
    return [{"loss": loss, "accuracy": value} for loss, value in zip(losses, right, strict=True)]


def signature(net: nn.Module, *, tensors: bool = True) -> dict[str, Any]:
    """What decides a network's computation beside its weights: modules, their settings, shapes; by readable names.

    Args:
        net: a network.
        tensors: whether tensors that are neither parameters nor buffers count with their values.
    """
    found: dict[str, Any] = {}
    for name, p in net.named_parameters():
        found[f"parameter {name}"] = (tuple(p.shape), p.dtype, p.requires_grad)
    for name, b in net.named_buffers():
        found[f"buffer {name}"] = (tuple(b.shape), b.dtype)
    for path, module in net.named_modules():
        found[f"module {path or 'itself'}"] = type(module)
        for key, value in vars(module).items():
            if key not in _INTERNAL:
                found[f"{path}.{key}".lstrip(".")] = _comparable(value, tensors, set())
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first name in which two signatures differ."""
    return next((name for name in {**one, **other} if one.get(name, ...) != other.get(name, ...)), None)


_INTERNAL = set(vars(nn.Module()))
_ATOMS = (bool, int, float, complex, str, bytes, type, type(None), torch.dtype, torch.device, type(...))


def _comparable(value: Any, tensors: bool, seen: set[int]) -> Any:
    """``value`` in a form that is equal for things that compute alike."""
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, Tensor):
        if not tensors:
            return Tensor
        flat = value.detach().cpu().flatten().contiguous()
        return tuple(value.shape), value.dtype, hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()
    if id(value) in seen:
        return "again"
    seen.add(id(value))
    if isinstance(value, dict):
        return [(str(key), _comparable(item, tensors, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value), *(_comparable(item, tensors, seen) for item in value)]
    if isinstance(value, nn.Module):
        return type(value)  # its own settings stand under its own name
    if isinstance(value, partial):
        return [partial, *(_comparable(v, tensors, seen) for v in (value.func, value.args, value.keywords))]
    if hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, _comparable([cells, value.__defaults__, value.__kwdefaults__], tensors, seen)]
    if hasattr(value, "__func__"):
        return [_comparable(value.__func__, tensors, seen), type(value.__self__)]
    if hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None)):
        return [type(value), _comparable(vars(value), tensors, seen)]
    return [type(value), re.sub(r" at 0x[0-9a-f]+", "", repr(value))]
