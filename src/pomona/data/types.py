"""What kind of column this is: inferred from training rows, with the rules written here and nowhere else."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.tseries.api import guess_datetime_format  # type: ignore[attr-defined]

from pomona.errors import PomonaError, unknown

KINDS = ("number", "binary", "category", "date", "text", "image", "drop")
FEWEST_FOR_IDENTIFIER = 20
MISSING_MARKS = frozenset({"", "?", "-", "--", ".", "na", "n/a", "nan", "none", "null", "missing"})
IMAGE_SUFFIX = r"(?i)\.(?:png|jpe?g|bmp|gif|webp|tiff?)$"

_ID_NAME = re.compile(r"(?i)^(unnamed: ?\d+|row_?(names?|id|number|num|no)|index)$|(^|[_\s.-])(id|uuid|guid|key)$")
_CAMEL_ID = re.compile(r"[a-z]I[Dd]$")
_DATE_LIKE = r"^\s*(?:\d{4}[-/.]\d|\d{1,2}[-/. ]\w{1,9}[-/. ]\d{2,4}\b|[A-Za-z]{3,9}\.? \d{1,2},? \d{4})"
_UNITS = r"[\s$€£¥%]|(?<=\d),(?=\d{3}(?:\D|$))"


@dataclass
class Inferred:
    """A column's kind and the remark that belongs on the data card."""

    kind: str
    note: str = ""


def labels(column: pd.Series) -> pd.Series:
    """Values as strings, missing kept missing; a whole number is written alike as integer and as float."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        text = column.astype(object)
        return text.where(text.isna(), text.map(_label).astype(object))
    values, codes = np.unique(column.to_numpy(), return_inverse=True)
    names = np.array([_label(value) for value in values.tolist()] or [""], dtype=object)
    text = pd.Series(names[codes.reshape(-1)], index=column.index, name=column.name, dtype=object)
    return text.where(column.notna(), None)


def _label(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def to_number(column: pd.Series) -> pd.Series:
    """Values as float64; infinities, and marks such as ``?`` or ``NA``, count as missing.

    Currency and percent signs and thousands separators are read over.

    Raises:
        PomonaError: naming row and column of the first cell that is not a number.
    """
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float).replace([np.inf, -np.inf], np.nan)
    number, wrong = parse_number(column)
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        raise PomonaError(
            f"column {str(column.name)!r}, row {_row(column, row)}: {column.iloc[row]!r} is not a number "
            f"({int(wrong.sum()):,} such cells in {len(column):,}); mend it, or say "
            f"types={{{str(column.name)!r}: 'category'}}"
        )
    return number


def _row(column: pd.Series, position: int) -> object:
    """The row as a person counts: from 1, the header left out."""
    label = column.index[position]
    return label + 1 if isinstance(label, (int, np.integer)) else label


def parse_number(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """The column as numbers, and which cells are neither numbers nor missing."""
    number = pd.to_numeric(column, errors="coerce").astype(float)
    left = number.isna() & column.notna()
    if left.any():
        text = column[left].astype(str)
        text = text.mask(text.str.strip().str.lower().isin(MISSING_MARKS))
        number[left] = pd.to_numeric(text.str.replace(_UNITS, "", regex=True), errors="coerce")
        left = left & text.reindex(column.index).notna() & number.isna()
    return number.replace([np.inf, -np.inf], np.nan), left


def to_date(column: pd.Series, date_format: str) -> pd.Series:
    """Values as timestamps without a time zone; what does not parse is missing."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz is not None else column
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text = column.astype(str).where(column.notna())
        parsed = pd.to_datetime(text, errors="coerce", utc=True, format=date_format or None)
    return parsed.dt.tz_localize(None)


def date_format(column: pd.Series) -> str | None:
    """The one format that all values of a column of strings have, or None.

    Month-first is tried before day-first, so ``03/04/2020`` alone is the fourth of March.
    """
    if pd.api.types.is_datetime64_any_dtype(column):
        return ""
    text = column.dropna().astype(str)
    if not len(text) or not text.str.contains(_DATE_LIKE, regex=True).all():
        return None
    first = text.iloc[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guesses = [guess_datetime_format(first), guess_datetime_format(first, dayfirst=True)]
        for guess in ("ISO8601", *guesses, "%m/%d/%y", "%d/%m/%y"):
            if guess and not to_date(text, guess).isna().any():
                return guess
    return None


def is_identifier_name(name: str) -> bool:
    """Whether a name reads like a row's identity: ``id``, ``user_id``, ``orderId``, ``key``, ``Unnamed: 0``..."""
    return bool(_ID_NAME.search(name) or _CAMEL_ID.search(name))


def infer(column: pd.Series, override: str | None = None) -> Inferred:
    """The kind of one column, from its training rows.

    ==========  ==========================================================================================
    drop        no values, one value, or an identifier: all distinct with an identifier's name, or single
                words that are (nearly) all distinct
    binary      booleans, or exactly two distinct values
    number      numbers, or strings that all read as numbers
    date        timestamps, or strings that share one date format
    image       strings that all end like an image file
    text        strings of several words, mostly distinct
    category    all other strings
    ==========  ==========================================================================================

    Raises:
        PomonaError: for an unknown override, or a few stray cells of text in a column of numbers.
    """
    name = str(column.name)
    if override is not None:
        if override not in KINDS:
            raise unknown(f"types[{name!r}]", override, KINDS)
        return Inferred(override, "as asked")
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    present = (to_number(column) if numeric else column).dropna()
    distinct = present.nunique()
    if distinct == 0:
        return Inferred("drop", "no values")
    if distinct == 1 and len(present) == len(column):
        return Inferred("drop", "constant")
    unique = distinct == len(present) >= FEWEST_FOR_IDENTIFIER
    if pd.api.types.is_bool_dtype(column):
        return Inferred("binary")
    if pd.api.types.is_datetime64_any_dtype(column):
        return Inferred("date")
    if numeric:
        whole = unique and bool((present == present.round()).all())
        if whole and is_identifier_name(name):
            return Inferred("drop", "identifier")
        return Inferred("binary" if distinct == 2 else "number")
    return _infer_strings(name, present, distinct, unique)


def _infer_strings(name: str, present: pd.Series, distinct: int, unique: bool) -> Inferred:
    if pd.api.types.infer_dtype(present) == "boolean":
        return Inferred("binary")
    number, wrong = parse_number(present)
    good, bad = int(number.notna().sum()), int(wrong.sum())
    if good and bad == 0:
        note = "marks such as ? read as missing" if good < len(present) else "numbers written as text"
        if unique and is_identifier_name(name):
            return Inferred("drop", "identifier")
        return Inferred("number", note)
    if bad <= max(1, 0.05 * len(present)) and good > bad:
        to_number(present)  # raises, naming the first such cell
    text = present.astype(str)
    if text.str.contains(IMAGE_SUFFIX, regex=True).all():
        return Inferred("image")
    if date_format(text) is not None:
        return Inferred("date")
    words = text.str.count(r"\S+").mean()
    if unique and is_identifier_name(name):
        return Inferred("drop", "identifier")
    if distinct > max(30, 0.2 * len(present)) and words >= 2:
        return Inferred("text")
    if len(present) >= FEWEST_FOR_IDENTIFIER and distinct >= 0.95 * len(present):
        return Inferred("drop", "identifier: nearly every value is distinct")
    return Inferred("binary" if distinct == 2 else "category")
