import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.cost import flops, parameters
from pomona.nn.hypermixer import (
    MIXERS,
    HeadMLP,
    HyperMixerBlock,
    HyperMixing,
    LinearAttentionMixer,
    diagnose,
    sinusoid,
    tuning_curve,
)
from pomona.nn.mixing import MLPTokenMixer, NoMix

D, N, K = 6, 5, 8


def layer(**options: object) -> HyperMixing:
    return HyperMixing(D, K, generator=torch.Generator().manual_seed(0), **options).double()


def tokens(batch: int = 3, n: int = N) -> torch.Tensor:
    return torch.randn(batch, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
def test_permutation_equivariant_without_positions(tied):
    x, order = tokens(), torch.tensor([3, 0, 4, 2, 1])
    free = layer(pos="none", tied=tied, heads=2)
    torch.testing.assert_close(free(x[:, order]), free(x)[:, order])
    located = layer(tied=tied)
    assert (located(x[:, order]) - located(x)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["hypermixer", "linear_transformer"])
def test_masked_padding_leaves_real_tokens_unchanged(name):
    x = tokens()
    mixer = MIXERS[name](D, N).double()
    mask = torch.arange(N + 4).expand(3, -1) < N
    padded = torch.cat([x, 100 * tokens(n=4)], 1)
    torch.testing.assert_close(mixer(padded, mask)[:, :N], mixer(x))
    torch.testing.assert_close(mixer(padded, mask)[:, :N], mixer(x, mask[:, :N]))


def test_cost_linear_in_tokens_and_parameters_independent_of_them():
    mixer = HyperMixing(D, K, norm=False)
    assert parameters(mixer) == 2 * (D * D + D * K)
    assert parameters(HyperMixing(D, K, norm=False, tied=True)) == D * D + D * K
    assert parameters(HyperMixing(D, K, norm=False, heads=2)) == D * D + D * K
    counts = [flops(mixer, torch.randn(2, n, D)) for n in (8, 16, 32)]
    assert counts[1] == 2 * counts[0] and counts[2] == 4 * counts[0]
    assert counts[0] == 2 * 8 * (parameters(mixer) + 2 * D * K)


def test_weights_constant_by_position_equal_a_fixed_token_mixing_mlp():
    class Constant(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return self.weight.expand(len(x), 1, -1, -1)

    mixer, fixed = layer(norm=False), MLPTokenMixer(N, width=K).double()
    for linear in (fixed.up, fixed.down):
        nn.init.zeros_(linear.bias)
    mixer.first, mixer.second = Constant(fixed.up.weight.T), Constant(fixed.down.weight)
    torch.testing.assert_close(mixer(tokens()), fixed(tokens()))


def test_one_head_equals_the_formula_by_matmuls():
    mixer, x = layer(), tokens()
    h = x + sinusoid(N, D, x)
    w1, w2 = (F.gelu(h @ m.up[0]) @ m.down[0] for m in (mixer.first, mixer.second))
    expected = torch.stack([b @ F.gelu(a.T @ one) for a, b, one in zip(w1, w2, x, strict=True)])
    torch.testing.assert_close(mixer(x), F.layer_norm(expected, (D,)))


def test_heads_are_layers_on_their_share_of_the_features():
    mixer, x = layer(heads=2, norm=False, pos="none"), tokens()
    parts = []
    for head in range(2):
        one = HyperMixing(D // 2, K // 2, norm=False, pos="none").double()
        for own, whole in ((one.first, mixer.first), (one.second, mixer.second)):
            own.up, own.down = nn.Parameter(whole.up[head : head + 1]), nn.Parameter(whole.down[head : head + 1])
        parts.append(one(x[..., 3 * head : 3 * head + 3]))
    torch.testing.assert_close(mixer(x), torch.cat(parts, -1))


def test_cross_mixing_takes_weights_from_keys_and_queries():
    mixer, x, other = layer(heads=2), tokens(), tokens(n=7).flip(0)
    torch.testing.assert_close(mixer.cross(x, x, x), mixer(x))
    out = mixer.cross(other, x, 2 * x)
    assert out.shape == other.shape
    mask = torch.arange(7).expand(3, -1) < 4
    torch.testing.assert_close(mixer.cross(other, x, 2 * x, mask)[:, :4], out[:, :4])
    hidden = mixer.cross(x, other, other, key_mask=mask)
    torch.testing.assert_close(hidden, mixer.cross(x, other[:, :4], other[:, :4]))


def test_generators_start_with_the_fans_of_one_head():
    made = HeadMLP(64, 256, 4, bias=True, generator=torch.Generator().manual_seed(0))
    assert made.up.std().item() == pytest.approx((2 * 2 / 32) ** 0.5, rel=0.05)
    assert made.down.std().item() == pytest.approx((2 * 2 / 80) ** 0.5, rel=0.05)
    assert not made.up_bias.any() and made(torch.zeros(1, 3, 64)).shape == (1, 4, 3, 64)


def test_linear_attention_equals_its_sum_over_tokens():
    mixer, x = LinearAttentionMixer(D).double(), tokens()
    q, k, v = mixer.qkv(x).chunk(3, -1)
    weight = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    expected = mixer.out(weight / weight.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_block_follows_its_equation_and_every_baseline_fits_it():
    block, x = HyperMixerBlock(D, K, heads=2).double(), tokens()
    u = x + block.mixer(block.norm_mixer(x))
    torch.testing.assert_close(block(x), u + block.channel_mlp(block.norm_channel(u)))
    for make in MIXERS.values():
        assert make(D, N)(x.float(), torch.ones(3, N, dtype=torch.bool)).shape == x.shape


def test_diagnose_gives_the_dependence_of_outputs_on_inputs():
    linear = MLPTokenMixer(N).double()
    x = tokens()
    found = diagnose(layer(), x)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, N, dtype=torch.float64))
    assert not diagnose(NoMix(), x).any() and diagnose(linear, x[:0]).shape == (0, N, N)
    torch.testing.assert_close(diagnose(lambda x: 3 * x, x), torch.eye(N, dtype=torch.float64).expand(3, N, N))
    mask = torch.arange(N).expand(3, -1) < 3
    assert not diagnose(layer(), x, mask)[:, :, 3:].any()


def test_tuning_curve_is_the_expected_maximum():
    scores = [0.2, 0.5, 0.9]
    pairs = [max(a, b) for a in scores for b in scores]
    curve = tuning_curve(scores)
    assert curve[0].item() == pytest.approx(sum(scores) / 3) and curve[1].item() == pytest.approx(sum(pairs) / 9)
    assert (curve.diff() > 0).all() and (curve <= 0.9).all()
    with pytest.raises(PomonaError, match="scores is empty"):
        tuning_curve([])


def test_gradient():
    assert torch.autograd.gradcheck(layer(heads=2), tokens(1).requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="causal=True is impossible"):
        layer(causal=True)
    with pytest.raises(PomonaError, match="hidden=8 cannot be divided into heads=3 equal parts"):
        layer(heads=3)
    with pytest.raises(PomonaError, match="pos='learned' is not known"):
        layer(pos="learned")
    with pytest.raises(PomonaError, match="HyperMixing takes 6 features on axis -1"):
        layer()(torch.zeros(1, 2, 5))
    with pytest.raises(PomonaError, match="cross needs tied=False"):
        layer(tied=True).cross(tokens(), tokens(), tokens())
