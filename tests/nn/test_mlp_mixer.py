import math

import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.mixing import MLPTokenMixer
from pomona.nn.mlp_mixer import SIZES, MixerLayer, MLPMixer, resize_tokens

S, C, DS, DC = 9, 5, 7, 11


def layer() -> MixerLayer:
    return MixerLayer(S, C, DS, DC, generator=torch.Generator().manual_seed(0)).double()


def tokens(batch: int = 4, n: int = S) -> torch.Tensor:
    return torch.randn(batch, n, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_token_mixing_equals_a_convolution_with_full_receptive_field_and_shared_kernels():
    mixer, x = layer().mixer, tokens()
    one_channel = x.mT.reshape(-1, 1, S)
    hidden = F.gelu(F.conv1d(one_channel, mixer.up.weight[:, None], mixer.up.bias))
    out = F.conv1d(hidden.mT, mixer.down.weight[:, None], mixer.down.bias)
    torch.testing.assert_close(mixer(x), out[..., 0].view(4, C, S).mT)


def test_parameters_per_layer():
    expected = 2 * S * DS + S + DS + 2 * C * DC + C + DC + 4 * C
    assert sum(p.numel() for p in layer().parameters()) == expected


def test_permuting_patches_and_token_weights_together_leaves_logits_unchanged():
    net = MLPMixer(12, 4, 2, classes=3, dim=C, depth=2, token_width=DS).double()
    torch.nn.init.normal_(net.head.weight)
    x = torch.randn(4, 2, 12, 12, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order].unflatten(2, (3, 3))
    shuffled = patches.permute(0, 1, 2, 4, 3, 5).reshape(4, 2, 12, 12)
    before = net(x)
    assert (net(shuffled) - before).abs().max() > 1e-3
    with torch.no_grad():
        for block in net.blocks:
            block.mixer.up.weight.copy_(block.mixer.up.weight[:, order])
            block.mixer.down.weight.copy_(block.mixer.down.weight[order])
            block.mixer.down.bias.copy_(block.mixer.down.bias[order])
    torch.testing.assert_close(net(shuffled), before)


def test_channel_part_is_equivariant_over_tokens_and_token_part_over_channels():
    net, x = layer(), tokens()
    order, channels = torch.randperm(S), torch.randperm(C)
    torch.testing.assert_close(net.channel_mlp(x[:, order]), net.channel_mlp(x)[:, order])
    torch.testing.assert_close(net.mixer(x[..., channels]), net.mixer(x)[..., channels])


def test_zero_head_gives_the_loss_log_classes():
    net = MLPMixer(8, 4, 1, classes=10, dim=C).double()
    loss = F.cross_entropy(net(torch.randn(6, 1, 8, 8, dtype=torch.float64)), torch.arange(6))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-12)


def test_the_papers_sizes():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in MLPMixer.sized(name).parameters()) / 1e6 for name in ("S/16", "B/16")}
    assert counts["S/16"] == pytest.approx(18.5, abs=0.5) and counts["B/16"] == pytest.approx(59.9, abs=0.5)
    assert set(SIZES) >= {"S/16", "B/16", "L/16"}


def test_series_are_cut_into_patches():
    net = MLPMixer((20,), 5, 3, classes=2, dim=C)
    assert net(torch.randn(4, 3, 20)).shape == (4, 2) and net.stem.tokens == 4


def test_block_resize_of_an_enlarged_input_gives_the_enlarged_output():
    mixer, x = layer().mixer, tokens()
    fine = resize_tokens(mixer, (6, 6), mode="block")

    def enlarge(v: torch.Tensor) -> torch.Tensor:
        return v.mT.unflatten(-1, (3, 3)).repeat_interleave(2, -1).repeat_interleave(2, -2).flatten(-2).mT

    assert fine.width == 4 * mixer.width
    torch.testing.assert_close(fine(enlarge(x)), enlarge(mixer(x)))


def test_bicubic_resize_to_the_same_grid_changes_nothing_and_keeps_constants():
    mixer, x = layer().mixer, tokens()
    torch.testing.assert_close(resize_tokens(mixer, (3, 3))(x), mixer(x))
    fine = resize_tokens(mixer, (7, 7))
    assert fine.width == mixer.width and fine(tokens(2, 49)).shape == (2, 49, C)
    constant = torch.ones(1, 49, C, dtype=torch.float64)
    torch.testing.assert_close(fine.up(constant.mT), mixer.up(constant[:, :9].mT), atol=0.1, rtol=0.1)


def test_gradient():
    assert torch.autograd.gradcheck(layer(), tokens(1).requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="image=10 cannot be divided into patch=4 equal parts"):
        MLPMixer(10, 4, 1, classes=2)
    with pytest.raises(PomonaError, match="must be a whole multiple of grid"):
        resize_tokens(MLPTokenMixer(9), (5, 5), mode="block")
