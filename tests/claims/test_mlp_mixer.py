import numpy as np
import torch

from pomona.claims.mlp_mixer import PATCH, mlp_mixer, shuffle
from pomona.data.task import Split, Task
from pomona.nets.specs import Inputs, Outputs


def test_shuffling_moves_patches_and_the_pixels_within_them():
    x = torch.arange(784.0).view(1, 1, 28, 28)
    task = Task("one", Inputs("image", (1, 28, 28)), Outputs("classes", 2), {"test": Split(x, torch.tensor([0]))})

    def patches(task: Task) -> list[list[float]]:
        return task.splits["test"].x.view(7, PATCH, 7, PATCH).permute(0, 2, 1, 3).reshape(49, -1).tolist()

    before, after = patches(task), patches(shuffle(task, 0))
    moved = [sorted(row) for row in after]
    assert moved != before and sorted(moved) == sorted(before)
    order = torch.tensor(after).argsort(1)
    assert (order == order[0]).all() and order[0].tolist() != list(range(16))  # the same order within every patch


def test_smoke():
    evidence = mlp_mixer("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == {"320 images", "100 images", "shuffled"}
    parameters = {name: summary["parameters"] for name, summary in evidence.details["100 images"].items()}
    assert set(parameters) == {"mixer", "attention", "conv"}
    assert abs(parameters["conv"] / parameters["mixer"] - 1) < 0.25
