"""`opd ask`: texts of a teacher that is known by its words alone, as rows to train on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ...data_source import read_source
from ...endpoint import Endpoint
from ...endpoint_reward import messages_of, replies_to
from ...printable import printable
from ...rows import LOCATION, BadRows
from ..autoregressive.elsewhere.store import write_whole
from .distill import prompt_column

EPILOG = """Rows keep their columns; prompts are in the column prompt, and the texts in completion. Texts that were cut
at --max_tokens, and empty ones, are left out. Answers are kept in --endpoint.keep, so that the same command goes on
where it ended. To train on them: opd fit -c mine.yaml -c opd:methods/sft.yaml --data.train=FILE
--model.rollout.behavior='{dataset: 1.0, teacher: 0.0}'"""


def main(arguments: Sequence[str]) -> None:
    """Asks a model behind a chat endpoint about each row, and writes its texts down as completions, for SFT."""
    parser = ArgumentParser(prog="opd ask", description=main.__doc__, epilog=EPILOG)
    parser.add_class_arguments(Endpoint, "endpoint")
    parser.add_argument("--data", type=str, required=True, help="rows with prompts, as `data.train` takes them")
    parser.add_argument("--into", type=Path, required=True, help="the file to write, .jsonl")
    parser.add_argument("--prompt", type=str | None, default=None, help="their column (default: the likeliest)")
    parser.add_argument("--system", type=str | None, default=None, help="a system message before each prompt")
    parser.add_argument("--draws", type=int, default=1, help="texts of each row")
    parser.add_argument("--temperature", type=float | None, default=1.0)
    parser.add_argument("--max_tokens", type=int | None, default=1024, help="of a text")
    options = parser.instantiate(parser.parse_args(list(arguments)))
    told = ask(**vars(options))
    print(printable(f"{told}: {EPILOG.partition('To train on them: ')[2].replace('FILE', str(options.into))}"))


def ask(
    endpoint: Endpoint,
    data: str,
    into: Path,
    prompt: str | None = None,
    system: str | None = None,
    draws: int = 1,
    temperature: float | None = 1.0,
    max_tokens: int | None = 1024,
) -> str:
    """Asks about each row, and writes rows with completions; returns what became of it.

    Args:
        endpoint: who is asked.
        data: rows with prompts, as ``data.train`` takes them.
        into: the file to write, JSON lines; it is there as a whole or not.
        prompt: the column of prompts; None: the likeliest one.
        system: a message before each prompt.
        draws: texts of each row.
        temperature, max_tokens: of a text.

    Raises:
        ValueError: the rows can't be read, or hold no prompts; no draws; nothing came of it.
        BudgetSpent, ConnectionError: as in `Endpoint.ask`; what was answered is kept.
    """
    # 1. what is asked
    if draws < 1:
        raise ValueError(f"--draws is {draws}; it takes 1 or more")
    rows = read_source(data, {}, "--data", 0, BadRows("--data", "refuse"))
    column = prompt_column(rows, prompt)
    before = [{"role": "system", "content": system}] if system else []
    chats = [[*before, *messages_of(row[column])] for row in rows]
    # 2. its answers
    settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    try:
        replies = replies_to(endpoint, [endpoint.ask(chat, d, **settings) for chat in chats for d in range(draws)])
    finally:
        endpoint.close()
    # 3. rows of those that are whole
    lines = list[str]()
    for row, reply in zip(_repeated(rows, draws), replies, strict=True):
        if reply.text.strip() and not reply.cut:
            columns = {n: value for n, value in row.items() if n not in (LOCATION, column) and value is not None}
            try:
                lines.append(
                    json.dumps({"prompt": row[column]} | columns | {"completion": reply.text}, ensure_ascii=False)
                )
            except TypeError as error:
                raise ValueError(f"{data}: rows hold more than text and numbers, which is no JSON: {error}") from None
    cut = sum(reply.cut for reply in replies)
    tokens, money = endpoint.spent()
    told = f"{len(lines):,} of {len(replies):,} texts, {cut:,} were cut ({endpoint.budget.told(tokens, money)} spent)"
    if not lines:
        raise ValueError(f"no row was written: {told}")
    write_whole(into, "".join(f"{line}\n" for line in lines))
    return f"{into} holds {told}"


def _repeated(rows: Any, draws: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield from [row] * draws
