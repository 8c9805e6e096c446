"""What models, rows and paths hold, made fit to be shown: nothing in it commands a terminal, a table or a page.

Everything that is printed and was not written in this repository goes through here: `printable` for plain text,
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
    """``str(text)`` with all that does not show, or moves what does, as its escape: ``\\x1b``, ``\\r``, ``\\u202e``.

    Line breaks and tabs stay.
    """
    return "".join(_visible(character) for character in str(text))


def quoted(value: Any, length: int = 80) -> str:
    """One line for a message: as Python writes the value, cut in the middle to about ``length`` characters."""
    line = printable(repr(value)).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) <= length:
        return line
    kept = length // 2
    return f"{line[:kept]} … {line[-kept:]}"


def cell(value: Any, style: str = "") -> Text:
    """For rich's tables and consoles, without a meaning of its brackets."""
    from rich.text import Text  # not to be waited for where nothing is drawn

    return Text(printable(value), style)


def in_markdown(text: Any) -> str:
    """For loggers that render Markdown and HTML: reads as it was written, on one line."""
    plain = escape(printable(text), quote=False).replace("\n", " ")
    return "".join(f"\\{character}" if character in _MARKDOWN else character for character in plain)


def _visible(character: str) -> str:
    if character in _READABLE or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()
