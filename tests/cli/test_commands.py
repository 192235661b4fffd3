"""What a person does, from CSV to predictions, and what the commands say."""

import json

import pandas as pd
import pytest

QUICK = ["--seeds", "2", "--trials", "0", "--epochs", "2"]


def strict(text: str):
    return json.loads(text, parse_constant=pytest.fail)


def test_compare_prints_card_table_and_sentences_and_keeps_the_best(pomona, sales, tmp_path):
    report = tmp_path / "report.html"
    done = pomona(
        "compare", sales, "--target", "churn", "--candidates", "mlp", "mlp act=gelu", *QUICK, "--report", report
    )
    assert done.code == 0, done.err
    for part in ("churn (classes)", "mlp act=gelu", "gradient boosting", "The best network is", "kept as"):
        assert part in done.out
    assert report.stat().st_size > 1_000_000 and f"report written to {report}" in done.err
    listed = strict(pomona("zoo", "ls", "--json").out)
    assert len(listed) == 4 and {record["status"] for record in listed} == {"ok"}


def test_compare_as_json_is_only_json(pomona, sales):
    done = pomona("compare", sales, "-t", "churn", "-c", "mlp", *QUICK, "--json")
    assert done.code == 0, done.err
    data = strict(done.out)
    assert data["task"]["metric"] == "accuracy" and len(data["rows"]) == 6


def test_a_slot_is_swept(pomona, sales):
    done = pomona(
        "compare", sales, "-t", "churn", "--slot", "act=gelu,tanh", "--backbone", "mlp width=8", *QUICK, "--json"
    )
    names = {row["name"] for row in strict(done.out)["rows"] if row["kind"] == "network"}
    assert names == {"mlp act=relu width=8", "mlp act=gelu width=8", "mlp act=tanh width=8"}


def test_from_recipe_to_predictions_and_exports(pomona, sales, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("candidate: mlp width=16\ntarget: churn\nepochs: 3\nseed: 5\n")
    made = strict(pomona("run", recipe, "--data", sales, "--json").out)
    shown = pomona("zoo", "show", made["id"][:5])
    assert "seed 5" in shown.out and "width: 16" in shown.out
    assert strict(pomona("zoo", "show", made["id"], "--json").out)["metrics"] == made["metrics"]

    new = tmp_path / "new.csv"
    pd.read_csv(sales).drop(columns="churn").head(7).to_csv(new, index=False)
    out = tmp_path / "out.csv"
    done = pomona("predict", made["id"], new, "-o", out)
    assert done.out == f"7 predictions written to {out}\n"
    written = pd.read_csv(out)
    assert set(written["prediction"]) <= {"yes", "no"} and len(written) == 7
    printed = pomona("predict", made["id"], new).out
    assert printed.splitlines()[0] == ",".join(written.columns) and len(printed.splitlines()) == 8

    done = pomona("export", made["id"], "--torch", tmp_path / "net.pt2")
    assert done.code == 0 and "largest difference from the network" in done.out and (tmp_path / "net.pt2").exists()
    assert pomona("zoo", "rm", made["id"], made["id"][:6]).out == f"removed {made['id']}\n"
    assert "the zoo is empty" in pomona("zoo", "ls").out


def test_a_run_says_how_to_use_what_it_kept(pomona, sales, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"candidate: mlp width=16\ndata: {sales}\ntarget: churn\nepochs: 1\n")
    done = pomona("run", recipe)
    assert done.code == 0 and "accuracy" in done.out and "pomona predict" in done.out


def test_lists_of_papers_and_slots(pomona):
    every = strict(pomona("list", "--json").out)
    assert len(every) == 337
    done = strict(pomona("list", "--done", "--json").out)
    still = strict(pomona("list", "--open", "--json").out)
    assert len(done) + len(still) == 337 and all(paper["status"] == "done" for paper in done)
    assert {paper["family"] for paper in strict(pomona("list", "--family", "layers", "--json").out)} == {"layers"}
    assert "gelu" in strict(pomona("list", "--slot", "act", "--json").out)
    assert "act=gelu" in pomona("list", "--slot", "act").out
    assert "of 337 papers are done" in pomona("list").out


def test_show_tells_equation_options_facts_and_use(pomona):
    out = pomona("show", "gelu").out
    for part in ("Gaussian Error Linear Units", "1606.08415", "act=gelu", "facts tested", "pomona claim gelu"):
        assert part in out
    assert pomona("show", "quadratic", "--json").code == 0  # by the name in a slot
    data = strict(pomona("show", "quadratic_neuron", "--json").out)
    assert data["slots"]["linear"] == ["quadratic"] and data["usage"]


def test_the_ledger_is_shown(pomona):
    assert isinstance(strict(pomona("claims", "--json").out), list)
    assert pomona("claims").code == 0


def test_a_claim_runs_and_is_printed(pomona, monkeypatch):
    from pomona.claims import run
    from pomona.claims.verdict import Comparison

    def claim(scale, seeds):
        return Comparison([0.9] * len(seeds), [float("nan")] * len(seeds), "accuracy", "a", "b", "two points better")

    monkeypatch.setattr(run.catalog, "load", lambda path: claim)
    data = strict(pomona("claim", "gelu", "--scale", "smoke", "--seeds", "3", "--json").out)
    assert data["verdict"] == "undecided" and data["effect"] is None and data["seeds"] == [0, 1, 2]
    said = pomona("claim", "gelu", "--scale", "smoke").out
    assert "gelu undecided: a against b" in said and "decides nothing" in said


def test_the_version(pomona):
    assert pomona("--version").out.startswith("pomona 0.")
