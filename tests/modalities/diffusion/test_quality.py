"""Distances between samples and real images, their table and pictures."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from opd_lightning.modalities.diffusion import Brightness, ClipScore, DigitFeatures, Features, SampleQuality
from opd_lightning.modalities.diffusion.images import contact_sheet
from opd_lightning.modalities.diffusion.quality import compare, precision_and_recall
from opd_lightning.modalities.diffusion.quickstart import digits
from opd_lightning.modalities.diffusion.table import by_steps, closed, pictures, report
from opd_lightning.report import report as report_of_any_run
from tests.tiny import Rows, fit, make_trainer
from tests.tiny_diffusion import make_rows, tokenizer


def normal(count: int, mean: float, spread: float, seed: int) -> torch.Tensor:
    draws = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + spread * draws


def test_the_frechet_distance_of_normals_is_the_closed_form():
    found = compare(normal(3000, 0, 1, 0), normal(3000, 0.5, 2, 1))
    assert found["fid"] == pytest.approx(4 * (0.5**2 + (2 - 1) ** 2), rel=0.06)
    same = compare(normal(3000, 0, 1, 0), normal(3000, 0, 1, 1))
    assert same["fid"] < 0.02
    assert abs(same["kid"]) < 0.1 < found["kid"]


def test_kid_draws_the_same_subset_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = [compare(normal(900, 0, 1, 0), normal(900, 1, 1, 1))["kid"] for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.rand(3), wanted)


def test_precision_falls_with_what_is_not_real_and_recall_with_what_is_missing():
    real = torch.cat([normal(100, 0, 1, 0), normal(100, 30, 1, 1)])
    assert precision_and_recall(real, real) == (1.0, 1.0)
    half = normal(100, 0, 1, 2)
    precision, recall = precision_and_recall(real, half)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    precision, recall = precision_and_recall(half, real)
    assert 0.4 < precision < 0.55


def test_the_digits_network_tells_held_out_digits_apart_in_both_colors():
    features = DigitFeatures()
    for inverted in (0.0, 1.0):
        rows = digits(held_out=True, inverted=inverted)
        images = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).permute(0, 3, 1, 2) / 255
        assert (features.classify(images) == torch.tensor(rows["label"])).float().mean() > 0.9
        assert features(images).shape == (360, 32)


class Colors(Features):
    """The mean of each channel."""

    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))


def test_every_number_of_steps_is_measured_before_and_after_and_drawn(make, tmp_path):
    module = make(quality=SampleQuality(Colors(), [1, 2]), reward=Brightness(0.0))
    module.evaluation.before = True
    logger = CSVLogger(tmp_path, name="logs")
    rows = make_rows(16)
    fit(module, tmp_path, rows, steps=2, validation=rows[:8], logger=logger, val_check_interval=2,
        check_val_every_n_epoch=None, num_sanity_val_steps=0)  # fmt: skip
    names = {
        name
        for row in csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8"))
        for name in row
    }
    for metric in ("fid", "kid", "precision", "recall"):
        assert {f"val/{metric}_1", f"val/{metric}_2", f"val/teacher/{metric}_2"} <= names
    assert {file.name for file in (tmp_path / "grids").iterdir()} == {
        f"{who}_step-{step}_steps-{count}.png"
        for who, step in (("teacher", 0), ("student", 0), ("student", 2))
        for count in (1, 2)
    }
    (tmp_path / "config.yaml").write_text("seed_everything: 3\n", encoding="utf-8")
    found = report(tmp_path, steps=1)
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == found
    assert (found["seed"], set(found["steps"])) == (3, {"teacher", "student before", "student after"})
    assert (
        Image.open(tmp_path / "grid.png").width == Image.open(tmp_path / "grids" / "student_step-2_steps-1.png").width
    )
    assert (tmp_path / "table.png").exists()
    # the report of any run has files of other names, and shows the sheets
    report_of_any_run(tmp_path)
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == found
    assert {"result.json", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    titles = [[picture.title for picture in line] for line in pictures(tmp_path)]
    assert titles == [
        [
            f"teacher, {count}",
            f"student, {count}, before training",
            f"student, {count}, after 2 optimizer steps",
        ]
        for count in ("1 denoising step", "2 denoising steps")
    ]


def test_a_run_without_sheets_has_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no sheets of samples"):
        pictures(tmp_path)


def test_the_samples_of_a_number_of_steps_are_those_of_a_rollout(make, tmp_path):
    module = make(quality=SampleQuality(Colors(), [2], test_steps=[3]))
    trainer = make_trainer(tmp_path)
    found = trainer.test(module, datamodule=Rows([], make_rows(8)), verbose=False)[0]
    acted = [module.evaluator.act("student", make_rows(8)[i : i + 4], i // 4) for i in (0, 4)]
    assert all(one.mask.shape[1] == 3 for one in acted), "the rollout's horizon is 3"
    images = torch.cat([module.images(one) for one in acted])
    real = torch.stack([module.family.pixels([row["image"]])[0] / 2 + 0.5 for row in make_rows(8)])
    wanted = compare(real.mean((2, 3)), images.mean((2, 3)))
    assert found["test/fid_3"] == pytest.approx(wanted["fid"], rel=1e-4, abs=1e-6)
    assert "test/fid_2" not in found


def test_a_rank_that_saw_stand_ins_alone_takes_part(make, tmp_path, monkeypatch):
    """Fewer held-out rows than ranks: the others wait for it in every collective call."""
    module = make(quality=SampleQuality(Colors(), [1]))
    quality, features = module.quality, torch.rand(8, 3)
    monkeypatch.setattr(SampleQuality, "_reference", lambda self, module: torch.rand(8, 3))
    elsewhere = ({1: [features]}, {1: [torch.tensor([1.0, 0.0])]})
    calls = []

    class TwoRanks:
        def gather_objects(self, value):
            calls.append(value)
            return [value, elsewhere]

    monkeypatch.setattr(type(module), "ranks", TwoRanks())
    found = quality.finish(module, "val")
    assert calls == [({}, {})], "one call, whatever it has seen"
    assert found["val/class_accuracy_1"] == 0.5
    assert "val/fid_1" in found


def test_without_real_images_there_is_nothing_to_compare_with(make, tmp_path):
    module = make(quality=SampleQuality(Colors(), [1]))
    rows = [{**row, "image": None} for row in make_rows(8)]
    with pytest.raises(ValueError, match="no split has a column 'image'"):
        make_trainer(tmp_path).test(module, datamodule=Rows([], rows), verbose=False)


def test_table_helpers():
    curves = {"val/fid_4": [(0, 3.0), (9, 1.0)], "val/fid_32": [(0, 0.5)], "val/teacher/fid_4": [(0, 2.0)]}
    assert by_steps(curves, "val", -1) == {4: 1.0, 32: 0.5}
    assert by_steps(curves, "val/teacher", 0) == {4: 2.0}
    assert closed(3.0, 1.0, 0.5) == pytest.approx(0.8)


def test_pictures_and_brightness():
    sheet = contact_sheet(torch.rand(13, 3, 8, 8))
    assert sheet.size == (3 * 10 * 9, 3 * 2 * 9)
    assert Brightness()(Image.new("RGB", (2, 2), "white"), {}) == 1.0
    assert Brightness()(Image.new("RGB", (2, 2), (100, 100, 100)), {}) == 0.0


def test_clip_score_is_the_cosine_of_a_clip_models_embeddings(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 16, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer()).save_pretrained(tmp_path)
    score = ClipScore(str(tmp_path))
    found = {
        round(score(Image.new("RGB", (16, 16), color), {"prompt": prompt}), 6)
        for color in ("red", "blue", "green", "black")
        for prompt in ("a red dot", "small circle", "big")
    }
    assert len(found) > 2
    assert all(0 <= value <= 1 for value in found)


def test_numbers_of_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="numbers of steps must be >= 1"):
        SampleQuality(Colors(), [0])
