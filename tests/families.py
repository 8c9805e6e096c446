"""Tokenizers of five families, trained on a few sentences, with chat templates of two kinds."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "1234 + 5678 = 6912, and 12 + 34 = 46; what is 7 + 8?",
    "naïve café, Straße, ñandú, the answer is 42",
    "日本語 と 한국어 и русский",
    "🙂 smiles at 👩‍👩‍👧 and says:  two  spaces, a\ttab\nand a line",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A space before each answer, and no words for whose turn it is, as Llama 2 and Mistral have it."""
CHAT = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<unk>", "<s>", "</s>")
FALLBACK = tuple(f"<0x{byte:02X}>" for byte in range(256))
NAMES = ("byte_level", "bpe", "unigram", "word_piece", "characters")


@cache
def family(name: str, size: int = 500, template: bool = True) -> PreTrainedTokenizerFast:
    """One tokenizer of five: ``byte_level`` and ``characters`` end with <|im_end|>, others with </s>.

    byte_level: BPE of bytes, as GPT-2's and Qwen's; bpe: of characters with ▁ for spaces and byte fallback, as
    Llama's; unigram: as T5's, with ▁ and byte fallback; word_piece: as BERT's, lowercase, without spaces; characters:
    of bytes, one by one.
    """
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if name in ("byte_level", "characters"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        count = size if name == "byte_level" else len(alphabet)
        trainer: Any = trainers.BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(SENTENCES, trainer)
        options |= {"pad_token": "<|endoftext|>", "eos_token": CHAT[1], "additional_special_tokens": [CHAT[0]]}
    elif name == "word_piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        specials = ["[UNK]", "<s>", "</s>", "<pad>"]
        tokenizer.train_from_iterator(
            SENTENCES, trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
        )
        options |= {"pad_token": "<pad>", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if name == "bpe" else models.Unigram())
        prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(prepend if name == "bpe" else prepend[1:])
        if name == "unigram":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        strip = [decoders.Strip(" ", 1, 0)] if name == "bpe" else []
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        tokenizer.decoder = decoders.Sequence(parts)
        specials = [*LLAMA, *FALLBACK]
        if name == "bpe":
            trainer = trainers.BpeTrainer(vocab_size=size + 256, special_tokens=specials, show_progress=False)
        else:
            trainer = trainers.UnigramTrainer(
                vocab_size=size, special_tokens=specials, unk_token="<unk>", show_progress=False
            )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        tokenizer = _with_bytes_of_its_own(tokenizer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        options |= {"pad_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    if template:
        fast.chat_template = CHATML if name in ("byte_level", "characters") else INST
    return fast


def _with_bytes_of_its_own(tokenizer: Tokenizer) -> Tokenizer:
    """Makes tokens of bytes plain ones, as they are in SentencePiece's: training knows them as special alone."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in LLAMA]
    if state["model"]["type"] == "Unigram":
        state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))
