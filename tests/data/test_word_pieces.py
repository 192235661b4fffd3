from collections import Counter
from itertools import pairwise

import pytest
import torch

from pomona.data.text import characters, kjv_characters
from pomona.data.word_pieces import _WORDS, train_word_pieces, word_pieces
from pomona.errors import PomonaError


def test_merges_the_most_frequent_pairs_first():
    coder = train_word_pieces("low low low lower newest newest", 14)
    assert coder.pieces[:9] == (" ", "e", "l", "n", "o", "r", "s", "t", "w")
    assert coder.pieces[9:12] == ("lo", "low", " low")
    assert coder.decode(coder.encode("lower tree")) == "lower tree"


def test_pieces_never_cross_words():
    coder = train_word_pieces("to be or not to be " * 20, 40)
    assert all(" " not in piece[1:] for piece in coder.pieces)
    assert len(coder.encode("to be")) == 2


def test_a_text_keeps_its_parts_and_its_vocabulary_comes_from_training():
    text = characters("the cat sat on the mat. " * 40)
    pieces = word_pieces(text, 30)
    for part in ("train", "valid", "test"):
        assert pieces.decode(pieces.split(part)) == text.decode(text.split(part))
    assert int(pieces.counts.sum()) == len(pieces.train)
    assert pieces.size <= 30
    x, y = pieces.batches("train", 3, 5, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_pieces_of_the_bible_and_a_plain_trainer_agree():
    text = kjv_characters(40_000)
    pieces = word_pieces(text, 300)
    assert pieces.size == 300
    assert len(text.train) / len(pieces.train) > 2
    words, merges = [list(w) for w in _WORDS.findall(text.decode(text.train))], []
    while len(merges) < 20:  # the first merges, counted anew each time
        counts = Counter(pair for word in words for pair in pairwise(word))
        rank = {piece: i for i, piece in enumerate(pieces.coder.pieces)}
        best = max(counts, key=lambda p: (counts[p], -rank[p[0]], -rank[p[1]]))
        merges.append("".join(best))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
    found = [pieces.coder.pieces[piece] for piece in list(pieces.coder.merges.values())[:20]]
    assert found == merges


def test_bad_input_is_named():
    with pytest.raises(PomonaError, match="vocab=2 must be at least the text's 3 characters"):
        train_word_pieces("abc", 2)
    with pytest.raises(PomonaError, match="outside the vocabulary: 'z'"):
        train_word_pieces("abc abc", 5).encode("az")
