"""The methods that ship, read from the heads of their files; ``opd methods`` lists them and writes the docs' tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .config_file import did_you_mean

SOURCES = ("paper", "official code", "third-party code", "note", "abstract", "ours")
"""Where formula and numbers come from: the paper's text, its authors' code, other people's code, a detailed account by
others, the abstract alone; ``ours`` where there is no paper."""
ID = r"\d{4}\.\d{5}"
FORMS = {
    "Paper": rf"none|(after )?{ID}(, {ID})*",
    "Settings": r"[a-z_]+(, [a-z_]+)*",
    "Over": r"any|[a-z_/]+(, [a-z_/]+)*",
    "Parts": r"[A-Z]\w+(, [A-Z]\w+)*",
    "Evidence": r"({0})(, ({0}))*(; .+)?".format("|".join(SOURCES)),
    "Differs": r".+",
    "Measured": r"not measured|.+ \(docs/\w+\.md\)",
}
"""The lines of a head below its title, in this order, and what they may say; only overlays say ``Over``."""


@dataclass(frozen=True)
class Method:
    """The head of a method's file, or of an overlay's, which goes over a method.

    Attributes:
        name: as in ``opd:NAME.yaml``: ``methods/gkd``, ``methods/text/opsd``, ``overlays/samples``.
        title: one sentence.
        paper: arXiv ids, ``after`` and ids where only the idea is the paper's, or ``none``.
        settings: those whose quickstart it can overlay as it is.
        over: the methods that an overlay is for, one of each setting; empty: any, and for methods.
        parts: the classes that the file names.
        evidence: some of `SOURCES`, and a remark.
        differs: from the paper: what is left out, and which numbers are ours.
        measured: the number to expect and the page that has it, or ``not measured``.
        prose: what else is to be known.
    """

    name: str
    title: str
    paper: str
    settings: tuple[str, ...]
    over: tuple[str, ...]
    parts: tuple[str, ...]
    evidence: str
    differs: str
    measured: str
    prose: str

    def stack(self, setting: str) -> list[str]:
        """Lists the configurations of a run of it: the setting's quickstart, for overlays a method, and itself."""
        folder = f"methods/{setting}/"
        return [f"{setting}/quickstart", *(name for name in self.over if name.startswith(folder)), self.name]


def shipped_configs() -> Path:
    """Returns the folder of configurations that comes with the package."""
    return Path(str(files("opd_lightning"))) / "configs"


def read_all(configs: Path | None = None) -> list[Method]:
    """Reads the heads of all methods, those for several settings first, and then of all overlays.

    Args:
        configs: the folder of configurations. Default: the shipped one.

    Raises:
        ValueError: a file has no such head, or its head is not true of it.
    """
    configs = configs or shipped_configs()
    methods = sorted((configs / "methods").rglob("*.yaml"), key=lambda path: (path.parent, path.stem))
    return [read(path, configs) for path in (*methods, *sorted((configs / "overlays").glob("*.yaml")))]


def read(path: Path, configs: Path) -> Method:
    """Reads the head of one file below the folder of configurations.

    Raises:
        ValueError: a line is missing, out of order or of another form; a setting or method that is not there; a folder
            of another setting; parts that are not those of the file.
    """
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(configs).with_suffix("").as_posix()
    # 1. the lines: a sentence, `Key: value` with indented continuations, an empty line, prose
    comment = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text[: _end(text)].splitlines())
    facts, _, prose = comment.partition("\n\n")
    title, *lines = re.split(rf"\n(?=(?:{'|'.join(FORMS)}): )", facts)
    head = {key: " ".join(value.split()) for key, _, value in (line.partition(": ") for line in lines)}
    # 2. their forms
    expected = [key for key in FORMS if key != "Over" or name.startswith("overlays/")]
    if not title or list(head) != expected:
        there = ", ".join(head) or title or "nothing"
        raise ValueError(f"{path}: its head is a sentence and then {', '.join(expected)}, not {there}")
    for key, value in head.items():
        if not re.fullmatch(FORMS[key], value):
            raise ValueError(f"{path}: {key}: {value} is not of the form {FORMS[key]}")
    settings, parts = tuple(head["Settings"].split(", ")), tuple(head["Parts"].split(", "))
    over = () if head.get("Over", "any") == "any" else tuple(head["Over"].split(", "))
    # 3. whether they are true of the file
    missing = [n for n in (*over, *(f"{s}/quickstart" for s in settings)) if not (configs / f"{n}.yaml").exists()]
    if missing:
        raise ValueError(f"{path}: there is no {', '.join(missing)}")
    home = f"methods/{settings[0]}" if len(settings) == 1 else "methods"
    if name.startswith("methods/") and path.parent != configs / home:
        raise ValueError(f"{path}: a method for {', '.join(settings)} belongs into {home}/")
    if set(parts) != (named := set(classes(yaml.safe_load(text)))):
        raise ValueError(f"{path}: Parts: {', '.join(sorted(parts))}, but the file names {', '.join(sorted(named))}")
    return Method(
        name, " ".join(title.split()), head["Paper"], settings, over, parts, head["Evidence"], head["Differs"],
        head["Measured"], prose,
    )  # fmt: skip


def _end(text: str) -> int:
    """Returns where the comment at the top of a file ends."""
    comment = re.match(r"(#.*\n)+", text)
    return comment.end() if comment else 0


def classes(node: Any) -> Iterator[str]:
    """Yields the classes that a configuration names, by path or in short, but for optimizers."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from classes(value) if key != "optimizer" else ()
    elif isinstance(node, list):
        for value in node:
            yield from classes(value)
    elif isinstance(node, str) and re.fullmatch(r"([a-z_]\w*\.)*[A-Z]\w*", node):
        yield node.rpartition(".")[2]


def table(kind: str, methods: Sequence[Method]) -> str:
    """Formats a Markdown table.

    Args:
        kind: ``methods`` or ``overlays``, what they are; ``evidence``, how sure all of them are.
    """
    if kind == "evidence":
        columns = ["overlay", "parts", "evidence", "differs from the paper in", "measured"]
        rows = [[f"`{m.name}`", f"`{'`, `'.join(m.parts)}`", m.evidence, m.differs, m.measured] for m in methods]
    else:
        columns = ["overlay", "method" if kind == "methods" else "what it does", "paper", "settings"]
        chosen = [m for m in methods if m.name.startswith(f"{kind}/")]
        rows = [[f"`{m.name}`", m.title, "" if m.paper == "none" else m.paper, ", ".join(m.settings)] for m in chosen]
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def updated(page: str, methods: Sequence[Method]) -> str:
    """Returns a Markdown page with its tables, between ``<!-- opd methods: KIND -->`` and ``<!-- end -->``, new."""
    pattern = r"(<!-- opd methods: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: match[1] + table(match[2], methods) + match[3], page, flags=re.DOTALL)


def main(arguments: Sequence[str]) -> None:
    """Lists the methods that ship, shows the head of one, or writes the tables of Markdown pages anew."""
    parser = argparse.ArgumentParser(prog="opd methods", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="whose head is shown, such as gkd; default: a list of all")
    parser.add_argument("--setting", help="only what works in it, such as gui_grounding")
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="PAGE", help="Markdown pages with tables")
    options = parser.parse_args(arguments)
    methods = [m for m in read_all() if options.setting in (None, *m.settings)]
    for page in options.update:
        page.write_text(updated(page.read_text(encoding="utf-8"), read_all()), encoding="utf-8")
    if options.name is not None:
        known = {spelled: m for m in methods for spelled in (m.name, m.name.rpartition("/")[2])}
        if options.name not in known:
            parser.error(f"there is no method {options.name}{did_you_mean(options.name, known)}")
        name = known[options.name].name
        text = (shipped_configs() / f"{name}.yaml").read_text(encoding="utf-8")
        print(f"opd:{name}.yaml\n{text[: _end(text)]}", end="")
    elif not options.update:
        print("".join(f"{m.name:<42}{m.title}\n" for m in methods), end="")
