"""Errors a person can act on: one sentence that names the field, the value and what would do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import Any


class PomonaError(ValueError):
    """Input that cannot be used; its message is the one sentence the person sees (exit code 2 on the command line)."""


class MissingExtra(PomonaError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class MissingData(PomonaError):
    """A built-in data set's files are not on this machine; the message says what to install."""


def nearest(value: object, choices: Iterable[object], most: int = 3) -> list[str]:
    """The choices that look most like ``value``, best first."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    return [by_lower[name] for name in get_close_matches(str(value).lower(), by_lower, n=most, cutoff=0.5)]


def unknown(field: str, value: object, choices: Iterable[object]) -> PomonaError:
    """An error for a name that is not among ``choices``, with the nearest ones (or all, when few).

    >>> str(unknown("act", "geluu", ["gelu", "relu"]))
    "act='geluu' is not known; did you mean gelu?"
    """
    names = [str(choice) for choice in choices]
    near = nearest(value, names)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(names) <= 24:
        hint = f"choose one of {', '.join(names)}"
    else:
        hint = f"choose one of {', '.join(names[:24])}, ... ({len(names)} in all)"
    named = f"{field} {value!r}" if " " in field else f"{field}={value!r}"  # a phrase, or the name of an argument
    return PomonaError(f"{named} is not known; {hint}")


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtra: if the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(f'{package} is not installed; run: pip install "pomona[{extra}]"') from error


def check_divisible(field: str, value: int, divisor_field: str, divisor: int) -> None:
    """Raise unless ``divisor`` divides ``value``."""
    if divisor < 1 or value % divisor:
        raise PomonaError(f"{field}={value} cannot be divided into {divisor_field}={divisor} equal parts")


def check_positive(**fields: Any) -> None:
    """Raise for the first field that is not a number above zero."""
    for field, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise PomonaError(f"{field}={value!r} must be a number above 0")
