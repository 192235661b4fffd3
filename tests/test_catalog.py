"""Every row of the catalogue held against the code, both ways."""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

from pomona import catalog
from pomona.errors import PomonaError
from pomona.recipe.recipe import Recipe

TESTS = Path(__file__).parent
PAPERS = catalog.papers()
PARTS = [(paper, part) for paper in PAPERS.values() for part in paper.parts]
FACTS = [(paper, fact) for paper in PAPERS.values() for fact in paper.facts]
ENTRIES = [(slot, name) for slot, options in catalog.slots().items() for name in options]
ARXIV = re.compile(r"arXiv:? ?\d{4}\.\d{4,5}|arXiv \w+(-\w+)?/\d{7}")


@cache
def home(part: str) -> str:
    """The module that defines a part, which may be named by the package that offers it."""
    return getattr(catalog.load(part), "__module__", part.partition(":")[0])


@cache
def facts_in_twin_of(module: str) -> frozenset[str]:
    """Names of the test functions in the twin of a module: pomona.a.b -> tests/a/test_b.py."""
    *folders, name = module.split(".")[1:]
    file = TESTS.joinpath(*folders, f"test_{name}.py")
    if not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_there_are_337_papers_with_fields_that_make_sense():
    assert len(PAPERS) == len(catalog._read("catalog.toml")["paper"]) == 337
    for key, paper in PAPERS.items():
        assert key == paper.key and re.fullmatch(r"[a-z0-9_]+", key)
        assert paper.title.strip() == paper.title and paper.title
        assert not paper.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", paper.arxiv), key
        assert 1980 < paper.year < 2030
        assert len(set(paper.parts)) == len(paper.parts) and len(set(paper.facts)) == len(paper.facts)


def test_no_paper_is_there_twice():
    known = [paper.arxiv for paper in PAPERS.values() if paper.arxiv]
    assert len(set(known)) == len(known)
    assert len({paper.title.lower() for paper in PAPERS.values()}) == len(PAPERS)


@pytest.mark.parametrize("paper, part", PARTS, ids=[f"{p.key}-{part}" for p, part in PARTS])
def test_each_part_exists_and_its_docstring_names_a_source(paper, part):
    own = catalog.load(part).__doc__ or ""
    source = inspect.getsource(importlib.import_module(home(part)))
    assert own.strip(), f"{part} has no docstring"
    assert ARXIV.search(own) or ARXIV.search(source) or not paper.arxiv, f"{part} names no arXiv id"


@pytest.mark.parametrize("paper, fact", FACTS, ids=[f"{p.key}-{fact}" for p, fact in FACTS])
def test_each_fact_is_a_test_beside_one_of_the_parts(paper, fact):
    modules = {home(part) for part in paper.parts}
    assert any(f"test_{fact}" in facts_in_twin_of(module) for module in modules), (
        f"test_{fact} is in no twin of {modules}"
    )


@pytest.mark.parametrize("figure", [f for p in PAPERS.values() for f in p.figures])
def test_each_figure_is_a_function_with_a_docstring(figure):
    assert inspect.isfunction(catalog.load(figure)) and catalog.load(figure).__doc__


@pytest.mark.parametrize("paper", [p for p in PAPERS.values() if p.claim], ids=lambda p: p.key)
def test_each_claim_is_a_function_named_as_its_key(paper):
    module, _, name = paper.claim.partition(":")
    claim = catalog.load(paper.claim)
    assert module == f"pomona.claims.{paper.key}" and name == paper.key
    assert list(inspect.signature(claim).parameters)[:2] == ["scale", "seeds"]
    assert (claim.__doc__ or "").strip()


def test_each_claim_module_belongs_to_a_row():
    folder = Path(importlib.import_module("pomona.claims").__file__).parent
    machinery = {"__init__", "all", "characters", "lab", "run", "verdict"}
    files = {file.stem for file in folder.glob("*.py")} - machinery
    stray = {name for name in files if name in PAPERS and not PAPERS[name].claim}
    assert not stray, f"claims that no row names: {stray}"


@pytest.mark.parametrize("slot, name", ENTRIES, ids=[f"{s}-{n}" for s, n in ENTRIES])
def test_each_name_in_a_slot_stands_for_something(slot, name):
    entry = catalog.entry(slot, name)
    assert callable(catalog.load(entry.make))
    if entry.paper:
        assert entry.paper in PAPERS
        assert name in catalog.paper(entry.paper).slots[slot]


@pytest.mark.parametrize("name", catalog.short_names())
def test_each_short_name_is_a_candidate(name):
    assert isinstance(Recipe.parse(name), Recipe)


def test_status_follows_from_the_row():
    def row(**fields):
        return catalog.Paper("k", "t", "", 2020, "layers", "layer", **fields).status

    assert row() == "open"
    assert row(parts=("a:b",)) == row(parts=("a:b",), facts=("f",)) == row(claim="a:b") == "part"
    assert row(parts=("a:b",), facts=("f",), claim="a:b") == "done"


def test_unknown_keys_and_names():
    with pytest.raises(PomonaError, match=r"^key='kann' is not known; did you mean"):
        catalog.paper("kann")
    with pytest.raises(PomonaError, match=r"^slot='acts' is not known; did you mean act"):
        catalog.entry("acts", "gelu")
    with pytest.raises(PomonaError, match=r"^act='gelo' is not known; did you mean"):
        catalog.entry("act", "gelo")
