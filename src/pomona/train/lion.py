"""The Lion optimiser: every coordinate moves by the learning rate, in the direction of a mixture of momentum and
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pomona.errors import PomonaError, check_positive


class Lion(torch.optim.Optimizer):
    """theta <- (1 - lr wd) theta - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g

    It wants a learning rate 3 to 10 times smaller than Adam's, and so much larger a weight decay.

    Args:
        params: parameters or groups.
        lr: learning rate: by how much every coordinate moves.
        betas: (b1, b2).
        weight_decay: decoupled.

    Raises:
        PomonaError: for a rate, decay or betas out of range.

    Source: Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        check_positive(lr=lr)
        if not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            raise PomonaError(f"betas={betas} must be in [0, 1) and weight_decay={weight_decay} at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see the class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            moments: list[Tensor] = [self.state[p]["exp_avg"] for p in params]
            grads, (b1, b2) = [p.grad for p in params], group["betas"]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            direction = torch._foreach_lerp(moments, grads, 1 - b1)
            torch._foreach_sign_(direction)
            torch._foreach_add_(params, direction, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - b2)
        return loss
