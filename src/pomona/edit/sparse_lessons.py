"""The handbook's ten questions on sparse networks: short answers, each with settings that put it to the test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pomona.data.task import Task
from pomona.edit.sparseland import Sparse, sparsify
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Lesson:
    """One question about sparse networks.

    Attributes:
        question: what people ask.
        answer: in a few sentences.
        sides: settings of :func:`pomona.edit.sparsify` on either side of the question, by name.
    """

    question: str
    answer: str
    sides: dict[str, dict[str, Any]] = field(repr=False)

    def compare(self, net: nn.Module, task: Task, density: float, **options: Any) -> dict[str, Sparse]:
        """Train ``net`` on every side at the same budget (``options`` of :func:`pomona.edit.sparsify`)."""
        return {
            name: sparsify(net, task, **{"density": density, **options, **side}) for name, side in self.sides.items()
        }


LESSONS = (
    Lesson(
        "Is a sparse network only a smaller dense one?",
        "No. At equal numbers of weights a wide network with few connections differs from a narrow full one: which "
        "connections there are is a choice too, and more choices are open to it. Compare at equal weights.",
        {
            "wide and sparse": {"when": "before", "criterion": "random"},
            "narrow and dense": {"when": "before", "criterion": "random", "structure": "unit"},
        },
    ),
    Lesson(
        "Is unstructured sparsity useless because hardware does not speed it up?",
        "It shows what accuracy a number of weights can reach, and saves storage at once; speed needs kernels. "
        "Patterns such as 2:4 and blocks trade some accuracy for speed on hardware there is, whole units for speed "
        "anywhere.",
        {
            "unstructured": {"density": 0.5},
            "2:4": {"structure": "2:4", "density": 0.5},
            "4x4 blocks": {"structure": "block", "density": 0.5},
        },
    ),
    Lesson(
        "Are pruning and sparse training the same?",
        "Pruning takes weights from a network that was trained densely and saves inference; sparse training has the "
        "sparse network learn by itself and can save training too. Compare like with like, and name the whole cost.",
        {"pruning": {"when": "after"}, "sparse training": {"when": "during", "schedule": "rigl"}},
    ),
    Lesson(
        "How do dense-to-sparse and sparse-to-sparse training differ?",
        "The first starts dense and ends sparse, so its peak cost is the dense one's and its exploration is complete; "
        "the second never holds more than the sparse weights, and has to explore by moving them.",
        {
            "dense to sparse": {"when": "during", "schedule": "gradual"},
            "sparse to sparse": {"when": "during", "schedule": "rigl"},
        },
    ),
    Lesson(
        "Static or dynamic masks?",
        "A fixed mask is simple and binds training to one guess; connections that move let training correct it. "
        "Dynamic training gains with the share of weights it has ever tried.",
        {
            "static": {"when": "before", "criterion": "random"},
            "dynamic": {"when": "during", "schedule": "set"},
        },
    ),
    Lesson(
        "Should a network be pruned before, during or after training?",
        "The later, the more is known and the more was spent. After is the most accurate at a density, before the "
        "cheapest; a method is to be judged within its own group and by its own costs.",
        {
            "before": {"when": "before", "criterion": "snip"},
            "during": {"when": "during"},
            "after": {"when": "after"},
        },
    ),
    Lesson(
        "What does pruning at initialisation find?",
        "Mostly how many weights each layer should keep. Shuffling the mask within layers costs little; for masks from "
        "a trained network it costs much. Report that control.",
        {
            "snip": {"when": "before", "criterion": "snip"},
            "snip, shuffled": {"when": "before", "criterion": "snip", "control": "shuffle"},
            "magnitude after training": {"when": "after"},
            "magnitude after training, shuffled": {"when": "after", "control": "shuffle"},
        },
    ),
    Lesson(
        "Which layers should be sparse?",
        "Equal shares starve small layers, and global scores can empty one, after which nothing passes. Shares after "
        "Erdos-Renyi or per-layer scores such as LAMP keep all layers alive; a random mask with good shares is strong.",
        {
            "global": {"allocation": "global"},
            "uniform": {"allocation": "uniform"},
            "erk": {"allocation": "erk"},
            "lamp": {"allocation": "lamp"},
        },
    ),
    Lesson(
        "Does the criterion matter?",
        "Magnitude with a gradual schedule is hard to beat at moderate densities. First- and second-order criteria pay "
        "where little or no retraining follows, and data-free ones where layers would collapse.",
        {name: {"when": "after", "criterion": name} for name in ("magnitude", "taylor", "obd", "random")},
    ),
    Lesson(
        "When is a sparse network as good as it gets?",
        "When its baselines had the same budget of steps: gradual magnitude pruning, one-shot pruning with "
        "fine-tuning, and a random mask trained as long. Several densities and seeds, and effective rather than "
        "nominal density.",
        {
            "gradual": {"when": "during"},
            "one shot": {"when": "after"},
            "random": {"when": "before", "criterion": "random"},
        },
    ),
)


def lesson(k: int) -> Lesson:
    """The answer to question ``k`` = 1, ..., 10, in our order and words.

    Raises:
        PomonaError: for another number.

    Source: Ten Lessons We Have Learned in the New "Sparseland" (arXiv 2302.02596).
    """
    if not 1 <= k <= len(LESSONS):
        raise PomonaError(f"k={k} must lie between 1 and {len(LESSONS)}")
    return LESSONS[k - 1]
