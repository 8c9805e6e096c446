"""The heads of methods and overlays, the systems that are not built, and what is made of both."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from opd_lightning.catalog import MISSING, main, read_all, read_unbuilt, shipped_configs, table, updated

ROOT = Path(__file__).parent.parent
# published up to June 2026, as far as they were found; but for what is no method: the Distillation Loss Statement of
# `opd export`
SYSTEMS = 116
NEW = """\
# Newest: what was thought of
#   this morning.
# Paper: after 2612.00001, 2612.00002
# System: Newest, of all; Newest 2
# Settings: text
# Privilege: solution, model
# Parts: ReverseKL, EMA, Window
# Formula: Σ_t KL(p ‖ q)
# Defaults: 0.3 (ours)
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
    assert newest.systems == ("Newest, of all", "Newest 2")
    assert newest.privilege == ("solution", "model")
    assert newest.parts == ("ReverseKL", "EMA", "Window")
    assert newest.formula == "Σ_t KL(p ‖ q)"
    assert newest.defaults == "0.3 (ours)"
    assert newest.evidence == "abstract, third-party code; the code is unlicensed"
    assert newest.prose == "Needs the column `completion`."
    assert newest.stack("text") == ["text/quickstart", "methods/text/newest"], "what the test of all methods trains"
    assert "| `methods/text/newest` | Newest: what was thought of this morning. | after" in table("methods", methods)
    assert "| `methods/text/newest` | solution, model | Σ_t KL(p ‖ q) | 0.3 (ours) |" in table("formulas", methods)
    assert r"| half of it is left out \| 0.3 is ours | not measured |" in table("evidence", methods)


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (
            NEW.partition("\nmodel")[0],
            "# All that it needs.",
            "its head is a sentence and then Paper, System, Settings, ",
        ),
        ("# Paper: after 2612.00001, 2612.00002\n", "", "not System, Settings, Privilege, Parts, Formula, "),
        ("# Paper: after 2612.00001, 2612.00002", "# Paper: a blog", "Paper: a blog is not of the form none|"),
        (
            "# Privilege: solution",
            "# Privilege: luck",
            "Privilege: luck, model is not of the form (any|model|solution|",
        ),
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
    (gaps,) = (m for m in read_all() if m.name == "overlays/note_gaps")
    assert gaps.stack("gui_grounding") == ["gui_grounding/quickstart", "methods/sdpo", "overlays/note_gaps"]


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


def test_every_published_system_is_in_the_catalog_once():
    built = {system: method.paper for method in read_all() for system in method.systems}
    unbuilt = read_unbuilt()
    names = Counter([*built, *(entry.system for entry in unbuilt)])
    assert [name for name, times in names.items() if times > 1] == [], "built, and in not_built.yaml, or twice in it"
    assert len(names) == SYSTEMS, "a system was lost or came: who builds one takes it out of not_built.yaml"
    papers = Counter(paper for paper in [*built.values(), *(entry.paper for entry in unbuilt)] if paper != "none")
    assert [paper for paper, times in papers.items() if times > 1] == []
    assert not any(paper.startswith("after") for paper in built.values()), "an idea of a paper is not its system"
    for entry in unbuilt:
        assert re.fullmatch(r"none|\d{4}\.\d{5}", entry.paper), entry.system
        assert entry.missing in MISSING
        assert len(entry.reason) > 5, entry.system


def test_what_was_read_in_an_abstract_alone_is_after_its_paper():
    read = ("paper", "official code", "third-party code")
    for method in read_all():
        if method.systems and not any(source in method.evidence for source in read):
            assert method.title.startswith("After "), method.name


def test_the_command_lists_shows_and_updates(capsys, tmp_path):
    main([])
    listed = capsys.readouterr().out
    assert all(f"\n{method.name} " in f"\n{listed}" for method in read_all())
    assert re.search(r"not built, the core can't do it yet:\n(    .*\n)*    TAD +2605\.09536  ", listed)
    main(["--setting", "gui_grounding"])
    listed = capsys.readouterr().out
    assert "methods/gui_grounding/gui_sd " in listed
    assert "methods/text/opsd" not in listed
    assert "not built" not in listed
    with pytest.raises(SystemExit):
        main(["show"])
    assert "show which method?" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- opd methods: overlays -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    main(["--update", str(page)])
    made = table("overlays", read_all())
    expected = f"Before\n<!-- opd methods: overlays -->\n{made}<!-- end -->\nafter\n"
    assert page.read_text(encoding="utf-8") == expected


def test_one_is_shown_with_its_file_or_the_reason_why_there_is_none(capsys):
    main(["show", "opsd"])
    shown = capsys.readouterr().out
    assert shown.startswith("opd:methods/text/opsd.yaml\n# OPSD: ")
    assert "\n# Formula: " in shown
    assert "\n# Defaults: " in shown
    assert shown.endswith((shipped_configs() / "methods/text/opsd.yaml").read_text(encoding="utf-8"))
    main(["show", "anyflow"])
    assert "flow_map_forward" not in capsys.readouterr().out, "a method's name wins over a system's"
    main(["show", "performance recovery"])
    assert capsys.readouterr().out.startswith("opd:methods/text/recover.yaml\n")
    main(["show", "tad"])
    assert capsys.readouterr().out.startswith("TAD (paper: 2605.09536) is not built, the core can't do it yet: ")
    with pytest.raises(SystemExit):
        main(["show", "opsdd"])
    assert "there is no method opsdd; did you mean opsd?" in capsys.readouterr().err


def test_programs_get_all_methods_and_all_systems(capsys):
    main(["--json"])
    catalog = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in catalog["methods"]] == [method.name for method in read_all()]
    assert len(catalog["systems"]) == SYSTEMS
    systems = {entry["system"]: entry for entry in catalog["systems"]}
    assert systems["OPSD"] == {
        "system": "OPSD",
        "paper": "2601.18734",
        "built": ["methods/text/opsd", "methods/vision_language/opsd_vision"],
    }
    assert systems["LaTER"]["built"] == []
    assert systems["LaTER"]["missing"] == "signal"
    assert systems["LaTER"]["reason"]
