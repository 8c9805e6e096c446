"""Clicks: written, sampled, read back, weighed and judged through the setting itself."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.gui_grounding import (
    AbsolutePixels,
    BoxOnly,
    BoxTags,
    CoordinatesAsText,
    CropZoom,
    DigitSignificance,
    GUIGroundingDistillation,
    JSONAnswer,
    Normalized1000,
    Overlap,
    PyAutoGUI,
    Spotlight,
)
from opd_lightning.modalities.gui_grounding.weight import digit_places
from opd_lightning.modalities.vision_language import Downscale
from opd_lightning.objective import Confidence, Objective, ReverseKL, Term
from opd_lightning.policy import Original
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Initial, Teacher
from tests.tiny import act, attach, fit, log_softmax, make_module, no_teacher
from tests.tiny_vlm import gui_rows, save_vlm

FORMATS = [
    Normalized1000(),
    Normalized1000(box=True),
    AbsolutePixels(),
    BoxTags("qwen"),
    JSONAnswer(),
    JSONAnswer("pixels", box=True),
    PyAutoGUI(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("gui") / "student")


def make(folder, teachers=None, objective=None, **settings):
    settings.setdefault("rollout", Rollout(batch_size=4, horizon=60))
    if teachers is None and objective is None:
        objective = no_teacher()
    return make_module(folder, teachers, objective, setting=GUIGroundingDistillation, **settings)


@pytest.mark.parametrize("answer", FORMATS, ids=lambda answer: f"{type(answer).__name__}-{answer.unit}-{answer.box}")
def test_what_is_written_of_the_box_hits_it(folder, answer):
    """Through tokens, smart-resize and the reward; with a smaller screenshot for the student too."""
    for student_view in (None, Downscale(32)):
        module = make(folder, answer_format=answer, student_view=student_view)
        trajectories = act(module, gui_rows(), "dataset")
        assert bool(trajectories.stopped.all())
        reward, shown = module.actor.checked_rewards(trajectories)
        assert reward.tolist() == [1.0] * 8, [row["completion"] for row in shown]
        assert all(row["metrics"]["parsed"] == 1 for row in shown)


def test_pixels_are_those_of_the_resized_screenshot(folder):
    module = make(folder, answer_format=AbsolutePixels())
    row = gui_rows(3)[2]
    width, height = module.model_size(row["image"].size, module.policies["student"])
    assert (width % 16, height % 16) == (0, 0)
    assert (width, height) != row["image"].size
    x, y = module.answer_format.parse(module.written(row, *module.shown([row]), module.policies["student"]))
    assert (x, y) == (round(14 * width / 100), round(13.75 * height / 60))
    grid = module.policies["student"].processor.image_processor(images=[row["image"]])["image_grid_thw"][0]
    assert [width, height] == [8 * int(grid[2]), 8 * int(grid[1])]


def test_malformed_answers_score_nothing_and_are_counted(folder, tmp_path):
    module = make(folder, evaluation=Evaluation(before=False, by=["platform", "element_type"]))
    rows = gui_rows(24)
    trainer = fit(module, tmp_path, rows, validation=rows[:8])
    trainer.validate(module, verbose=False, datamodule=trainer.datamodule)
    found = trainer.callback_metrics
    assert found["val/parsed"] < 1
    assert {"val/accuracy/web/text", "val/accuracy/mobile", "val/accuracy/*/icon", "val/point_in_box"} <= set(found)


def test_the_papers_table_is_printed(folder, tmp_path, capsys):
    module = make(folder, evaluation=Evaluation(before=False, by=["platform", "element_type"]))
    rows = gui_rows(24)
    trainer = fit(module, tmp_path, rows, validation=rows[:8])
    trainer.test(module, verbose=False, datamodule=trainer.datamodule)
    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if "platform" in line)
    assert [cell.strip() for cell in head.split("┃")[1:-1]] == ["platform", "icon", "text", "all"]
    assert all(any(line.startswith(f"│ {name}") for line in printed.splitlines()) for name in ("web", "mobile", "all"))


def test_overlap_rewards_boxes(folder):
    rows = gui_rows(4)
    module = make(folder, answer_format=Normalized1000(box=True), reward=Overlap())
    reward, _ = module.actor.checked_rewards(act(module, rows, "dataset"))
    assert (reward > 0.9).all()
    reward, _ = make(folder, reward=Overlap()).actor.checked_rewards(act(make(folder), rows, "dataset"))
    assert (reward == 0).all(), "a point overlaps nothing"


# -- GUI-SD -----------------------------------------------------------------------------------------------------


def test_digits_are_counted_in_rollouts_and_given_answers(folder):
    module = make(folder)
    for trajectories in (act(module, gui_rows()), act(module, gui_rows(), "dataset")):
        decode = module.tokenizer().decode
        for i, row in enumerate(trajectories.actions):
            length = int(trajectories.length[i])
            places = digit_places(row[:length].tolist(), decode)
            assert trajectories.channels["digits"][i, :length].tolist() == places
    (row,) = act(make(folder, answer_format=Normalized1000()), gui_rows(1), "dataset").channels["digits"]
    assert row.tolist() == [0, 3, 2, 1, 0, 0, 3, 2, 1, 0, 0]  # (188, 286)


def test_digit_weights_survive_the_cut_into_micro_batches(folder, tmp_path):
    term = Term(ReverseKL(), weights=[DigitSignificance(), Confidence()])
    teachers = {"teacher": Teacher(EMA(0.05), view=Spotlight())}
    losses = []
    for size in (8, 2):
        module = make(
            folder, teachers, Objective([term]), rollout=Rollout(batch_size=8, horizon=8, micro_batch_size=size)
        )
        trainer = fit(module, tmp_path / str(size), gui_rows(16), accumulate_grad_batches=8 // size)
        losses.append(float(trainer.callback_metrics["train/loss/ReverseKL"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("view", [Spotlight(), BoxOnly(), CropZoom()])
def test_the_teachers_screenshot_has_as_many_tokens(folder, view):
    module = make(folder, {"teacher": Teacher(Initial(), view=view)}, Objective([Term(ReverseKL())]))
    image = module.policies["student"].processor.image_token_id
    rows = gui_rows()
    mine, theirs = (module.collate(shown, module.policies["student"]) for shown in (rows, [view(row) for row in rows]))
    assert torch.equal((mine["input_ids"] == image).sum(1), (theirs["input_ids"] == image).sum(1))
    rolled = act(module, rows)
    seen = log_softmax(module, "teacher", rolled, [view(row) for row in rows])
    assert not torch.allclose(seen, log_softmax(module, "teacher", rolled), atol=1e-3)


@pytest.mark.parametrize("view", [CoordinatesAsText(), PromptView("{{ prompt }} It is at {{ box }}")])
def test_a_view_that_tells_the_answer_is_warned_of(folder, view):
    with pytest.warns(UserWarning, match=r"model\.teachers\.teacher: its view tells the answer in words"):
        make(folder, {"teacher": Teacher(Initial(), view=view)}, load=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(folder, {"teacher": Teacher(Initial(), view=Spotlight())}, load=False)


def test_digit_weights_need_a_setting_that_knows_digits(folder, tmp_path):
    from opd_lightning.modalities.vision_language import VisionLanguageDistillation

    objective = Objective([Term(ReverseKL(), weights=[DigitSignificance()])])
    module = make_module(folder, folder, objective, setting=VisionLanguageDistillation, load=False)
    with pytest.raises(ValueError, match=r"DigitSignificance needs 'digits': .*GUIGroundingDistillation"):
        attach(module, tmp_path).check()


# -- rows that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"box": [4, 6, 4, 20]}, "area"),
        ({"box": [4, 6, 400, 20]}, "the image"),
        ({"box": [0.1, 0.2, 0.3, 0.4]}, "normalized"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": None}, "GUI grounding needs one screenshot, the row has 0 images"),
    ],
)
def test_rows_that_cannot_be_used_say_why(folder, change, reason):
    module = make(folder)
    assert module.refusal(gui_rows(1)[0]) is None
    found = module.refusal(gui_rows(1)[0] | change)
    assert found is not None
    assert reason in found, found


def test_pixels_of_two_sizes_are_refused(folder):
    module = make(
        folder,
        {"teacher": Teacher(Initial(), view=Original())},
        Objective([Term(ReverseKL())]),
        answer_format=AbsolutePixels(),
        student_view=Downscale(32),
    )
    assert "has another image size" in module.refusal(gui_rows(1)[0])


def test_samples_hold_what_a_gallery_draws(folder, tmp_path):
    rows = gui_rows(24)
    module = make(folder, evaluation=Evaluation(before=False, show=2))
    fit(module, tmp_path, rows, validation=rows[:4], val_check_interval=1, num_sanity_val_steps=0)
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["box"] for row in found] == [rows[0]["box"], rows[1]["box"]]
    assert all(row["prediction"] is None or len(row["prediction"]) == 2 for row in found)
