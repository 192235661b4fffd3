import json
import math

import pandas as pd
import pytest
import torch

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.zoo import Corpus, Zoo, settings
from pomona.zoo import code as codes

PLAIN = '''
from torch import nn


class Net(nn.Sequential):
    """A linear network."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__(nn.Flatten(), nn.Linear(in_shape[0], out_shape[0]), nn.Dropout(prm["dropout"]))
'''
PRM = {"lr": 0.5, "momentum": 0.5, "dropout": 0.1}


def blobs(kind="classes"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long() if kind == "classes" else x[:, :1] - x[:, 1:2]
    outputs = Outputs("classes", 3) if kind == "classes" else Outputs("number", 1, mean=(0.0,), scale=(1.4,))
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 80), (80, 120), (120, 160))]
    return tensors(f"blobs_{kind}", Inputs("table", (6,)), outputs, *parts)


TASK = blobs()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One for all tests of this file: its process imports torch once."""
    with Zoo(tmp_path_factory.mktemp("zoo")) as zoo:
        yield zoo.corpus


@pytest.fixture(scope="module")
def filled(corpus):
    name = corpus.register(PLAIN, "plain")
    corpus.run("table-classification", TASK, "acc", name, trials=6, epochs=3)
    corpus.run(None, TASK, "f1", "linear", trials=2, epochs=2)
    corpus.run(None, blobs("number"), "r2", "plain", trials=2, epochs=2)
    return corpus


def failing(corpus, tmp_path_factory=None, *, body="", init="", head="", seconds=None, memory=None, name="failing"):
    """The record of one trial of a network with this code in ``learn``, ``__init__`` or at the top."""
    code = f"""
import os, sys, time
import torch
from torch import nn
{head}

def supported_hyperparameters():
    return {{"lr"}}


class Net(nn.Module):
    def __init__(self, in_shape, out_shape, prm, device):
        super().__init__()
        self.layer = nn.Linear(in_shape[0], out_shape[0])
        {init or "pass"}

    def forward(self, x):
        return self.layer(x)

    def train_setup(self, prm):
        pass

    def learn(self, train_data):
        {body or "pass"}
"""
    identity = corpus.register(code, name)
    limits = (corpus.runner.seconds, corpus.runner.memory)
    corpus.runner.seconds, corpus.runner.memory = seconds or limits[0], memory or limits[1]
    try:
        return corpus.run(None, TASK, "acc", identity, prm={"lr": 0.5}, trials=1, epochs=2)[0]
    finally:
        corpus.runner.seconds, corpus.runner.memory = limits


def test_only_best_has_one_row_a_pipeline_and_epoch_with_the_largest_accuracy(filled):
    everything, best = filled.data(), filled.data(only_best=True)
    key = ["task", "dataset", "metric", "nn", "epoch"]
    assert len(everything) > len(best) == len(everything[key].drop_duplicates()) > 0
    assert not best.duplicated(key).any()
    largest = everything.groupby(key)["accuracy"].max()
    assert (best.set_index(key)["accuracy"].sort_index() == largest.sort_index()).all()


def test_other_whitespace_and_comments_are_a_duplicate_and_another_constant_is_not(filled):
    same = PLAIN.replace("\n", "\n\n").replace("Flatten(),", "Flatten(),  # to a vector\n").replace("A linear", "One")
    assert codes.identity(same) == codes.identity(PLAIN)
    with pytest.raises(PomonaError, match="is in the corpus already, as plain-"):
        filled.register(same, "other")
    other = PLAIN.replace("in_shape[0]", "in_shape[-1]")
    assert codes.identity(other) != codes.identity(PLAIN)
    assert filled.register(other, "other").startswith("other-")


def test_rerunning_a_rows_prm_and_seed_reproduces_its_accuracy_exactly(filled):
    rows = filled.data(metric="acc", nn="plain")
    for _, row in rows[rows["epoch"] == 3].head(3).iterrows():
        again = filled.run(row.task, TASK, row.metric, row.nn, prm=row.prm, trials=1, epochs=3, seed=row.seed)[0]
        assert again.curve[-1]["accuracy"] == row.accuracy
        assert again.id == row.id
    assert len(filled.data(metric="acc", nn="plain")) == len(rows)


def test_json_export_and_import_into_an_empty_zoo_gives_identical_data(filled, tmp_path):
    failing(filled, head="'exported failure'", body="raise ValueError('exported')", name="broken")
    filled.export("json", tmp_path / "out")
    pipeline = next((tmp_path / "out").glob("table-classification_blobs_classes_acc_plain-*"))
    assert {file.name for file in pipeline.iterdir()} == {"1.json", "2.json", "3.json", "trials.json"}
    assert json.loads((pipeline / "2.json").read_text())[0].keys() >= {"accuracy", "duration", "prm", "seed"}
    with Zoo(tmp_path / "empty") as zoo:
        assert zoo.corpus.import_(tmp_path / "out") == len(filled.trials())
        assert zoo.corpus.import_(tmp_path / "out") == 0
        pd.testing.assert_frame_equal(zoo.data(), filled.data())
        pd.testing.assert_frame_equal(zoo.corpus.stats(), filled.stats())
        assert zoo.corpus.networks() == filled.networks()


def test_a_net_that_raises_is_a_failed_record_and_not_a_crash(corpus):
    record = failing(corpus, body="raise RuntimeError('no luck')")
    assert (record.status, record.curve) == ("error", [])
    assert record.error.startswith("RuntimeError: no luck (line 2")
    assert corpus.zoo.get(record.id).error == record.error
    assert record.id in {r.id for r in corpus.trials(record.candidate)}
    assert record.id not in set(corpus.data()["id"])


def test_supported_hyperparameters_outside_prm_are_a_clear_error(filled):
    with pytest.raises(PomonaError, match=r"prm lacks dropout, momentum, which .*supported_hyperparameters"):
        filled.run(None, TASK, "acc", "plain", prm={"lr": 0.5})
    with pytest.raises(PomonaError, match="prm='weight' is not known"):
        filled.run(None, TASK, "acc", "plain", prm=PRM | {"weight": 0.5})
    with pytest.raises(PomonaError, match=r"prm\['lr'\]=1.5 must lie in \[0, 1\]"):
        filled.run(None, TASK, "acc", "plain", prm=PRM | {"lr": 1.5})
    with pytest.raises(PomonaError, match=r"prm\['batch'\]=12 must be a power of two"):
        filled.run(None, TASK, "acc", "plain", prm=PRM | {"batch": 12})
    with pytest.raises(PomonaError, match="transform='nois' is not known; did you mean noise"):
        filled.check_nn(PLAIN, None, TASK, "acc", PRM | {"transform": "nois"})


@pytest.mark.parametrize(
    "code, error",
    [
        ({"body": "sys.exit(3)"}, "SystemExit: 3"),
        ({"body": "os._exit(0)", "head": "1"}, "ended before it was done"),
        ({"body": "os.kill(os.getpid(), 11)"}, "ended with SIGSEGV"),
        ({"body": "import nothing_like_it"}, "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ({"init": "self.layer = nn.Linear(7, 3)"}, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ({"body": "time.sleep(60)", "seconds": 0.5}, "an epoch took longer than seconds=0.5"),
        ({"init": "while True: pass", "seconds": 0.5}, "an epoch took longer than seconds=0.5"),
        ({"body": "torch.ones(300, 2**20)", "memory": 256}, "allocate memory"),
        ({"body": "with torch.no_grad(): self.layer.weight.fill_(float('nan'))"}, "are not finite"),
    ],
)
def test_whatever_the_code_does_ends_as_a_record(corpus, code, error):
    record = failing(corpus, **code)
    assert record.status == ("diverged" if "finite" in error else "error")
    assert error in record.error


def test_later_trials_work_after_a_killed_one_and_may_mend_a_failure(corpus):
    slow = failing(corpus, body="time.sleep(0.8)", seconds=0.4, name="slow")
    assert slow.status == "error"
    mended = corpus.run(None, TASK, "acc", "slow", prm={"lr": 0.5}, trials=1, epochs=2)[0]
    assert mended.status == "ok"
    assert [record.status for record in corpus.trials(mended.candidate)] == ["ok"]


def test_secrets_in_the_environment_do_not_reach_the_code(corpus, monkeypatch):
    monkeypatch.setenv("POMONA_TEST_SECRET", "x")
    corpus.close()
    record = failing(corpus, body="raise KeyError(os.environ.get('POMONA_TEST_SECRET', 'not there'))")
    assert "not there" in record.error


def test_every_epoch_is_a_row_with_all_columns(filled):
    frame = filled.data(dataset="blobs_classes", metric="acc", nn="plain")
    assert tuple(frame.columns[:11]) == (
        *("task", "dataset", "metric", "metric_code", "nn", "nn_code", "epoch", "accuracy", "duration", "prm"),
        "transform_code",
    )
    assert len(frame) == 6 * 3
    assert set(frame["epoch"]) == {1, 2, 3}
    assert frame["nn_code"].str.contains("def learn").all()
    assert frame["metric_code"].str.startswith("def acc(").all()
    assert all(f"def {row.prm['transform']}(" in row.transform_code for row in frame.itertuples())
    assert frame["prm"].map(lambda prm: prm["batch"] in {16, 32, 64, 128}).all()
    assert frame["accuracy"].between(0, 1).all()
    assert (frame["duration"] > 0).all()
    assert len(filled.data(metric="acc", nn="plain", epoch=2)) == 6
    assert len(filled.data(max_rows=4)) == 4
    assert set(filled.data(prefix="lin")["nn"].str[:7]) == {"linear-"}
    assert set(filled.data(metric="r2")["task"]) == {"table-regression"}
    assert filled.data(task="img-classification").empty


def test_trials_are_kept_with_weights_cost_and_test_score(filled):
    record = filled.trials()[0]
    assert {"valid", "test"} == record.metrics.keys()
    assert record.cost["parameters"] == 6 * 3 + 3
    assert record.cost["latency"] > 0
    state = filled.zoo.state(record.id)
    assert {tuple(value.shape) for value in state.values()} == {(3, 6), (3,)}
    assert record.task["fingerprint"] == TASK.fingerprint()


def test_trials_beat_the_largest_class_and_later_searches_start_from_them(filled):
    largest = TASK.splits["valid"].y.bincount().max().item() / len(TASK.splits["valid"])
    assert filled.data(metric="acc", nn="plain", epoch=3)["accuracy"].max() > largest
    from pomona.zoo.trials import Search

    trials = [record for record in filled.trials() if record.recipe["metric"] == "acc" and len(record.curve) == 3]
    search = Search(set(PRM), trials, 4, 0, False)
    assert len(search.study.trials) == 6
    assert search.study.best_value == max(record.curve[-1]["accuracy"] for record in trials)


def test_pruning_stops_trials_below_the_median(corpus):
    records = corpus.run(None, TASK, "acc", "mlp", trials=12, epochs=4, prune=True)
    pruned = [record for record in records if record.extra["pruned"]]
    assert pruned
    assert all(record.status == "ok" and len(record.curve) < 4 and not record.weights for record in pruned)
    assert corpus.stats().set_index("nn")["pruned"].filter(like="mlp-").sum() == len(pruned)


def test_check_nn_judges_and_saves(corpus):
    code = PLAIN.replace("Flatten()", "Flatten(1)")
    before = len(corpus.trials())
    checked = corpus.check_nn(code, None, TASK, "acc", PRM, save=False, name="checked")
    assert len(corpus.trials()) == before
    saved = corpus.check_nn(code, None, TASK, "acc", PRM, epochs=2, name="checked")
    assert checked.name == saved.name == f"checked-{codes.identity(codes.contract(code))}"
    assert 0 <= saved.accuracy <= 1 and 0 < saved.code_quality <= 1
    duration = corpus.trials()[-1].cost["seconds"]
    assert saved.accuracy_to_time == pytest.approx(saved.accuracy / duration)
    assert len(corpus.data(nn="checked")) == 2
    with pytest.raises(PomonaError, match="the network failed: NameError"):
        corpus.check_nn(code.replace("in_shape[0]", "unheard_of"), None, TASK, "acc", PRM)
    with pytest.raises(PomonaError, match="is in the corpus already"):
        corpus.check_nn(code, None, TASK, "acc", PRM, epochs=2, name="checked")


def test_stats_plot_and_csv_summarise_the_corpus(filled, tmp_path):
    stats = filled.stats().set_index("nn").filter(like="plain-", axis=0)
    row = stats[stats["metric"] == "acc"].iloc[0]
    best = filled.data(only_best=True, metric="acc", nn="plain", epoch=3)["accuracy"].iloc[0]
    assert (row["trials"], row["failed"], row["best"]) == (6, 0, best)
    figure = filled.plot()
    assert {trace.name for trace in figure.data} >= {"blobs_classes, acc", "blobs_classes, f1", "blobs_number, r2"}
    frame = pd.read_csv(filled.export("csv", tmp_path / "rows.csv"))
    assert len(frame) == len(filled.data())
    assert json.loads(frame["prm"][0]) == filled.data()["prm"][0]
    with pytest.raises(PomonaError, match="format='xml' is not known"):
        filled.export("xml", tmp_path / "rows")


def test_an_empty_corpus_has_the_columns_and_refuses_to_plot(tmp_path):
    with Zoo(tmp_path) as zoo:
        assert list(zoo.data().columns)[:2] == ["task", "dataset"]
        assert zoo.data(only_best=True).empty
        assert zoo.corpus.stats().empty
        with pytest.raises(PomonaError, match="no records to plot"):
            zoo.corpus.plot()
        with pytest.raises(PomonaError, match="holds no exported corpus"):
            zoo.corpus.import_(tmp_path / "absent")


def test_exported_code_that_was_changed_is_refused(filled, tmp_path):
    filled.export("json", tmp_path / "out")
    file = next((tmp_path / "out" / "nn").glob("plain-*.py"))
    file.write_text(file.read_text().replace("3.0", "4.0"))
    with Zoo(tmp_path / "empty") as zoo, pytest.raises(PomonaError, match="is not the code its name says"):
        zoo.corpus.import_(tmp_path / "out")


def test_bad_names_are_explained(corpus):
    with pytest.raises(PomonaError, match="nn='mpl' is not known; did you mean mlp"):
        corpus.run(None, TASK, "acc", "mpl")
    with pytest.raises(PomonaError, match="metric='accuracy' is not known"):
        corpus.run(None, TASK, "accuracy", "mlp")
    with pytest.raises(PomonaError, match="task='img-classification' does not fit 'blobs_classes'"):
        corpus.run("img-classification", TASK, "acc", "mlp")
    with pytest.raises(PomonaError, match="trials=0 must be a number above 0"):
        corpus.run(None, TASK, "acc", "mlp", trials=0)
    only = corpus.register(
        PLAIN.replace("A linear", "").replace("Flatten()", "Flatten(1, 1)"), "only", "img-classification"
    )
    with pytest.raises(PomonaError, match="is for task='img-classification'"):
        corpus.run(None, TASK, "acc", only)


def test_two_codes_of_one_name_need_the_whole_identity(corpus):
    a = corpus.register(PLAIN + "\nA = 1\n", "twin")
    corpus.register(PLAIN + "\nA = 2\n", "twin")
    with pytest.raises(PomonaError, match="nn='twin' fits twin-.*; give the whole name"):
        corpus.find("twin")
    assert corpus.find(a)[0] == a


def test_limits_must_be_positive(corpus):
    with pytest.raises(PomonaError, match="seconds=0 must be a number above 0"):
        Corpus(corpus.zoo, seconds=0)


def test_prm_maps_keep_their_documented_ends():
    ends = {name: (map(0.0), map(1.0)) for name, map in settings.MAPS.items()}
    assert ends["lr"] == pytest.approx((1e-3, 1.0))
    assert ends["momentum"] == pytest.approx((0.0, 0.99))
    assert settings.MAPS["momentum"](0.5) == pytest.approx(0.9)
    assert (ends["width"], ends["depth"]) == ((16, 128), (1, 4))
    assert settings.mapped({"lr": 0.0, "scale": 0.25, "batch": 8}) == pytest.approx(
        {"lr": 1e-3, "scale": 0.25, "batch": 8}
    )


def test_scores_agree_with_their_definitions():
    from sklearn.metrics import f1_score, r2_score

    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(50, 3, generator=generator), torch.randint(3, (50,), generator=generator)
    said = output.argmax(-1)
    assert settings.acc(output, target) == (said == target).double().mean().item()
    assert settings.f1(output, target) == pytest.approx(f1_score(target, said, average="macro"))
    y = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    assert settings.r2(output[:, :2], y) == pytest.approx(r2_score(y, output[:, :2].double()))


@pytest.mark.parametrize("name", settings.TRANSFORMS)
def test_transforms_fit_on_training_inputs_and_are_still_in_evaluation(name):
    generator = torch.Generator().manual_seed(0)
    train, x = 3 + 2 * torch.randn(40, 2, 5, generator=generator), torch.randn(7, 2, 5, generator=generator)
    train[:, 0, 0] = 1.0
    apply = settings.transform(name)(train)
    assert apply(x, None).shape == x.shape
    assert apply(train, None).isfinite().all()
    assert torch.equal(apply(x, None), apply(x, None))
    drawn = [apply(x, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0], apply(x, None)) == (name not in {"noise", "mask"})
    if name == "standardize":
        assert apply(train, None)[:, 1].mean().abs() < 1e-5
    if name == "norm":
        assert apply(x, None).flatten(1).var(1, correction=0).sub(1).abs().max() < 1e-5


def test_results_are_finite_numbers(filled):
    for record in filled.trials():
        if record.status == "ok":
            assert all(math.isfinite(point["accuracy"]) for point in record.curve)
