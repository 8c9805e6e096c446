"""Handshake: what is compared with a server before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....connection import Refused
from ....likeness import UNKNOWN
from ....policy import Policy, evaluating
from ....printable import quoted
from .dialect import Dialect
from .question import Question, answers
from .scorer import as_trajectories

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    " a space before, two  within, one behind ",
    "1234567890 + 0.5e-3 = 12,345",
    "naïve café, Straße, ñandú",
    "日本語 и русский, 한국어",
    "🙂👩‍👩‍👧",
    "def f(x):\n\treturn x**2  # ²\n\n\n",
)
"""Texts whose ids are compared one by one."""
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
TIMES, ANSWER_TOKENS = 5, 8


def handshake(
    dialect: Dialect, setting: Any, reader: Policy, vocabulary: int, top_k: int, tolerance: float
) -> tuple[dict[str, str], Question, Tensor]:
    """Compares a server with a tokenizer, and with itself.

    Args:
        dialect: asks it.
        setting: of the run.
        reader: has the tokenizer; mostly the student.
        vocabulary: ids below it can be actions.
        top_k: ids of each step that will be asked for.
        tolerance: nats that the same text may be apart when it is scored again.

    Returns:
        Facts for the start-up table; a question, with the log-probs of its answer, by which the server is known again.

    Raises:
        ValueError: it reads ids otherwise, caps the likeliest ids, or contradicts itself.
    """
    # 1. ids, one by one
    who, texts, compared = dialect.connection.url, _texts(setting, reader, vocabulary), 0
    is_student = reader is setting.policies["student"]
    own_name = "the student" if is_student else reader.path
    for text, own in texts.items():
        answered = dialect.ids(text)
        if answered is None:
            break
        if own != answered:
            same = [a == b for a, b in zip(own, answered, strict=False)]
            place = [*same, False].index(False)
            raise ValueError(
                f"{who} has another tokenizer than {own_name}: {quoted(text)} has the ids {quoted(answered)} there "
                f"and {quoted(own)} here, which differ from place {place} on"
            )
        compared += 1
    facts = {"ids": f"equal in {compared} texts" if compared else "not compared: it has no /tokenize"}
    # 2. the chat template, which the student's stands in for
    facts["template"] = _template(dialect, setting.tokenizer(reader), reader, "the student's" if is_student else "its")
    # 3. one text, again and again: the cap on likeliest ids, and how far apart answers are
    ids = next(iter(texts.values()), list(range(min(vocabulary, 16))))[: 4 * ANSWER_TOKENS]
    cut = max(1, len(ids) - ANSWER_TOKENS)
    question = Question(tuple(ids[:cut]), tuple(ids[cut:]), tuple(range(len(ids) - cut)))
    try:
        told = torch.stack([dialect.ask(question, top_k).log_probs.double() for _ in range(TIMES)])
    except Refused as error:
        cap = f". Does it cap top_k={top_k}? Lower weights.top_k, or raise the server's limit (vLLM: --max-logprobs)"
        raise ValueError(f"{error}{cap if top_k and error.code in (400, 422) else ''}") from error
    if not bool(told[0].any()):
        raise ValueError(f"{who} finds every token of {quoted(ids)} certain (0 nats), as no model does")
    apart = float((told.amax(0) - told.amin(0)).max())
    if not apart <= tolerance:
        raise ValueError(
            f"{who} scores the same text differently each time: {apart:.3g} nats apart in {TIMES} tries, more than "
            f"weights.tolerance={tolerance:g}. Does it compute in half precision, or batch what others ask?"
        )
    facts["scored five times"] = f"{apart:.1e} nats apart"
    # 4. beside the student, which finds it as likely where it is the same model
    if is_student and isinstance(reader.processor, PreTrainedTokenizerBase):
        ours = float(_by_student(setting, question).mean())
        facts["log-prob of that text"] = f"{float(told[0].mean()):.3f} nats a token, the student's {ours:.3f}"
    return facts, question, told[0]


@torch.no_grad()
def _by_student(setting: Any, question: Question) -> Tensor:
    """Computes the student's log-probs ``[n]`` of an answer, as a teacher here would be asked for its own."""
    student = setting.policies["student"]
    batch = as_trajectories([question], setting.padding_id).to(next(student.model.parameters()).device)
    with evaluating(student.model):
        (answer,) = answers(setting.distribution(student, batch), batch, setting.objective.chunk_size)
    return answer.log_probs


def _texts(setting: Any, reader: Policy, vocabulary: int) -> dict[str, list[int]]:
    """Lists texts with their ids: one of tokens of the whole vocabulary, and those of `TEXTS` that can be written."""
    tokenizer, never = setting.tokenizer(reader), {*setting.suppressed()}
    tokens = [tokenizer.decode([i]) for i in range(0, vocabulary, max(1, vocabulary // 64)) if i not in never]
    known: dict[str, list[int]] = {}
    for text in ("".join(token for token in tokens if token not in tokenizer.all_special_tokens), *TEXTS):
        try:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # of a tokenizer that knows few characters, which may raise anything
            continue
        if len(ids) > 1 and max(ids) < vocabulary:
            known[text] = ids
    return known


def _template(dialect: Dialect, tokenizer: Any, reader: Policy, whose: str) -> str:
    """Says whether the server renders a chat as the reader does, whose template is the one that counts."""
    if reader.processor.chat_template is None:
        return "none: prompts as they are"
    own = reader.processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    answered = dialect.rendered(MESSAGES)
    if answered is None:
        return f"{whose}; the server's is not known"
    same = answered == list(tokenizer(own, add_special_tokens=False)["input_ids"])
    return f"{whose}, equal to the server's" if same else f"{whose}; the server's is another one"


def same_weights(now: str, before: str, tolerance: float) -> bool:
    """Tells whether two fingerprints may be of the same weights.

    Those of weights that a server does not tell apart hold log-probs of a known text, which may be ``tolerance`` nats
    apart; of one without them nothing is known.
    """
    if UNKNOWN in (now, before):
        return now.startswith(UNKNOWN) and before.startswith(UNKNOWN)
    if not now.startswith(UNKNOWN) or not before.startswith(UNKNOWN):
        return now == before
    one, other = ([float(x) for x in mark.split(":", 1)[1].split(",")] for mark in (now, before))
    return len(one) == len(other) and all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def check_known(now: Tensor, before: Tensor, tolerance: float, who: str) -> None:
    """Compares log-probs ``[n]`` of a known text with those of before.

    Raises:
        ValueError: they are further apart than ``tolerance``, in nats.
    """
    apart = float((now.double() - before).abs().max()) if len(now) == len(before) else float("inf")
    if not apart <= tolerance:
        raise ValueError(
            f"{who} scores a known text {apart:.3g} nats away from before, more than weights.tolerance={tolerance:g}: "
            "was it restarted with other weights?"
        )
