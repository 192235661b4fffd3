import math

import pytest

from pomona.claims.quantize import STATEMENTS, quantize, statements


def test_smoke_run_gives_six_statements_and_the_table():
    evidence = quantize("smoke", (7,))
    assert len(evidence.values) == len(evidence.bounds) == len(STATEMENTS) == 6
    assert all(map(math.isfinite, evidence.values))
    for kind in ("images", "series"):
        table = evidence.details["accuracy"][kind]
        assert all(0 <= value <= 100 for value in table.values())
        assert {"W2A8 trained", "W3A8 AdaRound", "W8A32 channel mse", "mixed precision of 3 bits"} <= set(table)
        size = evidence.details["bytes"][kind]
        assert size["mixed precision of 3 bits"] <= size["W3A8 channel mse"] + 1
        assert size["float"] > 3 * size["W8A8 channel"]


def test_statements_are_differences_of_losses():
    names = ("W8A8 channel", "W3A32 tensor", "W3A32 channel", "W2A8 trained", "W2A8 channel", "W3A8 channel mse")
    values = (89.8, 80.0, 87.0, 88.0, 40.0, 86.0)
    extra = {"float": 90.0, "float, one more epoch": 91.0, "mixed precision of 3 bits": 88.0}
    found = statements(dict(zip(names, values, strict=True)) | extra)
    assert list(found.values()) == pytest.approx([0.2, -5.0, -2.0, 3.0, -40.0, -2.0])
