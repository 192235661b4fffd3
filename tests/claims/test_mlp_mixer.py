import numpy as np
import torch

from pomona.claims.mlp_mixer import PATCH, mlp_mixer, shuffle
from pomona.data.task import Split, Task
from pomona.nets.specs import Inputs, Outputs


def test_shuffling_moves_whole_patches_or_pixels_within_them():
    x = torch.arange(784.0).view(1, 1, 28, 28)
    task = Task("one", Inputs("image", (1, 28, 28)), Outputs("classes", 2), {"test": Split(x, torch.tensor([0]))})

    def patches(task: Task) -> list[tuple[float, ...]]:
        cut = task.splits["test"].x.view(7, PATCH, 7, PATCH).permute(0, 2, 1, 3).reshape(49, -1)
        return [tuple(row) for row in cut.tolist()]

    before, moved, within = patches(task), patches(shuffle(task, "patches", 0)), patches(shuffle(task, "pixels", 0))
    assert moved != before and sorted(moved) == sorted(before)
    assert within != before and [sorted(row) for row in within] == [sorted(row) for row in before]


def test_smoke():
    evidence = mlp_mixer("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert {"100 images", "patches shuffled", "pixels within patches shuffled"} <= set(evidence.details)
    parameters = {name: summary["parameters"] for name, summary in evidence.details["100 images"].items()}
    assert set(parameters) == {"mixer", "attention", "conv"}
    assert abs(parameters["conv"] / parameters["mixer"] - 1) < 0.2
