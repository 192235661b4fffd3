import pytest
import torch

from pomona.errors import PomonaError
from pomona.search.mini_nets import CELL, MLP, arch_key, enumerate_archs
from pomona.search.minibench import Images, MiniBench, Protocol, cost, train_arch

NAMES = ["mini-cell", "mini-cell-digits", "mini-mlp"]


@pytest.mark.parametrize("name, size", list(zip(NAMES, [125, 125, 96], strict=True)))
def test_committed_tables_hold_three_seeds_of_every_architecture(name, size):
    bench = MiniBench(name)
    assert len(bench) == size == len(bench.rows)
    for split in ("valid", "test"):
        scores = bench.scores(split=split)
        assert scores.shape == (size, 3) and scores.min() >= 0 and scores.max() <= 100
    arch = bench.archs[-1]
    assert bench.score(arch) == pytest.approx(sum(bench.row(arch)["test"]) / 3)
    assert bench.score(arch, split="valid", seed=1) == bench.row(arch)["valid"][1]


@pytest.mark.parametrize("name", NAMES)
def test_tables_agree_with_the_networks_they_describe(name):
    bench = MiniBench(name)
    shape = (1, 8, 8) if name.endswith("digits") else (1, 14, 14)
    for arch in bench.archs[:: len(bench) // 5]:
        assert cost(name, arch, shape, **bench.protocol.build).items() <= bench.row(arch).items()
        assert bench.build(arch, seed=0)(torch.zeros(2, *shape)).shape == (2, 10)


def test_an_arch_without_a_path_is_at_chance_and_convolutions_are_better():
    bench = MiniBench("mini-cell")
    dead = dict.fromkeys(CELL, "none")
    assert bench.score(dead) < 15 < bench.score(dict.fromkeys(CELL, "conv3"))


def toy_images(n=60):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 2
    x[:, :, :4] += 3 * y[:, None, None, None]
    return Images.split(x, y, x[:20], y[:20], n_train=40, n_valid=20, n_test=20)


@pytest.mark.parametrize("space, variables", [("mini-cell", CELL), ("mini-mlp", MLP)])
def test_training_learns_is_seeded_and_every_trick_runs(space, variables):
    arch = list(enumerate_archs(variables))[-31]
    build = {"in_features": 64} if space == "mini-mlp" else {"channels": 4}
    plain = Protocol(epochs=20, batch_size=10, build=build)
    first = train_arch(space, arch, toy_images(), plain, seeds=(0, 1))
    assert first == train_arch(space, arch, toy_images(), plain, seeds=(0, 1))
    assert len(first["test"]) == 2 and min(first["test"]) > 80
    tricks = Protocol(epochs=20, batch_size=10, cutout=3, shift=1, build=build)
    if space == "mini-cell":
        tricks = Protocol(epochs=20, batch_size=10, cutout=3, shift=1, auxiliary=0.4, drop_path=0.1, build=build)
    changed = train_arch(space, arch, toy_images(), tricks, seeds=(0, 1))
    assert min(changed["test"]) > 60


def test_splits_are_disjoint_and_standardised():
    x = torch.arange(60.0)[:, None, None, None].expand(-1, 1, 2, 2)
    images = Images.split(x, torch.zeros(60).long(), x, torch.zeros(60).long(), n_train=30, n_valid=20, n_test=5)
    assert not set(images.x_train[:, 0, 0, 0].tolist()) & set(images.x_valid[:, 0, 0, 0].tolist())
    assert images.x_train.mean().abs() < 1e-5 and len(images.x_test) == 5


def test_bad_input_messages():
    with pytest.raises(PomonaError, match="name='mini-sell' is not known; did you mean mini-cell"):
        MiniBench("mini-sell")
    bench = MiniBench("mini-mlp")
    with pytest.raises(PomonaError, match=r"arch='7\|1\|relu\|none' is not known"):
        bench.row({**bench.archs[0], "width": 7})
    assert arch_key(bench.archs[0]) == "8|1|relu|none"
    with pytest.raises(PomonaError, match="has no row for 95 of its"):
        MiniBench("x", table={"rows": {"8|1|relu|none": {}}, "variables": MLP})
