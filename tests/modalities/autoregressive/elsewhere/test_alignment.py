"""Alignment of two tokenizers' tokens of one text, over tokenizers of five families."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd_lightning.modalities.autoregressive.elsewhere.alignment import (
    Chunk,
    Pieces,
    chunks,
    ends_of,
    matches,
    text_of,
)
from tests.families import NAMES, family

PAIRS = [*product(NAMES, NAMES)]
# what a tokenizer that ends a text with an unfinished character could be given is not a text
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=24) | st.text("aé🙂 \n日,1the", max_size=24)


def ends(name: str, text: str) -> tuple[list[int], list[int]]:
    """A text's ids, and the bytes where each ends."""
    tokenizer = family(name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], ends_of(Pieces(tokenizer), encoded["input_ids"], text, encoded["offset_mapping"])


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=20)
@given(TEXTS)
@example("🙂 日é")
@example("naïve café,  the answer is 42\n")
def test_chunks_cover_the_bytes_exactly_and_are_minimal(student, teacher, text):
    (mine, own), (theirs, other) = ends(student, text), ends(teacher, text)
    found = chunks(own, other)
    if mine and theirs:
        # both sides are covered, in order, without a gap
        assert (found[0].start, found[0].teacher_start) == (0, 0)
        assert (found[-1].stop, found[-1].teacher_stop) == (len(mine), len(theirs))
        assert own[-1] == other[-1] == len(text.encode())
    assert all((a.stop, a.teacher_stop) == (b.start, b.teacher_start) for a, b in pairwise(found))
    for chunk in found:
        borders = own[chunk.start : chunk.stop], other[chunk.teacher_start : chunk.teacher_stop]
        assert borders[0][-1] == borders[1][-1], "both have written the same bytes"
        begin = own[chunk.start - 1] if chunk.start else 0
        inside = {*borders[0]} & {*borders[1]} - {begin, borders[0][-1]}
        assert not inside, "no smaller chunk would do"
    if student == teacher:
        assert found == [Chunk(i, i + 1, i, i + 1) for i in range(len(mine))]


@pytest.mark.parametrize("name", NAMES)
@given(TEXTS)
def test_pieces_are_the_bytes_of_a_text(name, text):
    ids, places = ends(name, text)
    assert len(places) == len(ids)
    assert places == sorted(places)
    if name != "word_piece":  # which changes what it reads
        # bpe begins every text with a space of its own
        assert b"".join(Pieces(family(name)).all_of(ids, is_text=name == "bpe")) == text.encode()


def test_a_chunk_goes_on_until_both_have_written_the_same():
    # the|quick and th|equ|ick
    assert chunks([3, 8], [2, 5, 8]) == [Chunk(0, 2, 0, 3)]
    assert chunks([3, 5, 8], [3, 8]) == [Chunk(0, 1, 0, 1), Chunk(1, 3, 1, 2)]
    # tokens that write nothing: before others, on both sides, at the end
    assert chunks([0, 3], [3]) == [Chunk(0, 2, 0, 1)]
    assert chunks([0, 3], [0, 3]) == [Chunk(0, 1, 0, 1), Chunk(1, 2, 1, 2)]
    assert chunks([3, 3], [3]) == [Chunk(0, 2, 0, 1)]
    # what one side has not finished, or could not read, is in no chunk
    assert chunks([2, 4], [2, 5]) == [Chunk(0, 1, 0, 1)]
    assert chunks([2], []) == chunks([], [2]) == []


def test_split_characters_are_cut_between_their_bytes():
    smile = "🙂".encode()
    assert len(smile) == 4
    # two bytes and two, against one, one and two: the border in the middle of the character is a cut
    assert chunks([2, 4], [1, 2, 4]) == [Chunk(0, 1, 0, 2), Chunk(1, 2, 2, 3)]
    _, bytewise = ends("characters", "é🙂")
    assert bytewise == [1, 2, 3, 4, 5, 6]
    _, fallback = ends("unigram", "ö")
    assert fallback == [1, 2], "byte fallback writes one byte a token"


def test_bytes_that_are_no_text():
    # an invalid byte in the middle is one sign, which its last piece writes
    assert text_of([b"a", b"\xff", b"b"], is_whole=True) == ("a\ufffdb", [1, 4, 5])
    assert text_of([b"\xf0", b"\x9f\x99", b"b"], is_whole=True) == ("\ufffdb", [0, 3, 4])
    # at the horizon a character that is not finished is left out with the pieces that begin it
    assert text_of([b"a", b"\xf0\x9f", b"\x99"], is_whole=False) == ("a", [1])
    assert text_of([b"a\xf0", b"\x9f"], is_whole=False) == ("a", [])
    assert text_of([b"a", b"\xf0\x9f"], is_whole=True) == ("a\ufffd", [1, 4])
    assert text_of([], is_whole=True) == ("", [])


@pytest.mark.parametrize("is_whole", [False, True])
@given(st.lists(st.binary(max_size=3), max_size=8))
def test_text_of_any_bytes(is_whole, pieces):
    text, places = text_of(pieces, is_whole)
    raw = b"".join(pieces)
    if is_whole:
        assert (text, len(places)) == (raw.decode(errors="replace"), len(pieces))
    assert raw.decode(errors="replace").startswith(text)
    assert places == sorted(places)
    if len(places) == len(pieces) and pieces:
        assert places[-1] == len(text.encode())


def test_a_space_before_the_first_word():
    pieces = Pieces(family("bpe"))
    ids = family("bpe")("the fox", add_special_tokens=False)["input_ids"]
    assert b"".join(pieces.all_of(ids, is_text=True)) == b"the fox"
    assert b"".join(pieces.all_of(ids, is_text=False)) == b" the fox"


def test_added_tokens_write_their_names():
    tokenizer = family("byte_level")
    assert Pieces(tokenizer).of(tokenizer.convert_tokens_to_ids("<|im_start|>")) == b"<|im_start|>"
    assert Pieces(tokenizer).of(10**6) == b"", "padding of the head writes nothing"


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_matched_ids_write_the_same_bytes(student, teacher):
    one, other = Pieces(family(student)), Pieces(family(teacher))
    sizes = len(family(student)), len(family(teacher))
    stops = family(student).eos_token_id, family(teacher).eos_token_id
    pairs = matches(one, other, sizes, stops)
    assert stops in pairs
    assert all(one.of(i) == other.of(j) for i, j in pairs if (i, j) != stops)
    for side in zip(*pairs, strict=True):
        assert len({*side}) == len(side), "each id has one partner"
    if student == teacher:
        assert pairs == [(i, i) for i in range(sizes[0])]
    else:
        texts = {one.of(i) for i in range(sizes[0])} & {other.of(j) for j in range(sizes[1])} - {b""}
        paired = {one.of(i) for i, _ in pairs}
        assert texts <= paired | {one.of(stops[0]), other.of(stops[1])}, "none is left out"


def test_tokenizers_whose_tokens_depend_on_their_neighbors_are_refused():
    tokenizer = Tokenizer(models.WordLevel({"a</w>": 0, "b</w>": 1}, unk_token="a</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")  # a space after each but the last
    with pytest.raises(ValueError, match="nobody can tell which bytes are whose"):
        Pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).check(2)
    for name in NAMES:
        Pieces(family(name)).check(len(family(name)))
