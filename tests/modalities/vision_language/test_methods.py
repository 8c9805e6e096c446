"""The overlays for students that see, by the test ideas of their papers, on the quickstart's own scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from opd_lightning import cli  # noqa: F401  (so that short class names resolve)
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.vision_language import Cue, VisionLanguageDistillation
from opd_lightning.modalities.vision_language.quickstart import scenes
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import JSD, ImportanceRatio, Objective, Support, Term
from opd_lightning.policy import Original
from opd_lightning.shipped import shipped
from opd_lightning.teacher import EMA, Live, Teacher
from tests.tiny import act, fit, log_softmax, make_module
from tests.tiny_vlm import save_vlm, vlm_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("methods") / "student")


def overlay(name: str, folder) -> VisionLanguageDistillation:
    """The module that an overlay makes of a tiny student."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(OnPolicyDistillation, "model")
    base = {"class_path": "VisionLanguageDistillation", "init_args": {"student": {"path": str(folder)}}}
    base["init_args"] |= {"rollout": {"batch_size": 8, "horizon": 8}, "evaluation": {"before": False}}
    overlay = yaml.safe_load(Path(shipped(f"opd:methods/vision_language/{name}.yaml")).read_text(encoding="utf-8"))
    base["init_args"] |= overlay["model"]["init_args"]
    module = parser.instantiate_classes(parser.parse_object({"model": base})).model
    module.configure_model()
    return module


def loss_of(module, rolled):
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    loss, _ = module.objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    return loss


def cropless(count: int) -> list:
    return [row for row in vlm_rows(count) if row["images"]]


# -- Vision-OPD -------------------------------------------------------------------------------------------------


def test_vision_opd_is_at_rest_where_the_crop_is_the_whole_image(folder):
    module = overlay("vision_opd", folder)
    rows = [row | {"box": [0, 0, *row["images"][0].size]} for row in cropless(12)]
    loss = loss_of(module, act(module, rows))
    assert abs(float(loss)) < 1e-6
    assert float(loss_of(module, act(module, cropless(12)))) > 1e-4, "a real crop says something else"


def test_vision_opd_with_all_of_the_vocabulary_is_the_full_divergence(folder):
    rows = cropless(12)
    found = {}
    for name, support in (("top", Support(of="student", k=107)), ("full", Support())):
        term = Term(JSD(0.5, support=support), weights=[ImportanceRatio(2.0)])
        teachers = {"teacher": Teacher(Live(), view=overlay("vision_opd", folder).teachers["teacher"].view)}
        module = make_module(folder, teachers, Objective([term]), setting=VisionLanguageDistillation)
        found[name] = float(loss_of(module, act(module, rows)))
    assert found["top"] == pytest.approx(found["full"], rel=1e-5)


def test_vision_opd_scores_the_same_response_after_prompts_of_other_lengths(folder):
    module = overlay("vision_opd", folder)
    module.teachers["teacher"].view.size = 64
    rolled = act(module, cropless(12))
    shown = [module.teachers["teacher"].look(row) for row in rolled.examples]
    assert (
        module.collate(shown, module.policies["student"])["input_ids"].shape[1]
        != rolled.observation["input_ids"].shape[1]
    )
    distribution = module.streams.query("teacher", rolled).distribution
    assert distribution.hidden.shape[:2] == rolled.actions.shape


def test_the_importance_ratio_is_capped_and_has_no_gradient(folder):
    module = overlay("vision_opd", folder)
    rolled = act(module, cropless(12))
    fresh = float(loss_of(module, rolled))
    rolled.behavior_log_probs = rolled.behavior_log_probs - 5.0  # the sampling student found each action e⁵ less likely
    assert float(loss_of(module, rolled)) == pytest.approx(2 * fresh, rel=1e-4)


def test_vision_opd_moves_its_teacher(folder, tmp_path):
    module = overlay("vision_opd", folder)
    assert isinstance(module.teachers["teacher"].weights, EMA)
    assert module.teachers["teacher"].weights.rate == 0.05
    start = [p.clone() for p in module.policies["teacher"].model.parameters()]
    fit(module, tmp_path, cropless(32), steps=2)
    moved = zip(start, module.policies["teacher"].model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


# -- ViCuR, and OPSD for students that see -----------------------------------------------------------------------


def test_an_empty_cue_is_no_privilege(folder):
    module = overlay("vicur", folder)
    rows = [row | {"cue": ""} for row in cropless(12)]
    rolled = act(module, rows)
    said = module.streams.query("teacher", rolled).distribution
    own = log_softmax(module, "student", rolled)
    assert (said.head(said.hidden).log_softmax(-1) - own).abs().max() < 1e-6


def test_a_cue_is_read_by_the_teacher_alone(folder):
    module = overlay("vicur", folder)
    rolled = act(module, [row | {"cue": "it is gray"} for row in cropless(12)])
    plain = act(module, cropless(12))
    assert torch.equal(rolled.observation["input_ids"], plain.observation["input_ids"])
    cued = log_softmax(module, "teacher", rolled, [module.teachers["teacher"].look(row) for row in rolled.examples])
    assert not torch.allclose(cued, log_softmax(module, "teacher", rolled), atol=1e-3)


def test_vicur_gives_the_k1_gradient(folder):
    """−Σ sg(log q − log p)·log p at the sampled tokens."""
    module = overlay("vicur", folder)
    rolled = act(module, [row | {"cue": "it is gray"} for row in cropless(8)])
    loss_of(module, rolled).backward()
    found = [p.grad.clone() for p in module.student.parameters()]
    module.student.zero_grad()
    said = module.streams.query("teacher", rolled).distribution
    teacher = said.head(said.hidden).log_softmax(-1).gather(-1, rolled.actions[..., None])[..., 0]
    own = module.distribution(module.policies["student"], rolled)
    student = own.head(own.hidden).log_softmax(-1).gather(-1, rolled.actions[..., None])[..., 0]
    advantage = (teacher - student).detach()
    (-(advantage * student)[rolled.mask].sum() / rolled.mask.sum()).backward()
    for mine, parameter in zip(found, module.student.parameters(), strict=True):
        assert torch.allclose(mine, parameter.grad, atol=1e-5)


def test_the_answer_reaches_the_teacher_beside_the_image(folder):
    module = overlay("opsd_vision", folder)
    view = module.teachers["teacher"].view
    assert isinstance(view, PromptView)
    row = cropless(1)[0]
    shown = view(row)
    assert row["answer"] in shown["prompt"]
    assert shown["images"] is row["images"]


def test_scenes_have_the_columns_that_these_methods_need():
    (row,) = scenes(1, kinds=["which"], digits=(1, 1))
    asked = row["prompt"].split(" the ")[1].split(" ")[0]
    assert f"The {asked} frame" in row["cue"]
    assert f"holds a {row['answer']}." in row["cue"]
    assert Cue()(row)["prompt"].endswith(row["cue"])
    assert Original()(row) is row
