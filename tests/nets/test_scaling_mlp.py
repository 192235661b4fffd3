import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.scaling_mlp import (
    Augmented,
    FineTuned,
    InvertedBottleneck,
    InvertedBottleneckMLP,
    StandardMLP,
    first_layer_filters,
    permute_input,
    predict_tta,
    random_crop_flip,
)
from pomona.train.optim import parameter_groups

NETS = {
    "standard": lambda: StandardMLP(12, 5, (8, 7, 6)),
    "bottleneck": lambda: InvertedBottleneckMLP(12, 5, thin=6, depth=2),
}
every = pytest.mark.parametrize("name", NETS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().double()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every
def test_a_fixed_permutation_of_the_pixels_is_one_of_the_first_weights(name):
    net, x, order = make(name), draw(4, 12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(permute_input(net, order)(x[:, order]), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [4, 16])
def test_parameters_of_an_inverted_bottleneck(m):
    assert sum(p.numel() for p in InvertedBottleneck(m, 4 * m).parameters()) == 2 * m * 4 * m + 5 * m + 2 * m


def test_without_its_second_weights_the_bottleneck_net_is_head_of_embedding():
    net, x = make("bottleneck"), draw(4, 12)
    for block in net.blocks:
        nn.init.zeros_(block.down.weight)
        nn.init.zeros_(block.down.bias)
    torch.testing.assert_close(net(x), net.head(net.embed(x)), rtol=0, atol=0)


def test_the_standard_net_is_its_equation():
    net, x = make("standard"), draw(4, 3, 2, 2)
    z = net.embed(x.flatten(1))
    for block, width in zip(net.blocks, (8, 7, 6), strict=True):
        z = nn.functional.gelu(nn.functional.layer_norm(z, (width,)))
        z = block[2](z) if width != 6 else z
    torch.testing.assert_close(net(x), net.head(z))


@every
def test_takes_images_empty_batches_and_has_right_gradients(name):
    net = make(name)
    assert net(draw(3, 3, 2, 2)).shape == (3, 5)
    assert net(draw(0, 12)).shape == (0, 5)
    assert torch.autograd.gradcheck(net, (draw(2, 12).requires_grad_(),), fast_mode=True)
    filters = first_layer_filters(net, (3, 2, 2))
    torch.testing.assert_close((filters * draw(3, 2, 2)).sum((1, 2, 3)) + net.embed.bias, net.embed(draw(12)))


def test_names_of_the_paper():
    net = InvertedBottleneckMLP.named("B-3/Wi-8", 12, 5)
    assert len(net.blocks) == 3 and net.head.in_features == 8 and net.blocks[0].up.out_features == 32


def test_crops_and_mirror_images():
    x = draw(40, 2, 5, 4)
    moved = random_crop_flip(x, 1, True, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for image, whole in zip(moved, padded, strict=True):
        fits = [
            (i, j, mirrored)
            for i in range(3)
            for j in range(3)
            for mirrored in (False, True)
            if torch.equal(image.flip(-1) if mirrored else image, whole[:, i : i + 5, j : j + 4])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 12
    assert torch.equal(random_crop_flip(x, 0, False), x)
    net = Augmented(nn.Flatten(), pad=2)
    assert torch.equal(net.eval()(x), x.flatten(1)) and not torch.equal(net.train()(x), x.flatten(1))


def test_averaging_over_crops():
    net, x = make("standard"), draw(4, 3, 2, 2)
    torch.testing.assert_close(predict_tta(net, x, 3, pad=0, flip=False), net(x).softmax(-1))
    probabilities = predict_tta(net, x, 7, pad=1)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(probabilities, predict_tta(net, x, 7, pad=1))


def test_fine_tuning_has_a_fresh_head_and_a_slow_body():
    net = make("bottleneck")
    tuned = FineTuned(net, 3)
    assert tuned(draw(2, 12)).eq(0).all() and net.head.out_features == 5
    scale = {id(p): group["lr_scale"] for group in parameter_groups(tuned, 0.0) for p in group["params"]}
    assert {scale[id(p)] for p in tuned.net.head.parameters()} == {1.0}
    assert {scale[id(p)] for p in [*tuned.net.embed.parameters(), *tuned.net.blocks.parameters()]} == {0.1}


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="name='B12' is not of the form"):
        InvertedBottleneckMLP.named("B12", 4, 2)
    with pytest.raises(PomonaError, match=r"widths=\(\) must hold"):
        StandardMLP(4, 2, ())
    with pytest.raises(PomonaError, match="StandardMLP takes 12 features on axis -1"):
        make("standard")(draw(2, 11))
