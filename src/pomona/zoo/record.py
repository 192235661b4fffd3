"""What the zoo keeps of one finished training.

Source: LEMUR Neural Network Dataset: Towards Seamless AutoML, arXiv 2504.10552.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """One finished training: what was trained, on what, how it went and what it cost.

    ``(study, candidate, phase, index)`` names the unit of work; a study holds each unit once. A record with
    ``study=None`` belongs to no study and is always new.

    Attributes:
        study: id from :meth:`pomona.zoo.Zoo.start_study`, or ``None``.
        candidate: label of the candidate, as in the study's table.
        phase: ``"tune"``, ``"seed"``, ``"single"``, ``"edit"``, ...
        index: which trial or seed of the phase.
        seed: the random seed of the training.
        recipe: the candidate as data.
        task: ``name``, ``fingerprint``, ``inputs``, ``outputs`` and ``pipeline`` as JSON.
        metrics: ``{"valid": {...}, "test": {...}}``.
        curve: one dict for each point of the learning curve.
        cost: ``parameters``, ``flops``, ``seconds``, ...
        versions: of Pomona, torch, Python.
        status: ``"ok"``, ``"diverged"`` or ``"error"``.
        error: the message when ``status`` is not ``"ok"``.
        parent: ids of the networks that this one was made from.
        extra: anything else that JSON can hold.
        id: ten characters, filled by the zoo.
        created: UTC time in ISO form, filled by the zoo.
        weights: SHA-256 of the stored weights (empty when there are none), filled by the zoo.
    """

    study: str | None = None
    candidate: str = ""
    phase: str = "single"
    index: int = 0
    seed: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    error: str = ""
    parent: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    created: str = ""
    weights: str = ""


def short_id(*parts: object) -> str:
    """Ten base32 characters (50 bits) that depend on ``parts`` alone."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return base64.b32encode(digest)[:10].decode().lower()
