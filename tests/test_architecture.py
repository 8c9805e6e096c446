"""The architecture, held: which file imports which, how long files and classes are, and what nobody does."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "opd_lightning"
LINES, METHODS = 400, 40

# What was there when this test was written, in issue 15: an entry goes with what it names, and none comes.
ARROWS_IN_CIRCLES: set[tuple[str, str]] = set()
LONG_FILES: set[str] = set()
LARGE_CLASSES: set[str] = set()
COPIED_MODULES: set[str] = set()
SWAPPED_ATTRIBUTES: set[str] = set()

# Models of transformers and layers of peft offer no other way
OF_LIBRARIES = {
    "opd_lightning.adapters: layer._active_adapter",
    "opd_lightning.adapters: layer._disable_adapters",
    "opd_lightning.filling: nn.Module.register_parameter",
    "opd_lightning.filling: nn.Module.to",
    "opd_lightning.modalities.autoregressive.engines.generate: model.generation_config",
}


@cache
def sources() -> dict[str, Path]:
    """Every file of the core, the settings, the callbacks and the methods, by the name that it is imported by."""
    found = {}
    for folder in (PACKAGE, "modalities", "callbacks", "methods"):
        prefix = () if folder == PACKAGE else (PACKAGE,)
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not any(parent.is_symlink() for parent in path.parents):
                found[".".join((*prefix, *(part for part in parts if part != "__init__")))] = path
    return dict(sorted(found.items()))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(sources()[name].read_text(encoding="utf-8"))


def imported(name: str) -> Iterator[str]:
    """The files that a file imports, also inside functions and for type checking alone."""
    known = sources()
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (one for one in wanted if one in known and one != name)


@cache
def arrows() -> dict[str, set[str]]:
    return {name: set(imported(name)) for name in sources()}


def way(graph: dict[str, set[str]], start: str, stop: str) -> list[str] | None:
    """The shortest way from one file to another, both included; None: there is none."""
    before, queue = {start: start}, [start]
    for here in queue:
        if here == stop:
            path = [stop]
            while path[-1] != start:
                path.append(before[path[-1]])
            return path[::-1]
        for there in sorted(graph[here] - before.keys()):
            before[there] = here
            queue.append(there)
    return None


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The shortest circle of imports, its first file twice; None: there is none."""
    ways = (way(graph, there, here) for here in graph for there in graph[here])
    circles = [[found[-1], *found] for found in ways if found]
    return min(circles, key=len, default=None)


def room(name: str) -> str:
    """``core``, ``callbacks``, ``methods``, the name of a setting, or ``modalities`` for what lists them."""
    parts = name.split(".")[1:]
    if not parts or parts[0] not in ("modalities", "callbacks", "methods"):
        return "core"
    return parts[1] if parts[0] == "modalities" and len(parts) > 1 else parts[0]


def may_import(here: str, there: str) -> bool:
    """As design.md draws the arrows."""
    if here == there or (there == "core" and here != "core"):
        return True
    settings = {room(name) for name in sources()} - {"core", "callbacks", "methods", "modalities"}
    if here == "modalities":
        return there in settings
    if here in settings - {"autoregressive"}:
        return there == "autoregressive" or (here, there) == ("gui_grounding", "vision_language")
    return (here, there) == ("methods", "callbacks")


def test_arrows_are_found_wherever_they_stand():
    assert arrows()["opd_lightning.modalities.gui_grounding.setting"] >= {
        "opd_lightning.modalities.vision_language",
        "opd_lightning.trajectory",
    }
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert circle(graph) in (["b", "c", "b"], ["c", "b", "c"])
    assert way(graph, "a", "d") == ["a", "b", "c", "d"]
    assert [may_import(*pair) for pair in (("core", "text"), ("text", "diffusion"), ("callbacks", "text"))] == [
        False
    ] * 3
    assert may_import("gui_grounding", "vision_language")
    assert may_import("methods", "callbacks")
    assert not may_import("callbacks", "methods")
    assert not may_import("methods", "text")
    assert not may_import("vision_language", "gui_grounding")


def test_no_imports_go_in_a_circle():
    graph = {here: {there for there in arrows()[here] if (here, there) not in ARROWS_IN_CIRCLES} for here in arrows()}
    found = circle(graph)
    assert found is None, " imports\n".join(found)
    for here, there in ARROWS_IN_CIRCLES:
        assert there in arrows().get(here, ()), f"{here} no longer imports {there}: shorten ARROWS_IN_CIRCLES"
        assert way(arrows(), there, here), f"{here} → {there} is in no circle: shorten ARROWS_IN_CIRCLES"


def test_arrows_run_one_way():
    astray = {(here, there) for here in arrows() for there in arrows()[here] if not may_import(room(here), room(there))}
    assert not astray


def test_files_are_short():
    files = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in sources().values()}
    assert {name for name, lines in files.items() if lines > LINES} == LONG_FILES


def test_classes_are_small():
    classes = {
        f"{name}.{node.name}": sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
        for name in sources()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, methods in classes.items() if methods > METHODS} == LARGE_CLASSES


def files_with(pattern: str, under: str = "") -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in sources().values()
        if str(path.relative_to(ROOT)).startswith(under) and re.search(pattern, path.read_text(encoding="utf-8"))
    }


def test_parts_of_an_objective_are_not_looked_up_by_their_identity():
    assert files_with(r"\bid\(", "opd_lightning/objective/") | files_with(r"\bid\(", "callbacks/") == set()


def test_modules_are_not_copied():
    assert files_with(r"\bcopy\.copy\((self|\w*module)\)") == COPIED_MODULES


def test_attributes_are_not_swapped_and_swapped_back():
    """Whatever ``finally`` sets to what it was; models of libraries alone have no other way."""
    swapped = set()
    for name in sources():
        for function in ast.walk(tree(name)):
            if isinstance(function, ast.FunctionDef):
                tries = [node for node in ast.walk(function) if isinstance(node, ast.Try)]
                back = {target for node in tries for part in node.finalbody for target in assigned(part)}
                targets = list(assigned(function))
                swapped |= {f"{name}: {target}" for target in back if targets.count(target) > 1}
    assert swapped == SWAPPED_ATTRIBUTES | OF_LIBRARIES


def assigned(node: ast.AST) -> Iterator[str]:
    """The attributes that are set within a statement."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield ast.unparse(part)


# -- private names of libraries ---------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def of_no_own() -> dict[str, set[str]]:
    """Private names that a file reads and none of ours defines, and private modules that it imports from."""
    own: set[str] = set()
    used: dict[str, set[str]] = defaultdict(set)
    for name in sources():
        for node in ast.walk(tree(name)):
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    own.add(node.name)
                case ast.Name(ctx=ast.Store()):
                    own.add(node.id)
                case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                    own.add(node.attr)
                case ast.Attribute() if is_private(node.attr) and ast.unparse(node.value) != "os":
                    used[node.attr].add(name)
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(text)), *_]):
                    if is_private(text):
                        used[text].add(name)
                case ast.ImportFrom(level=0, module=str(module)):
                    if any(map(is_private, module.split("."))):
                        used[module].add(name)
                    for alias in node.names:
                        if is_private(alias.name):
                            used[alias.name].add(name)
    return {name: files for name, files in used.items() if name not in own}


def of_bases() -> dict[str, set[str]]:
    """Private names that a class of ours shares with a library's class that it is made of."""
    used: dict[str, set[str]] = defaultdict(set)
    for name in sources():
        module = importlib.import_module(name)
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != name:
                continue
            bases = [base for base in kind.__mro__ if not base.__module__.startswith(PACKAGE)]
            theirs = {one for base in bases for one in private_of_self(base)}
            for one in private_of_self(kind) & theirs:
                used[one].add(name)
    return used


@cache
def private_of_self(kind: type) -> frozenset[str]:
    """Private methods of a class, and private attributes of ``self`` in its source."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):  # written in C, or by a decorator
        return frozenset()
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found.add(node.attr)
    return frozenset(filter(is_private, found))


def test_private_names_of_libraries_are_listed():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Private names of libraries\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w.]*\b_\w+)`", section))
    used = of_no_own()
    for name, files in of_bases().items():
        used.setdefault(name, set()).update(files)
    assert listed == set(used), {name: sorted(files) for name, files in used.items() if name not in listed}
