"""Asked: answers of chat endpoints in one file, found by what was asked, with what they cost."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from .printable import printable

PATIENCE = 60.0
"""Seconds that one process waits for another's writing."""

T = TypeVar("T")


class Reply(NamedTuple):
    """Answer of a chat endpoint.

    Attributes:
        text: of the assistant's message.
        cut: whether it ended because it was long enough.
        read: tokens of the prompt.
        written: tokens of the answer.
        counted: whether the server told how many tokens there were.
    """

    text: str
    cut: bool = False
    read: int = 0
    written: int = 0
    counted: bool = True


class Asked:
    """Answers of a folder, in ``answers.sqlite``. Threads, ranks and runs may share it.

    Args:
        folder: made when the first answer comes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.sqlite"
        self._lock = threading.Lock()

    def find(self, key: str) -> Reply | None:
        """Finds an answer that is kept."""
        row = self._do(lambda base: base.execute("SELECT text, cut, read, written FROM answers WHERE key = ?", (key,)))
        return None if not row else Reply(row[0][0], bool(row[0][1]), *row[0][2:])

    def keep(self, key: str, asked: str, reply: Reply, money: float) -> None:
        """Keeps an answer, with what was asked and what it cost; of two to the same question, the first."""
        values = (key, asked, reply.text, int(reply.cut), reply.read, reply.written, money)
        self._do(lambda base: base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", values), True)

    def spent(self) -> tuple[int, float]:
        """Sums up tokens and money of all answers."""
        rows = self._do(lambda base: base.execute("SELECT SUM(read + written), SUM(money) FROM answers"))
        return (rows[0][0] or 0, rows[0][1] or 0.0) if rows else (0, 0.0)

    def _do(self, call: Callable[[sqlite3.Connection], sqlite3.Cursor], writes: bool = False) -> list[tuple]:
        """Runs one statement; nothing is read of a file that is not there.

        Raises:
            ValueError: the file is none of answers, or can't be written.
        """
        with self._lock:
            if not writes and not self.path.exists():
                return []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # opened anew each time: one process forks others, and an answer takes far longer than this
                base = sqlite3.connect(self.path, timeout=PATIENCE)
                try:
                    with base:
                        base.execute(
                            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, asked TEXT, text TEXT, "
                            "cut INTEGER, read INTEGER, written INTEGER, money REAL)"
                        )
                        return call(base).fetchall()
                finally:
                    base.close()
            except sqlite3.Error as error:
                raise ValueError(
                    f"{self.path} can't be read or written as answers of an endpoint: {printable(error)}"
                ) from error
