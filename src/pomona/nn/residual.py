"""How a block's branch joins its input: what fills the ``residual`` slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pomona.nn.check import check_input


class Add(nn.Module):
    """y = x + branch.

    Source: Deep Residual Learning for Image Recognition, arXiv 1512.03385.
    """

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """(*), (*) -> (*)"""
        return x + branch


class NoResidual(nn.Module):
    """y = branch."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """(*), (*) -> (*)"""
        return branch


class ReZero(nn.Module):
    """y = x + alpha * branch with a learned scalar alpha that starts at ``init``.

    Source: ReZero is All You Need: Fast Convergence at Large Depth, arXiv 2003.04887.
    """

    def __init__(self, init: float = 0.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(init)))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """(*), (*) -> (*)"""
        check_input(self, x)
        return x + self.alpha * branch
