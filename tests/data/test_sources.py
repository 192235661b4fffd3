import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets

from pomona.data.sources import open_source
from pomona.errors import PomonaError

Y = np.arange(20) % 2


def test_arrays_by_their_dimensions():
    kinds = [open_source((np.zeros((20, *shape)), Y)).kind for shape in ((3,), (1, 9), (3, 8, 8))]
    assert kinds == ["table", "series", "image"]
    assert open_source((torch.zeros(20, 2, 9), torch.tensor(Y))).inputs.shape == (20, 2, 9)


def test_a_frame_with_a_series():
    source = open_source((pd.DataFrame({"a": range(20), "b": list("xy") * 10}), pd.Series(Y, name="churn")))
    assert list(source.inputs) == ["a", "b"] and list(source.target) == ["churn"]


def test_bunches():
    wine = open_source(datasets.load_wine())
    assert wine.inputs.shape == (178, 13) and "alcohol" in wine.inputs
    assert sorted(wine.target["target"].unique()) == ["class_0", "class_1", "class_2"]
    diabetes = open_source(datasets.load_diabetes(as_frame=True), "bmi")
    assert list(diabetes.target) == ["bmi"] and "target" in diabetes.inputs
    assert open_source({"X": np.zeros((20, 2)), "y": Y}).kind == "table"


def test_npz(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.zeros((20, 1, 9)), y=Y)
    assert open_source(tmp_path / "t.npz").kind == "series"
    np.savez(tmp_path / "words.npz", x=np.zeros((20, 2)), y=np.array(["a", "b"])[Y])
    assert open_source(tmp_path / "words.npz").target["target"].tolist()[:2] == ["a", "b"]


def test_several_targets():
    frame = pd.DataFrame({"a": range(20), "u": np.linspace(0, 1, 20), "v": np.linspace(3, 1, 20)})
    assert list(open_source(frame, ["u", "v"]).target) == ["u", "v"]
    assert open_source((np.zeros((20, 2)), np.zeros((20, 3)))).target.shape == (20, 3)
    assert open_source((np.zeros((20, 2)), np.zeros((20, 1)))).target.shape == (20, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "a source of type int cannot be loaded"),
        ((np.zeros((20, 2)), Y[:5]), "X has 20 rows and y 5; they must be equally many"),
        ((np.zeros(20), Y), r"X of shape \(20,\) and type float64 cannot be used"),
        ((np.zeros((20, 2)), np.zeros((20, 2, 2))), r"y of shape \(20, 2, 2\) cannot be used"),
        ((np.zeros((20, 8, 8, 3)), Y), r"has its channels last; move them: np.moveaxis\(X, -1, 1\)"),
        ({"a": 1}, "a mapping needs X and y, or data and target; it has a"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(PomonaError, match=message):
        open_source(source)


def test_bad_npz(tmp_path):
    np.savez(tmp_path / "t.npz", a=Y, b=Y)
    with pytest.raises(PomonaError, match="file 't.npz' needs arrays called X and y; it has a, b"):
        open_source(tmp_path / "t.npz")
    np.savez(tmp_path / "o.npz", X=np.zeros((20, 2)), y=np.array([None] * 20, dtype=object))
    with pytest.raises(PomonaError, match="file 'o.npz' holds Python objects"):
        open_source(tmp_path / "o.npz")
    (tmp_path / "n.npz").write_bytes(b"no zip")
    with pytest.raises(PomonaError, match="file 'n.npz' is not an npz file"):
        open_source(tmp_path / "n.npz")
    with pytest.raises(PomonaError, match="is not there; did you mean t.npz"):
        open_source(tmp_path / "tt.npz")
