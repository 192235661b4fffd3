"""One thread, and a zoo of its own for every test."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses too


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def zoo_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("POMONA_ZOO", str(tmp_path / "zoo"))
