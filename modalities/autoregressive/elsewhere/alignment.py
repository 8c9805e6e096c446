"""Alignment of the tokens that two tokenizers make of one text, byte by byte."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ....printable import quoted

ANCHOR = "a"
"""A token before another one, so that a decoder writes that as it does within a text."""
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers of SentencePiece spell a byte that is in no other token."""
CHECKED, DRAWN = 8, 32
"""Texts of tokens that are drawn at random, and their length, by which a tokenizer is checked."""


class Chunk(NamedTuple):
    """Tokens of both sides that write the same bytes: the student's start … stop, and the teacher's."""

    start: int
    stop: int
    teacher_start: int
    teacher_stop: int


def chunks(student: Sequence[int], teacher: Sequence[int]) -> list[Chunk]:
    """Cuts two lists of tokens at every byte where both have a border (Breaking the Tokenizer Barrier, 2606.09456).

    From the last cut on the side that has written less goes on until both have written the same.

    Args:
        student: for each token, how many bytes of the text were written once it was, in ascending order.
        teacher: the same of the other side's tokens.

    Returns:
        Minimal chunks in order, which cover both sides up to the last border that they share. A token that writes
        nothing belongs to what comes after it, at the end to what came before.
    """
    cut: list[Chunk] = []
    i = j = 0
    while i < len(student) and j < len(teacher):
        stop, other = i + 1, j + 1
        while student[stop - 1] != teacher[other - 1]:
            if student[stop - 1] < teacher[other - 1]:
                stop += 1
            else:
                other += 1
            if stop > len(student) or other > len(teacher):
                return cut
        cut.append(Chunk(i, stop, j, other))
        i, j = stop, other
    if cut and {*student[i:], *teacher[j:]} <= {student[cut[-1].stop - 1]}:
        cut[-1] = Chunk(cut[-1].start, len(student), cut[-1].teacher_start, len(teacher))
    return cut


class Pieces:
    """Bytes that tokens write.

    Args:
        tokenizer: of transformers, made of the library ``tokenizers``.

    Raises:
        ValueError: it is made of something else.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} is none of the library tokenizers (a fast one), which "
                "alone tells what each token writes"
            )
        self.tokenizer, self._decoder = tokenizer, backend.decoder
        kinds = json.dumps(json.loads(backend.to_str())["decoder"])
        self._is_byte_level, self._has_bytes = '"ByteLevel"' in kinds, '"ByteFallback"' in kinds
        self._added = {i: token for token, i in tokenizer.get_added_vocab().items()}
        self._known: dict[tuple[int, bool], bytes] = {}

    def of(self, token: int, is_first: bool = False) -> bytes:
        """Returns the bytes of one token; ``is_first``: of a text, where decoders leave a space out."""
        key = (token, is_first)
        if key not in self._known:
            self._known[key] = self._of(token, is_first)
        return self._known[key]

    def all_of(self, ids: Sequence[int], is_text: bool) -> list[bytes]:
        """Returns the bytes of each token; ``is_text``: of a text of its own, rather than behind another one."""
        return [self.of(token, is_text and place == 0) for place, token in enumerate(ids)]

    def _of(self, token: int, is_first: bool) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        name: str | None = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # padding of the head
            return b""
        if self._is_byte_level:
            return bytes(BYTES[c] for c in name) if {*name} <= BYTES.keys() else name.encode()
        if self._has_bytes and (byte := FALLBACK.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if self._decoder is None:
            return name.encode()
        before = [] if is_first else [ANCHOR]
        written: str = self._decoder.decode([*before, name])
        return written.removeprefix("".join(before)).encode()

    def check(self, vocabulary: int) -> None:
        """Compares the bytes of drawn tokens, put together, with what the tokenizer writes of them.

        Args:
            vocabulary: ids below it are drawn.

        Raises:
            ValueError: they differ, so what tokens write depends on their neighbors.
        """
        draw = random.Random(0)
        # bytes that are no text are spelled in several ways, and added tokens with spaces around
        possible = [token for token in range(vocabulary) if self._is_text(token)]
        for _ in range(CHECKED if possible else 0):
            ids = draw.choices(possible, k=DRAWN)
            own = b"".join(self.all_of(ids, is_text=True)).decode()
            there = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            if own != there:
                raise ValueError(
                    f"the tokenizer of {self.tokenizer.name_or_path} writes {quoted(there)} where its tokens by "
                    f"themselves write {quoted(own)}, so that nobody can tell which bytes are whose"
                )

    def _is_text(self, token: int) -> bool:
        name = self.tokenizer.convert_ids_to_tokens(token)
        try:
            self.of(token).decode()
        except UnicodeDecodeError:
            return False
        is_byte = self._has_bytes and name is not None and FALLBACK.fullmatch(name)
        return name is not None and token not in self._added and not is_byte


def _byte_characters() -> dict[str, int]:
    """Maps the characters by which byte-level tokenizers spell bytes to these (GPT-2)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_characters()


def text_of(pieces: Sequence[bytes], is_whole: bool) -> tuple[str, list[int]]:
    """Puts pieces together to a text, and tells where in it each ends.

    Bytes that are no text are U+FFFD, which the last of their pieces writes.

    Args:
        pieces: of the tokens, in order.
        is_whole: nothing comes after them. Otherwise a character that is not complete is left out, with the pieces that
            begin it.

    Returns:
        The text, and for each piece that is read the bytes of the text up to its end; pieces that are left out have no
        entry.
    """
    raw = b"".join(pieces)
    text, places, start = "", {0: 0}, 0
    written = 0
    while start < len(raw):
        try:
            good, bad = raw[start:].decode(), None
        except UnicodeDecodeError as error:
            good, bad = raw[start : start + error.start].decode(), error
        size = len(good.encode())
        places |= {start + k: written + k for k in range(size + 1)}
        text, start, written = text + good, start + size, written + size
        if bad is None:
            break
        stop = start + bad.end - bad.start
        if stop == len(raw) and bad.reason == "unexpected end of data" and not is_whole:
            break
        places |= dict.fromkeys(range(start, stop), written)
        text, start, written = text + "\ufffd", stop, written + len("\ufffd".encode())
        places[start] = written
    ends = [places[end] for end in accumulate(map(len, pieces)) if end <= start]
    return text, ends


def ends_of(pieces: Pieces, ids: Sequence[int], text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Tells where in a text each of its tokens ends, in bytes.

    By what tokens write where that is the text. Where a tokenizer changes what it reads (normalizes it, leaves spaces
    out), by the characters that it says a token was made of.

    Args:
        pieces: of the tokenizer.
        ids: that it made of the text.
        text: what it read.
        offsets: for each token the characters of the text that it was made of.
    """
    every = text.encode()
    for is_text in (False, True):
        written = pieces.all_of(ids, is_text)
        if b"".join(written) == every:
            return list(accumulate(map(len, written)))
    size = [0, *accumulate(len(character.encode()) for character in text)]
    # what was left out belongs to the token behind it, at the end to the last one
    ends = list(accumulate((size[min(max(stop, 0), len(text))] for _, stop in offsets), max))
    return [*ends[:-1], len(every)] if ends else []


def matches(student: Pieces, teacher: Pieces, sizes: tuple[int, int], ends: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs ids of both vocabularies that write the same bytes: those of equal spelling first, each once.

    Args:
        student: what its tokens write.
        teacher: what those of the other side write.
        sizes: ids of student and teacher below these are paired.
        ends: the ids that end an answer, which are a pair.
    """
    pairs = {ends[0]: ends[1]}
    taken = {ends[1]}
    other = teacher.tokenizer.get_vocab()
    for name, i in sorted(student.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        j = other.get(name, -1)
        if i < sizes[0] and 0 <= j < sizes[1] and i not in pairs and j not in taken and student.of(i) == teacher.of(j):
            pairs[i] = j
            taken.add(j)
    by_bytes: dict[bytes, int] = {}
    for j in range(sizes[1]):
        if j not in taken and (written := teacher.of(j)):
            by_bytes.setdefault(written, j)
    for i in range(sizes[0]):
        if i not in pairs and (j := by_bytes.pop(student.of(i), -1)) >= 0:
            pairs[i] = j
    return sorted(pairs.items())
