import numpy as np
import pytest

from pomona.errors import PomonaError
from pomona.search.nas_eval import (
    Live,
    Result,
    Trial,
    ablate_space,
    benchmark,
    depth_gap,
    kendall_tau,
    protocol_ladder,
    relative_improvement,
    report,
    seed_sensitivity,
    table,
    variance_components,
)
from pomona.search.strategies import RandomSearch, Ranked

SPACE = {"a": ("none", "x", "y"), "b": ("none", "x", "y")}
GAIN = {"none": 0.0, "x": 5.0, "y": 10.0}


def live():
    return Live(SPACE, lambda arch, seed: {"valid": 50 + GAIN[arch["a"]] + seed, "test": 60 + GAIN[arch["a"]]})


def test_average_architecture_has_no_improvement_and_rescaling_changes_nothing():
    accuracies = np.array([60.0, 70.0, 80.0])
    assert relative_improvement(accuracies.mean(), accuracies).value == 0
    first, scaled = (relative_improvement(c * np.array([75.0, 76.0]), c * accuracies) for c in (1.0, 0.01))
    np.testing.assert_allclose(first, scaled)
    assert first.value == pytest.approx(100 * 5.5 / 70) and first.low < first.value < first.high
    assert first.percentile == pytest.approx(200 / 3)


def test_components_recover_the_generating_variances():
    rng = np.random.default_rng(0)
    a, b, c = 2 * rng.normal(size=7), 0.5 * rng.normal(size=5), 3 * rng.normal(size=4)
    found = variance_components(c[:, None, None] + a[:, None] + b, ["protocol", "architecture", "seed"])
    for name, effect in {"protocol": c, "architecture": a, "seed": b}.items():
        assert found[name] == pytest.approx(effect.var(ddof=1))
    assert found["residual"] == pytest.approx(0, abs=1e-12)
    noise = [
        variance_components(a[:, None] + b + rng.normal(size=(7, 5)), ["architecture", "seed"]) for _ in range(400)
    ]
    assert np.mean([f["residual"] for f in noise]) == pytest.approx(1, abs=0.05)
    assert np.mean([f["architecture"] for f in noise]) == pytest.approx(a.var(ddof=1), rel=0.05)
    assert np.mean([f["seed"] for f in noise]) == pytest.approx(b.var(ddof=1), abs=0.05)


def test_kendall_tau_of_a_ranking_with_itself_and_its_reverse():
    ranks = np.arange(9)
    assert kendall_tau(ranks, ranks) == pytest.approx(1) and kendall_tau(ranks, -ranks) == pytest.approx(-1)


def test_bootstrap_interval_covers_the_truth_about_95_percent():
    rng, inside, runs = np.random.default_rng(1), 0, 400
    for i in range(runs):
        found = relative_improvement(rng.normal(72, 2, 30), rng.normal(70, 3, 40), resamples=500, seed=i)
        inside += found.low <= 100 * 2 / 70 <= found.high
    assert 0.91 <= inside / runs <= 0.98


def test_baseline_of_all_architectures_is_the_exact_space_mean():
    bench = live()
    everything = [bench.score({"a": a, "b": b}) for a in SPACE["a"] for b in SPACE["b"]]
    found = relative_improvement([65.0], everything)
    assert np.mean(everything) == pytest.approx(65) and found.value == pytest.approx(0)


def test_protocol_ladder_accumulates_tricks():
    calls = []

    def train(arch, seed, epochs=1, cutout=0):
        calls.append((epochs, cutout))
        return 10 * epochs + cutout + GAIN[arch["a"]] + 0.1 * seed

    archs = [{"a": "x", "b": "x"}, {"a": "y", "b": "x"}]
    ladder = protocol_ladder(archs, {"base": {}, "epochs": {"epochs": 3}, "cutout": {"cutout": 2}}, train, seeds=(0, 1))
    assert sorted(set(calls)) == [(1, 0), (3, 0), (3, 2)]
    assert ladder.means["cutout"] - ladder.means["base"] == pytest.approx(22)
    assert ladder.components["architecture"] == pytest.approx(12.5)


def test_seed_sensitivity_tells_signal_from_luck():
    signal = seed_sensitivity(np.arange(10)[:, None] * np.ones((1, 3)))
    assert signal.tau == pytest.approx(1) and signal.spread == 9 and signal.seed_std == 0
    luck = seed_sensitivity(np.random.default_rng(0).normal(size=(200, 3)))
    assert abs(luck.tau) < 0.1 and luck.seed_std == pytest.approx(0.88, abs=0.1)


def test_ablated_spaces_keep_one_operation_or_the_wiring():
    spaces = ablate_space(SPACE, keep=1, draws=1)
    assert spaces["one_op=x"] == {"a": ("x",), "b": ("x",)} and spaces["wiring=y"]["a"] == ("none", "y")
    assert sum(name.startswith("random_ops") for name in spaces) == 1


def test_depth_gap_is_the_tau_between_two_settings():
    archs = [{"a": a, "b": "x"} for a in SPACE["a"]]
    assert depth_gap(
        archs, lambda arch, seed, cells: cells * GAIN[arch["a"]], {"cells": 1}, {"cells": -3}
    ) == pytest.approx(-1)


def test_benchmark_judges_on_another_training_and_random_search_of_one_is_no_improvement_on_average():
    methods = {
        "top1": Trial(
            lambda bench, seed: Ranked([{"a": "y", "b": "x"}, {"a": "x", "b": "x"}], lambda arch: GAIN[arch["a"]]), 1
        ),
        "random": Trial(lambda bench, seed: RandomSearch(bench.variables, seed=seed), 20),
        "one draw": Trial(lambda bench, seed: RandomSearch(bench.variables, seed=seed), 1),
    }
    results = benchmark(methods, {"toy": live()}, n_random=8, seeds=range(40), protocol="toy")
    by_name = {row["method"]: row for row in table(results)}
    assert by_name["top1"]["accuracy"] == 70 and by_name["top1"]["evaluations"] == 0
    assert by_name["random"]["value"] > 5
    assert by_name["one draw"]["low"] < 0 < by_name["one draw"]["high"]
    assert "percentile" in report(results[0])


def test_live_bench_trains_once_a_seed():
    calls = []
    bench = Live(SPACE, lambda arch, seed: calls.append(seed) or {"valid": 1.0, "test": 2.0})
    arch = {"a": "x", "b": "y"}
    assert bench.score(arch) == 2 and bench.score(arch, split="valid", seed=0) == 1 and bench.score(arch, seed=1) == 2
    assert calls == [0, 1]


def test_report_refuses_a_single_accuracy():
    with pytest.raises(PomonaError, match="add accuracies of random architectures"):
        report(Result("m", "d", [90.0, 91.0]))
    with pytest.raises(PomonaError, match="repeat the search with another seed"):
        report(Result("m", "d", [90.0], [80.0]))
    with pytest.raises(PomonaError, match="how many architectures each search trained"):
        report(Result("m", "d", [90.0, 91.0], [80.0]))
    with pytest.warns(UserWarning, match="fewer than 8 random"):
        assert "+13.12 %" in report(Result("m", "d", [90.0, 91.0, 90.5], [80.0], 5, "p"))
