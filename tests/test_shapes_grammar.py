"""The shapes' language: captions to facts and back, errors that name the word, and the vectors of the words."""
import pytest
import torch

from config import UserError
from sources.shapes import Shapes
from sources.shapes_grammar import WORDS, facts_to_caption, parse_caption, split
from text import WordVectors

PLAIN = dict(native=False, crop=False, flip=False)


def test_captions_are_of_the_grammar_and_use_all_of_it():
    texts = Shapes(8, **PLAIN).records(range(500))["caption"]
    lengths = [len(split(text)) for text in texts]
    assert all(facts_to_caption(parse_caption(text)) == text for text in texts)
    assert (min(lengths), max(lengths) <= 20) == (3, True) and max(lengths) >= 17
    assert set(" ".join(texts).split()) == set(WORDS) and len(set(WORDS)) == len(WORDS)


def test_captions_are_read_as_people_type_them():
    facts = parse_caption("A small RED ring, left of a blue square; on grey.")
    assert facts.colors == ("red", "blue") and facts.shapes == ("ring", "square")
    assert facts.sizes == ("small", None)
    assert facts.relations == ("left of",) and facts.background == "grey"
    assert parse_caption("red ring and large orange star").relations == (None,)
    assert facts_to_caption(parse_caption("red ring and large orange star")) == "a red ring and a large orange star"


@pytest.mark.parametrize("text, part", [
    ("a ring", "'ring' (word 2)"), ("", "its end"), ("a red ring left a blue star", "wanted of"),
    ("a red ring on mars", "'mars'"), ("a red ring on grey above a blue star", "nothing may follow"),
    ("a red ring blue", "wanted on")])
def test_errors_name_the_word_that_breaks_the_grammar(text, part):
    with pytest.raises(UserError) as error:
        parse_caption(text)
    assert part in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- word vectors

def test_tokens_name_the_words_around_them_exactly():
    coder = WordVectors(length=7)
    tokens, lengths = coder.encode(["a small red ring", "", "A red star."])
    assert tokens.shape == (3, 7, coder.dim) and tokens.dtype == torch.float32
    assert lengths.tolist() == [4, 0, 3]
    for b, n in enumerate(lengths):
        assert (tokens[b, n:] == 0).all() and (tokens[b, :n] != 0).any(1).all()

    V = len(coder.table[0])
    read = (tokens[0, :4, :4 * V].reshape(4, 4, V) @ coder.table.T / V)      # 1 where the window shows a word
    words = [[coder.words[k] for k in row.nonzero()[:, 0]] for row in read.reshape(16, -1).round(decimals=5)]
    a, small, red, ring = ["a"], ["small"], ["red"], ["ring"]
    assert words == [[], [], a, small, [], a, small, red, a, small, red, ring, small, red, ring, []]


def test_word_vectors_are_orthogonal_distinct_in_place_and_of_unit_variance():
    coder = WordVectors()
    gram = coder.table[:-1] @ coder.table[:-1].T
    assert torch.equal(gram, torch.eye(len(coder.words)) * coder.table.shape[1])
    tokens, lengths = coder.encode(Shapes(8, **PLAIN).records(range(150))["caption"])
    power = (tokens ** 2).sum((1, 2)) / (lengths * coder.dim)
    assert 0.85 < power.mean() < 1 and torch.pdist(coder.where).min() > 0.5
    assert torch.equal(tokens, WordVectors().encode(Shapes(8, **PLAIN).records(range(150))["caption"])[0])


def test_encoder_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="unknown word 'rings'.*did you mean ring.*known: a, an"):
        WordVectors().encode(["a red rings"])
    with pytest.raises(UserError, match="has 4 words; the encoder takes 3"):
        WordVectors(length=3).encode(["a small red ring"])
