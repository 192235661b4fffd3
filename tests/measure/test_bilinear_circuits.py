import pytest
import torch

from pomona.errors import PomonaError
from pomona.measure.bilinear_circuits import (
    append_one,
    expand_paths,
    hadamard_to_tensor,
    linear_form,
    superposition_table,
    tensor_to_hadamard,
)
from pomona.nets.bilinear_transformer import BilinearTransformer
from pomona.nn.bilinear import GLUMLP, Bilinear

TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(heads: int = 2, **options: object) -> BilinearTransformer:
    torch.manual_seed(0)
    return BilinearTransformer(9, 12, heads, max_len=5, **options).double()


def biased() -> GLUMLP:
    torch.manual_seed(1)
    return GLUMLP(4, 6, None, bias=True).double()


@pytest.mark.parametrize("bias", [False, True])
def test_paths_add_up_to_the_logits(bias):
    model = make(bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    paths = expand_paths(model)
    pattern = model.attention(TOKENS)[0]
    for frozen in (None, pattern):
        total = sum(path.evaluate(TOKENS, frozen) for path in paths)
        torch.testing.assert_close(total, model(TOKENS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_number_of_paths(heads):
    assert len(expand_paths(make(heads))) == 1 + heads + (1 + heads) ** 2
    assert len(expand_paths(make(heads, bias=True))) == 1 + heads + (2 + heads) ** 2 + 1


def test_a_bilinear_layer_with_biases_is_one_without_on_an_appended_1():
    layer, x = biased().product, draw(7, 4)
    torch.testing.assert_close(append_one(layer)(torch.cat([x, torch.ones(7, 1)], 1)), layer(x), rtol=0, atol=1e-12)
    plain = Bilinear(4, 6).double()
    torch.testing.assert_close(append_one(plain)(torch.cat([x, draw(7, 1)], 1)), plain(x))


def test_the_tensor_contracted_twice_is_the_output_and_its_antisymmetric_part_adds_nothing():
    mlp, x = GLUMLP(4, 6, None).double(), draw(7, 4)
    tensor = hadamard_to_tensor(mlp.product.w, mlp.product.v, mlp.project.weight)
    torch.testing.assert_close(torch.einsum("oij,bi,bj->bo", tensor, x, x), mlp(x), rtol=0, atol=1e-12)
    odd = (tensor - tensor.mT) / 2
    torch.testing.assert_close(torch.einsum("oij,bi,bj->bo", odd, x, x), torch.zeros_like(mlp(x)), rtol=0, atol=1e-12)


def test_quadratic_linear_and_constant_parts():
    mlp, x = biased(), draw(7, 4)
    torch.testing.assert_close(linear_form(mlp)(x), mlp(x), rtol=0, atol=1e-12)
    assert linear_form(GLUMLP(4, 6, None)).linear.eq(0).all()


def test_decomposition_recovers_the_maps_up_to_order_and_scale():
    w, v, p = draw(3, 5), draw(3, 6, seed=1), draw(4, 3, seed=2)
    tensor = hadamard_to_tensor(w, v, p)
    found = tensor_to_hadamard(tensor, 3, generator=torch.Generator().manual_seed(0))
    assert found.error < 1e-8
    torch.testing.assert_close(hadamard_to_tensor(found.w, found.v, found.p), tensor, rtol=0, atol=1e-7)
    cosine = (torch.nn.functional.normalize(w, dim=1) @ found.w.mT).abs()
    torch.testing.assert_close(cosine.amax(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2]


def test_pairs_of_inputs_that_count_most():
    layer = Bilinear(3, 1).double()
    with torch.no_grad():
        layer.w.copy_(torch.tensor([[1.0, 0, 0]]))
        layer.v.copy_(torch.tensor([[0.5, -3, 2]]))
    table = superposition_table(layer, 2)
    assert table.pairs.tolist() == [[[0, 1], [0, 2]]]
    torch.testing.assert_close(table.values, torch.tensor([[-3.0, 2.0]], dtype=torch.float64))
    mlp, x = GLUMLP(4, 6, None).double(), draw(7, 4)
    every = superposition_table(mlp, 10)
    i, j = every.pairs.unbind(-1)
    torch.testing.assert_close((every.values * x[:, i] * x[:, j]).sum(-1), mlp(x))


def test_a_pair_of_tokens_and_the_norm_of_a_path():
    model = make()
    with torch.no_grad():
        model.position.weight.zero_()
    paths = {path.name: path for path in expand_paths(model)}
    one = TOKENS[:, :1]
    both = paths["mlp(embedding, embedding)"]
    torch.testing.assert_close(both.pair_logits(model, one, one), both.evaluate(one))
    table = both.pair_logits(model, torch.arange(9)[:, None], torch.arange(9))
    assert both.norm(model) == pytest.approx(table.norm().item())
    mixed = paths["mlp(embedding, head 1)"]
    stretched = torch.einsum("vo,oij,ai,bj->vab", model.head.weight, mixed.tensor, *[model.token.weight] * 2)
    assert mixed.norm(model) == pytest.approx(stretched.norm().item())
    direct = paths["direct"]
    assert direct.norm(model) == pytest.approx((model.head.weight @ model.token.weight.mT).norm().item())


def test_constant_legs_have_a_norm_and_a_table():
    model = make(bias=True)
    for layer in (model.blocks[0].ffn.product.both, model.blocks[0].ffn.project):
        torch.nn.init.normal_(layer.bias)
    paths = {path.name: path for path in expand_paths(model)}
    path = paths["mlp(embedding, constant)"]
    table = path.pair_logits(model, torch.arange(9), torch.arange(9))
    assert path.norm(model) == pytest.approx(table.norm().item())
    assert paths["bias"].norm(model) > 0


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="layers=2: the paths of one layer"):
        expand_paths(make(layers=2))
    with pytest.raises(PomonaError, match="take it out with fold_norms"):
        expand_paths(make(norm="rms"))
    with pytest.raises(PomonaError, match="gate='relu' makes the layer no product"):
        expand_paths(make(gate="relu"))
    with pytest.raises(PomonaError, match="path 'direct' has not two legs"):
        expand_paths(make())[0].pair_logits(make(), TOKENS, TOKENS)
    with pytest.raises(PomonaError, match=r"tensor has shape \(2, 3\)"):
        tensor_to_hadamard(torch.zeros(2, 3), 2)
