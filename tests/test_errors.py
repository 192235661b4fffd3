import pytest

from pomona.errors import MissingExtra, PomonaError, check_divisible, check_positive, nearest, require, unknown


def test_nearest_are_the_most_alike_first_whatever_the_case():
    assert nearest("Gelu", ["relu", "GELU", "tanh"])[0] == "GELU"
    assert nearest("zzz", ["relu", "gelu"]) == []
    assert len(nearest("geluu", ["gelu", "gelu2", "gelu3", "gelu4"], most=2)) == 2


def test_unknown_names_the_near_ones_or_all_when_few_or_some_when_many():
    assert str(unknown("act", "geluu", ["gelu", "tanh"])) == "act='geluu' is not known; did you mean gelu?"
    assert str(unknown("act", "zzz", ["gelu", "tanh"])) == "act='zzz' is not known; choose one of gelu, tanh"
    many = str(unknown("act", "zzz", [f"name{i}" for i in range(100)]))
    assert many.endswith(", ... (100 in all)") and "name23" in many and "name24" not in many
    assert str(unknown("key of mlp", "wdth", ["width"])) == "key of mlp 'wdth' is not known; did you mean width?"


def test_require_imports_or_names_the_extra():
    assert require("json", "text").dumps([]) == "[]"
    with pytest.raises(MissingExtra, match=r'^no_such_package is not installed; run: pip install "pomona\[text\]"$'):
        require("no_such_package", "text")


def test_errors_are_value_errors_and_a_missing_extra_an_import_error():
    assert issubclass(PomonaError, ValueError)
    assert issubclass(MissingExtra, PomonaError) and issubclass(MissingExtra, ImportError)


def test_sizes_that_do_not_divide():
    check_divisible("width", 12, "groups", 4)
    with pytest.raises(PomonaError, match=r"^width=10 cannot be divided into groups=4 equal parts$"):
        check_divisible("width", 10, "groups", 4)
    with pytest.raises(PomonaError):
        check_divisible("width", 10, "groups", 0)


@pytest.mark.parametrize("value", [0, -1, "3", True, None, float("nan")])
def test_what_is_not_a_number_above_zero(value):
    check_positive(size=3, rate=0.5)
    with pytest.raises(PomonaError, match=r"^rate=.* must be a number above 0$"):
        check_positive(size=3, rate=value)
