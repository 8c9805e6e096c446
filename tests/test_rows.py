"""Whatever a row raises is that row's fault: file, row and column are named, and `on_bad_row` decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.data import PromptData
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.vision_language import ImageData, VisionLanguageDistillation
from opd_lightning.policy import View
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.rows import BadRows, LostRow, Row, reason_of, row_of
from opd_lightning.teacher import Frozen, Live, Teacher
from tests.tiny import chat_tokenizer, make_module, make_trainer, no_teacher, reverse_kl, save_model
from tests.tiny_vlm import picture, save_vlm

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}{{ m.content }}{% endfor %}"
)
ASKED = [{"role": "user", "content": "a"}]
GOOD = {"prompt": "what is 3", "completion": "it is 3"}
GOOD_CHAT = {"prompt": ASKED, "completion": "it is 3"}
BAD = {
    "nested 3000 deep": '{"prompt": "a", "completion": "b", "x": ' + "[" * 3000 + "]" * 3000 + "}",
    "integer of 5000 digits": '{"prompt": "a", "completion": "b", "n": 1' + "0" * 5000 + "}",
    "integer of 31 digits": '{"prompt": "a", "completion": "b", "n": 1' + "0" * 30 + "}",
    "half an emoji": '{"prompt": "a\\ud83d", "completion": "b"}',
    "half an emoji within": '{"prompt": "a", "completion": "b", "x": {"y": ["\\ude00"]}}',
    "nested 200 deep": '{"prompt": "a", "completion": "b", "x": ' + "[" * 200 + "]" * 200 + "}",
    "NUL in a name": '{"prompt": "a", "completion": "b", "\\u0000": 1}',
    "column __location__": '{"prompt": "a", "completion": "b", "__location__": "x"}',
    "a key twice": '{"prompt": "a", "prompt": "c", "completion": "b"}',
    "a list": '["prompt", "completion"]',
    "cut short": '{"prompt": "a", "compl',
    "template refuses": json.dumps({"prompt": [*ASKED, {"role": "system", "content": "b"}], "completion": "b"}),
    "part is text": json.dumps({"prompt": [{"role": "user", "content": ["a"]}], "completion": "b"}),
    "part's text is null": json.dumps(
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}], "completion": "b"}
    ),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat"), tokenizer=chat_tokenizer(TEMPLATE), rows=104)


def told(student: Path, view: View | None = None, **rollout: Any) -> Any:
    """A student that is its own teacher, who is shown the completion."""
    teachers = {"told": Teacher(Live(), view=view or PromptView("{{ completion }} {{ prompt }}"))}
    return make_module(
        student, teachers, reverse_kl(teacher="told"), rollout=Rollout(batch_size=2, horizon=3, **rollout)
    )


def fit(module: Any, data: PromptData, folder: Path, steps: int = 2) -> None:
    make_trainer(folder, steps).fit(module, datamodule=data)


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


# -- at the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_skipped(name: str, chat: Path, tmp_path: Path) -> None:
    good = GOOD_CHAT if '"role"' in BAD[name] else GOOD
    source = write(tmp_path / "my rows.jsonl", [good, good, BAD[name], good, good])
    module = told(chat, behavior={"student": 0.5, "dataset": 0.5})
    with pytest.raises(ValueError, match=r"my rows\.jsonl, row 3: .*on_bad_row: skip"):
        fit(module, PromptData(train=source), tmp_path)
    with pytest.warns(UserWarning, match=r"1 rows are skipped: .* The first is .*my rows\.jsonl, row 3: "):
        fit(module, PromptData(train=source, on_bad_row="skip"), tmp_path)


@pytest.mark.parametrize("completion", [5, ["a", "b"], {"text": "a"}, [{"role": "user", "content": "a"}]], ids=repr)
def test_a_column_of_the_wrong_kind_is_named(completion: Any, chat: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": completion}] * 6)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: .*completion"):
        fit(told(chat, behavior={"student": 0.5, "dataset": 0.5}), PromptData(train=source), tmp_path)


@pytest.mark.parametrize(
    "template", ["{{ completion.a.b }}", "{{ completion }}{{ 1 / 0 }}", "{% include 'x' %}{{ prompt }}"]
)
def test_a_view_that_fails_names_row_and_columns(template: str, chat: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 4)
    told_of = (
        r"row 1: model\.teachers\.told can't read .*: \w+Error?: .* \(shown by PromptView from (completion|prompt)\)"
    )
    with pytest.raises(ValueError, match=told_of):
        fit(told(chat, PromptView(template)), PromptData(train=source), tmp_path)


def test_a_tokenizer_that_fails_names_the_row(tiny_student: Path, tmp_path: Path) -> None:
    """Characters that it does not know."""
    rows = [{"prompt": "1+1=", "completion": "2"}] * 4
    source = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "one", "completion": "2"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 5: a tokenizer has no token for 'eno'"):
        fit(told(tiny_student), PromptData(train=source), tmp_path)
    fit(told(tiny_student), PromptData(train=source, on_bad_row="skip"), tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), ImportError("torchvision"), KeyboardInterrupt(), SystemExit(3)])
def test_what_no_row_can_help_is_not_its_fault(error: BaseException) -> None:
    with pytest.raises(type(error)), BadRows("data.train", "skip").at("row 1"):
        raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("the prompt\nis\tempty"), "the prompt is empty"),
        (ValueError(), "ValueError"),
        (KeyError("box"), "KeyError: 'box'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (OSError(36, "File name too long"), "OSError: [Errno 36] File name too long"),
        (ValueError("\x1b[2J\ud83d"), r"\x1b[2J\ud83d"),
    ],
)
def test_reasons_are_one_line_that_commands_nothing(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_model_that_can_t_be_loaded_is_no_rows_fault(chat: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 4)
    for skip in ("refuse", "skip"):
        with pytest.raises(FileNotFoundError, match=r"^model\.student\.path: there is no folder no/such/model; [^.]*$"):
            fit(
                make_module(Path("no/such/model"), {}, no_teacher(), load=False),
                PromptData(train=source, on_bad_row=skip),
                tmp_path,
            )
    teachers = {"other": Teacher(Frozen(Pretrained(str(tmp_path / "nowhere"))))}
    module = make_module(chat, teachers, reverse_kl(teacher="other"), load=False)
    with pytest.raises(FileNotFoundError, match=r"^model\.teachers\.other\.weights\.pretrained\.path: there is no"):
        fit(module, PromptData(train=source, on_bad_row="skip"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"^model\.student: .*/empty"):
        fit(
            make_module(tmp_path / "empty", {}, no_teacher(), load=False),
            PromptData(train=source, on_bad_row="skip"),
            tmp_path,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rollout": Rollout(batch_size=2, horizon=10**6)},
            r"^rollout\.horizon is 1000000, and the context of model\.st",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, r"^model\.chat_template_kwargs: tokenize is set by the setting"),
    ],
)
def test_a_setting_that_no_row_can_meet_is_no_rows_fault(settings, message, chat: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 4)
    with pytest.raises(ValueError, match=message):
        fit(make_module(chat, {}, no_teacher(), **settings), PromptData(train=source, on_bad_row="skip"), tmp_path)


class Wrong(View):
    """Returns no example."""

    def __init__(self, shows: Any) -> None:
        self.shows = shows

    def __call__(self, example: Any) -> Any:
        return self.shows


@pytest.mark.parametrize("shows", ["a", ["a"], {"question": "a"}, 0])
def test_a_view_that_returns_no_example_is_no_rows_fault(shows: Any, chat: Path, tmp_path: Path) -> None:
    data = PromptData(train=write(tmp_path / "rows.jsonl", [GOOD] * 4), on_bad_row="skip")
    with pytest.raises(
        TypeError, match=r"^model\.teachers\.told\.view: Wrong returned .* returns the example as it is"
    ):
        fit(told(chat, Wrong(shows)), data, tmp_path)
    module = make_module(chat, {}, no_teacher(), student_view=Wrong(shows))
    with pytest.raises(TypeError, match=r"^model\.student_view: Wrong returned "):
        fit(module, data, tmp_path)


# -- later --------------------------------------------------------------------------------------------------------


def test_a_row_keeps_its_location(tmp_path: Path) -> None:
    data = PromptData(train=write(tmp_path / "rows.jsonl", [GOOD, {"prompt": ""}, GOOD]), on_bad_row="skip")
    data.setup("fit")
    assert data.train is not None
    row = row_of(data.train, 1)  # type: ignore[arg-type]
    assert (row, row.location) == (GOOD, f"{tmp_path / 'rows.jsonl'}, row 3")
    assert row_of([row], 0).location == row.location
    assert row_of([GOOD], 0).location == "row 1"
    assert isinstance(row, Row)


@pytest.fixture
def seeing(tmp_path: Path) -> tuple[Any, str]:
    """A module that reads images, and rows of images as files."""
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"prompt": "what?", "image": f"{i}.png", "box": [4, 4, 20, 20]} for i in range(4)]
    folder = save_vlm(tmp_path / "student")
    teachers = {"told": Teacher(Live())}
    module = make_module(
        folder,
        teachers,
        reverse_kl(teacher="told"),
        VisionLanguageDistillation,
        rollout=Rollout(batch_size=4, horizon=3, epochs=2),
        blank_check=False,
    )
    return module, write(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("where", ["rollout", "training"])
def test_an_image_that_vanishes_names_its_row(where: str, seeing: tuple[Any, str], tmp_path: Path, monkeypatch) -> None:
    module, source = seeing
    method = "sample" if where == "rollout" else "distribution"
    original = getattr(module, method)

    def vanishing(*args: Any, **kwargs: Any) -> Any:
        if module.global_step:  # not yet in what is compared before the first
            (tmp_path / "2.png").unlink(missing_ok=True)
        module._processed = None
        return original(*args, **kwargs)

    monkeypatch.setattr(module, method, vanishing)
    with pytest.raises(LostRow, match=r"rows\.jsonl, row 3 was fine when the run began, and is no longer: .*2\.png"):
        fit(module, ImageData(train=source), tmp_path, steps=4)


def test_in_validation_too(seeing: tuple[Any, str], tmp_path: Path) -> None:
    module, source = seeing
    data = ImageData(validation=source)
    trainer = make_trainer(tmp_path)
    setup = data.setup

    def setup_and_lose(stage: str) -> None:
        setup(stage)
        (tmp_path / "1.png").write_bytes(b"broken")

    data.setup = setup_and_lose  # type: ignore[method-assign]
    with pytest.raises(LostRow, match=r"rows\.jsonl, row 2 was fine when the run began"):
        trainer.validate(module, datamodule=data, verbose=False)


def test_what_is_no_rows_fault_is_raised_as_it_is(chat: Path, tmp_path: Path, monkeypatch) -> None:
    module = told(chat)

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "distribution", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fit(module, PromptData(train=write(tmp_path / "rows.jsonl", [GOOD] * 4)), tmp_path)
