"""The examples of the documentation do what the pages say."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.__main__ import execute
from opd_lightning.callbacks import Curriculum, Linear
from opd_lightning.catalog import read
from opd_lightning.distribution import CategoricalChunk
from opd_lightning.objective import STATISTICS, Objective, OpenSteps, Part, ReverseKL, Steps, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.scoring import Scoring
from opd_lightning.teacher import Frozen, Teacher
from opd_lightning.trajectory import Trajectories
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, act, fit, make_module, sgd, teacher_forced
from tests.tiny_vlm import vlm_rows

SMALL = [
    "--trainer.max_steps=2",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--model.evaluation.before=false",
    "--model.rollout.batch_size=4",
    "--data.train_options.count=64",
]
DOCS = Path(__file__).parent.parent / "docs"
PACKAGE = DOCS.parent / "opd_lightning"


def example(page: str) -> tuple[str, dict[str, Any]]:
    """The page's Python block, and what running it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    defined: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), defined)
    assert len(code.splitlines()) < 60
    return code, defined


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of somebody who is no developer of this package; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def follow(page: str, folder: Path, code: str, config: str, *extra: str) -> tuple[str, str]:
    """Does what a page says: saves its class and its configuration under these names, and runs its command, in short.

    Returns:
        The code and the configuration.
    """
    texts = blocks(page, "python")[0], *blocks(page, "yaml")
    (command,) = blocks(page, "sh")
    for name, text in zip((code, config), texts, strict=True):
        assert f"`{name}`" in (DOCS / page).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
    opd, *arguments = command.split()
    assert opd == "opd"
    execute([*arguments, *extra, f"--trainer.default_root_dir={folder / 'runs'}"])
    assert (folder / "runs" / "checkpoints" / "last.ckpt").exists()
    return texts


def test_add_a_method(folder):
    part, overlay = follow("add_a_method.md", folder, "edge.py", "edge.yaml", *SMALL)
    _, formula, _ = blocks("add_a_method.md", "python")
    # its head is one, its test passes, and its settled part settles
    for name, text in (("text/quickstart.yaml", ""), ("methods/text/edge.yaml", overlay)):
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert read(path, folder / "configs").paper == "2605.23493"
    defined: dict[str, Any] = {"__name__": "edge"}
    exec(part + formula, defined)
    settled = Objective([Term(ReverseKL(), weights=[defined["AboveAverage"]()], normalizer="on")])
    loss = settled(defined["student"], defined["streams"], defined["batch"]).loss
    assert torch.isclose(loss, defined["loss"]), "the same five steps are above average"


def test_a_statistic_of_ones_own():
    *_, statistic = blocks("add_a_method.md", "python")
    before = set(STATISTICS)
    exec(statistic, {"__name__": "example"})
    chunk = CategoricalChunk(torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, -9.0, -9.0]]))
    assert torch.allclose(STATISTICS["top2"](chunk, None), torch.tensor([0.5, 1.0]))
    for name in set(STATISTICS) - before:
        del STATISTICS[name]


def listed(page: str) -> set[str]:
    """The names in the first columns of its tables."""
    cells = re.findall(r"^\| ([^|]*)\|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return set(re.findall(r"`([a-z_]\w*)[`(]", " ".join(cells)))


def test_what_a_part_and_a_callback_see_is_listed():
    """Fields, properties and methods; but how micro-batches are cut is the objective's business."""
    own = {"statistics", "available", "abstained", "stream", "target", "without_view", "blind"}
    cutting = {"of", "at", "opened", "for_stream", "for_term"}
    seen = {name for name in (*vars(Steps), *fields_of(OpenSteps)) if not name.startswith("_")} - own - cutting
    assert seen | {"teacher"} <= listed("add_a_method.md")
    assert {*fields_of(Trajectories)} - {"student_view"} <= listed("add_a_callback.md")
    assert {*vars(Part)} & {"needs", "reads", "scope", "advice"} <= listed("add_a_method.md")


def fields_of(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    index = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert index == pages, "docs/README.md lists every page"
    site = set(re.findall(r"^ +- (\w+\.md)", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    made = {"index.md", "catalog.md", "commands.md", "changelog.md", "contributing.md"}
    assert site - made == pages, "mkdocs.yml, nav: every page has its place on the site"
    for page in (*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_how_it_works_names_files_and_functions_that_are_there():
    text = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(named) > 30
    for file, name in named:
        path = next(root / file for root in (PACKAGE, PACKAGE.parent) if (root / file).exists())
        node: Any = ast.parse(path.read_text(encoding="utf-8"))
        for part in name.split("."):
            inside = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef)}
            assert part in inside, f"docs/how_it_works.md: {file} has no {name}"
            node = inside[part]
    assert re.findall(r"^(\d+)\. ", text, re.MULTILINE) == [str(number) for number in range(1, 13)]


def test_a_training_step_goes_through_the_rooms_of_its_table_and_back_to_none(tmp_path):
    """What `training_step` itself calls, of a micro-batch that is not the first, in order."""
    text = (DOCS / "how_it_works.md").read_text(encoding="utf-8").partition("## One training step")[2]
    table = [re.findall(r"`([\w/]+\.py):(?:\w+\.)?(\w+)`", row) for row in text.splitlines() if row.startswith("| `")]
    expected = [tuple(room) for row in table for room in row]
    calls: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        above = frame.f_back
        if event == "call" and above is not None and above.f_code.co_name == "training_step":
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE) and above.f_code.co_filename == str(PACKAGE / "module.py"):
                calls.append((str(file.relative_to(PACKAGE)), frame.f_code.co_name))

    class Traced(toy.Moves):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sys.setprofile(None if batch.is_first else note)
            try:
                return super().training_step(batch, batch_idx)
            finally:
                sys.setprofile(None)

    module = toy.make_module(setting=Traced, rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=6))
    toy.fit(module, tmp_path, steps=1, accumulate_grad_batches=2)
    beside = {"module.py", "optimizer_step.py", "memory.py"}  # properties, places in a step, advice
    clock = {"count", "phase"}
    assert [call for call in calls if call[0] not in beside and call[1] not in clock] == expected
    rooms = [next(group)[0] for _, group in itertools.groupby(expected, key=lambda call: call[0])]
    assert len(rooms) == len(set(rooms))


def test_words_are_in_order_and_name_what_is_there():
    text = (DOCS / "words.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([a-z][\w ,-]*) \|", text, re.MULTILINE)[1:]
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(set(words)) > 60
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.parent.glob("[mco]*/**/*.py"))
    for name in set(re.findall(r"`([A-Z]\w+)", text)):
        assert re.search(rf"^class {name}\b|^{name}\b", code, re.MULTILINE), f"docs/words.md: there is no {name}"


def test_add_a_view():
    _, defined = example("add_a_view.md")
    view, row = defined["Stripe"](brightness=0.0), vlm_rows(1)[0]
    before = row["images"][0].tobytes()
    (shown,) = view(row)["images"]
    assert row["images"][0].tobytes() == before
    assert shown.getpixel((5, 2)) == (0, 0, 0)
    assert shown.getpixel((5, 10)) == row["images"][0].getpixel((5, 10))
    assert view({**row, "box": None}) is None


def test_add_a_view_as_the_page_says(folder):
    follow("add_a_view.md", folder, "my_package.py", "stripe.yaml", *SMALL)


def test_add_a_callback_as_the_page_says(folder):
    follow("add_a_callback.md", folder, "my_package.py", "warmer.yaml", *SMALL)
    saved = torch.load(folder / "runs" / "checkpoints" / "last.ckpt", weights_only=True)
    (warmer,) = [state for name, state in saved["callbacks"].items() if "Warmer" in name]
    assert warmer["extra"] >= 0


def test_add_a_note():
    code, defined = example("add_a_note.md")
    assert len(code.splitlines()) < 40
    note = defined["CompilerMessage"]()
    assert note.error_of("x = 1") is None
    assert note.error_of("x = (").offset == 5


def test_add_a_note_as_the_page_says(folder):
    follow("add_a_note.md", folder, "my_package.py", "compiled.yaml", *SMALL)


def test_add_an_environment():
    code, defined = example("add_an_environment.md")
    assert len(code.splitlines()) < 40
    environment = defined["AnotherTry"]()
    state = environment.reset({"answer": "46"}, 0)
    wrong = environment.step(state, "12+34=45 #45")
    assert (wrong.observation, wrong.done, wrong.reward) == ("?", False, None)
    right = environment.step(wrong.state, "#46")
    assert (right.done, right.reward) == (True, 0.5)


def test_add_an_environment_as_the_page_says(folder):
    follow("add_an_environment.md", folder, "my_package.py", "tries.yaml", *SMALL)


def test_add_a_setting_as_the_page_says(folder):
    (folder / "places.jsonl").write_text('{"prompt": "-3"}\n' * 32, encoding="utf-8")
    follow("add_a_setting.md", folder, "my_package.py", "walks.yaml")


def test_rewards():
    _, defined = example("rewards.md")
    answers = [("it is 4", "4"), ("it is 5", "4"), ("", "4"), ("5", "")]
    scored = [Scoring()(defined["judge"], completion, {"answer": answer}) for completion, answer in answers]
    assert scored == [1, 0, 0, None]


def test_add_a_setting(tmp_path):
    _, defined = example("add_a_setting.md")
    module = make_module(
        Pretrained("0"),
        {"teacher": Teacher(Frozen(Pretrained("1")))},
        setting=defined["Walks"],
        rollout=Rollout(batch_size=32, horizon=8),
        optimizer=sgd(1.0),
    )
    rows = [{"prompt": str(i % 9 - 4)} for i in range(64)]
    rolled = act(module, rows)
    assert torch.allclose(teacher_forced(module, "student", rolled), rolled.behavior_log_probs, atol=1e-5)
    trainer = fit(module, tmp_path, rows)
    first = float(trainer.callback_metrics["train/loss/ReverseKL"])
    trainer = fit(module, tmp_path, rows, steps=60)
    assert float(trainer.callback_metrics["train/loss/ReverseKL"]) < first / 4


def test_add_a_callback(tmp_path):
    _, defined = example("add_a_callback.md")

    def make(spread: float = 10.0) -> Any:
        rollout = Rollout(batch_size=4, group_size=2, micro_batch_size=4, horizon=6)
        return toy.make_module(rollout=rollout, reward=LongerIsBetter()), [defined["Warmer"](spread)]

    module, callbacks = make()
    trainer = toy.fit(module, tmp_path / "same", callbacks, steps=3)
    assert module.rollout.temperature == 1.3
    assert trainer.callback_metrics["knob/rollout.temperature"] == 1.2
    module, callbacks = make(spread=-1.0)
    toy.fit(module, tmp_path / "spread", callbacks, steps=3)
    assert module.rollout.temperature == 1
    twice = [*callbacks, Curriculum({"rollout.temperature": Linear(1, 2, 3)})]
    with pytest.raises(ValueError, match=r"Warmer .* and Curriculum .* turn the same knob"):
        toy.fit(module, tmp_path / "twice", twice)
    toy.assert_resumes(make, tmp_path)


def test_first_steps(folder):
    """Every command of the page, in its order and as it stands, but that runs are cut to two steps."""
    commands = [shlex.split(line) for block in blocks("first_steps.md", "sh") for line in block.splitlines()]
    assert len(commands) > 8
    cut = ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--model.rollout.batch_size=4"]
    few = [*cut, "--data.train_options.count=64"]
    for _, *arguments in commands:
        steps = f"--trainer.max_steps={4 if '--ckpt_path=last' in arguments else 2}"
        shorter = few if "opd:text/quickstart.yaml" in arguments else cut
        execute([*arguments, *([steps, *shorter] if arguments[0] == "fit" else [])])
    assert (folder / "runs" / "quickstart" / "comparison.html").exists()
    (code,) = blocks("first_steps.md", "python")
    exec(compile(code, "first_steps.md", "exec"), {"__name__": "example"})


def test_errors_that_are_explained_are_raised():
    """What a message says between its …, in strings of the code, wherever a line of the code ends."""
    files = [path for name in ("opd_lightning", "modalities") for path in (DOCS.parent / name).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    messages = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for words in filter(None, (part.strip(" .,:()") for part in message.split("…"))):
            assert words in code, f"docs/errors.md: nothing says {words!r}"
