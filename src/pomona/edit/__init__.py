"""Functions from network to network."""

from pomona.edit.lottery_ticket import (
    LotteryTicket,
    Ticket,
    fitting,
    linear_barrier,
    stability,
)
from pomona.edit.masks import (
    Mask,
    Masks,
    prune,
)

__all__ = [
    "LotteryTicket",
    "Mask",
    "Masks",
    "Ticket",
    "fitting",
    "linear_barrier",
    "prune",
    "stability",
]
