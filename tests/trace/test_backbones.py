"""Axes of Pomona's own backbones: right with every layer in their slots; what has no rule is frozen and named."""

import pytest
import torch

from pomona import catalog
from pomona.nets import BACKBONES, Inputs, Outputs, build
from pomona.nets.build import keys
from pomona.trace import axes

INPUTS = {
    "table": (Inputs("table", (8,)), lambda: torch.randn(2, 8)),
    "image": (Inputs("image", (1, 8, 8)), lambda: torch.randn(2, 1, 8, 8)),
    "tokens": (Inputs("tokens", (12,), vocabulary=9), lambda: torch.randint(9, (2, 12))),
}
KIND = {"mlp": "table", "convnet": "image", "resnet": "image", "mixer": "image", "sequence": "tokens"}
SLOTS = [
    (name, slot, option)
    for name in KIND
    for slot in keys(name)[0]
    if slot not in {"init", "weights"}
    for option in catalog.slots()[slot]
]


class Sizes:
    outputs = Outputs("classes", 3)

    def __init__(self, inputs):
        self.inputs = inputs


def trace(candidate):
    inputs, example = INPUTS[KIND[candidate.split()[0]]]
    torch.manual_seed(0)
    net = build(f"{candidate} width=8", Sizes(inputs)).eval()
    found = axes(net, example())
    assert found.check().worst <= 1e-9
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    found = trace(name)
    assert len(found) and not found.unknown


@pytest.mark.slow
@pytest.mark.parametrize("name, slot, option", SLOTS)
def test_every_layer_in_every_slot(name, slot, option):
    try:
        build(f"{name} {slot}={option} width=8", Sizes(INPUTS[KIND[name]][0]))
    except ValueError as error:
        pytest.skip(str(error))
    trace(f"{name} {slot}={option}")
