import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pomona.data.encoders import (
    FIT,
    MOST_CATEGORIES,
    BinaryEncoder,
    CategoryEncoder,
    DateEncoder,
    ImageEncoder,
    NumberEncoder,
    TextEncoder,
    encoder_from_json,
    encoder_to_json,
    moments,
)
from pomona.errors import PomonaError

HERE = Path()


def column(values):
    return pd.Series(list(values), name="c")


def test_a_number_is_standardised():
    values = column(np.random.default_rng(0).normal(50, 7, 500))
    out = NumberEncoder.fit(values, HERE).encode(values, HERE)
    assert out.shape == (500, 1) and out.dtype == np.float32
    assert abs(out.mean()) < 1e-5 and abs(out.std() - 1) < 1e-5


def test_a_missing_number_is_the_mean_with_an_indicator():
    encoder = NumberEncoder.fit(column([1.0, 3.0, np.nan]), HERE)
    assert encoder.column.width == 2
    np.testing.assert_array_equal(encoder.encode(column([3, None, np.inf]), HERE), [[1, 0], [0, 1], [0, 1]])


def test_a_gap_seen_first_at_prediction_is_the_mean():
    encoder = NumberEncoder.fit(column([1.0, 3.0]), HERE)
    np.testing.assert_array_equal(encoder.encode(column([np.nan, 1.0]), HERE), [[0], [-1]])


def test_a_constant_is_zero_not_nan():
    out = NumberEncoder.fit(column([0.1] * 7), HERE).encode(column([0.1, 0.1]), HERE)
    assert np.abs(out).max() < 1e-6
    mean, scale = moments(np.full((5, 2), np.nan))
    assert mean.tolist() == [0, 0] and scale.tolist() == [1, 1]


def test_a_tiny_spread_is_not_taken_for_a_constant():
    values = column(1e-9 * np.random.default_rng(0).normal(size=200))
    assert abs(NumberEncoder.fit(values, HERE).encode(values, HERE).std() - 1) < 1e-5


def test_binary_is_standardised_and_a_third_value_is_missing():
    encoder = BinaryEncoder.fit(column(["n", "y", "y", "n"]), HERE)
    np.testing.assert_array_equal(encoder.encode(column(["n", "y", "maybe", None]), HERE)[:, 0], [-1, 1, 0, 0])
    gaps = BinaryEncoder.fit(column([0.0, 1.0, np.nan]), HERE)
    np.testing.assert_array_equal(gaps.encode(column([1, 0]), HERE), [[1, 0], [-1, 0]])


def test_unseen_and_missing_categories_are_code_zero():
    encoder = CategoryEncoder.fit(column(["b", "a", "c", None]), HERE)
    assert encoder.column.cardinality == 4
    assert encoder.encode(column(["a", "c", "new", None, np.nan]), HERE)[:, 0].tolist() == [1, 3, 0, 0, 0]


def test_integer_categories_survive_becoming_floats():
    encoder = CategoryEncoder.fit(column([10, 20, 30]), HERE)
    assert encoder.encode(column([20.0, np.nan, 30.0]), HERE)[:, 0].tolist() == [2, 0, 3]


def test_rare_categories_beyond_the_limit_fold_into_code_zero():
    values = [f"v{i:04}" for i in range(MOST_CATEGORIES)] * 2 + ["rare1", "rare2"]
    encoder = CategoryEncoder.fit(column(values), HERE)
    assert encoder.column.cardinality == MOST_CATEGORIES + 1
    assert encoder.folded == 2 and "2 rare values" in encoder.note
    assert encoder.encode(column(["rare1", "v0000"]), HERE)[:, 0].tolist() == [0, 1]


def test_dates_become_standardised_parts():
    days = pd.Series(pd.date_range("2020-01-01", "2021-12-31"), name="c")
    encoder = DateEncoder.fit(days, HERE)
    out = encoder.encode(days, HERE)
    assert out.shape == (731, 5)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-5)
    raw = out * encoder.scale + encoder.mean
    np.testing.assert_allclose(raw[0, :3], [2020, 1, 2], atol=1e-4)  # the first of January 2020 is a Wednesday
    assert (np.abs((raw[:, 3] ** 2 + raw[:, 4] ** 2) - 1) < 1e-4).all()


def test_dates_with_hours_and_gaps_have_entries_for_them():
    hours = pd.Series([*pd.date_range("2020-01-01", periods=47, freq="h"), pd.NaT], name="c")
    encoder = DateEncoder.fit(hours, HERE)
    assert encoder.column.width == 7
    assert encoder.encode(hours, HERE)[-1].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_dates_asked_for_that_are_none_are_named():
    with pytest.raises(PomonaError, match="column 'c' cannot be read as dates: 'soon' is none"):
        DateEncoder.fit(column(["2020-01-01", "soon"]), HERE)


def test_text_is_padded_with_zero_and_unseen_words_are_one():
    encoder = TextEncoder.fit(column(["The cat sat", "the dog", "the cat's dog"]), HERE)
    assert encoder.words[:2] == ["the", "dog"]
    out = encoder.encode(column(["THE dog, quickly!", None, "the"]), HERE)
    assert out.tolist() == [[2, 3, 1][: out.shape[1]], [0] * out.shape[1], [2, 0, 0][: out.shape[1]]]
    assert encoder.column.cardinality == len(encoder.words) + 2


def test_images_are_read_from_paths(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (9, 7), (i * 100, 50, 0)).save(tmp_path / f"{i}.png")
    paths = column(["0.png", "1.png", "2.png", None])
    encoder = ImageEncoder.fit(paths, tmp_path, size=4)
    out = encoder.encode(paths, tmp_path).reshape(4, 3, 4, 4)
    assert encoder.column.shape == (3, 4, 4) and encoder.column.width == 48
    np.testing.assert_allclose(out[:3, 0].mean(), 0, atol=1e-6)
    assert (out[:, 1:] == 0).all()  # two channels are constant
    assert (out[3] == 0).all()
    with pytest.raises(PomonaError, match=r"image '.*9.png' is not there"):
        encoder.encode(column(["9.png"]), tmp_path)


@pytest.mark.parametrize("kind", ["number", "binary", "category", "date", "text"])
def test_json_round_trip_and_empty_input(kind):
    values = {
        "number": [1.0, None, 2.5],
        "binary": ["a", "b", None],
        "category": ["a", "b", "c"],
        "date": ["2020-01-01", "2021-02-03", None],
        "text": ["a b", "c d e", None],
    }[kind]
    encoder = FIT[kind](column(values), HERE)
    again = encoder_from_json(json.loads(json.dumps(encoder_to_json(encoder))))
    assert again == encoder
    np.testing.assert_array_equal(again.encode(column(values), HERE), encoder.encode(column(values), HERE))
    assert encoder.encode(column(values)[:0], HERE).shape == (0, encoder.column.width)
