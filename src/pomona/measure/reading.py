"""What every measurement of a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass
class Reading:
    """Numbers, and a picture where one helps.

    Attributes:
        values: name -> number (or tensor of numbers); plain names of the field.
        figure: a plotly figure, or ``None``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    figure: Figure | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class Measure(Protocol):
    """A function of a network and a task: ``measure(net, task) -> Reading``."""

    def __call__(self, net: nn.Module, task: Any) -> Reading: ...


def lines(
    series: Mapping[str, tuple[Any, Any]], *, x_title: str = "", y_title: str = "", log_y: bool = False
) -> Figure:
    """A line chart of ``name -> (x, y)``; plotly is imported only here."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure([Scatter(x=_list(x), y=_list(y), name=name) for name, (x, y) in series.items()])
    figure.update_layout(xaxis_title=x_title, yaxis_title=y_title)
    if log_y:
        figure.update_yaxes(type="log")
    return figure


def _list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
