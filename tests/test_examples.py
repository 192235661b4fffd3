"""The examples run, as a person would run them."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_own_loop_learns(capsys):
    assert example("own_loop").main(epochs=5) > 0.9
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_sklearn_pipeline():
    assert example("sklearn_pipeline").main(epochs=10) > 0.85


@pytest.mark.slow
def test_own_csv_says_that_it_is_synthetic_and_predicts(tmp_path, capsys):
    example("own_csv").main(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("The data of this example are synthetic.")
    assert "The best network is" in said and "probability_yes" in said


def test_every_candidate_of_the_demo_can_be_built():
    from pomona import Recipe, load

    task = load("digits")
    candidates = example("demo").CANDIDATES
    assert len(candidates) >= 12
    for candidate in candidates:
        output = Recipe.parse(candidate).build(task).eval()(task.example)
        assert output.shape == (2, 10), candidate


@pytest.mark.slow
def test_demo_writes_its_report(tmp_path):
    study = example("demo").main(tmp_path / "report.html", epochs=0.5, trials=0, seeds=2, zoo=str(tmp_path / "zoo"))
    assert all(row.status == "ok" for row in study.rows)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")[:500].lower()
