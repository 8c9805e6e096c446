"""The words of the source: docstrings begin with a verb or a noun, locals are nouns, long functions number phases."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A relative clause, or "the same", in place of the verb; and sections that no sentence comes before
FRAGMENTS = (
    *("What", "Which", "Whether", "The same", "Told", "Where", "Whom", "As", "None:"),
    *("Args:", "Attributes:", "Raises:", "Returns:", "Yields:"),
)
# They tell a story, and do not say what is held
STORY = {"found", "mine", "theirs", "said", "seen", "shown", "whole", "made"}
LINES = 30

# What was there when this test was written, in issue 15, by file: numbers only shrink, and no file comes
DOCSTRINGS: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
NAMES: dict[str, int] = {}


def sources() -> list[Path]:
    paths = [
        path
        for folder in ("opd_lightning", "modalities", "callbacks", "methods")
        for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(path for path in paths if not any(parent.is_symlink() for parent in path.parents))


def defined(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Classes, functions and methods by qualified name; functions inside of functions belong to these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from defined(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.FunctionDef):
            yield from defined(child, prefix)


def is_property(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def docstring_fault(name: str, node: ast.FunctionDef | ast.ClassDef) -> str | None:
    """A noun may begin the docstring of a class and of a property; a verb, third person, that of a function."""
    text = ast.get_docstring(node)
    if text is None or any(part.startswith("_") for part in name.split(".")):
        return None
    first = " ".join(text.split("\n\n")[0].split())
    if not re.match(r"[A-Z]", first):
        return f"{name} begins with no word: {first!r}"
    if re.match("|".join(rf"{re.escape(words)}(?!\w)" for words in FRAGMENTS), first):
        return f"{name} begins with a fragment: {first!r}"
    if isinstance(node, ast.FunctionDef) and not is_property(node) and not re.match(r"[A-Z][a-z]+s\b", first):
        return f"{name} begins with no verb: {first!r}"
    return None


def unnumbered(name: str, node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str | None:
    if isinstance(node, ast.ClassDef):
        return None
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return None
    text = lines[body[0].lineno - 1 : body[-1].end_lineno]
    # a comment above the first statement belongs to it
    for line in reversed(lines[node.lineno : body[0].lineno - 1]):
        if not line.strip().startswith("#"):
            break
        text.insert(0, line)
    phases = sum(re.search(r"# \d+\.", line) is not None for line in text)
    return f"{name} has {len(text)} lines and {phases} numbered phases" if len(text) > LINES and phases < 2 else None


def story(name: str, node: ast.FunctionDef | ast.ClassDef) -> Counter[str]:
    if isinstance(node, ast.ClassDef):
        return Counter()
    stores = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
    return Counter(f"{name}: {part.id}" for part in stores if part.id in STORY)


def faults(kind: str) -> dict[str, list[str]]:
    by_file = {}
    for path in sources():
        text = path.read_text(encoding="utf-8")
        nodes = list(defined(ast.parse(text)))
        if kind == "docstrings":
            messages = [docstring_fault(*item) for item in nodes]
        elif kind == "long functions":
            messages = [unnumbered(*item, text.splitlines()) for item in nodes]
        else:
            messages = [message for item in nodes for message in story(*item).elements()]
        if any(messages):
            by_file[str(path.relative_to(ROOT))] = [message for message in messages if message]
    return by_file


@pytest.mark.parametrize(
    ("kind", "known"), [("docstrings", DOCSTRINGS), ("long functions", LONG_FUNCTIONS), ("names", NAMES)]
)
def test_words(kind: str, known: dict[str, int]):
    by_file = faults(kind)
    new = {name: messages for name, messages in by_file.items() if len(messages) > known.get(name, 0)}
    assert not new, "\n".join(f"{name}: {message}" for name, messages in new.items() for message in messages)
    fewer = {name: len(by_file.get(name, [])) for name in known if len(by_file.get(name, [])) < known[name]}
    assert not fewer, f"shorten the list of {kind}: {fewer}"


SAMPLE = '''
class Weight:
    """w(i, t)."""

    def of(self):
        """What it is."""
        found = [1 for seen in ()]
        return found

    @property
    def scale(self):
        """Scale of all."""

def scaled():
    """Scale of all."""

def scales():
    """Scales all."""

def raises():
    """Raises:
        ValueError: always.
    """
'''


def test_faults_are_found():
    nodes = dict(defined(ast.parse(SAMPLE)))
    assert [name for name, node in nodes.items() if docstring_fault(name, node)] == [
        "Weight",
        "Weight.of",
        "scaled",
        "raises",
    ]
    assert story("of", nodes["Weight.of"]) == Counter({"of: found": 1, "of: seen": 1})
    body = [f"    x = {i}" for i in range(LINES + 1)]
    for first, long in (("    # 1. begin", False), ("    # begin", True)):
        lines = ["def f():", first, *body, "    # 2. end", "    return x"]
        assert (unnumbered("f", ast.parse("\n".join(lines)).body[0], lines) is not None) == long
