"""The catalog: the methods that ship, read from the heads of their files, and the published systems that are not built.

``opd methods`` lists both, shows one, and writes the docs' tables.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .config_file import did_you_mean

SOURCES = ("paper", "official code", "third-party code", "note", "abstract", "ours")
"""Where formula and numbers come from: the paper's text, its authors' code, other people's code, a detailed account by
others, the abstract alone; ``ours`` where there is no paper."""
PRIVILEGES = {
    "any": "whatever the teacher has in the configuration that it is laid over",
    "model": "a better model",
    "solution": "a worked solution or a demonstration",
    "answer": "the final answer alone",
    "hint": "a part of the solution, or words on what is to be seen",
    "feedback": "what was said of an answer",
    "sibling": "other rollouts of the same prompt, right or wrong",
    "prompt": "another prompt: an instruction, or one without what misleads",
    "picture": "an image: a crop, a spotlight, the target",
    "none": "nothing: its own past, or data",
}
"""What the teacher has that the student has not."""
MISSING = {
    "class": "a small class is missing",
    "seam": "the core can't do it yet",
    "formula": "its formula is unpublished",
    "signal": "there is nothing to train a student by",
    "domain": "another domain",
    "survey": "a survey",
}
"""Why published systems are not built."""
ID = r"\d{4}\.\d{5}"
FORMS = {
    "Paper": rf"none|(after )?{ID}(, {ID})*",
    "System": r".+",
    "Settings": r"[a-z_]+(, [a-z_]+)*",
    "Over": r"any|[a-z_/]+(, [a-z_/]+)*",
    "Privilege": r"({0})(, ({0}))*".format("|".join(PRIVILEGES)),
    "Parts": r"[A-Z]\w+(, [A-Z]\w+)*",
    "Formula": r".+",
    "Defaults": r".+",
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
        systems: the published systems of on-policy distillation that it builds, in the file with ``; `` between them;
            none for baselines, for methods of other kinds, and where only the idea is a paper's.
        settings: those whose quickstart it can overlay as it is.
        over: the methods that an overlay is for, one of each setting, or one of several; empty: any, and for methods.
        privilege: some of `PRIVILEGES`.
        parts: the classes that the file names.
        formula: the loss of a step, or of a trajectory of T: p is the student, q the teacher through its view, b who
            acted, y what was done, A a group-relative reward, sg without gradient.
        defaults: the numbers of the file, and in parentheses where they come from.
        evidence: some of `SOURCES`, and a remark.
        differs: from the paper: what is left out, and which numbers are ours.
        measured: the number to expect and the page that has it, or ``not measured``.
        prose: what else is to be known.
    """

    name: str
    title: str
    paper: str
    systems: tuple[str, ...]
    settings: tuple[str, ...]
    over: tuple[str, ...]
    privilege: tuple[str, ...]
    parts: tuple[str, ...]
    formula: str
    defaults: str
    evidence: str
    differs: str
    measured: str
    prose: str

    def stack(self, setting: str) -> list[str]:
        """Lists the configurations of a run of it: the setting's quickstart, for overlays a method, and itself."""
        below = [name for name in self.over if name.rpartition("/")[0] in ("methods", f"methods/{setting}")]
        return [f"{setting}/quickstart", *below, self.name]


@dataclass(frozen=True)
class Unbuilt:
    """A published system that no method builds.

    Attributes:
        system: its name.
        paper: an arXiv id, or ``none``.
        missing: one of `MISSING`.
        reason: more exactly.
    """

    system: str
    paper: str
    missing: str
    reason: str


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
    settings, privilege, parts = (tuple(head[key].split(", ")) for key in ("Settings", "Privilege", "Parts"))
    over = () if head.get("Over", "any") == "any" else tuple(head["Over"].split(", "))
    systems = () if head["System"] == "none" else tuple(head["System"].split("; "))
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
        name, " ".join(title.split()), head["Paper"], systems, settings, over, privilege, parts, head["Formula"],
        head["Defaults"], head["Evidence"], head["Differs"], head["Measured"], prose,
    )  # fmt: skip


def bases_of(path: str) -> list[str]:
    """Lists what a method's file, or an overlay, that ships is laid over in each of its settings; empty for others."""
    configs, file = shipped_configs().resolve(), Path(path).resolve()
    if not any(file.is_relative_to(configs / kind) for kind in ("methods", "overlays")):
        return []
    method = read(file, configs)
    stacks = (method.stack(setting)[:-1] for setting in method.settings)
    return [" ".join(f"-c opd:{name}.yaml" for name in stack) for stack in stacks]


def read_unbuilt(path: Path | None = None) -> list[Unbuilt]:
    """Reads the published systems that are not built.

    Args:
        path: a file like the shipped one, ``not_built.yaml``, which is the default.
    """
    path = path or Path(str(files("opd_lightning"))) / "not_built.yaml"
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Unbuilt(system, missing=kind, **entry) for kind, entries in kinds.items() for system, entry in entries.items()
    ]


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
        kind: ``methods`` or ``overlays``, what they are; ``formulas`` and ``evidence``, how sure all of them are;
            ``unbuilt``, the published systems that are not built.
        methods: those that ship.
    """
    rows: list[list[str]]
    if kind == "evidence":
        columns = ["overlay", "parts", "evidence", "differs from the paper in", "measured"]
        rows = [[f"`{m.name}`", f"`{'`, `'.join(m.parts)}`", m.evidence, m.differs, m.measured] for m in methods]
    elif kind == "formulas":
        columns = ["overlay", "privilege", "formula", "numbers"]
        rows = [[f"`{m.name}`", ", ".join(m.privilege), m.formula, m.defaults] for m in methods if m.formula != "none"]
    elif kind == "unbuilt":
        columns = ["system", "paper", "not built", "more exactly"]
        rows = [[u.system, "" if u.paper == "none" else u.paper, MISSING[u.missing], u.reason] for u in read_unbuilt()]
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


def as_json(methods: Sequence[Method], unbuilt: Sequence[Unbuilt]) -> str:
    """Formats the catalog: ``methods``, all that heads say; ``systems``, all published ones with what builds them."""
    systems: dict[str, dict[str, Any]] = {entry.system: {**asdict(entry), "built": []} for entry in unbuilt}
    for method in methods:
        for system in method.systems:
            entry = systems.setdefault(system, {"system": system, "paper": method.paper, "built": []})
            entry["built"].append(method.name)
    catalog = {"methods": [asdict(method) for method in methods], "systems": list(systems.values())}
    return json.dumps(catalog, indent=1, ensure_ascii=False)


def listing(methods: Sequence[Method], unbuilt: Sequence[Unbuilt]) -> str:
    """Formats the catalog for a terminal: four lines a method, then a line a system that is not built."""
    lines = []
    for method in methods:
        lines += [
            f"{method.name:<42}{method.title}",
            f"    paper: {method.paper} · privilege: {', '.join(method.privilege)} · {', '.join(method.settings)}",
            f"    {', '.join(method.parts)}",
            f"    evidence: {method.evidence} · measured: {method.measured}",
        ]
    for kind, what in MISSING.items():
        entries = [entry for entry in unbuilt if entry.missing == kind]
        lines += [f"\nnot built, {what}:"] if entries else []
        lines += [f"    {entry.system:<46}{entry.paper:<12}{entry.reason}" for entry in entries]
    return "\n".join(lines) + "\n"


def page(name: str, methods: Sequence[Method], unbuilt: Sequence[Unbuilt]) -> str:
    """Returns the files of a method, or of a published system; of one that is not built, the reason.

    A file's head has the formula, the numbers and their sources, and what is left out.

    Raises:
        ValueError: there is nothing of that name.
    """
    chosen = [m for m in methods if name in (m.name, m.name.rpartition("/")[2])]
    chosen = chosen or [m for m in methods if name.lower() in map(str.lower, m.systems)]
    if chosen:
        configs = shipped_configs()
        return "\n".join(
            f"opd:{m.name}.yaml\n{(configs / m.name).with_suffix('.yaml').read_text(encoding='utf-8')}" for m in chosen
        )
    for entry in unbuilt:
        if entry.system.lower() == name.lower():
            return f"{entry.system} (paper: {entry.paper}) is not built, {MISSING[entry.missing]}: {entry.reason}\n"
    known = [spelled for m in methods for spelled in (m.name, m.name.rpartition("/")[2], *m.systems)]
    near = did_you_mean(name, [*known, *(entry.system for entry in unbuilt)])
    raise ValueError(f"there is no method {name}{near}")


def main(arguments: Sequence[str]) -> None:
    """Lists the methods that ship and the published ones that do not, shows one, or writes the tables of pages anew."""
    parser = argparse.ArgumentParser(prog="opd methods", description=main.__doc__)
    parser.add_argument("show", nargs="?", choices=["show"], help="the formula, the numbers and the file of one")
    parser.add_argument("name", nargs="?", help="which one, such as gkd; published systems, too, such as SDPO")
    parser.add_argument("--setting", help="only what works in it, such as gui_grounding")
    parser.add_argument("--json", action="store_true", help="print the catalog for programs")
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="PAGE", help="Markdown pages with tables")
    options = parser.parse_args(arguments)
    methods = [m for m in read_all() if options.setting in (None, *m.settings)]
    unbuilt = read_unbuilt() if options.setting is None else []
    for path in options.update:
        path.write_text(updated(path.read_text(encoding="utf-8"), read_all()), encoding="utf-8")
    if options.show and options.name is None:
        parser.error("show which method? `opd methods` lists them")
    if options.show:
        try:
            print(page(options.name, methods, unbuilt), end="")
        except ValueError as error:
            parser.error(str(error))
    elif options.json:
        print(as_json(methods, unbuilt))
    elif not options.update:
        print(listing(methods, unbuilt), end="")
