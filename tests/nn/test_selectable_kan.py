import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.kan import KANLayer
from pomona.nn.selectable_kan import POOL, PrunedKANLayer, SelectableKANConv2d, SelectableKANLayer, prune_selectable


def seeded(n: int = 3, m: int = 10, **options) -> SelectableKANLayer:
    generator = torch.Generator().manual_seed(0)
    layer = SelectableKANLayer(n, m, generator=generator, **options).double()
    nn.init.normal_(layer.theta, generator=generator)
    return layer


def inputs(n: int = 7, features: int = 3) -> torch.Tensor:
    return torch.rand(n, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("basis", POOL[:-1])
def test_a_pool_of_one_member_is_the_kan_layer_of_that_basis(basis):
    layer, x = seeded(pool=(basis,), grid=4), inputs()
    alone = KANLayer(3, 10, grid=4, basis=basis, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(layer(x), alone(x))
    layer = seeded(pool=(basis,), grid={basis: 4}, norm="layer")
    assert torch.equal(layer(x), alone(F.layer_norm(x, (3,))))


@pytest.mark.parametrize("select", ["node", "layer"])
def test_the_pruned_layer_equals_the_hard_one_and_has_the_parameters_of_what_was_chosen(select):
    layer, x = seeded(select=select, norm="layer"), inputs()
    layer.hard = True
    small = layer.prune()
    assert isinstance(small, PrunedKANLayer)
    torch.testing.assert_close(small(x), layer(x), atol=1e-6, rtol=0)
    functions = {
        name: getattr(member, "coefficients", torch.empty(0, 0, 0)).shape[-1]
        for name, member in zip(POOL, layer.members, strict=True)
    }
    chosen = layer.theta.detach().argmax(-1).expand(10).tolist()
    edges = sum(3 * (functions[POOL[p]] + (1 if POOL[p] == "base" else 2)) for p in chosen)
    assert count(small) == edges + 2 * 3 < count(layer) / 4


@pytest.mark.parametrize("hard", [False, True])
def test_alpha_rows_sum_to_1_in_every_phase_and_masked_members_weigh_nothing(hard):
    layer, x = seeded(hard=hard), inputs()
    for kept in (len(POOL), 2, 1):
        layer.keep_top(kept)
        alpha = layer.alpha().detach()
        torch.testing.assert_close(alpha.sum(-1), torch.ones(10, dtype=torch.float64))
        assert (layer.kept.sum(-1) == kept).all() and (alpha[~layer.kept] == 0).all()
        layer.zero_grad()
        (layer(x) ** 2).sum().backward()
        assert (layer.theta.grad[~layer.kept] == 0).all()
        for p, member in enumerate(layer.members):
            for parameter in member.parameters():
                assert (parameter.grad[~layer.kept[:, p]] == 0).all()


def test_convolution_of_kernel_1_is_the_layer_at_each_pixel_and_others_see_patches():
    image = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    conv = SelectableKANConv2d(3, 10, 1, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(conv(image), conv.layer(image.movedim(1, -1)).movedim(-1, 1))
    conv = SelectableKANConv2d(3, 4, (3, 2), stride=(1, 2), padding=1, pool=("rbf", "base")).double()
    padded = F.pad(image, (1, 1, 1, 1))
    expected = torch.stack(
        [
            torch.stack([conv.layer(padded[:, :, i : i + 3, j : j + 2].flatten(1)) for j in (0, 2, 4)], -1)
            for i in range(5)
        ],
        -2,
    )
    torch.testing.assert_close(conv(image), expected)
    assert conv(image[:0]).shape == (0, 4, 5, 3)
    nn.init.normal_(conv.layer.theta)
    conv.layer.hard = True
    small = conv.prune()
    torch.testing.assert_close(small(image), conv(image))
    assert isinstance(conv.layer, SelectableKANLayer) and isinstance(small.layer, PrunedKANLayer)


def test_output_is_the_weighted_sum_of_the_members():
    layer, x = seeded(tau=0.5), inputs()
    alpha = (layer.theta / 0.5).softmax(-1)
    expected = sum(alpha[:, p] * member(x) for p, member in enumerate(layer.members))
    torch.testing.assert_close(layer(x), expected)
    assert layer.choice_map().shape == (10, 8) and not layer.choice_map().requires_grad


def test_hard_selection_has_the_gradient_of_the_softmax():
    layer, x = seeded(hard=True), inputs()
    weights = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((layer.alpha() * weights).sum(), layer.theta)
    layer.hard = False
    torch.testing.assert_close(gradient, torch.autograd.grad((layer.alpha() * weights).sum(), layer.theta)[0])
    assert torch.autograd.gradcheck(layer, x[:2].requires_grad_())


def test_grids_follow_the_inputs_and_networks_are_pruned_whole():
    net, x = nn.Sequential(seeded(), nn.Sequential(seeded(10, 2, select="layer"))), inputs(200)
    net[0].update_grid(0.3 * x)
    assert net[0].members[0].basis.edges.max() < 0.4
    small = prune_selectable(net)
    assert [type(small[0]), type(small[1][0])] == [PrunedKANLayer] * 2 and small(x).shape == (200, 2)
    assert list(small[1][0].members) == [POOL[net[1][0].theta.argmax()]]


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="pool='wavelets' is not known"):
        SelectableKANLayer(2, 2, pool=("wavelets",))
    with pytest.raises(PomonaError, match="grid='fouriers' is not known; did you mean fourier"):
        SelectableKANLayer(2, 2, grid={"fouriers": 4})
    with pytest.raises(PomonaError, match="base='relu6' is not known"):
        SelectableKANLayer(2, 2, pool=("base",), base="relu6")
    with pytest.raises(PomonaError, match="must name at least one kind of function"):
        SelectableKANLayer(2, 2, pool=())
    with pytest.raises(PomonaError, match="SelectableKANConv2d takes 3 features on axis -3"):
        SelectableKANConv2d(3, 2, 1)(torch.zeros(1, 2, 4, 4))
