"""Networks of the zoo, edited on the command line."""

import json

import pytest
import torch


@pytest.fixture
def parent(pomona, sales, tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_ZOO", str(tmp_path / "zoo"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("candidate: mlp width=16\n")
    assert pomona("run", recipe, "--data", sales, "--target", "churn", "--epochs", "4").code == 0
    return json.loads(pomona("zoo", "ls", "--json").out)[0]["id"]


def test_an_edited_network_is_kept_with_its_parent_and_measured(pomona, sales, parent):
    done = pomona("edit", parent, "prune", "--density", "0.25", "--rewind", "--data", sales, "-t", "churn", "--json")
    assert done.code == 2  # -t is no option of prune's
    done = pomona(
        "edit", parent, "prune", "--density", "0.25", "--rewind", "--data", sales, "--target", "churn", "--json"
    )
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["parent"] == [parent] and record["phase"] == "edit"
    assert record["extra"]["edit"] == "prune:density=0.25,rewind=True"
    assert 0 <= record["metrics"]["test"]["accuracy"] <= 1
    shown = pomona("zoo", "show", parent).out
    assert f"{record['id']}  by prune:density=0.25" in shown
    again = pomona("edit", record["id"], "prune:density=0.1")
    assert again.code == 0 and "not measured" in again.out
    assert pomona("zoo", "show", record["id"]).out.count("by prune") == 2


def test_an_edited_network_is_written(pomona, parent, tmp_path):
    out = tmp_path / "small.pt2"
    assert pomona("edit", parent, "prune", "-o", out).code == 0
    assert torch.export.load(out) is not None
    wrong = pomona("edit", parent, "prune", "-o", tmp_path / "small.bin")
    assert wrong.code == 2 and "must end in .onnx or .pt2" in wrong.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lottery_ticket"], "starts from the untrained network"),
        (["prune", "--density", "1.5"], "density=1.5 must lie in [0, 1]"),
        (["prune", "--densty", "0.5"], "did you mean density?"),
        (["prnue"], "did you mean prune"),
        (["prune", "--data", "iris"], "are not the data of network"),
    ],
)
def test_bad_input_gets_one_sentence(pomona, parent, arguments, message):
    done = pomona("edit", parent, *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_two_networks_are_merged_and_stitched(pomona, sales, parent, tmp_path):
    recipe = tmp_path / "other.yaml"
    recipe.write_text("candidate: mlp width=16\nseed: 1\n")
    assert pomona("run", recipe, "--data", sales, "--target", "churn", "--epochs", "4").code == 0
    both = [record["id"] for record in json.loads(pomona("zoo", "ls", "--json").out)]
    for command in (["merge", *both], ["stitch", *both, "--at", "2"]):
        done = pomona(*command, "--data", sales, "--target", "churn", "--json")
        assert done.code == 0, done.err
        record = json.loads(done.out)
        assert record["parent"] == both and 0 <= record["metrics"]["test"]["accuracy"] <= 1
        assert pomona("edit", record["id"], "prune").code == 0  # it comes back from the zoo
    wide = tmp_path / "wide.yaml"
    wide.write_text("candidate: mlp width=24\n")
    assert pomona("run", wide, "--data", sales, "--target", "churn", "--epochs", "1").code == 0
    last = json.loads(pomona("zoo", "ls", "--json", "--all").out)
    other = next(r["id"] for r in last if r["candidate"] == "mlp width=24")
    failed = pomona("merge", parent, other)
    assert failed.code == 2 and "has shapes" in failed.err and failed.err.count("\n") == 1
    assert pomona("stitch", parent, other).code == 0
