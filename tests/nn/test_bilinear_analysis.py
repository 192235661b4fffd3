import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.bilinear import Bilinear, BilinearNet
from pomona.nn.bilinear_analysis import (
    adversarial_mask,
    eig,
    eig_features,
    interaction_matrix,
    interaction_tensor,
    similarity,
    svd_tensor,
    truncate,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_net(seed=0, **options):
    torch.manual_seed(seed)
    return BilinearNet(7, 6, 4, dtype=torch.float64, **options).requires_grad_(False)


def test_output_direction_is_a_quadratic_form():
    layer, u, x = Bilinear(5, 4, dtype=torch.float64), draw(10, 4), draw(10, 5, seed=1)
    forms = interaction_matrix(layer, u)
    torch.testing.assert_close(torch.einsum("bi,bij,bj->b", x, forms, x), (layer(x) * u).sum(1))
    torch.testing.assert_close(forms, torch.einsum("ua,aij->uij", u, interaction_tensor(layer)))
    torch.testing.assert_close(forms, forms.mT)


def test_logits_are_quadratic_forms_of_the_input():
    net, x = make_net(), draw(10, 7, seed=1)
    forms = interaction_matrix(net.layers[0], net.head.weight)
    forms = net.embed.weight.T @ forms @ net.embed.weight
    torch.testing.assert_close(torch.einsum("bi,cij,bj->bc", x, forms, x), net(x))


def test_all_eigenpairs_reproduce_the_logits():
    net, x = make_net(), draw(10, 7, seed=1)
    values, vectors, features = eig_features(net)
    torch.testing.assert_close(
        torch.einsum("ck,bck->bc", values, torch.einsum("cki,bi->bck", features, x) ** 2), net(x)
    )
    assert (values.abs().diff(dim=1) <= 0).all()
    eye = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(vectors @ vectors.mT, eye)
    for by in ("sign", "magnitude"):
        torch.testing.assert_close(truncate(net, 6, by)(x), net(x))


def test_truncation_keeps_the_best_pairs():
    net, x = make_net(), draw(50, 7, seed=1)
    errors = [float((truncate(net, k, "magnitude")(x) - net(x)).detach().square().mean()) for k in range(1, 7)]
    assert errors[-1] < 1e-20 < errors[0]
    small = truncate(net, 1)
    values = eig_features(net).values
    assert torch.equal(small.values[:, 0], values.amax(1).clamp_min(0))
    assert torch.equal(small.values[:, 1], values.amin(1).clamp_max(0))


def test_exchange_and_rescaling_leave_the_symmetric_tensor_unchanged():
    layer, other = Bilinear(4, 3, dtype=torch.float64), Bilinear(4, 3, dtype=torch.float64)
    scale = draw(3, 1, seed=1).exp()
    for w, v in ((layer.v, layer.w), (scale * layer.w, layer.v / scale)):
        with torch.no_grad():
            other.both.weight.copy_(torch.cat([w, v]))
        torch.testing.assert_close(interaction_tensor(other), interaction_tensor(layer))


def test_rank_is_at_most_twice_the_outputs_that_count():
    layer = Bilinear(8, 6, dtype=torch.float64)
    for outputs in range(1, 6):
        u = torch.zeros(6, dtype=torch.float64)
        u[:outputs] = draw(outputs)
        rank = int(torch.linalg.matrix_rank(interaction_matrix(layer, u)))
        assert rank == min(8, 2 * outputs)  # the bound is met by weights in general position


def test_one_output_has_two_eigenvalues_of_opposite_sign_unless_parallel():
    layer = Bilinear(8, 2, dtype=torch.float64)
    values = eig(layer, torch.tensor([1.0, 0.0], dtype=torch.float64)).values
    assert values[0] * values[1] < 0
    assert values[2:].abs().max() < 1e-12
    with torch.no_grad():
        layer.both.weight[2] = 3 * layer.both.weight[0]  # V row parallel to W row
    values = eig(layer, torch.tensor([1.0, 0.0], dtype=torch.float64)).values
    assert values[0] > 0
    assert values[1:].abs().max() < 1e-12


def test_svd_reproduces_the_tensor():
    layer = Bilinear(5, 4, dtype=torch.float64)
    outputs, values, forms = svd_tensor(layer)
    torch.testing.assert_close(torch.einsum("ra,r,rij->aij", outputs, values, forms), interaction_tensor(layer))
    torch.testing.assert_close(forms, forms.mT)


def test_adversarial_mask_beats_random_ones():
    net = make_net()
    margin = lambda m: net(m[None])[0, 2] - net(m[None])[0, 1]  # noqa: E731
    mask = adversarial_mask(net, 1, 2)
    assert float(mask.norm()) == pytest.approx(1)
    best = margin(mask)
    for other in F.normalize(draw(200, 7), dim=1):
        assert margin(other) <= best
    x = draw(7, seed=3)
    mask = adversarial_mask(net, 1, 2, x)
    assert margin(x + mask) - margin(x) >= margin(x - mask) - margin(x)


def test_similarity_of_a_net_with_itself_is_one():
    net = make_net()
    torch.testing.assert_close(similarity(net, net, 2), torch.ones(4, 2, dtype=torch.float64))
    assert similarity(net, make_net(1)).max() < 1


def test_deep_nets_are_read_layer_by_layer():
    net, x = make_net(depth=2), draw(10, 7, seed=1)
    values, _, features = eig_features(net)
    h = net.layers[0](net.embed(x))
    torch.testing.assert_close(
        torch.einsum("ck,bck->bc", values, torch.einsum("cki,bi->bck", features, h) ** 2), net(x)
    )


def test_bad_input():
    with pytest.raises(PomonaError, match="gate='relu' makes the layer no quadratic form"):
        interaction_tensor(Bilinear(3, 2, gate="relu"))
    with pytest.raises(PomonaError, match="needs bias=False"):
        interaction_tensor(Bilinear(3, 2, bias=True))
    with pytest.raises(PomonaError, match="depth=2, residual=False cannot be taken apart"):
        truncate(make_net(depth=2), 3)
    with pytest.raises(PomonaError, match="by='size' is not known"):
        truncate(make_net(), 3, "size")
