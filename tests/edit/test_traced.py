"""The operations on every architecture of the trace's tests."""

import dataclasses
from functools import lru_cache

import pytest
import torch
from torch.utils._pytree import tree_map

from pomona.edit.apply import tensors
from pomona.edit.operations import duplicate, grow, mask, permute, take
from pomona.edit.transport import transport
from pomona.errors import PomonaError
from pomona.trace.axes import axes
from pomona.trace.check import Float64, leaves, worst_difference
from tests.trace.models import MODELS, make

QUICK = ("mlp", "vgg", "mobilenet", "vit", "groupnorm", "grouped", "lstm", "weight_norm", "shuffle", "conv1d")
SLOW = [*(name for name in MODELS if name not in QUICK), "gpt2", "bert", "llama"]
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@lru_cache(maxsize=2)
def traced(name):
    if name in ("gpt2", "bert", "llama"):
        pytest.importorskip("transformers")
    net, example = make(name)
    example = tree_map(lambda x: x.double() if x.is_floating_point() else x, example)
    net = net.double().eval()
    return net, axes(net, *example)


def outputs(net, found):
    with torch.no_grad(), Float64():
        return leaves(net(*found.example))


def difference(left, right, found):
    return worst_difference(outputs(left, found), outputs(right, found))


def exact(found):
    """Axes whose units are summed up by weights alone; of bundles and the units inside them the bundles."""
    return [a for a in found if a.groups == 1 and not a.coupled and any(place.role == "in" for place in a.places)]


def last_half(axis):
    per = axis.size // axis.groups
    return [g * per + i for g in range(axis.groups) for i in range(per - max(1, per // 2), per)]


@pytest.mark.parametrize("name", NAMES)
def test_half_of_every_axis_has_the_promised_shapes_and_runs(name):
    net, found = traced(name)
    edit = take(net, found, {axis.name: last_half(axis) for axis in found})
    small = tensors(edit.net)
    for key, before in tensors(net).items():
        if key in edit.maps:
            wanted = [len(edit.maps[key].get(dim, range(size))) for dim, size in enumerate(before.shape)]
            assert list(small[key].shape) == wanted
    for axis in found:
        inside = [a for a in found if a is not axis and {p.name for p in a.places} & {p.name for p in axis.places}]
        for place in axis.places if not inside else ():
            lost = (axis.size - len(last_half(axis))) * place.index.shape[1]
            assert small[place.name].shape[place.dim] <= tensors(net)[place.name].shape[place.dim] - lost
    assert all(x.isfinite().all() for x in outputs(edit.net, found))
    by_share = take(net, found, 0.5)
    assert sum(p.numel() for p in by_share.net.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_taking_equals_masking(name):
    net, found = traced(name)
    kept = {axis.name: last_half(axis) for axis in exact(found)}
    if not kept:
        pytest.skip("every axis is normalised over or multiplied")
    gates = {key: torch.zeros(found[key].size).index_fill(0, torch.tensor(units), 1) for key, units in kept.items()}
    assert difference(mask(net, found, gates).net, take(net, found, kept).net, found) <= 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if name != "shuffle"])
def test_copies_and_new_units_keep_the_function(name):
    net, found = traced(name)
    chosen = exact(found)
    if not chosen:
        pytest.skip("every axis is normalised over or multiplied")
    wide = duplicate(net, found, {axis.name: [0, axis.size - 1, 0] for axis in chosen})
    assert difference(net, wide.net, found) <= 1e-9
    grown = grow(net, found, {axis.name: 2 for axis in chosen}, generator=torch.Generator().manual_seed(0))
    assert difference(net, grown.net, found) <= 1e-9
    assert all(len(grown.maps[a.name.partition("#")[0]]) for a in chosen)


def test_units_that_a_shuffle_interleaves_with_others_cannot_be_added():
    net, found = traced("shuffle")
    with pytest.raises(PomonaError, match="changes the function here; .* shuffle interfere"):
        duplicate(net, found, {axis.name: [0] for axis in found})


@pytest.mark.parametrize("name", NAMES)
def test_permuting_and_back_is_the_identity_and_training_goes_on(name):
    net, found = traced(name)
    net = torch.nn.Module.train(net, False)
    orders = {axis.name: axis.random_order(torch.Generator().manual_seed(0)) for axis in found}
    there = permute(net, found, orders)
    assert difference(net, there.net, found) <= 1e-9
    back = permute(there.net, dataclasses.replace(found, net=there.net), {k: v.argsort() for k, v in orders.items()})
    if not any(axis.kind == "block" for axis in found):  # units inside permuted bundles have other numbers there
        assert all(torch.equal(value, tensors(net)[key]) for key, value in tensors(back.net).items())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        steps(net, optimizer, found, 2)
        edit = permute(net, found, orders)
        steps(edit.net, transport(optimizer, net, edit), found, 1)
        steps(net, optimizer, found, 1)
        assert difference(net, edit.net, found) <= 1e-6
    finally:
        net.load_state_dict(state)


def steps(net, optimizer, found, count):
    for _ in range(count):
        optimizer.zero_grad()
        sum(x.square().mean() for x in leaves(net(*found.example)) if x.is_floating_point()).backward()
        optimizer.step()


def test_layers_that_share_a_size_are_named_where_only_one_is_edited():
    net, found = traced("lstm")
    with pytest.raises(PomonaError, match=r"rnn.weight_ih_l1 in the same layer may have to be edited alike"):
        take(net, found, {"rnn.weight_ih_l0": [0, 1]})


def test_the_graph_takes_the_place_of_a_module_whose_code_holds_sizes():
    net, found = traced("shuffle")
    edit = take(net, found, 0.5)
    assert "the result is the graph of its operations" in edit.notes[-1]
    assert type(net).__name__ not in type(edit.net).__name__
    assert type(take(*traced("vit"), 0.5).net) is type(traced("vit")[0])
