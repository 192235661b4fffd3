"""Weights as safetensors bytes, and a folder that survives a kill at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from pomona.errors import PomonaError

if TYPE_CHECKING:
    from torch import Tensor

ORPHAN_SECONDS = 3600.0
"""A file without a row is left alone this long: its row may be about to be written."""


def encode(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as safetensors bytes; tied tensors are stored once for each name.

    Raises:
        PomonaError: for an entry that is not a dense tensor.
    """
    import safetensors.torch
    import torch

    dense: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            kind = f"{value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise PomonaError(f"state[{name!r}] is a {kind}; the zoo stores dense tensors only")
        if value.is_meta:
            raise PomonaError(f"state[{name!r}] is on the meta device and has no values to store")
        dense[str(name)] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return safetensors.torch.save(dense)


def decode(data: bytes) -> dict[str, Tensor]:
    """The inverse of :func:`encode`."""
    import safetensors.torch

    return safetensors.torch.load(data)


class WeightFolder:
    """Files written whole or not at all: temporary file, fsync, rename."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: bytes) -> None:
        """Store ``data`` as ``name``; a failure leaves nothing behind."""
        temporary = self.path / f".{name}.{uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> bytes:
        """The bytes stored as ``name``."""
        return (self.path / name).read_bytes()

    def remove(self, name: str) -> None:
        """Delete ``name`` if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def tidy(self, names: Callable[[], Iterable[str]]) -> int:
        """Delete files older than an hour that are not among ``names()``; returns how many."""
        files = {entry.name for entry in os.scandir(self.path)}
        if not files:
            return 0
        removed = 0
        for name in files.difference(names()):
            path = self.path / name
            try:
                if time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:  # another process tidied it
                continue
        return removed
