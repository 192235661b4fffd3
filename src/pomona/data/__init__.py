"""Any source of rows to a task: inferred column types, fair splits, and preprocessing that travels."""

from pomona.data.builtin import builtin_names, ucr_names
from pomona.data.card import ColumnCard, DataCard
from pomona.data.load import load
from pomona.data.metrics import classification_metrics, probability_metrics, regression_metrics
from pomona.data.pipeline import Pipeline
from pomona.data.task import Split, Task, tensors
from pomona.data.text import CharacterText, characters, kjv_characters

__all__ = [
    "CharacterText",
    "ColumnCard",
    "DataCard",
    "Pipeline",
    "Split",
    "Task",
    "builtin_names",
    "characters",
    "classification_metrics",
    "kjv_characters",
    "load",
    "probability_metrics",
    "regression_metrics",
    "tensors",
    "ucr_names",
]
