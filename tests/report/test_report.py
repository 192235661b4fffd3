"""The report opens anywhere: one file, no network, every chart drawn."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pomona.data import load
from pomona.errors import PomonaError
from pomona.report import write
from pomona.report.build import render
from pomona.study import compare

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
CHROMIUM = CHROMIUM or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = dict(attrs).get("id") or f"script {len(self.scripts)}"
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        self.inside = None if tag == "script" else self.inside

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[self.inside] += data


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """One of classes, with names that try to break the page and a candidate that fails; and one of numbers."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"NaN <b>": rng.normal(size=90), "other": rng.normal(size=90)})
    frame["class"] = np.where(frame["NaN <b>"] > 0, "</script><script>alert(1)</script>", "b & c")
    zoo = str(tmp_path_factory.mktemp("zoo"))
    candidates = {
        "NaN </script>": "mlp width=8",
        "lost": "mlp act=square depth=6 lr=1e9 optimizer=sgd clip=none",
        "b": "mlp depth=0",
    }
    settings = {"seeds": 2, "trials": 0, "epochs": 3, "zoo": zoo}
    return {
        "classes": compare(load(frame, "class", name="<i>odd</i>"), candidates=candidates, **settings),
        "numbers": compare("diabetes", candidates=["mlp width=8", "mlp depth=0"], **settings),
    }


@pytest.fixture(scope="module")
def pages(studies):
    return {kind: render(study) for kind, study in studies.items()}


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_nothing_in_the_page_would_be_loaded_from_elsewhere(pages, kind):
    page = Page(pages[kind])
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), f"<{tag} {name}={value!r}>"
    style = re.search(r"<style>(.*?)</style>", pages[kind], re.S).group(1)
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_data_in_the_page_are_strict_json_and_the_studys_own(pages, studies, kind):
    scripts = Page(pages[kind]).scripts
    study = json.loads(scripts["study"], parse_constant=pytest.fail)
    assert study == json.loads(json.dumps(studies[kind].to_json(), allow_nan=False))
    figures = json.loads(scripts["figures"], parse_constant=pytest.fail)
    drawn = {attributes["id"] for tag, attributes in Page(pages[kind]).elements if attributes.get("class") == "chart"}
    assert drawn == {f"chart-{name}" for name in figures}
    assert set(figures) == {"ranking", "differences", "curves", "cost", "errors"}


def test_names_in_the_data_do_not_become_part_of_the_page(pages, studies):
    page = Page(pages["classes"])
    assert len(page.scripts) == 4
    assert not [tag for tag, _ in page.elements if tag in {"b", "i"}]
    rows = json.loads(page.scripts["study"])["rows"]
    assert "NaN </script>" in {row["name"] for row in rows}  # as written, not null </script>


def test_failures_and_sentences_are_on_the_page(pages, studies):
    assert 'class="failed"' in pages["classes"] and "diverged: the loss became" in pages["classes"]
    assert 'class="failed"' not in pages["numbers"]
    for name in ("ridge", "mlp depth=0", "memory", "chosen on validation"):
        assert name in pages["numbers"]


def test_a_report_is_written_whole_or_not_at_all(studies, tmp_path):
    path = write(studies["numbers"], tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(PomonaError, match=r"^report='.*no/report.html' cannot be written: No such file or directory$"):
        write(studies["numbers"], tmp_path / "no" / "report.html")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_browser_draws_every_chart_without_an_error_or_a_request(pages, kind, tmp_path):
    """Chromium reports on its console whatever this policy stops: everything that is not in the file itself."""
    policy = (
        "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
    )
    guarded = pages[kind].replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    path = tmp_path / "report.html"
    path.write_text(guarded, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=8000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    charts = re.split(r'id="chart-', done.stdout.split("<h2>Recipes")[0])[1:]
    assert len(charts) == 5 and all("main-svg" in chart for chart in charts)
