import math

from pomona.claims.hypernetworks import hypernetworks


def test_smoke_run_gives_finite_paired_results():
    evidence = hypernetworks("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert all(math.isfinite(value) for value in (*evidence.method, *evidence.baseline))
    assert {"LSTM", "HyperLSTM", "layer-norm LSTM", "layer-norm HyperLSTM"} < set(evidence.details)
    counts = [evidence.details[name]["parameters"] for name in ("LSTM", "HyperLSTM")]
    assert abs(counts[0] / counts[1] - 1) < 0.05
    assert set(evidence.details["static, on digits"]) == {"ordinary", "hyper"}
