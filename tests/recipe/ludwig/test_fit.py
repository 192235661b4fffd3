"""The whole: a declaration, fitted, saved, loaded, searched, and from the command line."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from pomona.errors import PomonaError
from pomona.recipe.ludwig import Config, Fitted, fit, infer
from pomona.recipe.ludwig.schema import Schema
from pomona.recipe.ludwig.splits import split_rows

SHORT = {"epochs": 2, "batch_size": 16, "seed": 0}


def table(rows=80, seed=0):
    rng = np.random.default_rng(seed)
    words = np.array(["red", "green", "blue", "tall", "small"])
    a, c = rng.normal(size=rows), rng.choice(["u", "v", "w"], rows)
    series = [rng.normal(size=(2, rng.integers(4, 7))) for _ in range(rows)]
    tags = [list(rng.choice(words, rng.integers(1, 4), replace=False)) for _ in range(rows)]
    frame = {
        "a": a, "c": c, "flag": rng.random(rows) > 0.5, "when": pd.date_range("2020-01-01", periods=rows).astype(str),
        "text": [" ".join(rng.choice(words, 4)) for _ in range(rows)],
        "tags": tags, "bag": [" ".join(rng.choice(words, 3)) for _ in range(rows)],
        "series": series, "vector": [rng.normal(size=3) for _ in range(rows)],
        "picture": [rng.integers(0, 255, (8, 8)).astype(np.uint8) for _ in range(rows)],
        "number": 2 * a + rng.normal(size=rows) / 10, "kind": np.where(a > 0, "up", np.where(c == "u", "down", "side")),
        "yes": a > 0.2, "labels": tags, "sentence": [" ".join(sorted(t)) for t in tags],
        "path": [s[0, :2] for s in series],
    }  # fmt: skip
    return pd.DataFrame(frame)


EVERYTHING = {
    "input_features": [
        {"name": "a", "type": "number"},
        {"name": "c", "type": "category"},
        {"name": "flag", "type": "binary"},
        {"name": "when", "type": "date"},
        {"name": "text", "type": "text"},
        {"name": "tags", "type": "set"},
        {"name": "bag", "type": "bag"},
        {"name": "series", "type": "timeseries", "encoder": "rnn:width=8"},
        {"name": "vector", "type": "vector"},
        {"name": "picture", "type": "image", "encoder": "mlp linear=low_rank width=8 depth=1"},
    ],
    "output_features": [
        {"name": "number", "type": "number", "dependencies": ["kind"]},
        {"name": "kind", "type": "category", "decoder": {"layers": [8]}},
        {"name": "yes", "type": "binary"},
        {"name": "labels", "type": "set"},
        {"name": "sentence", "type": "sequence"},
        {"name": "path", "type": "vector"},
    ],
    "combiner": {"type": "concat", "layers": [16]},
    "trainer": SHORT,
}


@pytest.fixture(scope="module")
def fitted():
    return fit(EVERYTHING, table())


def test_every_type_is_an_input_or_output_by_declaration_alone(fitted):
    rows = table(12, seed=1)
    predicted = fitted.predict(rows)
    assert {"number_prediction", "kind_prediction", "kind_probability_up", "labels_prediction"} <= set(predicted)
    assert {"sentence_prediction", "path_prediction_0", "yes_probability_True"} <= set(predicted)
    assert len(predicted) == 12
    found = fitted.evaluate(rows)
    assert set(found) == {"number", "kind", "yes", "labels", "sentence", "path", "combined"}
    assert all(np.isfinite(part["loss"]) for part in found.values())


def test_saved_network_predicts_the_same_in_a_fresh_process_with_unseen_categories(fitted, tmp_path):
    rows = table(6, seed=2)[["a", "c", "number"]]
    rows["c"] = ["u", "v", "never seen", None, "w", "other"]
    config = {
        "input_features": [{"name": "a", "type": "number"}, {"name": "c", "type": "category"}],
        "output_features": [{"name": "kind", "type": "category"}],
        "trainer": SHORT,
    }
    small = fit(config, table())
    small.save(tmp_path / "saved")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    script = (
        "import sys; from pomona.recipe.ludwig import Fitted; "
        "Fitted.load(sys.argv[1]).predict(sys.argv[2]).to_csv(sys.argv[3], index=False)"
    )
    paths = [str(tmp_path / name) for name in ("saved", "rows.csv", "out.csv")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    here = small.predict(tmp_path / "rows.csv")
    there = pd.read_csv(tmp_path / "out.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(there, here, check_exact=True, check_dtype=False)
    assert small.schema.inputs[1].meta["vocabulary"][0] == "<UNK>"
    packed = small.schema.pack_inputs(rows, tmp_path)[:, 1].tolist()
    assert packed[2] == packed[3] == packed[5] == 0
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json", "metadata.json", "weights.safetensors",
    ]  # fmt: skip


def test_everything_survives_saving_and_loading(fitted, tmp_path):
    again = Fitted.load(fitted.save(tmp_path / "saved"))
    rows = table(10, seed=3)
    pd.testing.assert_frame_equal(again.predict(rows), fitted.predict(rows), check_exact=True)


def test_metadata_are_fitted_on_the_train_split_only():
    config = Config.parse({**EVERYTHING, "preprocessing": {"split": {"probabilities": [0.6, 0.2, 0.2]}}})
    frame = table()
    rows = split_rows(config.preprocessing.split, frame, 0)
    changed = frame.copy()
    for part in ("valid", "test"):
        changed.loc[rows[part], "a"] = 1e6
        changed.loc[rows[part], ["c", "kind"]] = "new"
        changed.loc[rows[part], "text"] = "unheard words"
    metas = [fit(config, data).schema.to_json() for data in (frame, changed)]
    assert json.dumps(metas[0]) == json.dumps(metas[1])
    other = frame.copy()
    other.loc[rows["train"], "a"] += 1
    assert json.dumps(Schema.fit(config, other.loc[rows["train"]], None).to_json()) != json.dumps(metas[0])


def test_adding_an_input_column_adds_its_encoder_and_combiner_columns():
    base = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "number", "type": "number"}],
        "combiner": {"type": "concat", "layers": [16]},
    }
    more = {**base, "input_features": [*base["input_features"], {"name": "text", "type": "text"}]}
    counts, nets = [], []
    for config in map(Config.parse, (base, more)):
        nets.append(Schema.fit(config, table(), None).build(config))
        counts.append(sum(p.numel() for p in nets[-1].parameters()))
    added = nets[1].encoders[1]
    assert counts[1] - counts[0] == sum(p.numel() for p in added.parameters()) + 16 * added.features


def test_training_is_repeatable_and_the_seed_changes_it():
    config = {
        **EVERYTHING,
        "input_features": EVERYTHING["input_features"][:2],
        "output_features": [{"name": "yes", "type": "binary"}],
    }
    state = torch.get_rng_state()
    first, second, other = (fit(config, table(), seed=seed).predict(table(5)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    pd.testing.assert_frame_equal(first, second)
    assert not np.allclose(first["yes_probability_True"], other["yes_probability_True"])


def test_search_returns_the_best_trial_on_validation():
    config = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "number", "type": "number"}],
        "trainer": SHORT,
        "search": {
            "trials": 3,
            "parameters": {
                "trainer.lr": {"low": 1e-3, "high": 1e-1, "log": True},
                "input_features.a.encoder.type": {"choices": ["passthrough", "dense"]},
                "combiner.layers": {"choices": [[], [8]]},
            },
        },
    }
    found = fit(config, table())
    assert len(found.trials) == 3
    best = min(found.trials, key=lambda trial: trial["score"])["values"]
    assert found.config.trainer.lr == best["trainer.lr"]
    assert found.config.input_features[0].encoder["type"] == best["input_features.a.encoder.type"]


def test_rows_without_a_target_train_the_other_outputs_alone():
    frame = table()
    frame.loc[::3, "number"] = np.nan
    frame.loc[1::3, "kind"] = None
    config = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "number", "type": "number"}, {"name": "kind", "type": "category"}],
        "trainer": {"epochs": 2, "validation_metric": "kind.accuracy"},
    }
    found = fit(config, frame)
    assert np.isfinite(found.test["combined"]["loss"]) and "kind.accuracy" in found.curve[0]
    assert found.test["number"]["rmse"] < 2.5


@pytest.mark.parametrize(
    ("split", "first"), [("stratify", "c"), ("datetime", "when"), ("fixed", "part"), ("random", None)]
)
def test_splits_share_out_all_rows(split, first):
    frame = table().assign(part=["train", "valid", "test", "train"] * 20)
    config = Config.parse({**EVERYTHING, "preprocessing": {"split": {"type": split, "column": first}}})
    rows = split_rows(config.preprocessing.split, frame, 0)
    assert sorted(np.concatenate([*rows.values()])) == list(range(80))
    if split == "datetime":
        assert rows["train"].max() < rows["valid"].min() < rows["test"].min()
    if split == "stratify":
        shares = frame["c"].iloc[rows["train"]].value_counts() / frame["c"].value_counts()
        assert np.abs(shares - 0.7).max() < 0.06


def test_command_fits_infers_and_refuses(tmp_path):
    from pomona.cli.app import app

    table()[["a", "c", "flag", "kind"]].to_csv(tmp_path / "t.csv", index=False)
    run = CliRunner().invoke
    args = ["fit", str(tmp_path / "c.yaml"), str(tmp_path / "t.csv"), "-o", str(tmp_path / "out"), "--json"]
    done = run(app, [*args, "-t", "kind"])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["test"]["kind"]["accuracy"] <= 1
    assert len(Fitted.load(tmp_path / "out").predict(tmp_path / "t.csv")) == 80
    again = run(app, args)
    assert isinstance(again.exception, PomonaError)
    assert "is there already; name a new folder" in str(again.exception)


def test_infer_writes_a_config_that_fits():
    config = infer(table()[["a", "c", "when", "tags", "vector", "series", "picture", "kind"]], "kind")
    kinds = {item["name"]: item["type"] for item in config["input_features"]}
    assert kinds == {
        "a": "number", "c": "category", "when": "date", "tags": "set", "vector": "vector", "series": "timeseries",
        "picture": "image",
    }  # fmt: skip
    assert config["output_features"] == [{"name": "kind", "type": "category"}]
    Config.parse(config)


def test_bad_data_are_named(fitted, tmp_path):
    with pytest.raises(PomonaError, match="column 'picture' is missing"):
        fitted.predict(table(3).drop(columns="picture"))
    wrong = table(3)
    wrong.at[1, "vector"] = [1.0]
    with pytest.raises(
        PomonaError, match=r"column 'vector', row 2: a cell of shape \(1,\) does not fit; needed is \(3,\)"
    ):
        fitted.predict(wrong)
    with pytest.raises(PomonaError, match=r"has no config\.json; give one that pomona fit wrote"):
        Fitted.load(tmp_path)
    config = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "c", "type": "category"}],
    }
    with pytest.raises(PomonaError, match="output 'c' needs at least two classes"):
        fit(config, table().assign(c="same"))
