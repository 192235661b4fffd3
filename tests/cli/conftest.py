"""Commands run in this process, by the entry point that a shell would call."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def pomona(monkeypatch, capsys):
    """``pomona("zoo", "ls")`` -> exit code, output and error output."""

    def run(*arguments) -> Done:
        from pomona.cli import main

        monkeypatch.setattr(sys, "argv", ["pomona", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def sales(tmp_path):
    """A small CSV: churn follows from age and plan."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.integers(18, 80, 120), "plan": rng.choice(["free", "basic", "pro"], 120)})
    frame["spent"] = rng.gamma(2.0, 30.0, 120).round(2)
    frame["churn"] = np.where((frame["plan"] == "free") | (frame["age"] > 60), "yes", "no")
    path = tmp_path / "sales.csv"
    frame.to_csv(path, index=False)
    return path
