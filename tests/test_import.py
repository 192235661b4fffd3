"""What `import pomona` and the quick commands cost."""

import resource
import subprocess
import sys

import pytest

import pomona

HEAVY = {"torch", "pandas", "sklearn", "sqlalchemy", "optuna", "numpy", "scipy", "plotly"}


def loaded_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "code", ["import pomona", "import pomona.catalog; pomona.catalog.papers()", "import pomona.cli"]
)
def test_importing_brings_no_heavy_package(code):
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize("name", sorted(pomona._NAMES))
def test_every_public_name_is_there_when_asked_for(name):
    assert getattr(pomona, name).__doc__
    assert name in dir(pomona) and name in pomona.__all__


@pytest.mark.parametrize("name", sorted(pomona._PACKAGES))
def test_every_package_is_there_when_asked_for(name):
    assert getattr(pomona, name).__name__ == f"pomona.{name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'pomona' has no attribute 'no_such_name'"):
        _ = pomona.no_such_name


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["--version"]])
def test_quick_commands_answer_at_once(arguments):
    """User time of the process, which other load moves little; half a second is wanted, the best of three counts."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "pomona", *arguments], capture_output=True, check=True)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(seconds) < 0.5
