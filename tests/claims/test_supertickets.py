import pytest

from pomona.claims.supertickets import PIPELINES, SIZES, supertickets


@pytest.mark.slow
def test_smoke_run_gives_every_pipeline_at_one_density():
    evidence = supertickets("smoke", (11,))
    assert len(evidence.method) == len(evidence.baseline) == 1
    assert set(evidence.details["accuracy"]) == set(PIPELINES)
    assert all(0 <= value <= 1 for part in ("accuracy", "digits") for value in evidence.details[part].values())
    reports = evidence.details["last seed"].values()
    assert all(report["density"] == pytest.approx(SIZES["smoke"]["density"], abs=5e-3) for report in reports)
    assert max(r["flops"] for r in reports) < 1.5 * min(r["flops"] for r in reports)
