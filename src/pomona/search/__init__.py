"""Searching for architectures: proxies, strategies, small benchmark tables and the referee."""

from pomona.search.minibench import (
    MiniBench,
)
from pomona.search.nas_eval import (
    benchmark,
    protocol_ladder,
    relative_improvement,
    seed_sensitivity,
)
from pomona.search.proxies import (
    PROXIES,
    ProxyAssisted,
    grad_norm,
    grad_sign,
    naswot,
    psi,
    snip,
    synflow,
)
from pomona.search.strategies import (
    RandomSearch,
    RegularizedEvolution,
    run_search,
)

__all__ = [
    "MiniBench",
    "PROXIES",
    "ProxyAssisted",
    "RandomSearch",
    "RegularizedEvolution",
    "benchmark",
    "grad_norm",
    "grad_sign",
    "naswot",
    "protocol_ladder",
    "psi",
    "relative_improvement",
    "run_search",
    "seed_sensitivity",
    "snip",
    "synflow",
]
