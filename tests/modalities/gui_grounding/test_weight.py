from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from opd_lightning.modalities.gui_grounding.formats import JSONAnswer
from opd_lightning.modalities.gui_grounding.weight import DigitSignificance, digit_places
from opd_lightning.objective import Steps
from tests.objective.reference import batch

CORPUS = [f"pyautogui.click(x={x}, y={1100 - x}) Klick auf {x * 10}: grüße 🙂 {x}" for x in range(0, 1100, 7)]


def trained(model, trainer, pre_tokenizer, decoder, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )


def sentencepiece():
    return trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=60,
            show_progress=False,
        ),
        pre_tokenizers.Metaspace(),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def wordpiece():
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(),
    )


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece(), "wordpiece": wordpiece()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def decoder(tokenizer):
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)


def places_of(text):
    """N − k of every character, by walking along the text."""
    places, start = [0] * len(text), 0
    while start < len(text):
        end = past_digits(text, start)
        if end > start and past_digits(text, end + 1) > end + 1 and text[end] == ".":
            end = past_digits(text, end + 1)
        for left, i in enumerate((i for i in reversed(range(start, end)) if text[i] != "."), 1):
            places[i] = left
        start = max(end, start + 1)
    return places


def past_digits(text, i):
    while i < len(text) and text[i] in "0123456789":
        i += 1
    return i


def by_offsets(tokenizer, text):
    """The same from the tokenizer's own offsets into the text that it encoded."""
    places = places_of(text)
    return [max(places[start:end], default=0) for start, end in tokenizer.encode(text).offsets]


@pytest.mark.parametrize(
    ("pieces", "places"),
    [
        (["1", "0", "4", "3"], [4, 3, 2, 1]),
        (["10", "43"], [4, 2]),
        (["(", "10", "43", ", ", "7", ")"], [0, 4, 2, 0, 1, 0]),
        (["1043"], [4]),
        (["(1", "2", "),(3", "4)"], [2, 1, 2, 1]),
        (["1,234"], [3]),
        (["0", ".", "4", "8", "2"], [4, 0, 3, 2, 1]),
        (["0.4", "82"], [4, 2]),
        (["5", "12", ".", "2", "5"], [5, 4, 0, 2, 1]),
        (["5", ".", " ", "2"], [1, 0, 0, 1]),
        (["no", "", " digits ²٣"], [0, 0, 0]),
        ([], []),
    ],
)
def test_the_places_of_a_numbers_digits(pieces, places):
    assert digit_places(list(range(len(pieces))), lambda tokens: "".join(pieces[i] for i in tokens)) == places


@each_tokenizer
@pytest.mark.parametrize("text", ["1043", "click at 7 12 512 1043", *CORPUS[:3], CORPUS[-1]])
def test_merged_digits_are_caught(tokenizer, text):
    if "." in text and tokenizer is TOKENIZERS["wordpiece"]:
        text = text.replace(".", " ")
    tokens = tokenizer.encode(text).ids
    assert digit_places(tokens, decoder(tokenizer)) == by_offsets(tokenizer, text)


@each_tokenizer
def test_the_tokenizers_of_these_tests_merge_digits(tokenizer):
    ids = tokenizer.encode("1043 512 700 1001").ids
    assert any(sum(map(str.isdigit, tokenizer.id_to_token(i))) > 1 for i in ids)


@given(st.text(st.sampled_from("0123456789.,() xgü🙂\n"), max_size=30))
def test_any_text_of_a_byte_level_tokenizer(text):
    tokenizer = TOKENIZERS["byte-level"]
    assert digit_places(tokenizer.encode(text).ids, decoder(tokenizer)) == by_offsets(tokenizer, text)


@given(st.lists(st.integers(0, 390)))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokens_that_a_model_may_say(name, tokens):
    tokenizer = TOKENIZERS[name]
    places = digit_places(tokens, decoder(tokenizer))
    assert len(places) == len(tokens)
    assert max(places, default=0) == max(places_of(decoder(tokenizer)(tokens)), default=0)


def test_digits_after_an_unfinished_character():
    text = "🙂512"
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = tokenizer.encode(text).ids
    assert digit_places(tokens, decoder(tokenizer)) == [0, 0, 0, 0, 3, 2, 1]
    assert digit_places(tokens[1:], decoder(tokenizer))[-3:] == [3, 2, 1]


@pytest.mark.parametrize(
    ("said", "places"),
    [("🙂512", [0, 0, 0, 0, 3, 2, 1]), ("5🙂", [1, 0, 0, 0, 0]), ("5é🙂1", [1, 0, 0, 0, 0, 0, 0, 1])],
)
def test_bytes_of_a_character_that_undo_the_text_before_it(said, places):
    tokenizer = TOKENIZERS["sentencepiece"]
    tokens = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in said.encode()]
    assert decoder(tokenizer)(tokens) == said
    assert digit_places(tokens, decoder(tokenizer)) == places


def test_a_written_answer():
    tokenizer = TOKENIZERS["byte-level"]
    text = JSONAnswer("pixels").write((1040, 30, 1046, 40), (2000, 1000), (2000, 1000))
    places = digit_places(tokenizer.encode(text).ids, decoder(tokenizer))
    assert text == '{"point_2d": [1043, 35]}'
    assert max(places) == 4
    assert places[-1] == 0


def steps(digits, mask=None):
    trajectories = batch(mask or [[1] * len(digits[0])] * len(digits), 6)
    trajectories.channels["digits"] = torch.tensor(digits).float()
    return Steps.of(trajectories)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (DigitSignificance(), [0.1, 4, 3, 2, 1, 0.1]),
        (DigitSignificance(cap=3), [0.1, 3, 3, 2, 1, 0.1]),
        (DigitSignificance(cap=1, other=0), [0, 1, 1, 1, 1, 0]),
    ],
)
def test_weights_of_1043(weight, expected):
    places = digit_places(list(range(6)), lambda tokens: "".join("(1043)"[i] for i in tokens))
    torch.testing.assert_close(weight(steps([places])), torch.tensor(expected).float())


def test_weights_are_those_of_the_trained_steps():
    found = DigitSignificance()(steps([[3, 2, 1], [0, 2, 1]], mask=[[1, 1, 0], [0, 1, 1]]))
    torch.testing.assert_close(found, torch.tensor([3.0, 2, 2, 1]))
    assert DigitSignificance.needs == {"digits"}
    assert DigitSignificance.scope == "data"


@pytest.mark.parametrize("arguments", [{"cap": 0}, {"other": -0.1}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"weight\.(cap|other) must be"):
        DigitSignificance(**arguments)
