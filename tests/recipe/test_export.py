import numpy as np
import pandas as pd
import pytest
import torch

from pomona.data import load
from pomona.errors import PomonaError
from pomona.nets import Column, Inputs
from pomona.nets.specs import inputs_from_json, outputs_from_json
from pomona.recipe import restore
from pomona.recipe.execute import Specs
from pomona.recipe.export import example_rows, export_onnx, export_torch, raw_rows
from pomona.recipe.single import run_recipe
from pomona.zoo import Zoo


def _sizes(network):
    return Specs(inputs_from_json(network.record.task["inputs"]), outputs_from_json(network.record.task["outputs"]))


def _inputs(network):
    return _sizes(network).inputs


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": rng.normal(40, 9, 80),
            "colour": rng.choice(["red", "green", "blue"], 80),
            "town": rng.choice([f"town{i}" for i in range(15)], 80),
        }
    )
    frame["y"] = (frame["age"] > 40) ^ (frame["colour"] == "red")
    zoo = Zoo(folder / "zoo")
    table = load(frame, "y")
    digits = load("digits", limit=120)
    made = {
        "table": run_recipe("mlp width=16", table, epochs=2, zoo=zoo).id,
        "image": run_recipe("convnet width=4", digits, epochs=1, zoo=zoo).id,
    }
    return {name: restore(zoo, id) for name, id in made.items()}


@pytest.mark.parametrize("kind", ["table", "image"])
def test_a_torch_program_computes_the_same_at_any_batch_size(networks, kind, tmp_path):
    network, path = networks[kind], tmp_path / "net.pt2"
    assert export_torch(network, path) <= 1e-4
    program = torch.export.load(path).module()
    for count in (1, 2, 9):
        x = example_rows(_inputs(network), count)
        torch.testing.assert_close(program(x), network.network(x), rtol=1e-4, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["table", "image"])
def test_an_onnx_model_computes_the_same_at_any_batch_size(networks, kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, path = networks[kind], tmp_path / "net.onnx"
    assert export_onnx(network, path) <= 1e-4
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 9):
        x = example_rows(_inputs(network), count)
        out = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(out, network.network(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_tampered_export_is_refused_and_nothing_is_kept(networks, tmp_path, monkeypatch):
    network, path = networks["table"], tmp_path / "net.pt2"
    path.write_bytes(b"an older export")
    x = torch.tensor(network.record.task["rows"])
    other = torch.export.export(network.recipe.build(_sizes(network), seed=1).eval(), (x,))
    save = torch.export.save
    monkeypatch.setattr(torch.export, "save", lambda program, file: save(other, file))
    with pytest.raises(
        PomonaError, match=r"^the exported network differs from the original by .*, so it was not kept$"
    ):
        export_torch(network, path)
    assert path.read_bytes() == b"an older export" and [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


def test_a_place_that_cannot_be_written(networks, tmp_path):
    missing = tmp_path / "no" / "net.pt2"
    with pytest.raises(PomonaError, match=r"net.pt2' cannot be written: the folder '.*no' does not exist$"):
        export_torch(networks["table"], missing)


def test_rows_made_for_typed_columns_hold_codes():
    columns = (Column("a", "number"), Column("c", "category", 1, 3), Column("t", "text", 2, 7))
    x = example_rows(Inputs("table", (4,), columns), 50)
    assert set(x[:, 1].tolist()) <= {0, 1, 2} and x[:, 2:].max() <= 6 and x[:, 2:].eq(x[:, 2:].round()).all()
    assert example_rows(Inputs("tokens", (5,), vocabulary=4)).dtype == torch.int64


def test_raw_rows_from_files(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.ones((2, 3)))
    assert raw_rows(tmp_path / "a.npz").shape == (2, 3)
    np.savez(tmp_path / "b.npz", Z=np.ones(2))
    with pytest.raises(PomonaError, match=r"b.npz' holds Z; the rows to predict must be called X$"):
        raw_rows(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_text("nothing")
    with pytest.raises(PomonaError, match=r"c.npz' is not an npz file"):
        raw_rows(tmp_path / "c.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PomonaError, match=r"empty' holds no images$"):
        raw_rows(tmp_path / "empty")
