"""The training loop, learning rules, schedules and losses."""

from pomona.train.budget import Budget, parse_duration
from pomona.train.loop import Fit, batches, choose_device, evaluate, fit, predict
from pomona.train.rule import Backprop, Rule, Update
from pomona.train.settings import Training

__all__ = [
    "Backprop",
    "Budget",
    "Fit",
    "Rule",
    "Training",
    "Update",
    "batches",
    "choose_device",
    "evaluate",
    "fit",
    "parse_duration",
    "predict",
]
