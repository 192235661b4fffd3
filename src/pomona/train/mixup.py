"""Mixup: learning from blends of two examples.

Source: mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.train.rule import Backprop, Batch, Loss, Tensors, Update


class Mixup(Backprop):
    """Backpropagation of k loss(f(z), y) + (1 - k) loss(f(z), y') at z = k x + (1 - k) x', k ~ Beta(alpha, alpha).

    (x', y') is the batch in another order; one k serves the batch.

    Args:
        alpha: of the Beta distribution; near 0 hardly mixes, 1 is uniform.

    Raises:
        PomonaError: if alpha is not above 0, or inputs are not floating-point numbers.
    """

    noise = 2

    def __init__(self, alpha: float = 0.8) -> None:
        check_positive(alpha=alpha)
        self.alpha = alpha
        # the distribution's quantiles, so that a uniform number becomes a draw without rejection
        middle = (np.arange(4096) + 0.5) / 4096
        self.quantiles = torch.from_numpy(stats.beta.ppf(middle, alpha, alpha))

    def init(self, net: nn.Module, loss: Loss, example: Batch) -> Tensors:
        """See `Rule`."""
        if not example[0].is_floating_point():
            raise PomonaError(f"inputs of {example[0].dtype} cannot be mixed; Mixup takes floating-point numbers")
        self.plain = loss
        return super().init(net, self._mixed, example)

    def grads(self, params: Tensors, buffers: Tensors, state: Tensors, batch: Batch, noise: Tensor) -> Update:
        """See `Rule`."""
        x, y = batch
        other = noise[:, 0].argsort()
        at = (noise[:1, 1] * len(self.quantiles)).long()
        share = self.quantiles.to(x)[at].squeeze(0)
        return super().grads(params, buffers, state, (torch.lerp(x[other], x, share), (y, y[other], share)), noise)  # type: ignore[arg-type]

    def _mixed(self, output: Tensor, target: Any) -> Tensor:
        y, other, share = target
        return share * self.plain(output, y) + (1 - share) * self.plain(output, other)
