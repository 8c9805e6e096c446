"""What `make docs` adds to the pages of docs/: README as the front page, the catalog of methods, and every knob.

Pages stay as people read them in the repository; links that lead out of docs/ are turned here.
"""

from __future__ import annotations

import html
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
GROUPS = {
    "OnPolicyDistillation": "Settings",
    "LightningDataModule": "Data modules",
    "Callback": "Callbacks",
    "": "Settings of a run",
}
"""Titles of pages of knobs; those of other kinds are called like their base class."""
CATALOG = """# Catalog of methods

Each is a YAML file: `opd fit -c opd:text/quickstart.yaml -c opd:methods/gkd.yaml`. What was measured of them is in
[methods.md](methods.md), what papers claim in [claims.md](claims.md); `opd methods show gkd` prints one.

In formulas p is the student, q the teacher through its view, p₀ the student before training, b who acted, y what was
done, A the group-relative advantage of a reward, T the length of a trajectory, sg what has no gradient. Without (1/T) a
mean is over the trained steps of the optimizer step.
"""
KNOBS = """# Every knob

Made from the docstrings that `opd fit --KEY.help` prints.

| page | classes |
| --- | --- |
"""
OF_TRAINERS = ("opd_lightning.callbacks", "opd_lightning.methods", "opd_lightning.modalities")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made while building."""
    front, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Train\n")
    pages = {
        "index.md": front,
        "commands.md": f"# Commands and parts\n\n## Train\n{rest}",
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "catalog.md": catalog(),
        **knobs(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    of_knobs = ["knobs/index.md", *sorted(name for name in pages if name.startswith("knobs/") and "index" not in name)]
    for section in config.nav or []:
        for entries in section.values():
            entries[:] = [{"Every knob": of_knobs} if entry == "knobs/" else entry for entry in entries]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that lead out of docs/, opens what is folded, and names the catalog in place of its tables."""
    heads = r"<!-- opd methods: (methods|overlays|formulas|evidence) -->\n.*?<!-- end -->"
    markdown = re.sub(heads, "[The catalog](catalog.md) has each of them.", markdown, count=1, flags=re.DOTALL)
    markdown = re.sub(heads, "", markdown, flags=re.DOTALL).replace("<details>", "<details markdown>")
    markdown = re.sub(r" · \[all pages\]\([^)]*\)", "", markdown).replace("](docs/README.md)", "](index.md)")
    markdown = markdown.replace("](docs/", "](")
    for name in ("CONTRIBUTING", "CHANGELOG"):
        markdown = re.sub(rf"\]\((\.\./)?{name}\.md", f"]({name.lower()}.md", markdown)
    markdown = re.sub(r"\[([^]]*)\]\(\.\./configs/[^)]*\)", r"`\1`", markdown)
    return re.sub(r"\]\(((\.\./)?README\.md)?#the-house", "](commands.md#the-house", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuses a page that would fetch something.

    Raises:
        PluginError: which page, and what.
    """
    for tag in re.findall(r"<(?:link|script|img|iframe)\b[^>]*", output):
        if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag):
            raise PluginError(f"{page.file.src_uri} fetches something from the net: {tag}>")
    return output


# -- the catalog ------------------------------------------------------------------------------------------------------


def catalog() -> str:
    """Makes the page of methods, from the heads of their files."""
    from opd_lightning.catalog import MISSING, PRIVILEGES, read_all, read_unbuilt

    lines = [CATALOG]
    for method in read_all():
        lines += [f"## {method.name.partition('/')[2] if method.name.startswith('methods/') else method.name}\n"]
        lines += [f"{escaped(method.title)}\n"]
        lines += [f'<p class="formula">{formula(method.formula)}</p>\n'] if method.formula != "none" else []
        parts = ", ".join(f"`{part}`" for part in method.parts)
        facts = {
            "File": f"`opd:{method.name}.yaml`",
            "Paper": escaped(method.paper),
            "Settings": ", ".join(method.settings),
            "The teacher has": escaped("; ".join(PRIVILEGES[what] for what in method.privilege)),
            "Parts": parts,
            "Numbers": escaped(method.defaults),
            "Read": escaped(method.evidence),
            "Differs in": escaped(method.differs),
            "Measured": re.sub(r"docs/(\w+\.md)", r"[\1](\1)", escaped(method.measured)),
        }
        lines += [f"* **{key}**: {value}" for key, value in facts.items() if value != "none"] + [""]
    lines += ["## Not built\n", "| system | paper | why | more exactly |", "| --- | --- | --- | --- |"]
    for entry in read_unbuilt():
        cells = (entry.system, entry.paper, MISSING[entry.missing], entry.reason)
        lines += [f"| {' | '.join(escaped(cell) for cell in cells)} |"]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Returns a text whose signs mean nothing to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def formula(text: str) -> str:
    """Sets a formula of a head: what follows _ and ^ as indices, single letters as variables."""
    inner = r"\{([^{}]*)\}|(\([^()]*\))|([\w½*′]+)"
    text = re.sub(rf"_(?:{inner})", lambda m: f"\x01{m[1] or m[2] or m[3]}\x02", text)
    text = re.sub(rf"\^(?:{inner})", lambda m: f"\x03{m[1] or m[2] or m[3]}\x04", text)
    text = re.sub(r"(?<![\w.])([^\W\d_a])(?![\w])", r"<var>\1</var>", html.escape(text))
    for sign, tag in zip("\x01\x02\x03\x04", ("<sub>", "</sub>", "<sup>", "</sup>"), strict=True):
        text = text.replace(sign, tag)
    return text


# -- knobs ------------------------------------------------------------------------------------------------------------


def knobs() -> dict[str, str]:
    """Makes a page for each kind of part: its classes, with what `--KEY.help` says of them, and an index."""
    from opd_lightning import cli, cli_help
    from opd_lightning.config_keys import name_of
    from opd_lightning.entry_points import import_parts
    from opd_lightning.jsonargparse_internals import get_signature_parameters

    import_parts()
    found: dict[Any, tuple[str, str]] = {}
    for key, kind in cli.kinds_at_the_top("fit").items():
        for cls, base, path in walk(kind, key, set()):
            found.setdefault(cls, (base, path))
    pages: dict[str, list[str]] = {}
    for cls, (base, path) in sorted(found.items(), key=lambda item: item[0].__name__):
        lines = pages.setdefault(base, [])
        lines += [f"## {cls.__name__}\n", f"`{path}`\n", cli_help.summary_of(cls) + "\n"]
        for parameter in get_signature_parameters(cls, "__init__" if inspect.isclass(cls) else None):
            kind = "" if parameter.annotation is inspect.Parameter.empty else f": {name_of(parameter.annotation)}"
            default = parameter.default
            default = "" if default is inspect.Parameter.empty else f" = {cli_help.shown(default)}"
            said = " ".join(cli_help.documented(cls, parameter.name).split())
            lines += [f"* `{parameter.name}{kind}{default}`<br>{said}"]
        lines += [""]
    index = KNOBS
    for base in sorted(pages):
        names = [line[3:].strip() for line in pages[base] if line.startswith("## ")]
        links = ", ".join(f"[{name}]({base or 'run'}.md#{name.lower()})" for name in names)
        index += f"| {GROUPS.get(base, base)} | {links} |\n"
    made = {f"knobs/{b or 'run'}.md": f"# {GROUPS.get(b, b)}\n\n" + "\n".join(lines) for b, lines in pages.items()}
    return {"knobs/index.md": index, **made}


def walk(kind: Any, path: str, seen: set[Any]) -> Iterator[tuple[Any, str, str]]:
    """Yields this package's classes below a key: each with its kind, empty for one by itself, and its key."""
    from opd_lightning.config_keys import accepted, base_of, is_closed, is_list, kinds_of, members
    from opd_lightning.jsonargparse_internals import import_object

    for member in members(kind):
        if is_list(member) or typing.get_origin(member) is dict:
            for inner in typing.get_args(member):
                yield from walk(inner, path if is_list(member) else f"{path}.NAME", seen)
            continue
        base = None if is_closed(member) else base_of(member)
        if not is_closed(member) and base is None:
            continue
        named = kinds_of(base).values() if base else ()
        for cls in map(import_object, named) if base else [getattr(member, "cls", member)]:
            # of what a trainer takes the callbacks of settings, methods and callbacks/ are chosen in a configuration
            chosen = "opd_lightning." if path.partition(".")[0] != "trainer" else OF_TRAINERS
            ours = cls.__module__.startswith(chosen)
            if cls in seen or not (ours or path == "trainer"):
                continue
            seen.add(cls)
            if ours:
                yield cls, base.__name__ if base else "", path
            for key, inner in accepted(cls).items():
                yield from walk(inner, f"{path}.{key}", seen)
