import datetime
import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from pomona.data.tables import plain_frame, read_table
from pomona.errors import PomonaError

FRAME = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": ["x", "y, z", "w"]}).astype({"c": object})


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_the_delimiter_is_found_whatever_the_suffix(tmp_path, delimiter, suffix):
    path = tmp_path / f"t{suffix}"
    FRAME.to_csv(path, sep=delimiter, index=False)
    frame, notes = read_table(path)
    pd.testing.assert_frame_equal(frame, FRAME)
    assert bool(notes) == (delimiter != ",")


def test_a_decimal_comma_is_found(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n1,5;2\n2,25;3\n")
    frame, notes = read_table(tmp_path / "t.csv")
    assert frame["a"].tolist() == [1.5, 2.25]
    assert "a comma is the decimal sign" in notes


def test_an_end_of_file_mark_is_no_cell(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,2\n3,4.5\x1a")
    assert read_table(tmp_path / "t.csv")[0]["b"].tolist() == [2, 4.5]


def test_gzip_is_read(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(FRAME.to_csv(index=False).encode()))
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv.gz")[0], FRAME)


def test_parquet_is_read(tmp_path):
    pytest.importorskip("pyarrow", exc_type=ImportError)
    FRAME.to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet")[0], FRAME)


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "UTF-16"), ("cp1252", "Windows-1252")]
)
def test_the_encoding_is_found_and_said(tmp_path, encoding, said):
    (tmp_path / "t.csv").write_bytes("größe,stadt\n1,Zürich\n2,Orléans\n".encode(encoding))
    frame, notes = read_table(tmp_path / "t.csv")
    assert list(frame) == ["größe", "stadt"]
    assert frame["stadt"].tolist() == ["Zürich", "Orléans"]
    assert (said in notes[0]) if said else not notes


def test_repeated_names_are_numbered_and_said(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n4,5,6\n")
    frame, notes = read_table(tmp_path / "t.csv")
    assert list(frame) == ["a", "b", "a.1"]
    assert notes == ["repeated column names are numbered (a -> a.1)"]
    frame, notes = plain_frame(pd.DataFrame([[1, 2, 3]], columns=["a", "a", "a.1"]))
    assert list(frame) == ["a", "a.1", "a.1.1"]
    assert notes


def test_a_missing_header_is_found(tmp_path):
    (tmp_path / "t.csv").write_text("1,2.5\n3,4\n")
    frame, notes = read_table(tmp_path / "t.csv")
    assert list(frame) == ["column_0", "column_1"] and len(frame) == 2
    assert "no header" in notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file 't.csv' is empty"),
        (b"  \n\n", "file 't.csv' is empty"),
        (b"a,b\n", "file 't.csv' has a header and no rows"),
        (b"a^b^c\n1^2^3\n4^5^6\n", r"'\^' looks right \(3 columns\): give pandas.read_csv\(..., sep='\^'\)"),
        (b"a b c\n1 2 3\n4 5 6\n", r"a space looks right \(3 columns\)"),
        (b"a\n1\n2\n", "file 't.csv' has one column only"),
        (b"PK\x03\x04\0\0\0\0,\n,", "file 't.csv' is not text"),
        (b"a,b\n1,2\n1,2,3,4,5\n", "file 't.csv' cannot be read as a table: .*line 3"),
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(PomonaError, match=message):
        read_table(tmp_path / "t.csv")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "sales.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PomonaError, match=r"file '.*slaes.csv' is not there; did you mean sales.csv\?"):
        read_table(tmp_path / "slaes.csv")


def test_broken_gzip_is_said(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(PomonaError, match=r"file 't.csv.gz' cannot be read"):
        read_table(tmp_path / "t.csv.gz")


def test_extension_types_become_plain():
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, 2, None], dtype="Int64"),
            "full": pd.array([1, 2, 3], dtype="Int64"),
            "flag": pd.array([True, None, False], dtype="boolean"),
            "word": pd.array(["a", None, "b"], dtype="string"),
            "kind": pd.Categorical(["x", "y", None]),
            "span": pd.to_timedelta([1, 2, 3], unit="min"),
            "price": [Decimal("1.5"), None, Decimal(2)],
            "day": [datetime.date(2020, 1, 1), None, datetime.date(2020, 1, 2)],
            ("two", "levels"): [1, 2, 3],
        },
        index=[5, 5, 7],
    )
    plain, _ = plain_frame(frame)
    assert list(plain)[-1] == "two levels"
    assert plain.index.tolist() == [0, 1, 2]
    kinds = plain.dtypes.astype(str)
    assert kinds[["whole", "span", "price"]].tolist() == ["float64"] * 3
    assert kinds["full"] == "int64"
    assert kinds["day"].startswith("datetime64")
    assert plain["flag"].isna().tolist() == plain["word"].isna().tolist() == [False, True, False]
    assert plain["kind"].isna().tolist() == [False, False, True]
    assert plain["span"].tolist() == [60, 120, 180]
    assert np.isnan(plain["whole"][2])


def test_lists_in_cells_are_refused():
    with pytest.raises(PomonaError, match="column 'c' holds a list in a cell"):
        plain_frame(pd.DataFrame({"c": [[1], [2]]}))
