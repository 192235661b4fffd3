"""The zoo's tables, its JSON, and how its database is opened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.schema import CreateIndex, CreateTable

from pomona.errors import PomonaError

SCHEMA = 1
"""Version of the tables below."""

MIGRATIONS: dict[int, Callable[[Connection], None]] = {}
"""``MIGRATIONS[v]`` turns the tables of version ``v`` into those of ``v + 1``."""

BUSY_SECONDS = 30.0
"""How long a process waits for another one that is writing."""

schema = MetaData()

meta = Table("meta", schema, Column("key", String(32), primary_key=True), Column("value", Text, nullable=False))

studies = Table(
    "study",
    schema,
    Column("serial", Integer, primary_key=True, autoincrement=True),
    Column("id", String(10), unique=True, nullable=False),
    Column("fingerprint", String(128), index=True, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("summary", JSON),
    Column("created", String(40), nullable=False),
    Column("finished", String(40)),
)

# the trainings of a study share one task, whose fitted pipeline may be long: it is kept once, under its hash
tasks = Table("task", schema, Column("key", String(64), primary_key=True), Column("task", JSON, nullable=False))

records = Table(
    "record",
    schema,
    Column("serial", Integer, primary_key=True, autoincrement=True),
    Column("id", String(10), unique=True, nullable=False),
    Column("study", String(10)),
    Column("candidate", Text, nullable=False),
    Column("phase", String(32), nullable=False),
    Column("index", BigInteger, nullable=False),
    Column("seed", Text, nullable=False),  # a seed may be wider than 64 bits
    Column("task_key", String(64), nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("curve", JSON, nullable=False),
    Column("cost", JSON, nullable=False),
    Column("versions", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("error", Text, nullable=False),
    Column("parent", JSON, nullable=False),
    Column("extra", JSON, nullable=False),
    Column("created", String(40), nullable=False),
    Column("weights", String(64), nullable=False),
    # NULL differs from NULL here, so records outside any study are never taken for one another
    UniqueConstraint("study", "candidate", "phase", "index", name="unit"),
)
Index("record_weights", records.c.id, records.c.weights)

blobs = Table(
    "weights", schema, Column("id", String(10), primary_key=True), Column("data", LargeBinary, nullable=False)
)

networks = Table(
    "nn",
    schema,
    Column("name", String(128), primary_key=True),
    Column("code", Text, nullable=False),
    Column("hash", String(12), unique=True, nullable=False),
    Column("task", String(64), nullable=False),
    Column("created", String(40), nullable=False),
)


def _plain(value: Any) -> Any:
    """``value`` with what JSON lacks put into JSON: non-finite numbers, tuples, arrays, paths."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(value.tolist())
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    return str(value)


def dumps(value: Any) -> str:
    """Strict JSON of ``value``; ``nan`` and ``inf`` survive the round trip."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """The inverse of :func:`dumps`."""
    if '"$float"' not in text:
        return json.loads(text)
    return json.loads(text, object_hook=lambda item: float(item["$float"]) if "$float" in item else item)


def connect(url: str) -> Engine:
    """An engine for ``url``; SQLite in write-ahead mode, waiting for other writers instead of failing."""
    options: dict[str, Any] = {"json_serializer": dumps, "json_deserializer": loads}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": BUSY_SECONDS}
    engine = create_engine(url, **options)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] not in {"wal", "memory"}:
                connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")  # safe against a killed process in this mode

    return engine


def prepare(engine: Engine, place: str) -> None:
    """Create the tables, or bring those of an older version up to date.

    Raises:
        PomonaError: if a newer Pomona wrote them, or if the database holds something else.
    """
    with engine.connect() as connection:
        if inspect(connection).has_table(meta.name):
            found = connection.scalar(select(meta.c.value).where(meta.c.key == "schema"))
            if found == str(SCHEMA):
                return
        else:
            found = None
    if found is not None and not re.fullmatch(r"\d{1,9}", found):
        raise PomonaError(f"{place} is not a zoo: its schema version reads {found!r}; choose another location")
    if found is not None and int(found) > SCHEMA:
        raise PomonaError(
            f"the zoo at {place} has schema version {found} and this Pomona reads up to version {SCHEMA}; "
            "install a newer pomona"
        )
    with engine.begin() as connection:
        for version in range(int(found) if found else SCHEMA, SCHEMA):
            MIGRATIONS[version](connection)
        # "if not exists", because another process may be opening the same new zoo
        for table in schema.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))
            for index in table.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
        known = connection.scalar(select(meta.c.value).where(meta.c.key == "schema"))
        statement = insert(meta).values(key="schema") if known is None else update(meta)
        connection.execute(statement.values(value=str(SCHEMA)))
