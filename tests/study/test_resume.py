"""Processes that are really killed lose and double nothing."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pomona.study import compare

CANDIDATES = ["mlp width=8 batch_size=4 patience=none", "mlp width=16 batch_size=4 patience=none"]
UNITS = len(CANDIDATES) * (2 + 2)


def start(zoo: Path) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "pomona", "compare", "iris", "--candidates", *CANDIDATES),
        *("--seeds", "2", "--trials", "2", "--epochs", "60", "--resume", "--no-references", "--json"),
        *("--zoo", str(zoo)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def units(zoo: Path) -> dict[tuple, tuple]:
    """What a reader of the database finds: unit -> (id, digest of its weights)."""
    if not (zoo / "zoo.sqlite").exists():
        return {}
    with closing(sqlite3.connect(zoo / "zoo.sqlite", timeout=30)) as database:
        try:
            rows = database.execute('select study, candidate, phase, "index", id, weights from record').fetchall()
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
    assert len({row[:4] for row in rows}) == len(rows)
    return {row[:4]: row[4:] for row in rows}


def killed(zoo: Path, moment: float) -> None:
    process = start(zoo)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.communicate()


def killed_in_training(zoo: Path, delay: float) -> None:
    """Kill a little after the next unit is finished."""
    before, process, limit = len(units(zoo)), start(zoo), time.monotonic() + 120
    while len(units(zoo)) == before and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finished(*processes: subprocess.Popen) -> list[dict]:
    results = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    return results


def check(zoo: Path, result: dict, whole: dict) -> None:
    """All units are there once, each with its weights, and the numbers are those of the run that was left alone."""
    found = units(zoo)
    assert len(found) == UNITS
    files = {path.name for path in (zoo / "weights").glob("*.safetensors")}
    assert {f"{id}-{digest[:8]}.safetensors" for id, digest in found.values()} <= files
    values = {row["name"]: row["values"] for row in result["rows"] if row["kind"] == "network"}
    assert values == {row["name"]: row["values"] for row in whole["rows"] if row["kind"] == "network"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same study, left alone."""
    zoo = str(tmp_path_factory.mktemp("whole"))
    return compare("iris", candidates=CANDIDATES, seeds=2, trials=2, epochs=60, references=False, zoo=zoo).to_json()


def test_four_kills_in_training_and_two_processes_at_the_end(tmp_path, whole):
    generator, before = random.Random(0), {}
    for _ in range(4):
        killed_in_training(tmp_path, generator.uniform(0, 0.2))
        now = units(tmp_path)
        assert len(now) > len(before) and before.items() <= now.items()
        before = now
    first, second = finished(start(tmp_path), start(tmp_path))
    assert before.items() <= units(tmp_path).items()
    assert first["study"] == second["study"]
    check(tmp_path, first, whole)
    check(tmp_path, second, whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, whole):
    begun = time.monotonic()
    finished(start(tmp_path / "alone"))
    took = time.monotonic() - begun
    generator, before = random.Random(os.urandom(8)), {}
    for _ in range(20):
        killed(tmp_path, generator.uniform(0.05, took))
        now = units(tmp_path)
        assert before.items() <= now.items()
        before = now
    check(tmp_path, finished(start(tmp_path))[0], whole)
    assert before.items() <= units(tmp_path).items()
