import numpy as np
import pandas as pd
import pytest

from pomona.data.types import date_format, infer, is_identifier_name, labels, to_date, to_number
from pomona.errors import PomonaError

N = 60
DAYS = pd.date_range("2021-01-15", periods=N)


def column(values, name="c"):
    return pd.Series(list(values), name=name)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 1, N), "number"),
        (np.arange(N) * 3, "number"),
        ([1.0, np.nan, np.inf] * 20, "number"),
        ([0, 1] * 30, "binary"),
        ([True, False, True] * 20, "binary"),
        ([True, None, False] * 20, "binary"),
        (["yes", "no"] * 30, "binary"),
        (["red", "green", "blue"] * 20, "category"),
        (["new york", "los angeles", "san francisco"] * 20, "category"),
        ([f"the {i}th of many good words" for i in range(N)], "text"),
        ([f"u{i}x" for i in range(N)], "drop"),
        (["1", "2.5", "?"] * 20, "number"),
        (["$1,200", "$950.50", "$7"] * 20, "number"),
        (["12%", "3%", "8 %"] * 20, "number"),
        (DAYS, "date"),
        (DAYS.tz_localize("Europe/Paris"), "date"),
        (DAYS.strftime("%Y-%m-%d"), "date"),
        (DAYS.strftime("%Y-%m-%dT%H:%M:%S"), "date"),
        (DAYS.strftime("%d/%m/%Y"), "date"),
        (DAYS.strftime("%m/%d/%y"), "date"),
        (DAYS.strftime("%d-%b-%Y"), "date"),
        (DAYS.strftime("%B %d, %Y"), "date"),
        ([f"img/{i}.png" for i in range(N)], "image"),
        (["same"] * N, "drop"),
        ([7] * N, "drop"),
        ([None] * N, "drop"),
        ([f"192.168.1.{i % 40}" for i in range(N)], "category"),
        ([f"555-123-{1000 + i % 30}" for i in range(N)], "category"),
        (["1", "2", "3+"] * 20, "category"),
        ([1.0, np.nan] * 30, "number"),
    ],
)
def test_kinds_are_inferred(values, kind):
    assert infer(column(values)).kind == kind


@pytest.mark.parametrize("name", ["id", "ID", "user_id", "orderId", "Unnamed: 0", "rownames", "key", "uuid", "index"])
def test_distinct_integers_with_an_identifier_name_are_dropped(name):
    assert is_identifier_name(name)
    assert infer(column(np.arange(N), name)).kind == "drop"
    assert infer(column(np.arange(N) // 2, name)).kind == "number"


@pytest.mark.parametrize("name", ["width", "paid", "grid", "humidity", "monkey", "idle", "candid"])
def test_other_names_are_no_identifiers(name):
    assert not is_identifier_name(name)


def test_an_override_wins():
    assert infer(column(np.arange(N), "zip"), "category").kind == "category"


def test_an_unknown_override_is_named():
    with pytest.raises(PomonaError, match=r"types\['c'\]='catgory' is not known; did you mean category"):
        infer(column([1]), "catgory")


def test_a_stray_word_in_a_number_column_is_an_error_with_row_and_column():
    values = [str(i) for i in range(100)]
    values[41] = "abc"
    with pytest.raises(PomonaError, match=r"column 'c', row 42: 'abc' is not a number \(1 such cells in 100\)"):
        infer(column(values))
    assert infer(column(values), "category").kind == "category"


def test_numbers_written_as_text_are_read():
    got = to_number(column(["1,234.5", "€7", " 8 ", "?", None, "inf", "-3%", "NA", "1e3"]))
    np.testing.assert_array_equal(got, [1234.5, 7, 8, np.nan, np.nan, np.nan, -3, np.nan, 1000])


def test_infinities_are_missing():
    np.testing.assert_array_equal(to_number(column([1.0, np.inf, -np.inf])), [1, np.nan, np.nan])


def test_a_whole_number_has_one_label():
    assert labels(column([1, 2])).tolist() == labels(column([1.0, 2.0])).tolist() == ["1", "2"]
    assert labels(column([1.0, None, 2.5])).dropna().tolist() == ["1", "2.5"]
    assert labels(column([True, False])).tolist() == ["True", "False"]
    assert labels(column([" a ", None]))[0] == "a"
    assert labels(column([" a ", None])).isna().tolist() == [False, True]


def test_day_first_is_found_when_month_first_does_not_fit():
    dates = column(["03/04/2020", "25/12/2020"])
    assert to_date(dates, date_format(dates) or "").dt.month.tolist() == [4, 12]
    assert to_date(column(["03/04/2020"]), date_format(column(["03/04/2020"])) or "").dt.month.tolist() == [3]


def test_time_zones_become_utc():
    dates = column(["2020-01-01T00:30:00+01:00", "2020-06-01T12:00:00+02:00"])
    assert to_date(dates, date_format(dates) or "")[0] == pd.Timestamp("2019-12-31 23:30")
