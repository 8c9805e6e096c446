"""What models, rows and paths hold is shown as text: it moves no cursor, ends no table and opens no page."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from opd_lightning import audit
from opd_lightning.__main__ import _show_error
from opd_lightning.callbacks.samples import COLUMNS, markdown, render
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.printable import cell, in_markdown, printable, quoted
from opd_lightning.report import report
from opd_lightning.rollout_settings import Rollout
from tests.tiny import LongerIsBetter, Rows, make_trainer

CLIPBOARD, CLEAR, C1, BACK, OVERRIDE = (
    "\x1b]52;c;cGF5bG9hZA==\x1b\\",
    "\x1b[2J",
    "\x9b2J",
    "ok\rno\x08",
    "a\u202eb\u2066",
)
COMMANDS = (CLIPBOARD, CLEAR, C1, BACK, OVERRIDE, "\x00\x7f", "\ufeff\u200b", "\ud83d", "\u2028")


@pytest.fixture
def console(monkeypatch):
    """Where tables are printed to, as a terminal that takes commands."""
    out = io.StringIO()
    made = Console(file=out, force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(audit, "Console", lambda: made)
    return SimpleNamespace(print=made.print, shown=out.getvalue)


def test_what_commands_is_written_out_and_what_reads_stays():
    assert printable(CLEAR + C1 + BACK) == r"\x1b[2J\x9b2Jok\rno\x08"
    assert printable(OVERRIDE) == r"a\u202eb\u2066"
    assert all(printable(text).isprintable() for text in COMMANDS)
    assert printable("\ud83d").encode() == rb"\ud83d"
    for text in ("two\nlines\tand a tab", "naïve 你好 עברית العربية", "👨‍👩‍👧 می‌خواهم", r"C:\new [b]old[/b] $x^2$", ""):
        assert printable(text) == text


def test_a_value_in_a_message_is_one_short_line():
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert quoted("x" * 500) == "'" + "x" * 39 + " … " + "x" * 39 + "'"
    assert quoted({"answer": CLEAR}) == r"{'answer': '\x1b[2J'}"

    class Multiline:
        def __repr__(self) -> str:
            return "tensor([1,\n  2])\x1b"

    assert quoted(Multiline()) == r"tensor([1,\n  2])\x1b"


@pytest.mark.parametrize("text", COMMANDS)
def test_a_row_cannot_write_to_the_terminal_but_text(text, console):
    row = {"prompt": text + "hi", "completion": text, "steps": [text, "x"], "signals": [1.0, None]}
    console.print(render([row | {"reward": 1.0, "length": 1, "signal": 1.0}], "t"))
    console.print(cell(text))
    audit.show("audit", ["student"], [("path", {"student": text})])
    assert not set(text) & set("\x1b\x9b\r\x08\u202e\u2066\x00\x7f\ufeff\u200b\ud83d\u2028") & set(console.shown())
    assert printable(text) in console.shown()


@pytest.mark.parametrize("path", ["/models/[old]/x", "/models/a [/b] c", "[bold red]", "[link=http://x]a", ":smile:"])
def test_markup_in_a_path_a_row_or_a_name_is_text(path, console):
    audit.show("audit", ["student", path], [(path, {"student": path})])
    row = {"prompt": path, "completion": path, "steps": None, "signals": [], "reward": 1.0, "length": 1, "signal": 1.0}
    console.print(render([row], "t"))
    assert console.shown().count(path) == 5


def test_errors_of_the_command_line_are_text():
    asked = [sys.executable, "-m", "opd_lightning", "fit", "-c", f"no{CLEAR}[b].yaml"]
    done = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert r"no\x1b[2J[b].yaml" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_traceback_is_text(capsys):
    try:
        raise KeyError(CLEAR) from ValueError(f"a row says {CLIPBOARD}\n\tand {OVERRIDE}")
    except KeyError as error:
        _show_error(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last):\n" in shown
    assert not set("\x1b\u202e") & set(shown)
    assert r"a row says \x1b]52" in shown


def test_markdown_reads_as_it_was_written():
    assert in_markdown("a_b\n# c ![x](http://x/y.png) <img src=x>|") == (
        r"a\_b \# c \!\[x\]\(http://x/y\.png\) &lt;img src=x&gt;\|"
    )
    first = markdown([["[a](b)|" + CLEAR, "<b>", 0.5, 3, None]]).splitlines()[-1]
    assert first == r"| \[a\]\(b\)\|\\x1b\[2J | &lt;b&gt; | 0.5 | 3 |  |"
    assert markdown([]).splitlines()[0] == f"| {' | '.join(COLUMNS)} |"


def test_columns_that_accuracy_is_broken_down_by(world, tmp_path, console, capsys):
    """`test` prints names of metrics by rich, its own and Lightning's."""
    kinds = ["[/b]", "a/b", CLEAR + "x"]
    rows = [{**row, "kind": kind} for row, kind in zip(world.make_rows(27)[24:], kinds, strict=True)]
    module = world.alone(
        reward=LongerIsBetter(1), evaluation=Evaluation(by=["kind"], before=False), rollout=Rollout(horizon=3)
    )
    (found,) = make_trainer(tmp_path).test(module, datamodule=Rows([], rows))
    assert {"test/accuracy/(|b)", "test/accuracy/a|b", r"test/accuracy/\x1b(2Jx"} <= found.keys()
    out = capsys.readouterr().out
    assert "(|b)" in out
    assert "\x1b[2J" not in out


def test_the_report_of_a_run_with_mathematics_and_markup(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 7}), encoding="utf-8")
    logs = tmp_path / "logs" / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text(
        "epoch,step,val/accuracy,val/$x^$/accuracy,val/[/b]/accuracy\n0,0,0.25,1.0,0.5\n0,5,0.5,,\n", encoding="utf-8"
    )
    row = {"step": 0, "who": "student", "prompt": "[/b]" + CLEAR, "completion": "$x^", "reward": 0.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    report(tmp_path)
    out = capsys.readouterr().out
    assert r"[/b]\x1b[2J$x^ ✗" in out
    assert (tmp_path / "curves.png").exists()
