import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.algebra import ALGEBRAS, CAYLEY_DICKSON, algebra, multiply, rule_similarity


def unit(n, seed):
    x = torch.randn(50, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("name", CAYLEY_DICKSON)
def test_norm_of_a_product_is_the_product_of_norms(name):
    n = CAYLEY_DICKSON[name]
    rules = algebra(name, dtype=torch.float64)
    product = multiply(rules, unit(n, 0), unit(n, 1))
    torch.testing.assert_close(product.norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_quaternion_rules_are_hamiltons():
    e = torch.eye(4)
    product = lambda i, j: multiply(algebra("quaternion"), e[i], e[j])  # noqa: E731
    for i, j, k in ((1, 2, 3), (2, 3, 1), (3, 1, 2)):
        assert torch.equal(product(i, j), e[k])
        assert torch.equal(product(j, i), -e[k])
        assert torch.equal(product(i, i), -e[0])


def test_quaternions_associate_and_octonions_do_not():
    for name, associates in (("quaternion", True), ("octonion", False)):
        n = CAYLEY_DICKSON[name]
        rules = algebra(name, dtype=torch.float64)
        x, y, z = unit(n, 0), unit(n, 1), unit(n, 2)
        left, right = multiply(rules, multiply(rules, x, y), z), multiply(rules, x, multiply(rules, y, z))
        assert torch.allclose(left, right) is associates


def test_cyclic_product_is_circular_convolution():
    x, y = unit(5, 0), unit(5, 1)
    expected = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(y)).real
    torch.testing.assert_close(multiply(algebra("cyclic", 5, dtype=torch.float64), x, y), expected)


def test_first_element_is_one():
    for name in ALGEBRAS:
        assert torch.equal(
            algebra(name, 3 if name == "cyclic" else None)[0],
            torch.eye(3 if name == "cyclic" else CAYLEY_DICKSON[name]),
        )


def test_similarity_is_one_up_to_basis_change_and_below_otherwise():
    draw = torch.Generator().manual_seed(0)
    rules = algebra("quaternion", dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64, generator=draw))[0]
    mixing = torch.randn(4, 4, dtype=torch.float64, generator=draw)
    hidden = torch.einsum("im,mab->iab", mixing, turns[0] @ rules @ turns[1])
    assert rule_similarity(hidden, rules) > 0.999
    assert rule_similarity(hidden, rules, basis_change=False) < 0.9
    assert rule_similarity(torch.randn(4, 4, 4, generator=draw), rules) < 0.9


def test_bad_input():
    with pytest.raises(PomonaError, match="algebra='quaternions' is not known; did you mean quaternion"):
        algebra("quaternions")
    with pytest.raises(PomonaError, match="n=3 does not fit algebra='complex', which has dimension 2"):
        algebra("complex", 3)
    with pytest.raises(PomonaError, match="needs n"):
        algebra("cyclic")
