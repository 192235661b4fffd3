import pytest
import torch

from pomona.errors import PomonaError
from pomona.recipe.ludwig.combiners import (
    COMBINERS,
    Comparator,
    Encoded,
    ProjectAggregate,
    TabTransformer,
    make_combiner,
)

KINDS = {"a": Encoded(3, type="number"), "b": Encoded(4, type="category"), "s": Encoded(5, 6, "text")}
OPTIONS = {
    "concat": {"layers": [8]},
    "comparator": {"entity_1": ["a", "s"], "entity_2": ["b"], "layers": [4]},
    "transformer": {"width": 8, "heads": 2},
    "tabtransformer": {"width": 8, "heads": 2},
}


def encodings(rows=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = {name: (rows, e.tokens, e.features) if e.tokens else (rows, e.features) for name, e in KINDS.items()}
    return {name: torch.randn(*shape, generator=generator, dtype=dtype) for name, shape in make.items()}


@pytest.mark.parametrize("name", COMBINERS)
def test_every_combiner_says_its_shape_and_passes_gradients_to_all_inputs(name):
    torch.manual_seed(0)
    net = make_combiner({"type": name, **OPTIONS.get(name, {})}, KINDS).double()
    given = {key: value.requires_grad_() for key, value in encodings().items()}
    out = net(given)
    assert out.shape == ((7, net.tokens, net.features) if net.tokens else (7, net.features))
    (out * torch.randn_like(out)).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in given.values())
    assert len(net.eval()(encodings(0))) == 0


def test_sequence_concat_repeats_vectors_at_each_step():
    given = encodings()
    out = COMBINERS["sequence_concat"](KINDS)(given)
    torch.testing.assert_close(out[:, 2], torch.cat([given["a"], given["b"], given["s"][:, 2]], -1))


def test_comparator_gives_dot_product_difference_and_bilinear_form():
    torch.manual_seed(0)
    net = Comparator({"a": Encoded(3), "b": Encoded(4)}, ["a"], ["b"], layers=[5]).double()
    given = {name: encodings()[name] for name in ("a", "b")}
    a, b = net.fc[0](given["a"]), net.fc[1](given["b"])
    out = net(given)
    torch.testing.assert_close(out[:, 0], torch.einsum("nd,nd->n", a, b))
    torch.testing.assert_close(out[:, 1:6], a * b)
    torch.testing.assert_close(out[:, 6:11], (a - b).abs())
    torch.testing.assert_close(out[:, 11], torch.einsum("nd,de,ne->n", a, net.weight, b))


def test_project_aggregate_does_not_depend_on_the_order_of_equal_projections():
    torch.manual_seed(0)
    net = ProjectAggregate({"a": Encoded(3), "b": Encoded(3)}, width=4).double()
    net.project.projections[1].load_state_dict(net.project.projections[0].state_dict())
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(net({"a": x, "b": y}), net({"a": y, "b": x}))


def test_tabtransformer_lets_numbers_go_round_the_attention():
    torch.manual_seed(0)
    kinds = {"a": KINDS["a"], "b": KINDS["b"]}
    net = TabTransformer(kinds, width=8, heads=2).double().eval()
    given = {name: encodings()[name] for name in kinds}
    moved = {**given, "a": given["a"] + torch.randn_like(given["a"])}
    one, two = net(given), net(moved)
    torch.testing.assert_close(one[:, :8], two[:, :8], rtol=0, atol=0)
    assert not torch.allclose(one[:, 8:], two[:, 8:])


def test_bad_arguments_are_named():
    with pytest.raises(PomonaError, match=r"combiner\.entity_1='c' is not known"):
        Comparator(KINDS, ["c"], ["a"])
    with pytest.raises(PomonaError, match="must share out all inputs, each in one of them"):
        Comparator(KINDS, ["a"], ["b"])
    with pytest.raises(PomonaError, match="sequence_concat needs a sequence; give an encoder reduce: none"):
        COMBINERS["sequence_concat"]({"a": Encoded(3)})
    with pytest.raises(PomonaError, match="needs a category or other input to attend to; use concat"):
        TabTransformer({"a": KINDS["a"]})
