import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nets.cost import parameters
from pomona.nn.mixing import MLPTokenMixer
from pomona.nn.raft_mlp import (
    MultiScalePatchEmbedding,
    OriginalMixer,
    RaftMixer,
    RaftTokenMixer,
    raft_expand,
    raft_shrink,
    resize,
    separable_mixer,
)

H, W, C = 3, 4, 6


def mixer(raft: int = 2, **options) -> RaftTokenMixer:
    return RaftTokenMixer(H, W, C, raft=raft, generator=torch.Generator().manual_seed(0), **options).double()


def tokens(batch: int = 2, n: int = H * W) -> torch.Tensor:
    return torch.randn(batch, n, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_rafts_of_one_are_separable_axial_mixing():
    net, x = separable_mixer(H, W, C).double(), tokens()
    vertical, horizontal = (MLPTokenMixer(n, expand=2).double() for n in (H, W))
    for own, mlp in ((vertical, net.mlps[0]), (horizontal, net.mlps[1])):
        own.load_state_dict({k: v for k, v in mlp.state_dict().items() if not k.startswith(("act", "dropout"))})
    y = x.clone()
    for column in range(W):
        at = torch.arange(column, H * W, W)
        y[:, at] = x[:, at] + vertical(net.norms[0](x)[:, at])
    z = y.clone()
    for row in range(H):
        at = slice(row * W, (row + 1) * W)
        z[:, at] = y[:, at] + horizontal(net.norms[1](y)[:, at])
    torch.testing.assert_close(net(x), z)


@pytest.mark.parametrize("raft", [1, 2, 3])
def test_token_mixing_parameters(raft):
    e, norms = 2, 2 * 2 * C
    expected = 2 * e * raft**2 * (H**2 + W**2) + (e + 1) * raft * (H + W)
    assert parameters(mixer(raft)) - norms == expected


@pytest.mark.parametrize("axis", [0, 1])
def test_shrinking_and_its_inverse_are_the_identity(axis):
    x = tokens().unflatten(1, (H, W))
    small = raft_shrink(x, 2, axis)
    assert small.shape == (2, C // 2, (W, H)[axis], 2 * (H, W)[axis])
    assert torch.equal(raft_expand(small, 2, axis), x)
    o, place, other, along = 2, 1, 1, 2  # channel place * (C / r) + o
    pixel = x[0, along, other] if axis == 0 else x[0, other, along]
    assert small[0, o, other, place * (H, W)[axis] + along] == pixel[place * (C // 2) + o]


def test_norm_statistics_are_per_pixel_over_the_channels():
    net, x = mixer(residual=False), tokens()
    scaled = x * torch.rand(1, H * W, 1, dtype=torch.float64).add(0.5)
    for norm in net.norms:
        norm.eps = 0.0
    torch.testing.assert_close(net.step(scaled, 0), net.step(x, 0))


def test_native_resolution_does_not_interpolate_and_others_do(monkeypatch):
    net, x = mixer(), tokens()
    calls, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: calls.append(a[1]) or interpolate(*a, **k))
    assert torch.equal(net(x), net(x, grid=(H, W))) and not calls
    assert net(tokens(n=30), grid=(5, 6)).shape == (2, 30, C) and calls == [(H, W), (5, 6)]
    constant = torch.ones(1, 5, 6, C, dtype=torch.float64)
    torch.testing.assert_close(resize(constant, (H, W)), torch.ones(1, H, W, C, dtype=torch.float64))


def test_one_row_makes_the_vertical_step_a_function_of_each_pixel():
    net = RaftTokenMixer(1, 5, C, raft=1).double()
    x = tokens(n=5)
    other = x.clone()
    other[:, 3:] += 1
    assert torch.equal(net.step(x, 0)[:, :3], net.step(other, 0)[:, :3])
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(net.step(x[:, order], 0), net.step(x, 0)[:, order])


def test_without_residual_it_is_the_change_and_padding_adds_nothing():
    full, change, x = mixer(), mixer(residual=False), tokens()
    torch.testing.assert_close(change(x), full(x) - x)
    mask = torch.arange(H * W).expand(2, -1) < 9
    noisy = torch.where(mask[..., None], x, 50.0)
    torch.testing.assert_close(change(noisy, mask)[:, :9], change(x, mask)[:, :9])
    assert RaftMixer(C, 12).sides == (3, 4) and RaftMixer(C, 7).sides == (1, 7)


def test_original_mixer_is_an_mlp_over_all_tokens():
    net, x = OriginalMixer(H, W, C).double(), tokens()
    torch.testing.assert_close(net(x), x + net.mix(net.norm(x)))
    assert net(tokens(n=30), grid=(5, 6)).shape == (2, 30, C)


def test_multi_scale_embedding_concatenates_windows_centred_on_the_patch():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    embed = MultiScalePatchEmbedding(3, C, (2, 4)).double()
    assert embed(x).shape == (2, 4, 6, C)
    padded = F.pad(x, (1, 1, 1, 1))
    small, large = x[:, :, 2:4, 6:8], padded[:, :, 2:6, 6:10]
    expected = embed.linear(torch.cat([small.flatten(1), large.flatten(1)], 1))
    torch.testing.assert_close(embed(x)[:, 1, 3], expected)
    assert embed(torch.randn(2, 3, 7, 9, dtype=torch.float64)).shape == (2, 4, 5, C)


def test_gradient():
    assert torch.autograd.gradcheck(mixer(), tokens(1).requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="dim=6 cannot be divided into raft=4 equal parts"):
        mixer(4)
    with pytest.raises(PomonaError, match=r"10 tokens do not fill the grid \(3, 4\)"):
        mixer()(tokens(n=10))
    with pytest.raises(PomonaError, match=r"mask needs tokens on the grid \(3, 4\)"):
        mixer()(tokens(n=10), torch.ones(2, 10), grid=(2, 5))
    with pytest.raises(PomonaError, match=r"kernels=\(4, 7\) must all be even or all be odd"):
        MultiScalePatchEmbedding(1, 4, (4, 7))
