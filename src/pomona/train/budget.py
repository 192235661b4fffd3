"""How much a training may use: epochs, examples seen, seconds or floating-point operations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pomona.errors import PomonaError

Kind = Literal["epochs", "examples", "seconds", "flops"]
_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str | float) -> float:
    """Seconds in ``"90"``, ``"2m"``, ``"1h30m"`` or a number.

    Raises:
        PomonaError: if the text is not a duration above zero.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        seconds = float(text)
    else:
        compact = str(text).replace(" ", "").lower()
        parts = re.findall(r"(\d+(?:\.\d+)?)(sec|min|s|m|h|d)", compact)
        if re.fullmatch(r"\d+(\.\d+)?", compact):
            seconds = float(compact)
        elif parts and "".join(number + unit for number, unit in parts) == compact:
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        else:
            raise PomonaError(f"budget={text!r} is not a duration; write it as 90s, 2m or 1h30m")
    if not seconds > 0:
        raise PomonaError(f"budget={text!r} must be longer than 0 seconds, such as 2m")
    return seconds


@dataclass(frozen=True)
class Budget:
    """What one training may use.

    Attributes:
        kind: ``epochs``, ``examples``, ``seconds`` or ``flops``.
        amount: how many of them.
    """

    kind: Kind = "epochs"
    amount: float = 20

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)) or not self.amount > 0:
            raise PomonaError(f"{self.kind}={self.amount!r} must be a number above 0")

    def steps(self, examples: int, batch_size: int, flops_per_example: float = 0.0) -> int | None:
        """Optimiser steps that fit; ``None`` when only the clock can tell.

        A step on FLOPs is counted as three forward passes: forward, and twice as much backward.

        Raises:
            PomonaError: for a budget in FLOPs without ``flops_per_example``.
        """
        batch = min(batch_size, examples)
        if self.kind == "seconds":
            return None
        if self.kind == "epochs":
            return max(1, round(self.amount * (examples // batch)))
        if self.kind == "examples":
            return max(1, round(self.amount / batch))
        if not flops_per_example > 0:
            raise PomonaError(f"a budget of flops={self.amount:g} needs flops_per_example above 0")
        return max(1, round(self.amount / (3 * flops_per_example * batch)))
