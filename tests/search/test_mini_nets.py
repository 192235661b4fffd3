import pytest
import torch

from pomona.errors import PomonaError
from pomona.search.mini_nets import CELL, MLP, DropPath, MiniCellNet, arch_key, build_net, enumerate_archs


def test_copies_are_independent_networks():
    arch = {"edge01": "conv3", "edge02": "conv1", "edge12": "pool"}
    both = MiniCellNet(arch, channels=4, copies=2).eval()
    x = torch.randn(3, 2, 14, 14)
    other = x.clone()
    other[:, 1] += 1
    assert torch.equal(both(x)[:, 0], both(other)[:, 0]) and not torch.equal(both(x)[:, 1], both(other)[:, 1])
    one = MiniCellNet(arch, channels=4).eval()
    state = {}
    for name, value in one.state_dict().items():
        whole = both.state_dict()[name]
        state[name] = whole[: len(value)] if value.ndim else whole
    one.load_state_dict(state)
    torch.testing.assert_close(one(x[:, :1]), both(x)[:, 0])


def test_node2_adds_the_direct_edge_and_the_edge_through_node1():
    x = torch.randn(2, 1, 14, 14)
    direct, around, twice, none = (
        build_net("mini-cell", dict(zip(CELL, ops, strict=True)), seed=0).eval().first[0]
        for ops in (("none", "skip", "none"), ("skip", "none", "skip"), ("skip",) * 3, ("skip", "none", "none"))
    )
    torch.testing.assert_close(direct(x), x)
    torch.testing.assert_close(around(x), x)
    torch.testing.assert_close(twice(x), 2 * x)
    assert none(x).abs().max() == 0


def test_spaces_have_125_and_96_architectures_with_distinct_keys():
    for variables, size in ((CELL, 125), (MLP, 96)):
        assert len({arch_key(arch) for arch in enumerate_archs(variables)}) == size


def test_auxiliary_head_leaves_the_other_weights_and_the_output():
    arch = dict.fromkeys(CELL, "conv3")
    plain, extra = (build_net("mini-cell", arch, seed=3, **kw).eval() for kw in ({}, {"auxiliary": True}))
    x = torch.randn(2, 1, 14, 14)
    main, second = extra.both_heads(x)
    assert torch.equal(plain(x), extra(x)) and torch.equal(main, extra(x)) and second.shape == (2, 10)


def test_drop_path_drops_whole_examples_keeps_the_mean_and_is_the_identity_in_evaluation():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 1, 1)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()} and torch.equal(y[:, 0], y[:, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05) and drop.eval()(x) is x


def test_empty_batch_and_gradients_reach_every_weight():
    net = build_net("mini-cell", dict.fromkeys(CELL, "conv1"), seed=0)
    assert net.eval()(torch.zeros(0, 1, 14, 14)).shape == (0, 10)
    net.train()(torch.randn(4, 1, 14, 14)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim > 1)


def test_bad_input_messages():
    with pytest.raises(PomonaError, match="space='maxi-cell' is not known"):
        build_net("maxi-cell", {})
    with pytest.raises(PomonaError, match="build the network with auxiliary=True"):
        MiniCellNet(dict.fromkeys(CELL, "skip")).both_heads(torch.zeros(1, 1, 14, 14))
