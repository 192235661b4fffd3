import json

import numpy as np
import pandas as pd
import pytest
import torch

from pomona.data import Pipeline, load
from pomona.errors import PomonaError


def frame(n=200, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.normal(40, 9, n)),
            "city": rng.choice(["rome", "oslo", "bonn"], n),
            "joined": pd.date_range("2020-01-01", periods=n).strftime("%Y-%m-%d"),
            "member": rng.choice([True, False], n),
            "note": [" ".join(words) for words in rng.choice(["good", "bad", "fine", "odd", "slow"], (n, 5))],
            "churn": rng.choice(["stay", "go"], n),
        }
    )


def test_columns_tell_the_slices_of_the_row():
    task = load(frame(), "churn")
    kinds = [(column.name, column.kind, column.width) for column in task.inputs.columns]
    assert kinds == [
        ("age", "number", 2),
        ("city", "category", 1),
        ("joined", "date", 5),
        ("member", "binary", 1),
        ("note", "text", 5),
    ]
    assert sum(column.width for column in task.inputs.columns) == task.inputs.shape[0]
    city = task.splits["train"].x[:, 2]
    assert set(city.tolist()) == {1.0, 2.0, 3.0}


def test_changing_test_rows_changes_nothing_that_was_fitted():
    data = frame()
    before = load(data, "churn")
    changed = data.copy()
    rows = before.extra["rows"]["test"]
    changed.loc[rows, "age"] = 1e6
    changed.loc[rows, "city"] = "atlantis"
    changed.loc[rows, "joined"] = "1950-01-01"
    changed.loc[rows, "note"] = "utterly new words in here"
    after = load(changed, "churn")
    assert after.pipeline.to_json() == before.pipeline.to_json()
    assert torch.equal(after.splits["train"].x, before.splits["train"].x)
    assert torch.equal(after.splits["valid"].x, before.splits["valid"].x)
    assert not torch.equal(after.splits["test"].x, before.splits["test"].x)


def test_changing_valid_rows_of_a_number_changes_nothing_that_was_fitted():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"a": rng.normal(size=100), "day": np.arange(100), "y": rng.normal(size=100)})
    before = load(data, "y", time="day")
    changed = data.copy()
    changed.loc[before.extra["rows"]["valid"], ["a", "y"]] = 77.0
    after = load(changed, "y", time="day")
    assert after.pipeline.to_json() == before.pipeline.to_json()


def test_changing_test_images_changes_nothing_that_was_fitted():
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 1, 4, 4)), np.arange(60) % 2
    before = load((x, y))
    x = x.copy()
    x[before.extra["rows"]["test"]] += 100
    assert load((x, y)).pipeline.to_json() == before.pipeline.to_json()


def test_the_pipeline_travels_as_json():
    data = frame()
    task = load(data, "churn")
    again = Pipeline.from_json(json.loads(json.dumps(task.pipeline.to_json())))
    assert again == task.pipeline
    assert again.inputs == task.inputs and again.outputs == task.outputs
    rows = task.extra["rows"]["test"]
    assert torch.equal(again.transform(data.iloc[rows]), task.splits["test"].x)


def test_new_rows_need_no_target_and_may_have_other_columns_in_another_order():
    data = frame()
    pipeline = load(data, "churn").pipeline
    other = data.drop(columns="churn")[["note", "member", "joined", "city", "age"]].assign(extra=1)
    assert torch.equal(pipeline.transform(other), pipeline.transform(data))


def test_a_missing_column_is_named_with_the_nearest():
    pipeline = load(frame(), "churn").pipeline
    with pytest.raises(PomonaError, match=r"column 'city' is missing; nearest are City_name"):
        pipeline.transform(frame().rename(columns={"city": "City_name"}))


def test_text_in_a_number_column_at_prediction_names_row_and_column():
    pipeline = load(frame(), "churn").pipeline
    new = frame(5).astype({"age": object})
    new.loc[3, "age"] = "old"
    with pytest.raises(PomonaError, match=r"column 'age', row 4: 'old' is not a number"):
        pipeline.transform(new)


def test_no_rows_give_no_rows():
    pipeline = load(frame(), "churn").pipeline
    assert pipeline.transform(frame()[:0]).shape == (0, 14)


def test_arrays_of_a_table_are_taken_in_order():
    x = np.random.default_rng(0).normal(size=(50, 3))
    pipeline = load((x, np.arange(50) % 2)).pipeline
    got = pipeline.transform(torch.tensor(x))
    np.testing.assert_allclose(got, pipeline.transform(pd.DataFrame(x, columns=["x0", "x1", "x2"])))
    with pytest.raises(PomonaError, match=r"an array of shape \(5, 2\) does not fit; needed are the 3 used columns"):
        pipeline.transform(x[:5, :2])


@pytest.mark.parametrize("shape", [(2, 20), (3, 6, 5)])
def test_series_and_images_are_standardised_per_channel(shape):
    rng = np.random.default_rng(0)
    offset = np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)) * 50
    x = rng.normal(size=(100, *shape)) * (1 + offset) + offset
    x[:, 0] = 3.0  # a constant channel
    task = load((x, np.arange(100) % 2))
    train = task.splits["train"].x
    assert task.inputs.kind == ("series" if len(shape) == 2 else "image") and task.inputs.shape == shape
    axes = (0, *range(2, len(shape) + 1))
    assert (train[:, 0] == 0).all()
    np.testing.assert_allclose(train[:, 1:].mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(train[:, 1:].std(axes), 1, atol=1e-3)
    with pytest.raises(PomonaError, match="do not fit; needed is"):
        task.pipeline.transform(x[:, :1])


def test_gaps_in_series_are_the_mean_and_said():
    x = np.random.default_rng(0).normal(size=(40, 1, 8))
    x[0, 0, 0], x[1, 0, 1] = np.nan, np.inf
    task = load((x, np.arange(40) % 2))
    assert all(torch.isfinite(split.x).all() for split in task.splits.values())
    assert any("replaced by the channel's mean" in note for note in task.card.notes)


def test_outputs_decode_to_predictions():
    task = load(frame(), "churn")
    decoded = task.pipeline.decode(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    assert list(decoded) == ["prediction", "probability_go", "probability_stay"]
    assert decoded["prediction"].tolist() == ["go", "stay"]
