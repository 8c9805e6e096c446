"""The names of the package itself: what people write, imported when it is asked for."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import opd_lightning
from opd_lightning.modalities.diffusion.velocity_target import VelocityTarget

FILE = Path(opd_lightning.__file__)


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, opd_lightning; names = dir(opd_lightning); "
        "print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules], 'Rollout' in names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FILE.parents[1])
    assert done.stdout == "[] True\n"


def test_every_name_is_what_its_home_calls_by_it():
    for name, home in opd_lightning._HOMES.items():
        assert getattr(opd_lightning, name) is getattr(importlib.import_module(f"opd_lightning.{home}"), name)
    assert sorted(opd_lightning.__all__) == sorted(opd_lightning._HOMES)


def test_type_checkers_see_the_same_names_at_the_same_homes():
    (block,) = [node for node in ast.parse(FILE.read_text(encoding="utf-8")).body if isinstance(node, ast.If)][:1]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == opd_lightning._HOMES


def test_other_names_are_refused_and_modules_are_found():
    with pytest.raises(AttributeError, match="module 'opd_lightning' has no attribute 'Nobody'"):
        _ = opd_lightning.Nobody
    with pytest.raises(ImportError, match="cannot import name 'Nobody'"):
        exec("from opd_lightning import Nobody")
    from opd_lightning import cli, objective

    assert [cli.__name__, objective.__name__] == ["opd_lightning.cli", "opd_lightning.objective"]


def test_a_class_of_ones_own_need_not_call_super():
    """What the base class's ``__init__`` takes has its default there, too."""
    public = [getattr(opd_lightning, name) for name in opd_lightning.__all__]
    bases = [cls for cls in (*public, VelocityTarget) if inspect.isabstract(cls)]
    assert {"Divergence", "Reward", "Target", "View", "VelocityTarget"} <= {base.__name__ for base in bases}
    for base in bases:
        members: dict = dict.fromkeys(base.__abstractmethods__)
        own = type("Own", (base,), {**members, "__init__": lambda self: None})()
        for parameter in inspect.signature(base).parameters.values():
            if base.__init__ is not object.__init__:
                assert getattr(own, parameter.name) == parameter.default, f"{base.__name__}.{parameter.name}"
