import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.norm import LayerNorm, Norm
from pomona.nn.norm_analysis import fisher_scale, fold_into_linear, invariance_table, norm_stats

CHANGES = (
    "weight_matrix_scale",
    "weight_matrix_shift",
    "weight_vector_scale",
    "dataset_scale",
    "dataset_shift",
    "example_scale",
)


@pytest.mark.parametrize(
    ("kind", "invariant"),
    [
        ("batch", "101110"),
        ("weight", "101000"),
        ("layer", "110101"),
        ("rms", "100101"),
        ("scale", "100101"),
        ("dyt", "000000"),
        ("none", "000000"),
    ],
)
def test_invariances_are_those_of_the_papers_table(kind, invariant):
    assert invariance_table(kind) == {change: bit == "1" for change, bit in zip(CHANGES, invariant, strict=True)}


@pytest.mark.parametrize("kind", ["layer", "batch", "weight", "rms"])
def test_fisher_falls_as_the_square_of_the_weight_length(kind):
    for scale, trace in fisher_scale(kind).items():
        assert trace == pytest.approx(scale**-2, rel=1e-6)


def test_fisher_of_a_plain_layer_does_not_depend_on_length():
    assert all(trace == pytest.approx(1.0) for trace in fisher_scale("none").values())


@pytest.mark.parametrize("kind", ["layer", "rms", "scale", "group", "dyt", "batch"])
def test_fold_into_linear_keeps_the_function(kind):
    generator = torch.Generator().manual_seed(0)
    norm, linear = Norm(kind, 8).double(), nn.Linear(8, 3, bias=kind != "rms").double()
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    norm(2 * x + 1)
    with torch.no_grad():
        norm.weight.add_(torch.randn(norm.weight.shape, generator=generator))
        if getattr(norm, "bias", None) is not None:
            norm.bias.add_(torch.randn(8, generator=generator))
    norm.eval()
    bare, folded = fold_into_linear(norm, linear)
    assert torch.allclose(folded(bare(x)), linear(norm(x)), atol=1e-10)
    if kind == "batch":
        assert isinstance(bare, nn.Identity)
    else:
        assert bool((bare.weight == 1).all()) and not bool((norm.weight == 1).all())


def test_norm_stats_measures_before_and_after():
    net = nn.Sequential(nn.Linear(4, 8), LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    stats = norm_stats(net, torch.randn(16, 4))
    assert list(stats) == ["1"]
    assert stats["1"]["out_std"] == pytest.approx(1.0, abs=1e-3)
    assert stats["1"]["out_mean"] == pytest.approx(0.0, abs=1e-6)
    assert stats["1"]["gain_mean"] == 1.0


def test_bad_input():
    with pytest.raises(PomonaError, match="norm='layr' is not known"):
        invariance_table("layr")
    with pytest.raises(PomonaError, match="no positions"):
        invariance_table("instance")
    with pytest.raises(PomonaError, match="must all be above 0"):
        fisher_scale("layer", [0.0])
    with pytest.raises(PomonaError, match="norm=ReLU has no gain"):
        fold_into_linear(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(PomonaError, match="call .eval"):
        fold_into_linear(nn.BatchNorm1d(2), nn.Linear(2, 2))
    with pytest.raises(PomonaError, match="no norm module"):
        norm_stats(nn.Linear(2, 2), torch.zeros(1, 2))
