import errno
import hashlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sqlalchemy import update

from pomona.errors import PomonaError
from pomona.zoo import Record, Zoo, tables, weights


@pytest.fixture(params=["folder", "url"])
def zoo(request, tmp_path):
    location = tmp_path / "zoo" if request.param == "folder" else f"sqlite:///{tmp_path / 'team.db'}"
    with Zoo(location) as opened:
        yield opened


@pytest.fixture
def folder_zoo(tmp_path):
    with Zoo(tmp_path / "zoo") as opened:
        yield opened


def state():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return net.state_dict()


def full_record(study):
    return Record(
        study=study,
        candidate="mlp act=gelu",
        phase="seed",
        index=2,
        seed=2**70,
        recipe={"backbone": "mlp", "slots": {"act": "gelu"}},
        task={"name": "digits", "fingerprint": "ab12", "inputs": {"shape": (64,)}, "pipeline": None},
        metrics={"valid": {"accuracy": 0.5, "auroc": math.nan}, "test": {"accuracy": 0.25}},
        curve=[{"step": 1, "loss": math.inf}],
        cost={"parameters": 24, "seconds": 0.5},
        versions={"torch": "2"},
        status="diverged",
        error="loss is infinite",
        parent=["abcdefghij"],
        extra={"array": torch.arange(3)},
    )


def files(zoo):
    return sorted(path.name for path in zoo.folder.path.iterdir())


def test_a_record_and_its_weights_come_back_as_they_were(zoo):
    study = zoo.start_study("f", {"seeds": 2})
    saved = state()
    record = full_record(study)
    identity = zoo.add(record, saved)
    found = zoo.get(identity[:6])
    assert (found.id, found.seed, found.index, found.candidate) == (identity, 2**70, 2, "mlp act=gelu")
    assert len(identity) == 10
    assert math.isnan(found.metrics["valid"]["auroc"])
    assert found.curve == [{"step": 1, "loss": math.inf}]
    assert found.task["inputs"] == {"shape": [64]}
    assert found.extra == {"array": [0, 1, 2]}
    assert (found.parent, found.status, found.error) == (["abcdefghij"], "diverged", "loss is infinite")
    assert found.created == record.created != ""
    loaded = zoo.state(identity)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == saved[name].dtype for name in saved)


def test_the_same_unit_is_stored_once(zoo):
    study = zoo.start_study("f", {})
    first = zoo.add(Record(study=study, candidate="mlp", phase="tune", index=0, seed=1), state())
    again = zoo.add(Record(study=study, candidate="mlp", phase="tune", index=0, seed=9), state())
    other = zoo.add(Record(study=study, candidate="mlp", phase="tune", index=1), None)
    assert first == again != other
    assert [record.seed for record in zoo.records(study=study)] == [1, 0]


def test_records_outside_a_study_are_always_new(zoo):
    assert zoo.add(Record(candidate="mlp")) != zoo.add(Record(candidate="mlp"))


def test_records_are_filtered_and_the_limit_keeps_the_newest(zoo):
    a, b = zoo.start_study("a", {}), zoo.start_study("b", {})
    for study in (a, b):
        for index in range(3):
            status = "ok" if index else "error"
            zoo.add(Record(study=study, candidate="mlp", phase="tune", index=index, status=status))
        zoo.add(Record(study=study, candidate="kan", phase="seed"))
    assert len(zoo.records()) == 8
    assert len(zoo.records(study=a)) == 4
    assert len(zoo.records(study=a, candidate="mlp", status="ok")) == 2
    assert [(r.study, r.candidate) for r in zoo.records(limit=2)] == [(b, "mlp"), (b, "kan")]
    assert len(zoo.records(phase="seed")) == 2


def test_studies_start_finish_and_resume_by_fingerprint(zoo):
    assert zoo.latest_study("f") is None
    first, second = zoo.start_study("f", {"n": 1}), zoo.start_study("f", {"n": 2})
    assert zoo.latest_study("f") == second != first
    assert zoo.study(second)["summary"] is None
    zoo.finish_study(second, {"best": "mlp"})
    assert zoo.study(second)["summary"] == {"best": "mlp"}
    assert zoo.study(second)["finished"] >= zoo.study(second)["created"]
    assert zoo.study(first)["spec"] == {"n": 1}
    with pytest.raises(PomonaError, match="study='nothing' is not known"):
        zoo.study("nothing")


def test_frame_has_one_row_a_record_with_metrics_and_costs(zoo):
    assert list(zoo.frame().columns[:2]) == ["id", "created"]
    zoo.add(full_record(None))
    zoo.add(Record(candidate="kan", metrics={"test": {"rmse": 1.5}}))
    frame = zoo.frame()
    assert frame["task"].tolist() == ["digits", ""]
    assert frame["test_accuracy"][0] == 0.25
    assert frame["test_rmse"][1] == 1.5
    assert frame["parameters"][0] == 24


def test_removing_a_record_removes_its_weights(zoo):
    keep, drop = zoo.add(Record(candidate="a"), state()), zoo.add(Record(candidate="b"), state())
    zoo.remove(drop)
    assert [record.id for record in zoo.records()] == [keep]
    assert len(zoo.state(keep)) == len(state())
    if zoo.folder:
        assert len(files(zoo)) == 1
    with pytest.raises(PomonaError, match="is not known"):
        zoo.state(drop)


def test_tied_sliced_and_empty_tensors_are_stored(zoo):
    base = torch.randn(4, 6)
    saved = {
        "a": base,
        "tied": base,
        "slice": base[:, ::2],
        "none": torch.empty(0, 3),
        "half": base.bfloat16(),
    }
    loaded = zoo.state(zoo.add(Record(), saved))
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert zoo.state(zoo.add(Record(), {})) == {}


def test_population_stacks_networks_of_one_shape(zoo):
    for seed in range(3):
        torch.manual_seed(seed)
        zoo.add(Record(candidate="mlp", seed=seed), state())
    zoo.add(Record(candidate="other"), {"w": torch.zeros(2)})
    chosen, stacked = zoo.population(candidate="mlp")
    assert [record.seed for record in chosen] == [0, 1, 2]
    assert stacked.shape == (3, 3 * 4 + 4 + 4 * 4)
    with pytest.raises(PomonaError, match="differ in shape"):
        zoo.population()
    with pytest.raises(PomonaError, match="no stored network"):
        zoo.population(candidate="absent")


def test_a_zoo_reopened_holds_everything(tmp_path):
    with Zoo(tmp_path / "zoo") as zoo:
        identity = zoo.add(Record(candidate="mlp"), state())
    with Zoo(str(tmp_path / "zoo")) as zoo:
        assert zoo.get(identity).candidate == "mlp"
        assert len(zoo.state(identity)) == len(state())


def test_location_comes_from_the_environment_or_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POMONA_ZOO", str(tmp_path / "named"))
    Zoo().close()
    monkeypatch.delenv("POMONA_ZOO")
    Zoo().close()
    assert (tmp_path / "named" / "zoo.sqlite").exists()
    assert (tmp_path / "pomona-zoo" / "zoo.sqlite").exists()


ADD = """
import sys
import torch
from pomona.zoo import Record, Zoo
location, study, who = sys.argv[1:]
with Zoo(location) as zoo:
    for index in range(50):
        own = torch.full((8,), float(index))
        zoo.add(Record(study=study, candidate=who, phase="seed", index=index), {"w": own})
        zoo.add(Record(study=study, candidate="shared", phase="seed", index=index), {"w": torch.rand(8)})
"""


def test_two_processes_write_one_zoo(tmp_path):
    # the zoo does not exist yet, so that both also race to create it
    location = tmp_path / "zoo"
    workers = [subprocess.Popen([sys.executable, "-c", ADD, location, "s", who]) for who in ("a", "b")]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    with Zoo(location) as zoo:
        for who in ("a", "b", "shared"):
            assert [record.index for record in sorted(zoo.records(candidate=who), key=lambda r: r.index)] == list(
                range(50)
            )
        assert all(
            torch.equal(zoo.state(r.id)["w"], torch.full((8,), float(r.index))) for r in zoo.records(candidate="a")
        )
        assert all(len(zoo.state(record.id)["w"]) == 8 for record in zoo.records(candidate="shared"))
        assert len(files(zoo)) == 150


KILL = """
import os, signal, sys
import torch
from pomona.zoo import Record, Zoo, store
zoo = Zoo(sys.argv[1])
zoo.add(Record(candidate="before"), {"w": torch.ones(2)})
zoo._engine.begin = lambda: os.kill(os.getpid(), signal.SIGKILL)  # the file is there, its row is not
zoo.add(Record(candidate="killed"), {"w": torch.ones(3)})
"""


def test_a_kill_between_file_and_row_leaves_an_orphan_that_is_tidied_after_an_hour(tmp_path):
    location = tmp_path / "zoo"
    assert subprocess.run([sys.executable, "-c", KILL, location]).returncode == -9
    with Zoo(location) as zoo:
        assert [record.candidate for record in zoo.records()] == ["before"]
        assert len(files(zoo)) == 2
        (zoo.folder.path / ".half-written.tmp").write_bytes(b"abc")
        old = time.time() - 2 * weights.ORPHAN_SECONDS
        for name in files(zoo):
            os.utime(zoo.folder.path / name, (old, old))
    with Zoo(location) as zoo:
        assert len(files(zoo)) == 1
        assert torch.equal(zoo.state(zoo.records()[0].id)["w"], torch.ones(2))


def test_a_full_disk_is_said_and_leaves_nothing(folder_zoo, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder_zoo.add(Record(candidate="kept"), state())
    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(PomonaError, match=r"the disk of the zoo at .* is full; free some space"):
        folder_zoo.add(Record(candidate="lost"), state())
    monkeypatch.undo()
    assert [record.candidate for record in folder_zoo.records()] == ["kept"]
    assert len(files(folder_zoo)) == 1


def test_a_database_out_of_pages_is_a_full_disk(zoo):
    from sqlalchemy import event

    @event.listens_for(zoo._engine, "begin")
    def shrink(connection):
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    with pytest.raises(PomonaError, match="is full; free some space"):
        zoo.add(Record(candidate="large", extra={"text": "x" * 10**6}))


def test_damaged_weights_are_refused(folder_zoo):
    identity = folder_zoo.add(Record(), state())
    path = folder_zoo.folder.path / files(folder_zoo)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PomonaError, match=f"the weights of network {identity} are damaged"):
        folder_zoo.state(identity)
    path.unlink()
    with pytest.raises(PomonaError, match=f"the weights of network {identity} are missing"):
        folder_zoo.state(identity)


def test_the_checksum_is_that_of_the_file(folder_zoo):
    record = Record()
    folder_zoo.add(record, state())
    data = (folder_zoo.folder.path / files(folder_zoo)[0]).read_bytes()
    assert record.weights == folder_zoo.get(record.id).weights == hashlib.sha256(data).hexdigest()


def test_a_zoo_of_a_newer_version_is_refused(tmp_path):
    with Zoo(tmp_path) as zoo, zoo._engine.begin() as connection:
        connection.execute(update(tables.meta).values(value="7"))
    with pytest.raises(PomonaError, match="schema version 7 and this Pomona reads up to version 1"):
        Zoo(tmp_path)


def test_a_zoo_of_an_older_version_is_migrated(tmp_path, monkeypatch):
    with Zoo(tmp_path) as zoo:
        zoo.add(Record(candidate="old"))
    monkeypatch.setattr(tables, "SCHEMA", 2)
    monkeypatch.setitem(
        tables.MIGRATIONS,
        1,
        lambda connection: connection.execute(update(tables.records).values(candidate="new")),
    )
    for _ in range(2):  # the second time there is nothing left to do
        with Zoo(tmp_path) as zoo:
            assert zoo.records()[0].candidate == "new"


def test_unknown_and_ambiguous_ids_are_explained(zoo):
    with pytest.raises(PomonaError, match="the zoo at .* is empty"):
        zoo.get("abc")
    ids = [zoo.add(Record(candidate=str(i))) for i in range(40)]
    letters = [identity[0] for identity in ids]
    twice = next(letter for letter in letters if letters.count(letter) > 1)
    with pytest.raises(PomonaError, match=f"id='{twice}' fits .*; give more of it"):
        zoo.get(twice)
    wrong = ids[0][:9] + ("2" if ids[0][9] != "2" else "3")
    with pytest.raises(PomonaError, match=f"id='{wrong}' is not known; did you mean {ids[0]}"):
        zoo.get(wrong)
    with pytest.raises(PomonaError, match="is not known"):
        zoo.get("%")


def test_a_location_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PomonaError, match="is a file; give a folder or a database URL"):
        Zoo(tmp_path / "file")


def test_a_location_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PomonaError, match="cannot be written to"):
        Zoo("/proc/zoo")
    (tmp_path / "file").write_text("")
    with pytest.raises(PomonaError, match="cannot be written to"):
        Zoo(tmp_path / "file" / "inside")
    with pytest.raises(PomonaError, match="cannot be written to"):
        Zoo(f"sqlite:///{tmp_path / 'absent' / 'team.db'}")

    def denied(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(PomonaError, match=r"cannot be written to \(Permission denied\)"):
        Zoo(tmp_path / "zoo")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "zoo.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(PomonaError, match="is damaged or not a zoo"):
        Zoo(tmp_path)


def test_a_locked_zoo_is_said_to_be_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BUSY_SECONDS", 0.05)
    with Zoo(tmp_path) as zoo, Zoo(tmp_path) as other, other._engine.begin() as connection:
        connection.execute(update(tables.meta).values(value="1"))
        with pytest.raises(PomonaError, match="is busy"):
            zoo.add(Record())


def test_a_missing_driver_and_a_bad_url_are_explained():
    with pytest.raises(PomonaError, match="needs a database driver"):
        Zoo("oracle+cx_oracle://user:secret@host/db")
    with pytest.raises(PomonaError, match="failed while opening it"):
        Zoo("nosuchthing://host/db")


def test_only_dense_tensors_are_stored(zoo):
    with pytest.raises(PomonaError, match=r"state\['w'\] is a list"):
        zoo.add(Record(), {"w": [1.0]})
    with pytest.raises(PomonaError, match=r"state\['w'\] is a torch.sparse_coo tensor"):
        zoo.add(Record(), {"w": torch.eye(2).to_sparse()})
    with pytest.raises(PomonaError, match="meta device"):
        zoo.add(Record(), {"w": torch.empty(2, device="meta")})
    assert zoo.records() == []
    with pytest.raises(PomonaError, match="was stored without weights"):
        zoo.state(zoo.add(Record()))


def test_the_store_alone_imports_neither_torch_nor_pandas(tmp_path):
    code = (
        "import sys; from pomona.zoo import Record, Zoo; zoo = Zoo(sys.argv[1]);"
        "zoo.add(Record()); zoo.records();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pandas', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 0
