import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.data import Pipeline, load
from pomona.errors import PomonaError

N = 120


def frame(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 9, n).round(1),
            "city": rng.choice(["rome", "oslo", "bonn"], n),
            "who": np.repeat(np.arange(n // 4), 4),
            "day": pd.date_range("2020-01-01", periods=n, freq="D" if n < 1000 else "min").strftime("%Y-%m-%d"),
            "churn": rng.choice(["stay", "go"], n),
            "spend": rng.exponential(100, n),
        }
    )


def write(tmp_path, data, name="sales.csv"):
    data.to_csv(tmp_path / name, index=False)
    return tmp_path / name


def test_a_csv_to_a_task(tmp_path):
    task = load(write(tmp_path, frame()), "churn")
    assert task.name == "sales" and task.outputs.names == ("go", "stay")
    assert sum(map(len, task.splits.values())) == N
    assert all(torch.isfinite(split.x).all() for split in task.splits.values())
    assert task.splits["train"].x.dtype == torch.float32 and task.splits["train"].y.dtype == torch.int64
    assert float(task.loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]))) == pytest.approx(np.log(2))


def test_rows_of_a_split_are_those_of_the_file(tmp_path):
    data = frame()
    task = load(write(tmp_path, data), "churn")
    labels = np.array(task.outputs.names)
    for part, split in task.splits.items():
        assert labels[split.y].tolist() == data["churn"].iloc[task.extra["rows"][part]].tolist()


def test_a_number_has_mean_and_scale_of_training_rows():
    task = load(frame(), "spend", metric="mae")
    y = task.splits["train"].y
    assert task.outputs.kind == "number" and y.shape[1] == 1 and task.metric == "mae"
    assert task.outputs.mean[0] == pytest.approx(float(y.mean()), rel=1e-5)
    assert task.outputs.scale[0] == pytest.approx(float(y.std(correction=0)), rel=1e-5)
    assert float(task.loss(y, y)) == 0


def test_several_numbers():
    task = load(frame(), ["spend", "age"])
    assert task.outputs.size == 2 and task.splits["test"].y.shape[1] == 2


def test_seeds():
    first, again, other = (load(frame(), "churn", seed=seed).fingerprint() for seed in (0, 0, 1))
    assert first == again != other


def test_groups_do_not_straddle_and_are_no_input():
    data = frame()
    task = load(data, "churn", group="who")
    groups = [set(data["who"].iloc[rows]) for rows in task.extra["rows"].values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert "who" not in [column.name for column in task.inputs.columns]
    assert "groups of 'who'" in task.card.split_by


def test_the_latest_rows_are_the_test():
    data = frame().sample(frac=1, random_state=0)
    task = load(data, "churn", time="day")
    days = data["day"].reset_index(drop=True)
    rows = task.extra["rows"]
    assert days[rows["train"]].max() < days[rows["valid"]].min() <= days[rows["valid"]].max() < days[rows["test"]].min()
    limited = load(data, "churn", time="day", limit=40)
    assert days[np.concatenate(list(limited.extra["rows"].values()))].min() == "2020-03-21"


def test_a_test_file_is_the_test_split(tmp_path):
    task = load(write(tmp_path, frame()), "churn", test=write(tmp_path, frame(40, seed=1), "new.csv"))
    assert [len(task.splits[part]) for part in ("train", "valid", "test")] == [96, 24, 40]
    assert "test set is its own" in task.card.split_by


def test_a_class_of_the_test_file_that_training_lacks_is_an_error(tmp_path):
    new = frame(40)
    new.loc[0, "churn"] = "moved"
    with pytest.raises(PomonaError, match=r"target 'churn' has 1 classes that the training table lacks \('moved'\)"):
        load(frame(), "churn", test=new)


def test_bad_rows_of_a_test_file_are_said_to_be_there():
    new = frame(40).astype({"age": object})
    new.loc[3, "age"] = "old"
    with pytest.raises(PomonaError, match=r"^test: column 'age', row 4: 'old' is not a number"):
        load(frame(), "churn", test=new)
    with pytest.raises(PomonaError, match=r"^test: column 'city' is missing"):
        load(frame(), "churn", test=frame(40).drop(columns="city"))
    with pytest.raises(PomonaError, match=r"^test: a DataFrame has no rows with a target"):
        load(frame(), "churn", test=frame(40).assign(churn=None))


def test_changing_a_test_file_changes_nothing_that_was_fitted():
    first, second = (load(frame(), "churn", test=frame(40, seed=seed)) for seed in (1, 2))
    assert first.pipeline.to_json() == second.pipeline.to_json()
    assert not torch.equal(first.splits["test"].x, second.splits["test"].x)


def test_a_test_file_without_the_target_is_an_error():
    with pytest.raises(PomonaError, match=r"test: target='churn' is not known"):
        load(frame(), "churn", test=frame().drop(columns="churn"))


def test_rows_without_a_target_are_left_out_and_counted():
    data = frame()
    data.loc[:6, "churn"] = None
    task = load(data, "churn")
    assert task.card.rows == N - 7
    assert "7 rows of a DataFrame have no target and were left out" in task.card.notes
    assert min(rows.min() for rows in task.extra["rows"].values()) == 7


def test_infinities_are_missing_and_said():
    data = frame()
    data.loc[::3, "age"] = np.inf
    task = load(data, "churn")
    assert any("infinities are treated as missing in age" in note for note in task.card.notes)
    assert task.inputs.columns[0].width == 2
    assert torch.isfinite(task.splits["train"].x).all()


def test_constants_and_identifiers_are_dropped_and_said():
    data = frame().assign(one=1, order_id=np.arange(N), none=np.nan)
    notes = {column.name: column for column in load(data, "churn").card.columns}
    assert {notes[name].kind for name in ("one", "order_id", "none")} == {"dropped"}
    assert [notes[name].note for name in ("one", "order_id", "none")] == ["constant", "identifier", "no values"]


def test_types_drop_and_name_are_obeyed():
    data = frame().assign(zip=np.arange(N) % 7)
    task = load(data, "churn", types={"zip": "category"}, drop=["day"], name="mine")
    kinds = {column.name: column.kind for column in task.inputs.columns}
    assert kinds["zip"] == "category" and "day" not in kinds and task.name == "mine"
    assert load(data, "zip").outputs.kind == "classes"
    assert load(data, "zip", types={"zip": "number"}).outputs.kind == "number"


def test_integer_and_boolean_targets_keep_their_labels():
    data = frame().assign(flag=np.arange(N) % 3 == 0)
    task = load(data, "flag")
    assert task.pipeline.decode(torch.tensor([[0.0, 1.0]]))["prediction"].tolist() == [True]


def test_limit():
    assert load(frame(), "churn", limit=50).card.rows == 50
    assert load(frame(), "churn", limit=5000).card.rows == N


def test_rare_classes_do_not_stop_the_split():
    data = frame()
    data.loc[0, "churn"], data.loc[1:2, "churn"] = "once", "twice"
    task = load(data, "churn")
    assert set(task.splits["train"].y.tolist()) == set(range(4))


def test_a_class_without_training_rows_is_said():
    data = frame()
    data.loc[N - 3 :, "churn"] = "late"
    task = load(data, "churn", time="day")
    assert "late" in task.outputs.names
    assert "no training rows of class late" in task.card.notes


def test_progress_is_told(tmp_path):
    told = []
    load(write(tmp_path, frame()), "churn", progress=told.append)
    assert told[0] == "reading sales.csv" and len(told) > 1


def test_a_frame_is_not_changed():
    data = frame()
    before = data.copy()
    load(data, "churn", limit=50)
    pd.testing.assert_frame_equal(data, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "chrun"}, r"target='chrun' is not known; did you mean churn\?"),
        ({"target": None}, "say which column is the target: target=... with one of age, city"),
        ({"group": "wo"}, r"group='wo' is not known; did you mean who\?"),
        ({"time": "dya"}, r"time='dya' is not known; did you mean day\?"),
        ({"drop": ["ctiy"]}, r"drop='ctiy' is not known; did you mean city\?"),
        ({"types": {"agee": "number"}}, r"types='agee' is not known; did you mean age\?"),
        ({"types": {"age": "numbr"}}, r"types\['age'\]='numbr' is not known; did you mean number"),
        ({"types": {"churn": "date"}}, r"types\['churn'\]='date' is not known"),
        ({"types": {"city": "number"}}, r"column 'city', row \d+: '\w+' is not a number"),
        ({"metric": "acuracy"}, r"metric='acuracy' is not known; did you mean accuracy"),
        ({"metric": "rmse"}, "metric='rmse' is not known"),
        ({"limit": 3}, "limit=3 is too small"),
        ({"group": "who", "time": "day"}, "give group or time, not both"),
        ({"time": "city"}, "time='city' cannot be read as dates or numbers"),
        ({"test": frame(40), "group": "who"}, "takes neither group nor time"),
        ({"target": ["churn", "age"]}, "several targets must all be numbers"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(PomonaError, match=message):
        load(frame(), **{"target": "churn", **options})


def test_bad_tables(tmp_path):
    with pytest.raises(PomonaError, match="a DataFrame has 3 rows with a target; at least 10 are needed"):
        load(frame()[:3], "churn")
    with pytest.raises(PomonaError, match=r"target 'churn' is constant \('go' in all 120 rows\)"):
        load(frame().assign(churn="go"), "churn")
    with pytest.raises(PomonaError, match="target 'spend' is constant"):
        load(frame().assign(spend=2.5), "spend", types={"spend": "number"})
    with pytest.raises(PomonaError, match="target 'name' has 10,000 classes in 10,000 rows"):
        load(pd.DataFrame({"a": np.arange(10_000) / 3, "name": [f"n{i}" for i in range(10_000)]}), "name")
    with pytest.raises(PomonaError, match=r"no usable column is left beside the target \(one: constant\)"):
        load(pd.DataFrame({"one": [1] * 20, "y": ["a", "b"] * 10}), "y")
    data = frame().astype({"age": object})
    data.loc[41, "age"] = "old"
    path = write(tmp_path, data)
    with pytest.raises(PomonaError, match=r"column 'age', row 42: 'old' is not a number \(1 such cells in \d+\)"):
        load(path, "churn")


def test_columns_need_a_table():
    with pytest.raises(PomonaError, match="group='who' needs a table; this source is image data without columns"):
        load("digits", group="who")
    with pytest.raises(PomonaError, match="target='who' is not known; choose one of target"):
        load("digits", "who")


def test_a_hundred_thousand_rows_load_within_seconds(tmp_path):
    path = write(tmp_path, frame(100_000))
    start = time.perf_counter()
    task = load(path, "churn")
    assert task.card.rows == 100_000
    assert time.perf_counter() - start < 8


CELLS = {
    "number": st.floats(width=32) | st.none(),
    "whole": st.integers(-(2**40), 2**40),
    "flag": st.booleans() | st.none(),
    "word": st.sampled_from(["a", "B", "", "ü", "1", "?", "2020-01-01"]) | st.none(),
    "text": st.text(max_size=12),
    "date": st.datetimes(pd.Timestamp("1900-01-01"), pd.Timestamp("2100-01-01")) | st.none(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_table_loads_finite_or_says_why(data):
    n = data.draw(st.integers(10, 30))
    frame = pd.DataFrame({"y": ["a", "b"] * (n // 2) + ["a"] * (n % 2), "z": np.linspace(0, 1, n)})
    for kind in data.draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4)):
        cells = data.draw(st.lists(CELLS[kind], min_size=n, max_size=n))
        frame[f"{kind}{frame.shape[1]}"] = pd.Series(cells, dtype=object if kind == "word" else None)
    try:
        task = load(frame, "y")
    except PomonaError as error:
        stray = str(error)
    else:
        stray = None
    if stray is not None:  # one word among numbers is the only thing that these tables can be refused for
        assert "is not a number" in stray
        return
    assert all(torch.isfinite(split.x).all() for split in task.splits.values())
    assert task.splits["train"].x.shape[1] == sum(column.width for column in task.inputs.columns)
    again = Pipeline.from_json(json.loads(json.dumps(task.pipeline.to_json())))
    assert torch.equal(again.transform(frame.iloc[task.extra["rows"]["test"]]), task.splits["test"].x)
