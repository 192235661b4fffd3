import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.fnet import (
    ENCODER_MIXERS,
    DCTMixer,
    FNet,
    FNetBlock,
    FourierMixer,
    HartleyMixer,
    dct_matrix,
    dft_matrices,
)
from pomona.nn.mixing import AttentionMixer, NoMix


def tokens(n: int = 6, d: int = 8) -> torch.Tensor:
    return torch.randn(3, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reverse(x: torch.Tensor) -> torch.Tensor:
    """x at -n, -d, modulo the lengths."""
    return x.flip(-2, -1).roll((1, 1), (-2, -1))


@pytest.mark.parametrize(("n", "d"), [(6, 8), (7, 5), (1, 4), (4, 1), (5, 2)])
@pytest.mark.parametrize("method", ["fft", "matmul"])
def test_fourier_equals_the_real_part_of_fft2_and_the_dft_matrices(n, d, method):
    x = tokens(n, d)
    expected = torch.fft.fft2(x, dim=(-2, -1))
    torch.testing.assert_close(FourierMixer(method=method)(x), expected.real)
    torch.testing.assert_close(HartleyMixer(method=method)(x), expected.real - expected.imag)
    sized = FourierMixer(d, n, method="matmul").double()
    torch.testing.assert_close(sized(x), expected.real, atol=1e-5, rtol=1e-5)  # its matrices were made in float32
    (cn, sn), (cd, sd) = dft_matrices(n, x), dft_matrices(d, x)
    product = torch.complex(cn, sn) @ x.to(torch.complex128) @ torch.complex(cd, sd)
    torch.testing.assert_close(product.real, expected.real)


def test_mixing_twice_gives_x_plus_x_reversed():
    x, mixer = tokens(), FourierMixer()
    torch.testing.assert_close(mixer(mixer(x)), 6 * 8 / 2 * (x + reverse(x)))


def test_hartley_is_an_involution_up_to_n_d():
    x, mixer = tokens(7, 5), HartleyMixer()
    torch.testing.assert_close(mixer(mixer(x)), 35 * x)
    ortho = HartleyMixer(scale="ortho")
    torch.testing.assert_close(ortho(ortho(x)), x)


def test_mixer_is_linear_without_parameters_and_a_constant_gives_one_entry():
    x, y, mixer = tokens(), tokens().flip(0), FourierMixer()
    torch.testing.assert_close(mixer(2 * x - 3 * y), 2 * mixer(x) - 3 * mixer(y))
    assert not list(mixer.parameters())
    out = mixer(torch.ones(1, 6, 8, dtype=torch.float64))[0]
    assert out[0, 0] == 48 and out.abs().sum() == pytest.approx(48)


def test_gradient_of_the_mixer_is_the_same_operator():
    x, weight = tokens().requires_grad_(), tokens().flip(1)
    (gradient,) = torch.autograd.grad((FourierMixer()(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, FourierMixer()(weight))


def test_no_mix_block_is_permutation_equivariant_and_fnet_is_not():
    x, order = tokens(), torch.tensor([3, 1, 5, 0, 2, 4])
    apart, mixed = FNetBlock(8, mixer=NoMix()).double(), FNetBlock(8).double()
    torch.testing.assert_close(apart(x[:, order]), apart(x)[:, order])
    assert (mixed(x[:, order]) - mixed(x)[:, order]).abs().max() > 0.1


def test_dct_is_orthonormal_and_matches_its_formula():
    c = dct_matrix(7, tokens())
    torch.testing.assert_close(c @ c.T, torch.eye(7, dtype=torch.float64))
    x = tokens(7, 5)
    torch.testing.assert_close(DCTMixer()(x).square().sum(), x.square().sum())


def test_post_norm_block_follows_its_equation():
    block, x = FNetBlock(8, 16).double(), tokens()
    u = block.norm_mixer(x + torch.fft.fft2(x).real)
    torch.testing.assert_close(block(x), block.norm_channel(u + block.channel_mlp(u)))


@pytest.mark.parametrize("mixer", ENCODER_MIXERS)
def test_fnet_heads_and_hybrid(mixer):
    net = FNet(20, 8, 3, 6, mixer=mixer, hybrid=1, pad=0)
    ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    out = net(ids, torch.ones_like(ids))
    assert [isinstance(b.mixer, AttentionMixer) for b in net.blocks][-1]
    assert net.masked_word_logits(out).shape == (4, 6, 20)
    assert net.next_sentence_logits(out).shape == (4, 2) and net.pooled(out).abs().max() <= 1
    net.masked_word_logits(out).square().mean().backward()
    assert all(p.grad is not None for p in net.blocks.parameters())


def test_padding_words_add_nothing_but_length_does():
    net = FNet(20, 8, 1, 8, pad=0).double()
    assert not net.word.weight[0].any()
    ids = torch.randint(1, 20, (1, 6))
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    assert (net(padded)[:, :6] - net(ids)).abs().max() > 1e-6


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="causal=True is impossible"):
        FourierMixer(causal=True)
    with pytest.raises(PomonaError, match="hybrid=9 must lie between 0 and layers=4"):
        FNet(20, hybrid=9)
    with pytest.raises(PomonaError, match="ids has 9 tokens, but max_len=8"):
        FNet(20, max_len=8)(torch.zeros(1, 9, dtype=torch.long))
