import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.train.lion import Lion
from pomona.train.optim import make_optimizer
from pomona.train.settings import Training


def test_lion_moves_every_coordinate_by_its_rate():
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = Lion([p], lr=0.25)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(3, 4, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close((p - before).abs(), torch.full_like(p, 0.25), rtol=0, atol=1e-12)


def test_lion_follows_its_equations_with_decay():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=(0.8, 0.95), weight_decay=0.5)
    theta, m = p.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        p.grad = g = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        theta = (1 - 0.1 * 0.5) * theta - 0.1 * (0.8 * m + 0.2 * g).sign()
        m = 0.95 * m + 0.05 * g
    torch.testing.assert_close(p.detach(), theta, rtol=0, atol=1e-12)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step(lambda: 3.0) == 3.0


def test_lion_is_an_optimizer_of_the_settings():
    optimizer = make_optimizer(nn.Linear(3, 2), Training(optimizer="lion", lr=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, Lion)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_lion_says_what_is_wrong():
    with pytest.raises(PomonaError, match=r"betas=\(1, 0.5\) must be in"):
        Lion([nn.Parameter(torch.ones(1))], betas=(1, 0.5))
