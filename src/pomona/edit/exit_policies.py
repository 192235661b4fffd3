"""Who leaves at which exit: trained gates, thresholds on the confidence, or patience.

A policy is called with the logits of the exits so far ``(n, l, classes)`` and says who leaves at the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive, unknown


def entropy(logits: Tensor) -> Tensor:
    """Entropy of ``softmax(logits)`` over the last dimension, in nats."""
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def margin(logits: Tensor) -> Tensor:
    """Largest minus second largest probability."""
    first, second = logits.softmax(-1).topk(2, -1).values.unbind(-1)
    return first - second


CONFIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": lambda logits: logits.softmax(-1).amax(-1),
    "entropy": lambda logits: -entropy(logits),
    "margin": margin,
}
"""Larger is surer."""


def uncertainty(logits: Tensor) -> Tensor:
    """What a gate sees ``(..., 4)``: largest probability, entropy, margin, entropy of the squared probabilities."""
    logits = logits.detach()
    surest = CONFIDENCE["max_probability"](logits)
    return torch.stack([surest, entropy(logits), margin(logits), entropy(2 * logits)], -1)


def exit_probabilities(gates: Tensor) -> Tensor:
    """``P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`` and the rest at the last exit: ``(n, l)`` -> ``(n, l + 1)``."""
    left = torch.minimum(gates, 1 - (gates.cumsum(1) - gates)).clamp_min(0)
    return torch.cat([left, (1 - left.sum(1, True)).clamp_min(0)], 1)


def conditional_probabilities(gates: Tensor) -> Tensor:
    """Probability to leave at l of those still there: ``clip(P_l / prod_{j<l} (1 - c_j), 0, 1)``, ``(n, l)``."""
    left = exit_probabilities(gates)[:, :-1]
    there = 1 - (left.cumsum(1) - left)  # equals the product
    return torch.where(there > 0, left / there.clamp_min(1e-12), 0).clamp(0, 1)


class Gates(nn.Module):
    """``g_l = sigmoid(w_l . u_l + b_l)`` of the head's uncertainties; leave where the conditional probability is 1/2.

    Source: arXiv 2310.09163.
    """

    def __init__(self, exits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(exits, 4).uniform_(-0.5, 0.5))
        self.bias = nn.Parameter(torch.empty(exits).uniform_(-0.5, 0.5))

    def logits(self, outputs: Tensor) -> Tensor:
        """(n, l, classes) -> (n, l); no gradient reaches the outputs."""
        seen = outputs.shape[1]
        return torch.einsum("nlf,lf->nl", uncertainty(outputs), self.weight[:seen]) + self.bias[:seen]

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of leaving at each exit ``(n, exits)``, from the outputs of all of them."""
        return exit_probabilities(self.logits(outputs[:, :-1]).sigmoid())

    def forward(self, outputs: Tensor) -> Tensor:
        """(n, l, classes) -> (n,) bool."""
        return conditional_probabilities(self.logits(outputs).sigmoid())[:, -1] >= 0.5


class Thresholds(nn.Module):
    """Leave where the confidence reaches the exit's threshold; at first infinite, so that nobody leaves.

    Args:
        exits: inner exits.
        measure: of :data:`CONFIDENCE`.
        shared: :meth:`fit` one threshold for all exits, or one each.

    Source: arXiv 1703.09844.
    """

    values: Tensor

    def __init__(self, exits: int, measure: str = "max_probability", shared: bool = True) -> None:
        super().__init__()
        if measure not in CONFIDENCE:
            raise unknown("measure", measure, CONFIDENCE)
        self.measure, self.shared = measure, shared
        self.register_buffer("values", torch.full((exits,), torch.inf))

    def forward(self, outputs: Tensor) -> Tensor:
        """(n, l, classes) -> (n,) bool."""
        return CONFIDENCE[self.measure](outputs[:, -1]) >= self.values[outputs.shape[1] - 1]

    @torch.no_grad()
    def fit(self, outputs: Tensor, costs: Tensor, budget: float) -> Thresholds:
        """Set the thresholds so that held-out inputs cost ``budget`` on average.

        One threshold is the largest confidence that keeps within the budget. One each: exits take shares in
        proportion to ``z^l``, with z such that the budget is met; at each the most confident of those left leave.

        Args:
            outputs: logits of all exits ``(n, exits, classes)``, of inputs that nothing was trained on.
            costs: share of the cost at each exit ``(exits,)``.
            budget: between ``costs[0]`` and 1.
        """
        low, high = float(costs[0]), float(costs[-1])
        if not low <= budget <= high:
            raise PomonaError(f"budget={budget} must lie between {low:.3g}, the first exit's cost, and {high:.3g}")
        score = CONFIDENCE[self.measure](outputs[:, :-1])
        if self.shared:
            candidates = torch.cat([score.flatten().unique(), score.new_tensor([torch.inf])])
            first, last = 0, len(candidates) - 1
            while first < last:  # the mean cost rises with the threshold
                middle = (first + last + 1) // 2
                exits = F.pad(score >= candidates[middle], (0, 1), value=True).int().argmax(1)
                first, last = (middle, last) if costs[exits].mean() <= budget else (first, middle - 1)
            self.values.fill_(candidates[first])
            return self
        place, cost = torch.arange(len(costs), dtype=torch.float64), costs.double().cpu()

        def excess(log_z: float) -> float:
            return float((place * log_z).softmax(0) @ cost) - budget

        ends = -60.0, 60.0
        log_z = ends[0] if excess(ends[0]) >= 0 else ends[1] if excess(ends[1]) <= 0 else brentq(excess, *ends)
        shares = (place * log_z).softmax(0)
        there = torch.ones(len(score), dtype=torch.bool, device=score.device)
        for i, share in enumerate(shares[:-1].tolist()):
            mine = score[there, i]
            count = min(round(share * len(score)), len(mine))
            self.values[i] = mine.topk(count).values[-1] if count else math.inf
            there &= score[:, i] < self.values[i]
        return self


class Patience(nn.Module):
    """Leave once ``patience`` exits in a row have agreed with the one before them.

    Source: arXiv 2006.04152.
    """

    def __init__(self, patience: int = 2) -> None:
        super().__init__()
        check_positive(patience=patience)
        self.patience = patience

    def forward(self, outputs: Tensor) -> Tensor:
        """(n, l, classes) -> (n,) bool."""
        recent = outputs[:, -(self.patience + 1) :].argmax(2)
        agree = (recent == recent[:, :1]).all(1)
        return agree if recent.shape[1] > self.patience else torch.zeros_like(agree)


POLICIES: dict[str, Callable[[int], nn.Module]] = {
    "uncertainty": Gates,
    "threshold": Thresholds,
    "dynamic": lambda exits: Thresholds(exits, shared=False),
    "patience": lambda exits: Patience(),
    "none": Thresholds,
}


def make_policy(name: str, exits: int) -> nn.Module:
    """A policy of :data:`POLICIES` for so many inner exits."""
    if name not in POLICIES:
        raise unknown("gate", name, POLICIES)
    return POLICIES[name](exits)
