import json

import numpy as np
import pytest
import torch

from pomona import catalog
from pomona.claims import run
from pomona.claims.run import Verdict, claim, parse_seeds, plain, read_ledger, write_ledger
from pomona.claims.verdict import Bound, Comparison, Prediction
from pomona.errors import PomonaError

NAMES = {"metric": "accuracy", "method_name": "gelu", "baseline_name": "relu", "paper": "better by a point"}


@pytest.mark.parametrize(
    "given, seeds",
    [
        (None, [0, 1]),
        (3, [0, 1, 2]),
        ("3", [0, 1, 2]),
        ("1000:1003", [1000, 1001, 1002]),
        ([4, 9], [4, 9]),
        (range(2), [0, 1]),
    ],
)
def test_seeds_as_people_give_them(given, seeds):
    assert parse_seeds(given, "smoke") == seeds


@pytest.mark.parametrize(
    "given, message",
    [
        ("few", "seeds='few' must be a number, such as 5, or a range, such as 1000:1005"),
        ("0", "seeds='0' names no seed; use a number, such as 5, or a range, such as 1000:1005"),
        ("5:3", "seeds='5:3' names no seed; use a number, such as 5, or a range, such as 1000:1005"),
        ([1, 1], "seeds=[1, 1] names a seed twice"),
    ],
)
def test_seeds_that_are_none(given, message):
    with pytest.raises(PomonaError) as error:
        parse_seeds(given, "smoke")
    assert str(error.value) == message


def test_the_default_number_of_seeds_is_the_scales():
    assert [len(parse_seeds(None, scale)) for scale in run.SCALES] == list(run.SCALES.values())


def answer(monkeypatch, evidence):
    asked = []

    def function(scale, seeds):
        asked.append((scale, seeds))
        return evidence

    monkeypatch.setattr(run.catalog, "load", lambda path: function)
    return asked


def test_a_claim_becomes_a_verdict_with_all_that_was_run(monkeypatch):
    evidence = Comparison([0.9, 0.92], [0.8, 0.81], **NAMES, details={"curve": np.array([1.0, np.nan])}, note="n")
    asked = answer(monkeypatch, evidence)
    verdict = claim("gelu", "smoke", "5:7")
    assert asked == [("smoke", [5, 6])]
    assert verdict.verdict == "holds" == evidence.decision and verdict.seeds == [5, 6]
    assert verdict.effect == pytest.approx(0.105) and verdict.interval == list(evidence.interval)
    assert verdict.details == {"curve": [1.0, None]}
    assert verdict.sentence() == ("gelu holds: gelu against relu, +0.105 [+0.04147, +0.1685] in accuracy")
    assert verdict.machine and verdict.date and verdict.seconds >= 0


def test_sentences_of_predictions_and_bounds(monkeypatch):
    answer(monkeypatch, Prediction([1.0], [[1.0], [1.1]], **NAMES))
    assert (
        claim("gelu", "smoke").sentence()
        == "gelu holds: gelu against relu, worst deviation 1 standard errors of accuracy"
    )
    answer(monkeypatch, Bound([1.0], [1.5], **NAMES))
    assert (
        claim("gelu", "smoke").sentence() == "gelu holds: gelu against relu, smallest room to the bound 0.5 in accuracy"
    )


def test_what_is_not_known_is_one_sentence():
    with pytest.raises(PomonaError, match=r"^key='gelo' is not known; did you mean gelu"):
        claim("gelo", "smoke")
    with pytest.raises(PomonaError, match=r"^scale='tiny' is not known; choose one of smoke, full, gpu$"):
        claim("gelu", "tiny")
    waiting = next(paper.key for paper in catalog.papers().values() if not paper.claim)
    with pytest.raises(PomonaError, match=rf"^{waiting} has no claim yet; those that have are "):
        claim(waiting, "smoke")


def entry(key="gelu", verdict="holds", scale="full", note="", effect=1.0) -> Verdict:
    return Verdict(
        key=key, kind="comparison", scale=scale, verdict=verdict, effect=effect, interval=[0.5, 1.5], margin=0.0,
        method="a", baseline="b", metric="m", paper="p", seeds=[0, 1], seconds=1.0, machine="here", commit="",
        date="2026-01-01", note=note, censored=False, details={},
    )  # fmt: skip


def test_the_ledger_keeps_one_entry_a_key_and_scale_in_the_catalogues_order(tmp_path):
    path = tmp_path / "ledger.json"
    assert read_ledger(path) == []
    keys = list(catalog.papers())
    write_ledger(entry(keys[5]), path)
    write_ledger(entry(keys[2]), path)
    write_ledger(entry(keys[5], scale="smoke"), path)
    write_ledger(entry(keys[5], effect=2.0), path)
    assert [(e["key"], e["scale"], e["effect"]) for e in read_ledger(path)] == [
        (keys[2], "full", 1.0), (keys[5], "full", 2.0), (keys[5], "smoke", 1.0),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_a_note_written_by_hand_stays_while_the_verdict_stands(tmp_path):
    path = tmp_path / "ledger.json"
    write_ledger(entry(verdict="fails"), path)
    entries = read_ledger(path)
    entries[0]["note"] = "the scale is too small for it"
    path.write_text(json.dumps(entries))
    write_ledger(entry(verdict="fails"), path)
    assert read_ledger(path)[0]["note"] == "the scale is too small for it"
    write_ledger(entry(verdict="holds"), path)
    assert read_ledger(path)[0]["note"] == ""


def test_plain_data_for_json():
    data = {1: np.float64(1 / 3), "t": torch.tensor([1.0, float("nan")]), "n": (np.int64(3), None, True, "text")}
    assert plain(data) == {"1": 0.333333, "t": [1.0, None], "n": [3, None, True, "text"]}
    json.dumps(plain(data), allow_nan=False)


def test_the_ledger_in_the_source_is_strict_and_known():
    for found in read_ledger():
        assert found["key"] in catalog.papers() and found["verdict"] in {"holds", "fails", "undecided"}
        assert catalog.papers()[found["key"]].claim
