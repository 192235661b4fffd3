"""The protocol held: equal work for all, test read once, failures kept apart, time kept."""

import json
import math
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from pomona import catalog
from pomona.data import load
from pomona.errors import PomonaError
from pomona.recipe import Recipe, execute
from pomona.study import compare
from pomona.study.comparison import name_candidates
from pomona.study.protocol import TUNING_SEED, choose_budget, seed_list
from pomona.study.references import NAMES, run_references
from pomona.study.slots import sweep
from pomona.study.tuning import Tuner, space, tune
from pomona.train import loop
from pomona.zoo import Zoo

IRIS = load("iris")
SMALL = {"seeds": 2, "trials": 2, "epochs": 2, "references": False}
DIVERGES = "mlp act=square depth=6 lr=1e9 optimizer=sgd clip=none"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    candidates = ["mlp width=16", "mlp width=8 act=gelu"]
    place = tmp_path_factory.mktemp("study")
    return compare(IRIS, candidates=candidates, seeds=3, trials=2, epochs=5, zoo=str(place))


def test_each_candidate_has_equal_trials_seeds_and_budget_and_test_is_read_once(monkeypatch):
    read, trained = [], []
    evaluate, fit = execute.evaluate, execute.fit

    def counted(net, task, split):
        read.append(split)
        return evaluate(net, task, split)

    def watched(net, task, settings, *, budget, seed, **more):
        trained.append((budget, seed, settings.batch_size))
        return fit(net, task, settings, budget=budget, seed=seed, **more)

    population = execute.fit_population

    def watched_population(members, task):
        trained.extend((member.budget, member.seed, member.training.batch_size) for member in members)
        return population(members, task)

    monkeypatch.setattr(execute, "evaluate", counted)
    monkeypatch.setattr(execute, "fit", watched)
    monkeypatch.setattr(execute, "fit_population", watched_population)
    compare(IRIS, candidates=["mlp width=8", "mlp width=9"], seeds=[5, 6], trials=3, epochs=2, references=False)
    assert read.count("test") == 2 * 2  # candidates x seeds, none for tuning
    assert read.count("valid") == 2 * (3 + 2)
    assert len({budget for budget, _, _ in trained}) == 1
    assert sorted(seed for _, seed, _ in trained) == sorted([5, 5, 6, 6] + [5 + TUNING_SEED] * 6)


def test_all_candidates_see_the_same_batches_at_a_seed(monkeypatch):
    seen: dict[int, list[torch.Tensor]] = {}
    batches = loop.batches

    def watched(count, batch_size, seed):
        run = []
        seen.setdefault(seed, []).append(run)
        for index in batches(count, batch_size, seed):
            run.append(index)
            yield index

    monkeypatch.setattr(loop, "batches", watched)
    compare(IRIS, candidates=["mlp width=8", "mixer width=8"], population=False, **{**SMALL, "trials": 0})
    for runs in seen.values():
        assert len(runs) == 2 and len(runs[0]) == len(runs[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(seen[0][0][0], seen[1][0][0])


def test_a_candidate_that_raises_and_one_that_diverges_are_rows_and_the_rest_go_on(monkeypatch):
    class Broken(nn.Module):
        def forward(self, x):
            return x.no_such_attribute

    module = types.ModuleType("broken_layers")
    module.Broken = Broken
    monkeypatch.setitem(sys.modules, "broken_layers", module)
    monkeypatch.setitem(catalog.slots()["act"], "broken", catalog.SlotEntry("broken_layers:Broken"))
    done = compare(IRIS, candidates=["mlp act=broken", DIVERGES, "mlp width=8"], **SMALL)
    raised, lost, fine = (done.row(name) for name in ("mlp act=broken", DIVERGES, "mlp width=8"))
    assert raised.status == "error" and "no_such_attribute" in raised.note and "\n" not in raised.note
    assert lost.status == "diverged" and "infinite or undefined" in lost.note
    assert fine.status == "ok" and len(fine.values) == 2
    assert next(row.name for row in done.rows) == "mlp width=8" and done.best_record.candidate == "mlp width=8"
    assert len(done.table()) == 3
    json.dumps(done.to_json(), allow_nan=False)


def test_when_nothing_finishes_there_is_no_best():
    done = compare(IRIS, candidates=[DIVERGES], **SMALL)
    assert done.best_record is None and done.sentences == ["No network finished, so nothing can be compared."]
    with pytest.raises(PomonaError, match=r"^no candidate finished, so there is no best network$"):
        _ = done.best


def test_the_table_has_its_columns_best_first(study):
    table = study.table()
    assert list(table.columns[:14]) == [
        "kind", "accuracy", "low", "high", "difference", "difference_low", "difference_high", "probability", "relative",
        "parameters", "flops", "seconds", "memory", "latency_1",
    ]  # fmt: skip
    assert list(table.columns[-2:]) == ["status", "note"]
    assert list(table["accuracy"]) == sorted(table["accuracy"], reverse=True)
    assert set(table.index) == {"mlp width=16", "mlp width=8 act=gelu", *NAMES["classes"]}
    networks = table[table.kind == "network"]
    assert (networks[["parameters", "flops", "seconds", "memory", "latency_1", "latency_256"]] > 0).all().all()
    assert math.isnan(table.loc["mlp width=16", "difference"])  # the reference has none to itself
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()


def test_the_mean_is_of_the_seeds_and_the_difference_is_paired(study):
    one, other = study.row("mlp width=8 act=gelu"), study.row("mlp width=16")
    assert one.mean == pytest.approx(np.mean(one.values))
    assert one.difference.mean == pytest.approx(np.mean(np.subtract(one.values, other.values)))


def test_the_best_network_is_chosen_on_validation_and_not_on_test(study):
    import copy

    shifted = copy.copy(study)
    shifted.records = copy.deepcopy(study.records)
    for record in shifted.records["mlp width=16"]:
        record.metrics["valid"]["accuracy"], record.metrics["test"]["accuracy"] = 0.99, 0.10
    for record in shifted.records["mlp width=8 act=gelu"]:
        record.metrics["valid"]["accuracy"], record.metrics["test"]["accuracy"] = 0.10, 0.99
    shifted.rows = shifted._rows()
    assert shifted.best_record.candidate == "mlp width=16"
    assert next(row.name for row in shifted.rows if row.kind == "network") == "mlp width=8 act=gelu"


def test_the_best_network_predicts_as_it_was_judged(study):
    best, record = study.best, study.best_record
    x, y = study.task.splits["test"]
    accuracy = (best.network(x).argmax(-1) == y).float().mean()
    assert float(accuracy) == pytest.approx(record.metrics["test"]["accuracy"])


def test_json_is_strict_and_says_everything(study, tmp_path):
    path = tmp_path / "study.json"
    data = study.to_json(path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == json.loads(json.dumps(data, allow_nan=False))
    assert {"study", "task", "protocol", "rows", "sentences", "curves", "best", "networks", "environment"} <= set(data)
    assert len(data["rows"]) == 7 and data["best"]["id"] == study.best_record.id


def test_curves_are_one_frame(study):
    curves = study.curves
    assert {"name", "seed", "step", "examples", "train_loss", "valid_loss", "accuracy"} <= set(curves.columns)
    assert curves.groupby(["name", "seed"]).ngroups == 6


def test_a_study_of_numbers_ranks_lower_first():
    done = compare("diabetes", candidates=["mlp width=8", "mlp depth=0"], seeds=2, trials=0, epochs=5)
    values = [row.mean for row in done.rows]
    assert done.metric == "rmse" and values == sorted(values)
    assert {row.name for row in done.rows if row.kind == "reference"} == set(NAMES["number"])


def test_match_gives_all_the_references_parameters():
    done = compare(IRIS, candidates=["mlp width=64", "mlp linear=quadratic", "mlp depth=3"], match="params", **SMALL)
    sizes = [row.cost["parameters"] for row in done.rows]
    assert max(sizes) <= 1.02 * min(sizes) * 1.02


def test_what_does_not_fit_the_data_is_left_out_where_that_is_allowed(tmp_path):
    narrow = "mlp norm=group:groups=7 width=16"
    left = compare(IRIS, candidates=["mlp width=16", narrow], optional=[narrow], zoo=str(tmp_path), **SMALL)
    assert list(left.records) == ["mlp width=16"]
    assert f"{narrow} was left out" in left.notes[0]
    with pytest.raises(PomonaError, match="groups"):
        compare(IRIS, candidates=["mlp width=16", narrow], match="params", zoo=str(tmp_path), **SMALL)


def test_resume_runs_nothing_that_is_done_and_gives_the_same(monkeypatch):
    first = compare(IRIS, candidates=["mlp width=8"], **SMALL)
    trained = []
    monkeypatch.setattr("pomona.study.runner.train_recipe", lambda *a, **k: trained.append(a))
    again = compare(IRIS, candidates=["mlp width=8"], resume=True, **SMALL)
    assert not trained and again.id == first.id and again.row("mlp width=8").values == first.row("mlp width=8").values
    ids = [record.id for records in again.records.values() for record in records]
    assert ids == [record.id for records in first.records.values() for record in records]


def test_another_question_is_another_study():
    first = compare(IRIS, candidates=["mlp width=8"], **SMALL)
    other = compare(IRIS, candidates=["mlp width=8"], resume=True, **{**SMALL, "seeds": 3})
    with Zoo() as zoo:
        assert other.id != first.id and len(zoo.records(study=first.id)) == 4


@pytest.mark.slow
def test_a_wall_clock_is_kept_within_a_quarter():
    candidates = ["mlp width=8 patience=none", "mlp width=16 patience=none"]
    done = compare(IRIS, candidates=candidates, seeds=2, trials=2, budget="16s")
    assert 12 <= done.seconds <= 20


def test_progress_is_told_before_each_training():
    told = []
    compare(IRIS, candidates=["mlp width=8"], progress=told.append, **SMALL)
    assert [(now.done, now.total, now.phase) for now in told] == [
        (0, 4, "tune"),
        (1, 4, "tune"),
        (2, 4, "seed"),
        (3, 4, "seed"),
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"candidates": []}, "candidates=[] names nothing to compare; give some, such as mlp and kan"),
        ({"candidates": ["mlp", "mlp"]}, "candidate 'mlp' is given twice"),
        ({"candidates": ["mlpp"]}, "candidate='mlpp' is not known; did you mean mlp"),
        ({"seeds": 0}, "seeds=0 must name at least one seed"),
        ({"seeds": [1, 1]}, "seeds=[1, 1] names a seed twice"),
        ({"seeds": "3"}, "seeds='3' must be a number of seeds, such as 5, or a list of them"),
        ({"seeds": [1.5]}, "seeds=[1.5] must hold whole numbers, not 1.5"),
        ({"trials": -1}, "trials=-1 must be a whole number, 0 or more"),
        ({"budget": "2 bananas"}, "budget='2 bananas' is not a duration; write it as 90s, 2m or 1h30m"),
        (
            {"budget": "2m", "epochs": 3},
            "give one budget, not budget and epochs; budget is the wall-clock of the whole study",
        ),
        ({"epochs": 0}, "epochs=0 must be a number above 0"),
        ({"reference": "kan"}, "reference='kan' is not known; "),
        ({"match": "parms"}, "match='parms' is not known; did you mean params?"),
        ({"device": "tpu"}, "device='tpu' is not available here; use cpu or auto"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(settings, message):
    with pytest.raises(PomonaError) as error:
        compare(IRIS, **{"candidates": ["mlp"], **settings})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_labels_name_candidates():
    assert list(name_candidates({"plain": "mlp", "smooth": "mlp act=gelu"})) == ["plain", "smooth"]
    assert list(name_candidates("mlp")) == ["mlp"]
    assert name_candidates([Recipe.parse("mlp act=gelu")]) == {"mlp act=gelu": Recipe.parse("mlp act=gelu")}


def test_a_wall_clock_is_shared_equally():
    none = dict.fromkeys(["epochs", "examples", "seconds", "flops"])
    budget, whole = choose_budget(budget="100s", **none, trainings=9, references=5)
    assert whole == 100 and budget.kind == "seconds" and budget.amount == pytest.approx(10)
    assert seed_list(3) == [0, 1, 2] and seed_list(range(4, 6)) == [4, 5]


def test_tuning_proposes_the_same_again_and_keeps_what_did_best():
    def run(index, tried):
        return -abs(math.log(tried.training.get("lr", 1e-3) / 5e-3))

    recipe = Recipe.parse("mlp")
    assert tune(recipe, 8, 3, run) == tune(recipe, 8, 3, run) != {}
    assert tune(recipe, 8, 3, lambda index, tried: math.nan) == {}
    assert tune(recipe, 3, 3, lambda index, tried: -index) == {}  # the recipe's own settings were tried first and best
    tuner = Tuner(recipe, 0)
    assert tuner.suggest() == (None, {})


def test_settings_that_a_recipe_fixes_are_not_tuned():
    assert set(space(Recipe.parse("mlp"))) >= {"lr", "weight_decay"}
    assert "lr" not in space(Recipe.parse("mlp lr=0.01"))
    assert space(Recipe.parse("mlp optimizer=sgd"))["lr"][1] > space(Recipe.parse("mlp"))["lr"][1]


def test_a_sweep_makes_a_candidate_of_each_name_the_backbones_own_first():
    assert sweep("act=gelu,tanh", "mlp width=8") == [
        "mlp act=relu width=8",
        "mlp act=gelu width=8",
        "mlp act=tanh width=8",
    ]
    assert len(sweep("norm=all")) == len(catalog.slots()["norm"])
    for text, message in [
        ("act", r"slot='act' must be written as slot=all or slot=name,name"),
        ("conv=all", r"slot of mlp 'conv' is not known"),
        ("act=gelo", r"act='gelo' is not known; did you mean"),
    ]:
        with pytest.raises(PomonaError, match=message):
            sweep(text)


def test_classical_models_beat_chance_and_one_that_cannot_be_fitted_says_why():
    found = {model.name: model for model in run_references(IRIS, [0], trials=2)}
    assert found["logistic"].test[0]["accuracy"] > 0.85 > 0.5 > found["majority"].test[0]["accuracy"]
    frame = pd.DataFrame({"when": range(40), "x": np.random.default_rng(0).normal(size=40)})
    frame["y"] = ["late" if i >= 34 else "early" for i in range(40)]
    task = load(frame, "y", time="when")
    broken = {model.name: model for model in run_references(task, [0], trials=1)}["logistic"]
    assert broken.test == [] and broken.note.startswith("ValueError: ")
    done = compare(task, candidates=["mlp width=4"], seeds=1, trials=0, epochs=1)
    assert done.row("logistic").status == "error" and done.row("mlp width=4").status == "ok"
