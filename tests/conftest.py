"""One thread, and a zoo of its own for every test."""

from __future__ import annotations

import os
import sys

import pytest

from pomona.errors import MissingData

os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses too


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of data that this machine has not is skipped, and says what to install."""
    try:
        return (yield)
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def zoo_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("POMONA_ZOO", str(tmp_path / "zoo"))
