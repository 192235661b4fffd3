"""A study gives the same records whether its trainings are stacked or not."""

import pytest

from pomona.data import load
from pomona.study import compare
from pomona.zoo import Zoo

CANDIDATES = ["mlp width=8 precision=float64 dropout=0.1", "mlp width=6 act=gelu precision=float64 norm=batch"]


def records(study):
    return {
        (r.candidate, r.phase, r.index): r for part in (study.records, study.tuning) for rs in part.values() for r in rs
    }


def test_records_are_the_same_with_and_without_populations(tmp_path):
    both = [
        compare(
            "iris", candidates=CANDIDATES, seeds=2, trials=8, epochs=4, references=False, population=population,
            zoo=str(tmp_path / str(population)),
        )
        for population in (True, False)
    ]  # fmt: skip
    stacked, alone = map(records, both)
    assert stacked.keys() == alone.keys() and len(stacked) == 2 * (8 + 2)
    for key, record in stacked.items():
        other = alone[key]
        assert record.status == "ok", record.error
        assert (record.recipe, record.seed, record.status, record.extra) == (
            other.recipe, other.seed, other.status, other.extra
        )  # fmt: skip
        for split in record.metrics:
            assert record.metrics[split] == pytest.approx(other.metrics[split], rel=1e-6, abs=1e-6)
        assert record.cost.keys() == other.cost.keys()
    assert both[0].notes == both[1].notes == []


def test_a_candidate_that_cannot_be_stacked_is_trained_singly_and_a_note_says_why(tmp_path):
    study = compare(
        "iris", candidates=["mlp width=4"], seeds=2, trials=0, seconds=0.05, references=False, zoo=str(tmp_path)
    )
    assert study.rows[0].status == "ok"
    assert study.notes == [
        "mlp width=4 was trained one network at a time: a budget in seconds is each network's own, "
        "so they are trained one at a time"
    ]
    assert study.to_json()["notes"] == study.notes and study.notes[0] in repr(study)


def test_a_stopped_study_resumes_with_the_same_proposals(tmp_path, monkeypatch):
    options = {"candidates": CANDIDATES[:1], "seeds": 2, "trials": 8, "epochs": 2, "references": False}
    task, zoo = load("iris"), Zoo(tmp_path / "a")
    whole = records(compare(task, zoo=str(tmp_path / "b"), **options))
    add, count = Zoo.add, []

    def stops(self, *args):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        return add(self, *args)

    monkeypatch.setattr(Zoo, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(task, zoo=zoo, **options)
    monkeypatch.setattr(Zoo, "add", add)
    resumed = records(compare(task, zoo=zoo, resume=True, **options))
    assert {key: r.recipe for key, r in resumed.items()} == {key: r.recipe for key, r in whole.items()}
    for key, record in resumed.items():
        assert record.metrics["valid"] == pytest.approx(whole[key].metrics["valid"], rel=1e-6, abs=1e-6)
