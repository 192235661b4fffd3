"""Writing the report: the study's data, the charts and Plotly's own script in one file."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from pomona.errors import PomonaError
from pomona.recipe.recipe import Recipe
from pomona.report import figures
from pomona.study.result import Study, plain
from pomona.study.sentences import SHARES
from pomona.train.loop import predict


def write(study: Study, path: str | Path) -> Path:
    """Write ``study`` as one self-contained HTML file.

    Raises:
        PomonaError: if the file cannot be written.
    """
    path = Path(path)
    page = render(study)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PomonaError(f"report={str(path)!r} cannot be written: {error.strerror}") from error
    return path


def render(study: Study) -> str:
    """The page as text."""
    charts = [
        ("ranking", "Ranking", "Mean on test with its 95% interval over seeds.", figures.ranking(study)),
        (
            "differences",
            "Paired differences",
            f"Against {study.protocol.reference}, seed by seed: the same batches for both. Right of zero is better.",
            figures.differences(study),
        ),
        ("curves", "Learning curves", "On validation; the band spans the seeds.", figures.curves(study)),
        (
            "cost",
            "Quality against cost",
            "The line is the Pareto front: nothing is both cheaper and better.",
            figures.quality_against_cost(study),
        ),
        _errors(study),
    ]
    shown = [(key, title, text, figure) for key, title, text, figure in charts if figure is not None]
    template = _environment().get_template("report.html.j2")
    return template.render(
        study=study,
        charts=shown,
        figures=_script({key: figure for key, _, _, figure in shown}),
        plotly=get_plotlyjs(),
        rows=[_cells(study, row) for row in study.rows],
        card=study.task.card,
        recipes={label: _yaml(study, label) for label in study.records},
        environment=_environment_facts(study),
        data=_script(study.to_json()),
    )


def _environment() -> jinja2.Environment:
    folder = resources.files("pomona.report")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _script(data: Any) -> str:
    """JSON that is safe inside a script element: no tag can begin in it."""
    return json.dumps(plain(data), allow_nan=False).replace("<", "\\u003c")


def _errors(study: Study) -> tuple[str, str, str, figures.Figure | None]:
    record = study.best_record
    if record is None:
        return "errors", "", "", None
    x, y = study.task.splits["test"]
    figure = figures.errors_of_best(study, predict(study.best.network, x), y)
    title = "Confusion matrix" if study.task.outputs.kind == "classes" else "Residuals"
    return "errors", title, f"Of {record.candidate} (seed {record.seed}), chosen on validation, on test.", figure


def _cells(study: Study, row: Any) -> dict[str, Any]:
    """A row of the table as text."""
    share = study.metric in SHARES

    def value(number: float, signed: bool = False) -> str:
        if number is None or not math.isfinite(number):
            return ""
        sign = "+" if signed else ""
        return f"{100 * number:{sign}.1f}" if share else f"{number:{sign}.4g}"

    def cost(name: str, factor: float = 1) -> str:
        number = row.cost.get(name)
        return (
            "" if number is None else f"{factor * number:,.3g}" if number * factor < 1000 else f"{number * factor:,.0f}"
        )

    gap = row.difference
    return {
        "name": row.name,
        "kind": row.kind,
        "status": row.status,
        "note": row.note,
        "mean": value(row.mean),
        "interval": f"{value(row.interval[0])} to {value(row.interval[1])}" if row.values else "",
        "difference": value(gap.mean, True) if gap else "",
        "between": f"{value(gap.interval[0], True)} to {value(gap.interval[1], True)}" if gap else "",
        "probability": f"{gap.probability:.2f}" if gap and math.isfinite(gap.probability) else "",
        "relative": f"{row.relative:+.1f}%" if math.isfinite(row.relative) else "",
        "parameters": cost("parameters"),
        "flops": cost("flops"),
        "seconds": cost("seconds"),
        "memory": cost("memory", 1e-6),
        "latency_1": cost("latency_1", 1e3),
        "latency_256": cost("latency_256", 1e3),
    }


def _yaml(study: Study, label: str) -> str:
    """The tuned recipe of a candidate; the recipe as given where no training finished."""
    records = study.records[label]
    data = records[0].recipe if records else study.protocol.candidates[label]
    text = Recipe(**data).to_yaml()
    tried = study.tuning.get(label, [])
    return text + (f"# chosen among {len(tried)} tuning trainings\n" if tried else "")


def _environment_facts(study: Study) -> dict[str, str]:
    found = next((records[0].versions for records in study.records.values() if records), {})
    protocol = study.protocol
    budget = f"{protocol.budget_amount:.4g} {protocol.budget_kind} a training"
    if protocol.wall_clock:
        budget += f", of {protocol.wall_clock:.0f} s for the whole study"
    return {
        "study": study.id,
        "data fingerprint": protocol.fingerprint,
        "budget": budget,
        "tuning trainings each": str(protocol.tuning_trials),
        "seeds": ", ".join(map(str, protocol.seeds)),
        "wall-clock": f"{study.seconds:.0f} s",
        **{name: str(value) for name, value in found.items()},
    }


__all__ = ["render", "write"]
