"""The report's charts, as Plotly figures in plain data. Colours follow the page's theme, so none is set but the
series' own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from pomona.study.result import Study
from pomona.study.sentences import SHARES
from pomona.study.stats import pareto_front

Figure = dict[str, Any]
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, on light and on dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
GREY = "#8a8a8a"
TRIVIAL = {"majority", "mean"}
"""Left out of the charts, not of the table: they would squeeze all the others into a corner."""
COSTS = {
    "parameters": "parameters",
    "flops": "FLOPs of a forward pass",
    "seconds": "seconds of a training",
    "memory": "bytes of a training step",
    "latency_1": "seconds for 1 row",
    "latency_256": "seconds for 256 rows",
}


def short(name: str, width: int = 34) -> str:
    """A label that fits a phone."""
    return name if len(name) <= width else name[: width - 1] + "…"


def _axis(study: Study, metric: str | None = None) -> dict[str, Any]:
    metric = metric or study.metric
    return {"title": {"text": metric.replace("_", " ")}, "tickformat": ".3~p" if metric in SHARES else ""}


def _layout(height: int, **more: Any) -> dict[str, Any]:
    margin = {"l": 10, "r": 10, "t": 10, "b": 40}
    return {"height": height, "margin": margin, "showlegend": False, "hovermode": "closest", **more}


def ranking(study: Study) -> Figure:
    """Mean and interval of every row, best on top."""
    rows = [row for row in study.rows if row.values and row.name not in TRIVIAL][::-1]
    traces = []
    for kind, colour, label in (("network", COLOURS[0], "networks"), ("reference", GREY, "classical models")):
        chosen = [row for row in rows if row.kind == kind]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [row.mean for row in chosen],
                "y": [short(row.name) for row in chosen],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [row.interval[1] - row.mean for row in chosen],
                    "arrayminus": [row.mean - row.interval[0] for row in chosen],
                    "color": colour,
                },
                "marker": {"size": 10, "color": colour, "symbol": "circle" if kind == "network" else "diamond"},
                "hovertext": [row.name for row in chosen],
                "hoverinfo": "x+text",
            }
        )
    order = [short(row.name) for row in rows]
    yaxis = {"automargin": True, "type": "category", "categoryorder": "array", "categoryarray": order}
    legend = {"orientation": "h", "y": 1.08, "x": 0}
    return {
        "data": traces,
        "layout": _layout(110 + 26 * len(rows), xaxis=_axis(study), yaxis=yaxis)
        | {"showlegend": True, "legend": legend},
    }


def differences(study: Study) -> Figure | None:
    """Paired difference of every row to the reference candidate, with its interval."""
    rows = [row for row in study.rows if row.difference is not None and math.isfinite(row.difference.mean)]
    rows = [row for row in rows if row.name not in TRIVIAL][::-1]
    if not rows:
        return None
    gaps = [row.difference for row in rows if row.difference is not None]
    colours = [COLOURS[2] if g.interval[0] > 0 else COLOURS[1] if g.interval[1] < 0 else GREY for g in gaps]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [gap.mean for gap in gaps],
        "y": [short(row.name) for row in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [gap.interval[1] - gap.mean for gap in gaps],
            "arrayminus": [gap.mean - gap.interval[0] for gap in gaps],
            "color": GREY,
        },
        "marker": {"size": 10, "color": colours},
        "hovertext": [f"{row.name}, P(better) = {gap.probability:.2f}" for row, gap in zip(rows, gaps, strict=True)],
        "hoverinfo": "x+text",
    }
    axis = _axis(study) | {"title": {"text": f"better than {short(study.protocol.reference, 24)} by"}, "zeroline": True}
    yaxis = {"automargin": True, "type": "category", "categoryorder": "array", "categoryarray": trace["y"]}
    return {"data": [trace], "layout": _layout(100 + 26 * len(rows), xaxis=axis, yaxis=yaxis)}


def curves(study: Study) -> Figure | None:
    """Validation metric against examples seen: mean over seeds, with the band from worst to best seed."""
    traces: list[dict[str, Any]] = []
    names = [row.name for row in study.rows if row.kind == "network" and study.records.get(row.name)]
    for i, name in enumerate(names):
        runs = [record.curve for record in study.records[name] if record.curve]
        if not runs:
            continue
        colour = COLOURS[i % len(COLOURS)]
        grid = np.unique(np.concatenate([[p["examples"] for p in run if "examples" in p] for run in runs]))
        if not len(grid):
            continue
        lines = np.full((len(runs), len(grid)), np.nan)
        for row, run in enumerate(runs):
            x = np.array([p["examples"] for p in run])
            y = np.array([p.get(study.metric, p["valid_loss"]) for p in run], float)
            lines[row] = np.interp(grid, x, y, right=y[-1])
        low, high = lines.min(axis=0), lines.max(axis=0)
        group = {"legendgroup": name, "hoverinfo": "skip", "showlegend": False}
        band = {"x": [*grid, *grid[::-1]], "y": [*high, *low[::-1]], "fill": "toself", "fillcolor": colour + "26"}
        traces.append({"type": "scatter", "mode": "lines", "line": {"width": 0}, **band, **group})
        line = {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[i // len(COLOURS) % 3]}
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": short(name),
                "legendgroup": name,
                "x": list(grid),
                "y": list(lines.mean(axis=0)),
                "line": line,
            }
        )
    if not traces:
        return None
    axis = _axis(study)
    axis["title"]["text"] += " on validation"
    layout = _layout(420, xaxis={"title": {"text": "examples seen"}}, yaxis={**axis, "automargin": True})
    return {"data": traces, "layout": layout | {"showlegend": True, "legend": {"orientation": "h", "y": -0.25, "x": 0}}}


def quality_against_cost(study: Study) -> Figure | None:
    """The metric against each cost, the Pareto front drawn through what nothing beats in both; buttons choose the
    cost.
    """
    rows = [row for row in study.rows if row.kind == "network" and row.values]
    names = [name for name in COSTS if any(row.cost.get(name) for row in rows)]
    if not names:
        return None
    traces, buttons = [], []
    for i, name in enumerate(names):
        chosen = [row for row in rows if row.cost.get(name)]
        cost, quality = [row.cost[name] for row in chosen], [row.mean for row in chosen]
        front = pareto_front(cost, quality, study.task.higher_is_better)
        visible = i == 0
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [cost[j] for j in front],
                "y": [quality[j] for j in front],
                "line": {"color": COLOURS[1], "shape": "hv", "width": 2},
                "hoverinfo": "skip",
                "visible": visible,
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": cost,
                "y": quality,
                "hovertext": [row.name for row in chosen],
                "hoverinfo": "x+y+text",
                "marker": {"size": 11, "color": [COLOURS[1] if j in front else COLOURS[0] for j in range(len(cost))]},
                "visible": visible,
            }
        )
        shown = [j // 2 == i for j in range(2 * len(names))]
        update = [{"visible": shown}, {"xaxis.title.text": COSTS[name]}]
        buttons.append({"label": COSTS[name], "method": "update", "args": update})
    menu = {"buttons": buttons, "direction": "down", "x": 0, "xanchor": "left", "y": 1.16, "yanchor": "top"}
    xaxis = {"type": "log", "title": {"text": COSTS[names[0]]}}
    layout = _layout(440, xaxis=xaxis, yaxis={**_axis(study), "automargin": True}, updatemenus=[menu])
    layout["margin"]["t"] = 60
    return {"data": traces, "layout": layout}


def errors_of_best(study: Study, output: Tensor, target: Tensor) -> Figure:
    """Confusion matrix (shares of each true class) for classes, residuals against predictions for numbers."""
    if study.task.outputs.kind == "classes":
        size = study.task.outputs.size
        counts = np.zeros((size, size))
        np.add.at(counts, (target.numpy(), output.argmax(-1).numpy()), 1.0)
        labels = [short(label, 14) for label in study.task.outputs.names] or [str(i) for i in range(size)]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        trace: dict[str, Any] = {
            "type": "heatmap",
            "z": shares.tolist(),
            "x": labels,
            "y": labels,
            "zmin": 0,
            "zmax": 1,
            "colorscale": [[0, "rgba(0,114,178,0.04)"], [1, "rgba(0,114,178,1)"]],
            "customdata": counts.tolist(),
            "hovertemplate": "true %{y}, predicted %{x}: %{customdata} rows (%{z:.0%})<extra></extra>",
            "showscale": False,
        }
        if size <= 20:
            trace |= {"text": [[f"{n:.0f}" if n else "" for n in row] for row in counts], "texttemplate": "%{text}"}
        axes = {
            "xaxis": {"title": {"text": "predicted"}, "type": "category", "automargin": True},
            "yaxis": {"title": {"text": "true"}, "type": "category", "autorange": "reversed", "automargin": True},
        }
        return {"data": [trace], "layout": _layout(min(620, 180 + 34 * size), **axes)}
    predicted, true = output.double().numpy()[:, 0], target.double().numpy()[:, 0]
    points = {
        "type": "scattergl" if len(true) > 5000 else "scatter",
        "mode": "markers",
        "x": predicted.tolist(),
        "y": (true - predicted).tolist(),
        "marker": {"size": 5, "color": COLOURS[0], "opacity": 0.6},
    }
    axes = {
        "xaxis": {"title": {"text": "predicted"}},
        "yaxis": {"title": {"text": "true - predicted"}, "zeroline": True, "automargin": True},
    }
    return {"data": [points], "layout": _layout(420, **axes)}
