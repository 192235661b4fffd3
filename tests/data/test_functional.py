import pytest
import torch

from pomona.data.functional import FDATask, hats, phi
from pomona.errors import PomonaError

GRID = torch.linspace(0, 1, 4001, dtype=torch.float64)


def test_functions_are_orthonormal():
    gram = torch.trapezoid(phi(GRID)[:, None] * phi(GRID), GRID)
    torch.testing.assert_close(gram, torch.eye(50).double(), atol=1e-9, rtol=0)
    assert hats(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() == [[4, 0, 0, 0, 0], [0, 0, 4, 0, 0]]


@pytest.mark.parametrize(("case", "k", "z"), [(1, 3, 5.0), (2, 5, 3.0), (3, 5, 3.0)])
def test_answers_are_squared_coefficients(case, k, z):
    task = FDATask(case, sizes=(3000, 10, 10))
    c, y = task.extra["coefficients"], torch.cat([s.y for s in task.splits.values()])[:, 0].double()
    truth = c[:, k - 1].square()
    torch.testing.assert_close(y, (truth - truth[:3000].mean()) / truth[:3000].std(), atol=1e-5, rtol=1e-5)
    assert abs(c[:, k - 1].std() / z - 1) < 0.05 and c[:, 20].abs().max() <= 3**0.5
    x, curves = task.splits["train"].x.double(), c[:3000] @ phi(task.extra["grid"])
    torch.testing.assert_close(x * curves.std(), curves, atol=1e-4, rtol=1e-4)


def test_fourth_case_is_the_integrals_of_the_curve():
    task = FDATask(4, sizes=(20, 10, 10))
    curves = task.extra["coefficients"] @ phi(GRID)
    first, second = torch.trapezoid(hats(GRID)[:, None] * curves, GRID)
    truth = second + first.square()
    y = torch.cat([s.y for s in task.splits.values()])[:, 0].double()
    torch.testing.assert_close(y, (truth - truth[:20].mean()) / truth[:20].std(), atol=1e-5, rtol=1e-5)


def test_noise_spares_the_test_targets():
    plain, noisy = (FDATask(2, noise_x=s, noise_y=s, sizes=(500, 100, 100), seed=1) for s in (0.0, 0.3))
    assert torch.equal(plain.extra["coefficients"], noisy.extra["coefficients"])
    ratio = noisy.splits["test"].y.diff(dim=0) / plain.splits["test"].y.diff(dim=0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert (noisy.splits["train"].x - plain.splits["train"].x).std() > 0.01
    with pytest.raises(PomonaError, match=r"^case=5 is not known; choose one of 1, 2, 3, 4"):
        FDATask(5)
