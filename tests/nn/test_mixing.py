import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.fnet import DCTMixer, FourierMixer, HartleyMixer, MatrixMixer
from pomona.nn.mixing import (
    AttentionMixer,
    ConvMixer1d,
    GatingMixer,
    LinearTokenMixer,
    MixerBlock,
    MixerNet,
    MLPTokenMixer,
    NoMix,
    PoolMixer,
)
from pomona.nn.norm import Affine

N, D = 6, 8
MIXERS = {
    "none": NoMix,
    "mlp": lambda: MLPTokenMixer(N),
    "resmlp": lambda: LinearTokenMixer(N),
    "attention": lambda: AttentionMixer(D, heads=2),
    "pool": PoolMixer,
    "pool2d": lambda: PoolMixer(grid=(2, 3)),
    "conv": lambda: ConvMixer1d(D),
    "gmlp": lambda: GatingMixer(D, N),
    "fourier": FourierMixer,
    "fourier_matmul": lambda: FourierMixer(method="matmul"),
    "hartley": HartleyMixer,
    "dct": DCTMixer,
    "linear": lambda: MatrixMixer(D, N),
    "random": lambda: MatrixMixer(D, N, learned=False),
}


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_keeps_the_shape_and_has_its_gradient(name):
    mixer, x = MIXERS[name]().double(), tokens()
    assert mixer(x).shape == x.shape
    assert mixer(x[:0]).shape == (0, N, D)
    assert torch.autograd.gradcheck(mixer, x[:1].requires_grad_())
    torch.testing.assert_close(mixer(x.mT.contiguous().mT), mixer(x))
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MIXERS)
def test_padding_does_not_reach_the_real_tokens(name):
    mixer, x = MIXERS[name]().double(), tokens()
    mask = torch.arange(N).expand(3, N) < 4
    other = torch.where(mask[..., None], x, 100.0)
    torch.testing.assert_close(mixer(x, mask)[mask], mixer(other, mask)[mask])


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "none"])
def test_every_mixer_but_none_lets_neighbours_see_one_another(name):
    mixer, x = MIXERS[name]().double(), tokens(1)
    moved = x.clone()
    moved[:, 1] += 1
    if name == "gmlp":  # its gate starts near the identity
        nn.init.normal_(mixer.gate.mix.weight)
    assert (mixer(moved) - mixer(x))[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize(
    "mixer",
    [
        AttentionMixer(D, causal=True),
        LinearTokenMixer(N, causal=True),
        ConvMixer1d(D, kernel=4, causal=True),
        GatingMixer(D, N, causal=True),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_causal_mixers_do_not_look_ahead(mixer, masked):
    mixer, x = mixer.double(), tokens()
    mask = torch.ones(3, N, dtype=torch.bool) if masked else None
    later = x.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(mixer(x, mask)[:, :3], mixer(later, mask)[:, :3])


def test_attention_matches_multihead_attention():
    mine, x = AttentionMixer(D, heads=2).double(), tokens()
    theirs = nn.MultiheadAttention(D, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(mine.qkv.weight)
        theirs.in_proj_bias.copy_(mine.qkv.bias)
        theirs.out_proj.weight.copy_(mine.out.weight)
        theirs.out_proj.bias.copy_(mine.out.bias)
    torch.testing.assert_close(mine(x), theirs(x, x, x)[0])


def test_pool_of_equal_tokens_is_zero():
    x = tokens()[:, :1].expand(-1, N, -1)
    assert PoolMixer()(x).abs().max() < 1e-12


def test_gating_starts_near_its_ungated_channel_part():
    mixer, x = GatingMixer(D, N).double(), tokens()
    u, _ = F.gelu(mixer.up(x)).chunk(2, -1)
    torch.testing.assert_close(mixer(x), mixer.down(u), atol=0.01, rtol=0.01)


def test_blocks_follow_their_equations():
    x = tokens()
    for norm in ("pre", "post"):
        block = MixerBlock(D, LinearTokenMixer(N), nn.Linear(D, D), norm=norm).double()
        a, b = block.norm_mixer, block.norm_channel
        if norm == "pre":
            u = x + block.mixer(a(x))
            expected = u + block.channel_mlp(b(u))
        else:
            u = a(x + block.mixer(x))
            expected = b(u + block.channel_mlp(u))
        torch.testing.assert_close(block(x), expected)


def test_drop_path_leaves_out_whole_examples():
    block = MixerBlock(D, NoMix(), nn.Linear(D, D), drop_path=0.5).double()
    x = tokens(1).expand(64, N, D)
    torch.manual_seed(0)
    difference = (block(x) - x).abs().sum((1, 2))
    assert 10 < (difference == 0).sum() < 54
    block.eval()
    assert ((block(x) - x).abs().sum((1, 2)) > 0).all()


def test_mixer_net_averages_the_real_tokens_only():
    head = nn.Linear(D, 3)
    net = MixerNet(nn.Identity(), D, PoolMixer, depth=2, head=head, make_norm=Affine, layer_scale=0.1).double()
    x = tokens()
    mask = torch.arange(N).expand(3, N) < 4
    torch.testing.assert_close(net(x, mask), net(torch.where(mask[..., None], x, 7.0), mask))
    assert net(x).shape == (3, 3)


def test_vmap_over_stacked_mixers():
    nets = [MixerBlock(D, AttentionMixer(D), nn.Linear(D, D)) for _ in range(2)]
    params, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(2, 3, N, D)
    out = torch.func.vmap(lambda p, b, v: torch.func.functional_call(nets[0], (p, b), (v,)))(params, buffers, x)
    torch.testing.assert_close(out, torch.stack([net(v) for net, v in zip(nets, x, strict=True)]), atol=1e-5, rtol=1e-4)


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="x has 6 tokens, but this mixer was made for tokens=4"):
        MLPTokenMixer(4)(tokens())
    with pytest.raises(PomonaError, match="dim=8 cannot be divided into heads=3 equal parts"):
        AttentionMixer(8, heads=3)
    with pytest.raises(PomonaError, match="kernel=4 must be an odd number"):
        PoolMixer(kernel=4)
