"""Sweeping a slot: ``act=all`` makes a candidate of every name that fills it."""

from __future__ import annotations

from pomona import catalog
from pomona.errors import PomonaError, unknown
from pomona.nets.build import keys
from pomona.options import parse_candidate


def sweep(text: str, backbone: str = "mlp") -> list[str]:
    """``("act=all", "mlp width=64")`` -> one candidate a name, the backbone's own first.

    Raises:
        PomonaError: for a slot that the backbone has not, or an unknown name.
    """
    slot, equals, names = text.partition("=")
    if not equals or not names:
        raise PomonaError(f"slot={text!r} must be written as slot=all or slot=name,name, such as act=gelu,relu")
    head, given = parse_candidate(backbone)
    own = keys(head)[0]
    if slot not in own:
        raise unknown(f"slot of {head}", slot, own)
    every = catalog.slots()[slot]
    chosen = list(every) if names == "all" else names.split(",")
    for name in chosen:
        catalog.entry(slot, name)
    default = given.get(slot, own[slot])
    chosen = [default, *(name for name in chosen if name != default)]
    rest = {key: value for key, value in given.items() if key != slot}
    return [" ".join([head, f"{slot}={name}", *(f"{k}={v}" for k, v in rest.items())]) for name in chosen]
