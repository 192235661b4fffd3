import gzip
import struct

import numpy as np
import pytest
import torch

from pomona.data import builtin_names, load, ucr_names
from pomona.data.builtin import FASHION_MNIST_FOLDER, read_idx, read_ts
from pomona.errors import PomonaError


@pytest.mark.parametrize(
    ("name", "kind", "shape", "outputs", "rows"),
    [
        ("digits", "image", (1, 8, 8), 10, 1797),
        ("iris", "table", (4,), 3, 150),
        ("wine", "table", (13,), 3, 178),
        ("breast_cancer", "table", (30,), 2, 569),
    ],
)
def test_classes(name, kind, shape, outputs, rows):
    task = load(name)
    assert (task.inputs.kind, task.inputs.shape, task.outputs.size) == (kind, shape, outputs)
    assert sum(map(len, task.splits.values())) == rows == task.card.rows
    assert task.name == name and name in builtin_names()
    assert task.metric == "accuracy"


def test_labels_of_built_in_tables_are_words():
    assert load("iris").outputs.names == ("setosa", "versicolor", "virginica")
    assert load("breast_cancer").outputs.names == ("benign", "malignant")
    assert load("digits").outputs.names == tuple("0123456789")


def test_diabetes_is_a_number():
    task = load("diabetes")
    assert task.outputs.kind == "number" and task.metric == "rmse"
    y = task.splits["train"].y
    assert y.shape[1] == 1 and abs(float(y.mean()) - task.outputs.mean[0]) < 1e-3


def test_another_target_of_a_built_in_table():
    task = load("iris", "petal width (cm)")
    assert task.outputs.kind == "number"
    assert "target" in [column.name for column in task.inputs.columns]


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_its_own_test_set():
    task = load("fashion_mnist", limit=500)
    assert task.inputs.shape == (1, 28, 28) and "Sneaker" in task.outputs.names
    assert {part: len(split) for part, split in task.splits.items()} == {"train": 400, "valid": 100, "test": 500}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_a_folder(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for part, n in (("train", 50), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(array)
            (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    task = load("fashion_mnist", data_dir=tmp_path)
    assert len(task.splits["test"]) == 20


def test_files_that_are_not_there_or_not_idx_are_named(tmp_path):
    with pytest.raises(PomonaError, match=r"fashion_mnist needs train-images-idx3-ubyte.gz in .*data_dir"):
        load("fashion_mnist", data_dir=tmp_path)
    (tmp_path / "a").write_bytes(b"nonsense")
    with pytest.raises(PomonaError, match="file 'a' is not an idx file"):
        read_idx(tmp_path / "a")
    (tmp_path / "b").write_bytes(idx(np.zeros((3, 2), np.uint8))[:-1])
    with pytest.raises(PomonaError, match="file 'b' holds 5 values; its header says 6"):
        read_idx(tmp_path / "b")


def test_ucr_series():
    pytest.importorskip("aeon", exc_type=ImportError)
    task = load("ucr:GunPoint")
    assert task.inputs.kind == "series" and task.inputs.shape == (1, 150)
    assert len(task.splits["test"]) == 150 and task.outputs.size == 2
    assert load("ucr:BasicMotions").inputs.shape == (6, 100)
    with pytest.raises(PomonaError, match=r"ucr='Gunpiont' is not known; did you mean GunPoint"):
        load("ucr:Gunpiont")


def test_every_ucr_problem_loads():
    pytest.importorskip("aeon", exc_type=ImportError)
    for name in ucr_names():
        assert all(torch.isfinite(split.x).all() for split in load(f"ucr:{name}").splits.values())


def test_ts_files(tmp_path):
    path = tmp_path / "t.ts"
    path.write_text("@problemName t\n@classLabel true a b\n@data\n1,2,?:4,5,6:a\n7,8,9:1,2,3:b\n")
    series, target = read_ts(path)
    assert series.shape == (2, 2, 3) and np.isnan(series[0, 0, 2]) and target.tolist() == ["a", "b"]
    path.write_text("@classLabel true a b\n@data\n1,2:a\n7,8,9:b\n")
    with pytest.raises(PomonaError, match="file 't.ts' holds series of different lengths"):
        read_ts(path)


def test_mnist1d_is_generated_and_says_so():
    pytest.importorskip("mnist1d.data", exc_type=ImportError)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    task = load("mnist1d", limit=300)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert task.inputs.kind == "series" and task.inputs.shape == (1, 40)
    assert task.card.synthetic and "synthetic" in str(task.card)


def test_an_unknown_name_has_the_nearest():
    with pytest.raises(PomonaError, match=r"source='digit' is not known; did you mean digits\?"):
        load("digit")
