"""The settings as the core's rules are tested in: tiny models, rows that they can read, and a privileged view.

A test that takes the fixture ``world`` runs in every setting; with ``any_world`` in every text architecture, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.diffusion import SDE, DiffusionDistillation, ReferenceImage
from opd_lightning.modalities.gui_grounding import GUIGroundingDistillation, Spotlight
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.modalities.vision_language import Crop, VisionLanguageDistillation
from opd_lightning.modalities.vision_language.images import images_of
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import View
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import Live, Teacher
from opd_lightning.trajectory import Example
from tests import tiny, tiny_diffusion
from tests.tiny_vlm import gui_rows, vlm_rows

PRIVILEGED = PromptView("{{ solution }}?{{ prompt }}")


class Told(View):
    """The solution in the prompt, and another look at the image; none for the rows without a solution."""

    columns = ("box", "solution")

    def __init__(self, look: View) -> None:
        self.look = look

    def __call__(self, example: Example) -> Example | None:
        told = PRIVILEGED(example)
        return told if told is None or not images_of(told) else self.look(told)


class Referenced(ReferenceImage):
    """A reference image; none for the rows without a solution."""

    columns = ("image", "solution")

    def __init__(self) -> None:
        self.column = "image"

    def __call__(self, example: Example) -> Example | None:
        return super().__call__(example) if example["solution"] else None


@dataclass(frozen=True)
class World:
    """One setting.

    Attributes:
        setting: its module.
        student, teacher: folders of tiny models; the teacher is wider.
        make_rows: a number of rows with prompts of mixed length and the columns ``answer``, ``solution`` (empty in
            every fifth row), ``completion`` and ``task`` (even, odd, …).
        view: shows a teacher what the student doesn't see; none for a row without a solution.
        yaml_view: another one, for configurations.
        settings: what its module needs besides, in Python.
        yaml: the same for configurations.
        freeze: of the student.
    """

    setting: type[OnPolicyDistillation]
    student: Path
    teacher: Path
    make_rows: Callable[[int], list[Example]]
    view: View
    yaml_view: dict[str, Any] = field(
        default_factory=lambda: {
            "class_path": "PromptView",
            "init_args": {"prompt": "{{ completion }}{{ prompt }}"},
        }
    )
    settings: dict[str, Any] = field(default_factory=dict)
    yaml: dict[str, Any] = field(default_factory=dict)
    freeze: str | None = None

    def module(
        self,
        teacher: Path | dict[str, Teacher] | None = None,
        objective: Objective | None = None,
        lora: Lora | None = None,
        setting: type[OnPolicyDistillation] | None = None,
        **settings: Any,
    ) -> Any:
        """`tiny.make_module` in this world; without any teacher its own is the frozen one."""
        student = Pretrained(str(self.student), lora=lora, freeze=self.freeze)
        teachers = self.teacher if teacher is None else teacher
        return tiny.make_module(student, teachers, objective, setting or self.setting, **self.settings | settings)

    def alone(self, **settings: Any) -> Any:
        """A module without teachers, or where nothing can be learned without one, with itself as its teacher."""
        if self.setting is DiffusionDistillation:
            return self.module({"teacher": Teacher(Live())}, Objective([Term(ReverseKL())]), **settings)
        return self.module({}, tiny.no_teacher(), **settings)

    def fit(self, module: Any, folder: Path, rows: Sequence[Example] | None = None, **settings: Any) -> L.Trainer:
        return tiny.fit(module, folder, self.make_rows(24) if rows is None else rows, **settings)

    def write(self, folder: Path, count: int = 40) -> Path:
        """The rows as JSONL, images beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i, row in enumerate(self.make_rows(count)):
            images = row.pop("images", None)
            saved = [_save(image, folder / f"{i}_{k}.png") for k, image in enumerate(images or [])]
            own = {"images": saved} if images is not None else {}
            if "image" in row:
                own["image"] = _save(row["image"], folder / f"{i}.png")
            lines.append(json.dumps(row | own))
        path = folder / "rows.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


def _save(image: Any, path: Path) -> str:
    image.save(path)
    return str(path)


def text(student: Path, teacher: Path) -> World:
    return World(TextDistillation, student, teacher, tiny.make_rows, PRIVILEGED)


def vision_language(student: Path, teacher: Path) -> World:
    return World(VisionLanguageDistillation, student, teacher, vlm_rows, Told(Crop(size=32)))


def gui_grounding(student: Path, teacher: Path) -> World:
    return World(GUIGroundingDistillation, student, teacher, gui_rows, Told(Spotlight()))


def diffusion(student: Path, teacher: Path) -> World:
    """Its sampler is stochastic, so that transitions have densities as tokens do."""
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16}
    return World(
        DiffusionDistillation,
        student,
        teacher,
        tiny_diffusion.make_rows,
        Referenced(),
        yaml_view={"class_path": "ReferenceImage"},
        settings={**sizes, "sampler": SDE(), "optimizer": tiny.sgd(1e-4)},
        yaml={**sizes, "sampler": "SDE"},
        freeze="image_embedder",
    )
