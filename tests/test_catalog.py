"""The heads of methods and overlays, and the tables that are made from them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from opd_lightning.catalog import main, read_all, shipped_configs, table, updated

ROOT = Path(__file__).parent.parent
NEW = """\
# Newest: what was thought of
#   this morning.
# Paper: after 2612.00001, 2612.00002
# Settings: text
# Parts: ReverseKL, EMA, Window
# Evidence: abstract, third-party code; the code is unlicensed
# Differs: half of it
#   is left out | 0.3 is ours
# Measured: not measured
#
# Needs the column `completion`.
model:
  init_args:
    teachers: {teacher: {weights: EMA}}
    objective:
      terms: [{signal: {class_path: opd_lightning.objective.ReverseKL}, weights: [{class_path: Window}]}]
    optimizer: {class_path: AdamW}
"""


@pytest.fixture
def configs(tmp_path):
    """A copy of the shipped folder with one more file, and nothing else."""
    shutil.copytree(shipped_configs(), tmp_path / "configs")
    (tmp_path / "configs/methods/text/newest.yaml").write_text(NEW, encoding="utf-8")
    return tmp_path / "configs"


def test_a_method_is_one_file(configs):
    methods = read_all(configs)
    (newest,) = set(methods) - set(read_all())
    assert newest.name == "methods/text/newest"
    assert newest.title == "Newest: what was thought of this morning."
    assert newest.paper == "after 2612.00001, 2612.00002"
    assert newest.parts == ("ReverseKL", "EMA", "Window")
    assert newest.evidence == "abstract, third-party code; the code is unlicensed"
    assert newest.prose == "Needs the column `completion`."
    assert newest.stack("text") == ["text/quickstart", "methods/text/newest"], "what the test of all methods trains"
    assert "| `methods/text/newest` | Newest: what was thought of this morning. | after" in table("methods", methods)
    assert r"| half of it is left out \| 0.3 is ours | not measured |" in table("evidence", methods)


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (NEW.partition("\nmodel")[0], "# All that it needs.", "its head is a sentence and then Paper, Settings, "),
        ("# Paper: after 2612.00001, 2612.00002\n", "", "not Settings, Parts, Evidence, Differs, Measured"),
        ("# Paper: after 2612.00001, 2612.00002", "# Paper: a blog", "Paper: a blog is not of the form none|"),
        ("# Evidence: abstract", "# Evidence: hearsay", "Evidence: hearsay, third-party code; the code is"),
        ("# Measured: not measured", "# Measured: 90 %", "Measured: 90 % is not of the form not measured|"),
        ("# Settings: text", "# Settings: texts", "there is no texts/quickstart"),
        ("# Settings: text", "# Settings: text, diffusion", "a method for text, diffusion belongs into methods/"),
        ("# Settings: text", "# Settings: diffusion", "a method for diffusion belongs into methods/diffusion/"),
        ("EMA, Window", "EMA", "Parts: EMA, ReverseKL, but the file names EMA, ReverseKL, Window"),
        ("# Measured: not measured", "# Measured: not measured\n# Over: any", "Differs, Measured, Over"),
    ],
)
def test_a_file_without_a_true_head_is_refused(configs, line, instead, message):
    path = configs / "methods/text/newest.yaml"
    assert line in NEW
    path.write_text(NEW.replace(line, instead), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_all(configs)
    assert str(path) in str(caught.value)


def test_overlays_go_over_methods_that_there_are(configs):
    path = configs / "overlays/teacher_ema.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("methods/text/sdft", "methods/text/gone"), encoding="utf-8")
    with pytest.raises(ValueError, match="there is no methods/text/gone"):
        read_all(configs)
    (overlay,) = (m for m in read_all() if m.name == "overlays/teacher_ema")
    assert overlay.stack("diffusion") == ["diffusion/quickstart", "methods/diffusion/d_opsd", "overlays/teacher_ema"]


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_tables_are_those_of_the_heads(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- opd methods: " in text
    assert updated(text, read_all()) == text, "make methods-tables writes them anew"


def test_what_was_measured_is_on_the_page_that_is_named():
    for method in read_all():
        if method.measured != "not measured":
            text, _, page = method.measured.rstrip(")").rpartition(" (")
            number = re.search(r"\d+(\.\d+)?", text)
            assert number, method.name
            assert number[0] in (ROOT / page).read_text(encoding="utf-8"), method.name


def test_the_command_lists_shows_and_updates(capsys, tmp_path):
    main([])
    assert len(capsys.readouterr().out.splitlines()) == len(read_all())
    main(["--setting", "gui_grounding"])
    listed = capsys.readouterr().out
    assert "methods/gui_grounding/gui_sd " in listed
    assert "methods/text/opsd" not in listed
    main(["opsd"])
    shown = capsys.readouterr().out
    assert shown.startswith("opd:methods/text/opsd.yaml\n# OPSD: ")
    assert "Paper: 2601.18734" in shown
    with pytest.raises(SystemExit):
        main(["opds"])
    assert "there is no method opds; did you mean opsd?" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- opd methods: overlays -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    main(["--update", str(page)])
    made = table("overlays", read_all())
    expected = f"Before\n<!-- opd methods: overlays -->\n{made}<!-- end -->\nafter\n"
    assert page.read_text(encoding="utf-8") == expected
