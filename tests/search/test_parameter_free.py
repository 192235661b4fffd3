import pytest
import torch

from pomona.data import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.search.parameter_free import build_chosen, op_study, search_ops
from pomona.train.budget import Budget


def images():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 6, 6, generator=g)
    y = (x.mean((1, 2, 3)) > 0).long()
    return tensors("blobs", Inputs("image", (1, 6, 6)), Outputs("classes", 2), (x, y), (x, y), (x, y))


def test_study_costs_and_search_name_an_operation_for_every_block():
    task, options = images(), {"layers": (1, 1), "width": 4, "expansion": 1}
    study = op_study(task, 1, ("conv", "max"), budget=Budget("examples", 32), **options)
    assert study["conv"]["flops"] - study["max"]["flops"] == 2 * 9 * 8 * 8 * 9
    assert study["conv"]["parameters"] > study["max"]["parameters"]
    chosen, shares = search_ops(task, ("max3", "conv3"), budget=Budget("examples", 32), **options)
    assert len(chosen) == 2
    assert sum(shares[0].values()) == pytest.approx(1)
    assert build_chosen(task, chosen, **options)(task.splits["test"].x).shape == (32, 2)
    with pytest.raises(PomonaError, match="position=2 must be the index of one of 2 blocks"):
        op_study(task, 2, budget=Budget("examples", 32), **options)
