import pytest
import torch

from pomona.nets.encoders import (
    ONE_HOT_LIMIT,
    CodeEmbedding,
    ColumnTokens,
    ImageEncoder,
    OneHotEncoder,
    Pass,
    Patches,
    Steps,
    TableEncoder,
    TextEncoder,
    column_encoder,
    embedding_size,
)
from pomona.nets.specs import Column, Inputs, Outputs, inputs_from_json, outputs_from_json, to_json


def test_small_categories_are_one_hot_and_large_ones_embedded():
    few, many = Column("c", "category", 1, ONE_HOT_LIMIT), Column("c", "category", 1, ONE_HOT_LIMIT + 1)
    assert isinstance(column_encoder(few), OneHotEncoder) and isinstance(column_encoder(many), CodeEmbedding)
    assert isinstance(column_encoder(Column("n", "number", 2)), Pass)
    assert 2 <= embedding_size(3) <= embedding_size(100) <= embedding_size(10**6) == 64


def test_one_hot_of_codes():
    out = OneHotEncoder(3)(torch.tensor([[0.0], [2.0]]))
    assert out.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert OneHotEncoder(3)(torch.zeros(1, 1, dtype=torch.float64)).dtype == torch.float64


def test_text_is_the_mean_of_its_tokens_and_padding_does_not_count():
    encoder = TextEncoder(10, 4)
    out = encoder(torch.tensor([[3.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(out[0], encoder.embedding.weight[[3, 5]].mean(0))
    assert torch.equal(out[1], torch.zeros(4))


def test_an_image_column_is_read_in_its_shape():
    encoder = ImageEncoder((3, 8, 6))
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(encoder(x.flatten(1)), encoder.body(x))
    assert encoder(torch.zeros(0, 3 * 8 * 6)).shape == (0, 32)


def test_neighbouring_numbers_share_one_slice_and_columns_keep_their_order():
    columns = (
        Column("a", "number"), Column("b", "number", 2), Column("c", "category", 1, 3), Column("d", "binary"),
    )  # fmt: skip
    encoder = TableEncoder(columns)
    assert encoder.slices == [(0, 3), (3, 4), (4, 5)] and encoder.features == 3 + 3 + 1
    out = encoder(torch.tensor([[0.1, 0.2, 0.3, 2.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.0, 1.0, 1.0]]))


def test_column_tokens_are_x_times_w_plus_b():
    inputs = Inputs("table", (3,))
    tokens = ColumnTokens(inputs, 4)
    x = torch.randn(2, 3)
    torch.testing.assert_close(tokens(x), x.unsqueeze(-1) * tokens.weight + tokens.place)
    typed = ColumnTokens(Inputs("table", (3,), (Column("a", "number"), Column("t", "text", 2, 9))), 4)
    assert typed.tokens == 2 and typed(torch.ones(5, 3)).shape == (5, 2, 4)


def test_a_table_without_numbers_has_tokens_too():
    tokens = ColumnTokens(Inputs("table", (1,), (Column("c", "category", 1, 3),)), 4)
    assert tokens(torch.zeros(2, 1)).shape == (2, 1, 4)


@pytest.mark.parametrize("inputs, patches", [(Inputs("image", (2, 8, 12)), 24), (Inputs("series", (3, 12)), 6)])
def test_patches_cover_the_input_once(inputs, patches):
    encoder = Patches(inputs, 5, 2)
    assert encoder.tokens == patches
    assert encoder(torch.randn(4, *inputs.shape)).shape == (4, patches, 5)


@pytest.mark.parametrize("length", [1, 2, 7, 128, 129, 500])
def test_steps_are_as_many_as_said_and_not_more_than_the_longest(length):
    steps = Steps(Inputs("series", (2, length)), 4, longest=128)
    assert steps(torch.randn(3, 2, length)).shape == (3, steps.tokens, 4)
    assert steps.tokens <= 128


def test_specs_survive_json():
    inputs = Inputs("table", (4,), (Column("a", "image", 4, 0, (1, 2, 2)),))
    outputs = Outputs("number", 1, ("y",), (1.0,), (2.0,))
    assert inputs_from_json(to_json(inputs)) == inputs
    assert outputs_from_json(to_json(outputs)) == outputs
