import numpy as np
import pandas as pd
import pytest
import torch

from pomona.data.target import TargetCoder, clean_target, find_target, target_kind
from pomona.errors import PomonaError


def column(values):
    return pd.Series(list(values), name="t")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b"], "classes"),
        (list("abcdefgh"), "classes"),
        ([True, False], "classes"),
        ([0, 1, 2] * 4, "classes"),
        ([0, 1, 2], "number"),
        (list(range(20)) * 4, "classes"),
        (list(range(21)) * 9, "number"),
        ([1.0, 2.0], "classes"),
        (range(21), "number"),
        ([0.5, 1.0], "number"),
    ],
)
def test_the_kind_is_inferred(values, kind):
    assert target_kind(column(values)) == kind


def test_the_kind_can_be_said():
    assert target_kind(column([0, 1]), "number") == "number"
    assert target_kind(column(range(50)), "category") == "classes"
    with pytest.raises(PomonaError, match=r"types\['t'\]='date' is not known"):
        target_kind(column([0]), "date")


def test_a_target_is_found_by_its_usual_names():
    assert find_target(["a", "Label"], None) == "Label"
    assert find_target(["a", "class"], None) == "class"
    with pytest.raises(PomonaError, match="say which column"):
        find_target(["class", "survived"], None)
    with pytest.raises(PomonaError, match=r"say which column is the target: target=... with one of a, b"):
        find_target(["a", "b"], None)
    with pytest.raises(PomonaError, match=r"target='chrun' is not known; did you mean churn\?"):
        find_target(["a", "churn"], "chrun")


def test_written_numbers_and_gaps_are_cleaned():
    assert clean_target(column(["1", "2", "?"])).tolist()[:2] == [1, 2]
    assert clean_target(column(["a", "", "?"])).isna().tolist() == [False, True, True]
    assert clean_target(column([1.5, np.inf])).isna().tolist() == [False, True]
    assert clean_target(column([True, None])).tolist() == [True, None]


def test_a_stray_word_in_a_number_target_is_an_error():
    values = [str(i / 7) for i in range(100)]
    values[3] = "n.a.!"
    with pytest.raises(PomonaError, match=r"column 't', row 4: 'n.a.!' is not a number"):
        clean_target(column(values))


def test_labels_are_sorted_and_decode_to_their_own_type():
    coder = TargetCoder.of_classes(column([10, 2, 2, 10, 2, 2]))
    assert coder.names == ("2", "10")
    assert coder.encode(column([10.0, 2.0])).tolist() == [1, 0]
    frame = coder.decode(torch.tensor([[0.0, 3.0], [1.0, -1.0]]))
    assert list(frame) == ["prediction", "probability_2", "probability_10"]
    assert frame["prediction"].tolist() == [10, 2]
    np.testing.assert_allclose(frame.iloc[:, 1:].sum(axis=1), 1)
    truth = TargetCoder.of_classes(column([True, False, True, False]))
    assert truth.decode(torch.tensor([[0.0, 1.0]]))["prediction"].tolist() == [True]


def test_numbers_keep_their_units():
    values = np.array([[1.0, 10.0], [3.0, 30.0], [100.0, 0.0]])
    coder = TargetCoder.of_numbers(["u", "v"], values, np.array([0, 1]))
    assert coder.outputs.mean == (2.0, 20.0) and coder.outputs.scale == (1.0, 10.0)
    assert coder.encode(values).dtype == torch.float32
    assert list(coder.decode(torch.zeros(3, 2))) == ["prediction_u", "prediction_v"]
    assert coder.decode(torch.zeros(0, 2)).shape == (0, 2)


def test_decode_of_nothing_is_an_empty_frame():
    assert TargetCoder.of_classes(column(["a", "b"] * 3)).decode(torch.zeros(0, 2)).shape == (0, 3)


def test_json_round_trip():
    for coder in (
        TargetCoder.of_classes(column(["a", "b"] * 3)),
        TargetCoder.of_numbers(["u"], np.array([[1.0], [2.0]]), np.arange(2)),
    ):
        assert TargetCoder.from_json(coder.to_json()) == coder


def test_bad_targets_are_named():
    with pytest.raises(PomonaError, match=r"target 't' is constant \('a' in all 20 rows\)"):
        TargetCoder.of_classes(column(["a"] * 20))
    with pytest.raises(PomonaError, match=r"target 't' is constant \(2 in all training rows\)"):
        TargetCoder.of_numbers(["t"], np.full((4, 1), 2.0), np.arange(4))
    with pytest.raises(
        PomonaError, match=r"target 't' has 10,000 classes in 10,000 rows; is it an identifier or free text\?"
    ):
        TargetCoder.of_classes(column([f"c{i}" for i in range(10_000)]))
    with pytest.raises(PomonaError, match=r"target 't' has 1 classes that the training table lacks \('z'\)"):
        TargetCoder.of_classes(column(["a", "b"] * 3)).encode(column(["a", "z"]))
