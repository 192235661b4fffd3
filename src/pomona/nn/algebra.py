"""Multiplication rules of finite-dimensional algebras, as the fixed A of a `PHMLinear`.

Source: Beyond Fully-Connected Layers with Quaternions: Parameterization of
Hypercomplex Multiplications with 1/n Parameters, arXiv 2102.08597.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pomona.errors import PomonaError, check_positive, unknown

CAYLEY_DICKSON = {"real": 1, "complex": 2, "quaternion": 4, "octonion": 8}
ALGEBRAS = (*CAYLEY_DICKSON, "cyclic")


def algebra(name: str, n: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The rules of an algebra: A[i] is the matrix of x -> e_i x, so A[i, k, j] is the e_k part of e_i e_j.

    'real', 'complex', 'quaternion' and 'octonion' come from Cayley and Dickson's doubling,
    (a, b)(c, d) = (a c - conj(d) b, d a + b conj(c)), with i j = k. 'cyclic' is the group algebra of Z_n,
    e_i e_j = e_{(i + j) mod n}, whose products are circular convolutions.

    Args:
        name: one of `ALGEBRAS`.
        n: dimension; needed for 'cyclic', elsewhere it may be left out.
        dtype: of the result.

    Returns:
        (n, n, n), with entries -1, 0 and 1.

    Raises:
        PomonaError: if the name is unknown or n is not the dimension of the algebra.
    """
    if name not in ALGEBRAS:
        raise unknown("algebra", name, ALGEBRAS)
    if name == "cyclic":
        if n is None:
            raise PomonaError("algebra='cyclic' needs n, its dimension")
        check_positive(n=n)
        index = torch.arange(n)
        return ((index[:, None, None] + index) % n == index[:, None]).to(dtype or torch.get_default_dtype())
    if n is not None and n != CAYLEY_DICKSON[name]:
        raise PomonaError(f"n={n} does not fit algebra={name!r}, which has dimension {CAYLEY_DICKSON[name]}")
    table = torch.ones(1, 1, 1, dtype=dtype)
    while len(table) < CAYLEY_DICKSON[name]:
        table = _double(table)
    return table


def multiply(rules: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The product x y in the algebra with these rules; x, y and the result are (*, n)."""
    return torch.einsum("ikj,...i,...j->...k", rules, x, y)


def rule_similarity(
    rules: Tensor,
    reference: Tensor,
    *,
    basis_change: bool = True,
    restarts: int = 16,
    steps: int = 200,
    seed: int = 0,
) -> float:
    """How much of the span of the matrices A_i lies in the span of the reference's, from 0 to 1.

    Mixing the A_i among themselves can be undone in S, so only their span counts. With ``basis_change`` the
    blocks of the input and of the output may also be rotated: max over orthogonal P, Q of
    ||project(P A_i Q)||^2 / n for an orthonormal basis A_i of the span, searched by gradient ascent from
    random starts, so that the answer is a lower bound.

    Args:
        rules, reference: (n, n, n).
        restarts, steps, seed: of the search.
    """
    n = len(rules)
    basis, target = (torch.linalg.qr(t.detach().double().flatten(1).T)[0] for t in (rules, reference))
    matrices, projector = basis.T.reshape(n, n, n), target @ target.T

    def captured(p: Tensor, q: Tensor) -> Tensor:
        rotated = torch.einsum("rab,ibc,rcd->riad", p, matrices, q).flatten(2)
        return torch.einsum("rix,xy,riy->r", rotated, projector, rotated) / n

    eye = torch.eye(n, dtype=basis.dtype).expand(1, n, n)
    best = captured(eye, eye).max()
    if basis_change:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.linalg.qr(torch.randn(2, restarts, n, n, dtype=basis.dtype, generator=generator))[0]
        turns = torch.zeros_like(starts, requires_grad=True)
        optimiser = torch.optim.Adam([turns], lr=0.1)
        for _ in range(steps):
            p, q = starts @ torch.matrix_exp(turns - turns.mT)
            optimiser.zero_grad()
            score = captured(p, q)
            (-score.sum()).backward()
            optimiser.step()
            best = torch.maximum(best, score.detach().max())
    return float(best.clamp(0, 1))


def _double(table: Tensor) -> Tensor:
    """Rules of twice the dimension: T[i, k, j] for pairs (a, b) of elements of the smaller algebra."""
    m = len(table)
    conj = -torch.ones(m, dtype=table.dtype)
    conj[0] = 1
    swapped = table.transpose(0, 2)  # swapped[i, k, j] is the e_k part of e_j e_i
    out = torch.zeros(2 * m, 2 * m, 2 * m, dtype=table.dtype)
    out[:m, :m, :m] = table  # a c
    out[m:, :m, m:] = -swapped * conj  # -conj(d) b
    out[:m, m:, m:] = swapped  # d a
    out[m:, m:, :m] = table * conj  # b conj(c)
    return out
