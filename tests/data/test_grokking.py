import pytest
import torch

from pomona.data.grokking import GrokTask
from pomona.errors import PomonaError


def test_symmetric_pairs_are_counted_and_labelled_modulo_p():
    task = GrokTask(67, frac=0.4)
    x = torch.cat([split.x for split in task.splits.values()])
    y = torch.cat([split.y for split in task.splits.values()])
    assert len(x) == 67 * 68 // 2 == 2278
    assert len(torch.unique(x, dim=0)) == 2278
    assert (x[:, 0] <= x[:, 1]).all()
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % 67)
    assert len(task.splits["train"]) == int(0.4 * 2278)


@pytest.mark.parametrize(("op", "label"), [("sub", 3 - 5), ("x2xyy2", 9 + 15 + 25)])
def test_operations(op, label):
    task = GrokTask(7, op, symmetric=False)
    assert sum(map(len, task.splits.values())) == 49
    x = torch.cat([split.x for split in task.splits.values()])
    y = torch.cat([split.y for split in task.splits.values()])
    assert y[(x == torch.tensor([3, 5])).all(1)].item() == label % 7


def test_seed_gives_split_and_random_labels():
    a, b, c = (GrokTask(11, "rand", seed=seed) for seed in (1, 1, 2))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert 0 <= int(a.splits["train"].y.min()) <= int(a.splits["train"].y.max()) < 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "mul"}, "op='mul' is not known"),
        ({"p": 1}, "p=1 must be 2 or more"),
        ({"frac": 1.5}, "frac=1.5 and valid=0.25 of 2278 pairs leave a split empty"),
        ({"valid": 0.0}, "leave a split empty"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(PomonaError, match=message):
        GrokTask(**options)
