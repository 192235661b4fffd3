"""The documentation: generated pages are fresh, links lead somewhere, errors say what the page says."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from pomona.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CONSOLE = re.compile(r"```console\n\$ (?P<command>.+)\n(?P<says>error: .+)\n```")
SHOWN = [match.groups() for match in CONSOLE.finditer((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_generated_pages_are_fresh():
    stale = [str(path.relative_to(ROOT)) for path in module(ROOT / "docs" / "generate.py").stale()]
    assert not stale, f"{', '.join(stale)}: run python docs/generate.py"


def test_the_check_ends_with_1_for_a_stale_page(tmp_path, monkeypatch, capsys):
    generate = module(ROOT / "docs" / "generate.py")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: {tmp_path / "page.md": "new"})
    assert generate.main(["--check"]) == 1 and "page.md is stale" in capsys.readouterr().err
    assert generate.main([]) == 0 and (tmp_path / "page.md").read_text() == "new"
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_package_has_a_page_of_reference():
    packages = {path.parent.name for path in (ROOT / "src" / "pomona").glob("*/__init__.py")} - {"cli"}
    missing = {name for name in packages if not (ROOT / "docs" / "api" / f"{name}.md").exists()}
    assert not missing, f"write docs/api/NAME.md and its line in mkdocs.yml for {', '.join(sorted(missing))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the errors' page speaks of."""
    here = tmp_path_factory.mktemp("errors")
    frame = module(ROOT / "examples" / "own_csv.py").customers(200, 0)
    stray = frame.age.astype(str)
    stray[41] = "unknown"
    tables = {
        "customers.csv": frame,
        "stray.csv": frame.assign(age=stray),
        "constant.csv": frame.assign(churned="yes"),
        "small.csv": frame.head(6),
    }
    for name, table in tables.items():
        table.to_csv(here / name, index=False)
    (here / "empty.csv").write_text("")
    (here / "column.csv").write_text("a\n1\n2\n")
    (here / "recipe.yaml").write_text("backbone: mlp\nslot:\n  act: gelu\n")
    (here / "broken.yaml").write_text("backbone: mlp\n  slots: [\n")
    return here


@pytest.mark.parametrize(("command", "says"), SHOWN, ids=[command for command, _ in SHOWN])
def test_errors_say_what_the_page_says(command, says, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == says


def test_the_page_of_errors_shows_some():
    assert len(SHOWN) > 30
