"""Several hundred malformed rows in every setting: each is left out by name, or can be used for all that a run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opd_lightning.data import PromptData
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.diffusion import SDE, DetailedPrompt, DiffusionDistillation, ReferenceImage
from opd_lightning.modalities.gui_grounding import GUIGroundingDistillation, Spotlight
from opd_lightning.modalities.vision_language import (
    Compose,
    Crop,
    Cue,
    HighResolution,
    ImageData,
    VisionLanguageDistillation,
)
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import View
from opd_lightning.pretrained import Pretrained
from opd_lightning.reward import ExactMatch
from opd_lightning.rollout_settings import Rollout
from opd_lightning.rows import BadRows, row_of
from opd_lightning.teacher import Live, Teacher
from tests.tiny import chat_tokenizer, make_module, make_trainer, save_model
from tests.tiny_diffusion import save_pipeline
from tests.tiny_vlm import save_vlm


def said(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


SCALARS = [None, "", " \n", 5, 0, 0.5, True, 10**30, float("nan"), float("inf")]
LISTS = [[], ["a", "b"], [None], [[1]], deep(90), deep(200), {}, {"x": 1}]
BOXES = [[-5, -5, -1, -1], [0, 0, float("nan"), 4], [1, 2], ["1", "2", "3", "4"], [20, 20, 4, 4], [1, 2, 3, 10**30]]
TEXTS = [
    "1+\ud83d",
    "1+\x00",
    "\x1b[2J1",
    "ÄÖ漢字",
    "1+" * 3000,
    "{{ 1/0 }}",
    "{instruction}{x}",
    "<pad><eos><|im_start|>",
]
IMAGES = [
    "/nowhere/x.png",
    "/",
    "https://x.invalid/a.png",
    "a" * 5000,
    "~nosuchuser/x.png",
    "data:image/png;base64,AAAA",
    "text.png",
    {"bytes": None, "path": None},
    {"bytes": "abc", "path": None},
    {"bytes": None, "path": 5},
]
CHATS = [
    [{"content": "a"}],
    [{"role": 5, "content": "a"}],
    *map(said, [5, None, {}, "", [], ["a"], [None], [{"text": "a"}]]),
    *(said([{"type": "text", "text": text}]) for text in (None, 5, [])),
    *(said([part]) for part in ({"type": "video"}, {"type": "image"}, {"type": ["image"], "text": "a"})),
    *(said([{"type": "image", "image": image}]) for image in (5, "/nowhere.png", {})),
    said([{"type": "image_url", "image_url": {"url": "x"}}]),
    [*said("1"), {"role": "assistant", "content": "2"}],
    [{"role": "system", "content": "1"}],
    [{"role": "alien", "content": "1"}],
    *(
        [*said("1"), {"role": "assistant", "content": "a", "tool_calls": calls}, *said("1")]
        for calls in (5, ["x"], [{}])
    ),
    ["a"],
    [None],
    [said("a")],
]
ANY = [*SCALARS, *LISTS, *BOXES, *TEXTS, *IMAGES, *CHATS]

Made = tuple[Any, type[PromptData], dict[str, Any], tuple[str, ...]]


def made(student: Any, view: View, **settings: Any) -> Any:
    rollout = Rollout(batch_size=2, horizon=4, behavior={"student": 0.5, "dataset": 0.5})
    teachers = {"told": Teacher(Live(), view=view)}
    return make_module(student, teachers, Objective([Term(ReverseKL(), teacher="told")]), rollout=rollout, **settings)


def text(folder: Path) -> Made:
    row = {"prompt": "1+1=", "completion": "2", "answer": "2", "solution": "1+1=2"}
    view = PromptView("{{ solution }} {{ prompt }}")
    return made(save_model(folder / "s"), view, reward=ExactMatch()), PromptData, row, tuple(row)


def chat(folder: Path) -> Made:
    student = save_model(folder / "s", tokenizer=chat_tokenizer(), rows=104)
    row = {"prompt": said("1+1="), "completion": "2", "answer": "2", "solution": "1+1=2"}
    view = PromptView([{"role": "user", "content": "{{ solution }}{{ completion }} {{ prompt }}"}])
    return made(student, view, reward=ExactMatch()), PromptData, row, (*row, "tools", "chat_template_kwargs")


def vision(folder: Path) -> Made:
    row = {"prompt": "what?", "image": "a.png", "image_full": "large.png", "box": [4, 4, 20, 20], "cue": "a"}
    row |= {"completion": "b", "answer": "c"}
    view = Compose([HighResolution(), Crop(), Cue(), PromptView("{{ completion }} {{ prompt }}")])
    module = made(save_vlm(folder / "s"), view, setting=VisionLanguageDistillation, reward=ExactMatch())
    return module, ImageData, row, (*row, "images")


def screens(folder: Path) -> Made:
    row = {"prompt": "click it", "image": "a.png", "box": [4, 4, 20, 20]}
    return made(save_vlm(folder / "s"), Spotlight(), setting=GUIGroundingDistillation), ImageData, row, tuple(row)


def diffusion(folder: Path) -> Made:
    row = {"prompt": "a red dot", "image": str(folder / "a.png"), "seen": str(folder / "a.png"), "caption": "a big dot"}
    view = Compose([ReferenceImage("seen"), DetailedPrompt()])
    student = Pretrained(str(save_pipeline(folder / "s", "anyflow")), freeze="image_embedder")
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16, "sampler": SDE()}
    return made(student, view, setting=DiffusionDistillation, **sizes), PromptData, row, tuple(row)


@pytest.mark.parametrize("make", [text, chat, vision, screens, diffusion])
def test_each_is_left_out_by_name_or_can_be_used(
    make: Callable[[Path], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    Image.new("RGB", (128, 96), "red").save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    module, data_class, good, columns = make(tmp_path)
    rows = [good] * 400 + [good | {column: value} for column in columns for value in ANY]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reasons: dict[str, str] = {}
    monkeypatch.setattr(
        BadRows, "__call__", lambda self, location, reason, cause=None: reasons.update({location: reason})
    )
    data = data_class(train=str(path), on_bad_row="skip")
    module.trainer = data.trainer = trainer = make_trainer(tmp_path)
    trainer.strategy._lightning_module = module
    data.setup("fit")

    kept = [row_of(data.train, i) for i in range(len(data.train))]  # type: ignore[arg-type]
    assert len(kept) + len(reasons) == len(rows)
    assert len(kept) >= 400
    assert {location for location in reasons if not location.startswith(f"{path}, row ")} == set()
    assert all(reason and "\n" not in reason for reason in reasons.values())
    usable = [row for row in kept if int(row.location.rpartition(" ")[2]) >= 400]
    for who in ("student", "dataset"):
        acted = module.act(who, usable, list(range(len(usable))))
        acted.group = torch.arange(len(usable))
        with torch.no_grad():
            module.distribution(module.policies["student"], acted)
            module.streams.query("told", acted)
        module.actor.checked_rewards(acted)
