"""The gallery shows the held-out examples of a run as student and teacher saw them, with answers before and after."""

from __future__ import annotations

import pytest
from PIL import Image

from opd_lightning.cli import run
from opd_lightning.modalities.vision_language.gallery import gallery, pictures, read
from opd_lightning.modalities.vision_language.images import images_of
from tests.tiny_vlm import save_vlm

SCREENS = "opd:assets/gui_screens"
GUI = f"""
model:
  class_path: GUIGroundingDistillation
  init_args:
    student: {{path: STUDENT}}
    teachers:
      teacher:
        weights: Live
        view: Spotlight
    objective: {{terms: [{{signal: ReverseKL}}]}}
    rollout: {{batch_size: 2, horizon: 6}}
    evaluation: {{show: 3}}
data:
  class_path: PromptData
  init_args:
    train: python:opd_lightning.modalities.gui_grounding.readers.rendered
    train_options: {{folder: "{SCREENS}", pages: [click-test], seeds: 0-2}}
    validation: python:opd_lightning.modalities.gui_grounding.readers.rendered
    validation_options: {{folder: "{SCREENS}", pages: [click-color], seeds: 3-6}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A GUI run of one step, with its configuration and samples."""
    folder = tmp_path_factory.mktemp("gallery")
    student = save_vlm(folder / "student")
    (folder / "gui.yaml").write_text(GUI.replace("STUDENT", str(student)), encoding="utf-8")
    run(["fit", "-c", str(folder / "gui.yaml"), f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu",
         "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.logger=false",
         "--trainer.enable_progress_bar=false"])  # fmt: skip
    return folder


def test_rows_and_samples_are_the_same_examples(finished):
    module, rows, before, after = read(finished)
    assert not module.policies, "no model is loaded for a picture"
    assert [row["step"] for row in before] == [0] * 3
    assert [row["step"] for row in after] == [1] * 3
    for row, old, new in zip(rows, before, after, strict=False):
        assert row["prompt"] == old["prompt"] == new["prompt"]
        assert row["box"] == new["box"]


def test_the_picture_is_drawn(finished):
    path = gallery(finished, across=2)
    with Image.open(path) as image:
        assert image.width > 500
        colors = {color for _, color in image.convert("RGB").getcolors(2**24)}
    assert (31, 119, 180) in colors, "the target's rectangle"


def test_pictures_of_a_report_have_clicks_and_the_target_in_their_own_pixels(finished):
    module, rows, before, after = read(finished)
    drawn = pictures(finished)
    assert len(drawn) == len(after) == 3
    for (student, *teachers), row, old, new in zip(drawn, rows, before, after, strict=False):
        assert student.title == "student sees"
        assert student.words[0] == row["prompt"]
        assert f"before: {old['completion']}" in student.words[1]
        assert f"after: {new['completion']}" in student.words[2]
        scale = student.size[0] / images_of(dict(row))[0].width
        assert student.target == pytest.approx([scale * value for value in row["box"]])
        assert (student.after is None) == (new["prediction"] is None)
        if new["prediction"] is not None:
            x, y = new["prediction"][0] + new["prediction"][-2], new["prediction"][1] + new["prediction"][-1]
            assert student.after == pytest.approx((scale * x / 2, scale * y / 2))
        looks = [name for name, teacher in module.teachers.items() if teacher.view is not None]
        assert [picture.title for picture in teachers] == [f"{name} sees" for name in looks]
        assert all(picture.target is None for picture in teachers)
