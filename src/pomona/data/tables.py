"""Tables from files: delimiter, encoding, header and column names are found, and what was found is said."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pomona.errors import PomonaError, nearest, require

_DELIMITERS = ",\t;|"
_OTHERS = (" ", ":", "^", "~")
_PARQUET = frozenset({".parquet", ".pq"})
_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SPOKEN = {"\t": "a tab", " ": "a space"}


def read_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table in a CSV, TSV (gz, bz2 or xz too) or Parquet file, and remarks for its card.

    Raises:
        PomonaError: for a file that is missing, empty, or of one column only.
    """
    if not path.is_file():
        folder = path.parent
        here = sorted(item.name for item in folder.iterdir() if item.is_file()) if folder.is_dir() else []
        raise missing_file(path, here)
    if path.suffix.lower() in _PARQUET:
        require("pyarrow", "parquet")
        frame, notes = pd.read_parquet(path), list[str]()
    else:
        frame, notes = _read_text(path)
    frame, more = plain_frame(frame)
    return frame, notes + more


def missing_file(path: Path, here: list[str]) -> PomonaError:
    """The error for a path that does not exist, with the nearest names beside it."""
    near = nearest(path.name, here)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return PomonaError(f"file {str(path)!r} is not there{hint}")


def _read_text(path: Path) -> tuple[pd.DataFrame, list[str]]:
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as stream:
            data = stream.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PomonaError(f"file {path.name!r} cannot be read: {error}") from error
    text, notes = _decode(data, path.name)
    if not text.strip():
        raise PomonaError(f"file {path.name!r} is empty")
    sample = text[:200_000].splitlines()[:200]
    if len(text) > 200_000 and len(sample) > 1:
        sample = sample[:-1]
    delimiter = sniff(sample, path.name)
    if delimiter != ",":
        notes.append(f"columns are divided by {_SPOKEN.get(delimiter, delimiter)}")
    options: dict[str, Any] = {"sep": delimiter, "low_memory": False, "skipinitialspace": True}
    body = "\n".join(sample[1:])
    if delimiter != "," and re.search(r"\d,\d", body) and not re.search(r"\d\.\d", body):
        options["decimal"] = ","
        notes.append("a comma is the decimal sign")
    header = next(csv.reader(sample[:1], delimiter=delimiter))
    if all(_is_number(cell) for cell in header):
        options.update(header=None, names=[f"column_{i}" for i in range(len(header))])
        notes.append(f"no header: columns are called column_0 to column_{len(header) - 1}")
    elif twice := [name for name, count in Counter(header).items() if count > 1]:
        notes.append(f"repeated column names are numbered ({', '.join(twice)} -> {twice[0]}.1)")
    try:
        frame = pd.read_csv(io.StringIO(text), **options, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise PomonaError(f"file {path.name!r} cannot be read as a table: {str(error).strip()}") from error
    if not len(frame):
        raise PomonaError(f"file {path.name!r} has a header and no rows")
    return frame, notes


def _decode(data: bytes, name: str) -> tuple[str, list[str]]:
    """Text of a file: by its byte-order mark, as UTF-8, or else as Windows-1252, which is then said."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16"), ["the file is UTF-16"]
    if b"\0" in data[:10_000]:
        raise PomonaError(f"file {name!r} is not text; save the table as CSV or Parquet")
    try:
        return data.decode("utf-8-sig").rstrip("\x1a"), []  # an old end-of-file mark is no cell
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), ["the file is not UTF-8; it was read as Windows-1252"]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _width(sample: list[str], delimiter: str) -> tuple[float, int]:
    """The share of lines with the most common number of columns, and that number."""
    lines = [len(row) for row in csv.reader(sample, delimiter=delimiter, skipinitialspace=True) if row]
    columns, count = Counter(lines).most_common(1)[0]
    return count / len(lines), columns


def sniff(sample: list[str], name: str = "the file") -> str:
    """The delimiter that divides most lines into the same number of columns.

    Raises:
        PomonaError: if none of comma, tab, semicolon and bar makes two columns; it names the one that looks right.
    """
    scores = {delimiter: _width(sample, delimiter) for delimiter in _DELIMITERS}
    able = [delimiter for delimiter, (_, columns) in scores.items() if columns > 1]
    if able:
        return max(able, key=lambda delimiter: scores[delimiter])
    for other in _OTHERS:
        share, columns = _width(sample, other)
        if columns > 1 and share > 0.9:
            spoken = _SPOKEN.get(other, repr(other))
            raise PomonaError(
                f"file {name!r} has one column when divided by comma, tab, semicolon or bar; {spoken} looks right "
                f"({columns} columns): give pandas.read_csv(..., sep={other!r}) as the source"
            )
    raise PomonaError(f"file {name!r} has one column only; a table needs a target and at least one more column")


def plain_frame(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A copy with string names, rows counted from 0, and numpy types alone; and remarks on repeated names.

    Raises:
        PomonaError: for cells that are lists, arrays or other things that are not values.
    """
    notes: list[str] = []
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name).strip() for name in frame.columns]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        notes.append(f"repeated column names are numbered ({', '.join(twice)} -> {twice[0]}.1)")
    taken: set[str] = set()
    for position, name in enumerate(names):
        fresh, number = name, 0
        while fresh in taken:
            number += 1
            fresh = f"{name}.{number}"
        names[position] = fresh
        taken.add(fresh)
    columns = {name: _plain(frame.iloc[:, i], name) for i, name in enumerate(names)}
    return pd.DataFrame(columns, index=pd.RangeIndex(len(frame))), notes


def _plain(column: pd.Series, name: str) -> np.ndarray | pd.Series:
    """One column as bool, integer, float, datetime or object of strings."""
    kind = pd.api.types
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        column = column.astype(object if column.isna().any() else dtype.categories.dtype)  # type: ignore[arg-type]
        dtype = column.dtype
    if kind.is_datetime64_any_dtype(dtype):
        return column.reset_index(drop=True)
    if kind.is_timedelta64_dtype(dtype):
        return column.dt.total_seconds().to_numpy()
    if kind.is_complex_dtype(dtype):
        raise PomonaError(f"column {name!r} holds complex numbers; give their parts as columns")
    if kind.is_bool_dtype(dtype) or kind.is_numeric_dtype(dtype):
        if not column.isna().any():
            return column.to_numpy(bool if kind.is_bool_dtype(dtype) else None)
        return column.to_numpy(object if kind.is_bool_dtype(dtype) else float, na_value=np.nan)
    values = column.astype(object).reset_index(drop=True)
    values = values.where(values.notna(), np.nan)
    return _plain_objects(values, name)


def _plain_objects(values: pd.Series, name: str) -> np.ndarray | pd.Series:
    inferred = pd.api.types.infer_dtype(values, skipna=True)
    if inferred in {"string", "boolean", "empty"}:
        return values
    if inferred in {"integer", "floating", "mixed-integer-float", "decimal"}:
        return values.map(lambda v: float(v) if isinstance(v, Decimal) else v).astype(float).to_numpy()
    if inferred in {"datetime", "datetime64", "date"}:
        return pd.to_datetime(values, errors="coerce")
    holder = next((v for v in values if isinstance(v, (list, dict, set, tuple, np.ndarray, bytes))), None)
    if holder is not None:
        raise PomonaError(
            f"column {name!r} holds a {type(holder).__name__} in a cell; a cell must be a number, a string or a date"
        )
    return values.where(values.isna(), values.astype(str))
