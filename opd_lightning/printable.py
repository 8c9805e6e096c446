"""Safe printing of texts of models, rows and paths, which could command a terminal, a table or a page.

All that is printed and was not written in this repository goes through here: `printable` for plain text,
`cell` for rich, `in_markdown` for loggers that render it, `quoted` for messages.
"""

from __future__ import annotations

import unicodedata
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Controls, invisible formats (bidirectional overrides among them), lone halves of pairs, line and paragraph separators
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Without the joiners neither Persian nor the emoji of a family can be read; they move nothing but their neighbors
_READABLE = frozenset("\n\t\u200c\u200d")
_MARKDOWN = frozenset("\\`*_{}[]()#+-.!|~")


def printable(text: Any) -> str:
    """Replaces invisible and moving characters of ``str(text)`` by escapes: ``\\x1b``, ``\\r``, ``\\u202e``.

    Line breaks and tabs stay.
    """
    return "".join(_visible(character) for character in str(text))


def quoted(value: Any, length: int = 80) -> str:
    """Formats a value for a message: its ``repr`` on one line, cut in the middle to about ``length`` characters."""
    line = printable(repr(value)).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) <= length:
        return line
    half = length // 2
    return f"{line[:half]} … {line[-half:]}"


def cell(value: Any, style: str = "") -> Text:
    """Wraps a value for rich's tables and consoles, so that its brackets are no markup."""
    from rich.text import Text  # not to be waited for where nothing is drawn

    return Text(printable(value), style)


def in_markdown(text: Any) -> str:
    """Escapes a text for loggers that render Markdown and HTML, on one line."""
    plain = escape(printable(text), quote=False).replace("\n", " ")
    return "".join(f"\\{character}" if character in _MARKDOWN else character for character in plain)


def _visible(character: str) -> str:
    if character in _READABLE or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()
