"""Rollouts that wait for their training are trained on what the student saw when it acted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image

from opd_lightning.callbacks import Curriculum, Staircase
from opd_lightning.callbacks.knobs import Knob
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.diffusion import DiffusionDistillation
from opd_lightning.modalities.gui_grounding import AbsolutePixels
from opd_lightning.modalities.vision_language import Blur, Compose, Downscale, Mixture
from opd_lightning.modalities.vision_language.images import images_of
from opd_lightning.policy import View
from opd_lightning.rollout_settings import Rollout
from opd_lightning.student_view import as_it_was, settings_of, shown
from opd_lightning.teacher import Initial, Teacher
from tests.tiny import attach, fit
from tests.worlds import World


def view() -> Compose:
    return Compose([Mixture(Downscale(64), share=0.25), PromptView("Look. {{ prompt }}"), Blur(2.0)])


def test_a_view_is_made_again_from_its_settings():
    before = settings_of(view())
    turned = view()
    turned.views[0].view.longest, turned.views[2].radius = 8, 1.0
    again = as_it_was(turned, before)
    assert settings_of(again) == before != settings_of(turned)
    assert again.views[0].view is not turned.views[0].view
    assert settings_of(None) == {}
    assert as_it_was(turned, {}) is None


def test_turning_the_one_turns_no_other():
    original = view()
    copied = as_it_was(original, settings_of(original))
    original.views[0].view.longest = 8
    assert copied.views[0].view.longest == 64


@pytest.mark.parametrize(("now", "name"), [(None, "none"), (Blur(1.0), "Blur")])
def test_another_view_is_refused(now, name):
    with pytest.raises(ValueError, match=rf"sampled with model\.student_view: Downscale, which is now {name}; go on"):
        shown(now, [], settings_of(Downscale(8)))


# -- turned while rollouts are pending ----------------------------------------------------------------------------


@pytest.fixture
def eyes(make_world) -> World:
    return make_world("vision_language")


@pytest.fixture(params=["vision_language", "gui_grounding", "diffusion"])
def seeing(request, make_world) -> World:
    return make_world(request.param)


class Wordy(View):
    """A longer prompt, where that is text."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, example: Any) -> Any:
        prompt = example["prompt"]
        return {**example, "prompt": "big " * self.times + prompt} if isinstance(prompt, str) else example


def looking(world: World, **rollout: Any) -> Any:
    settings = {"batch_size": 8, "micro_batch_size": 4, "horizon": 3, **rollout}
    seen = [Wordy(3)] if world.setting is DiffusionDistillation else [Wordy(3), Downscale(64)]
    return world.module({"teacher": Teacher(Initial())}, rollout=Rollout(**settings), student_view=Compose(seen))


def rows_of(world: World, count: int) -> list[Any]:
    blind = world.setting is DiffusionDistillation
    return [row for row in world.make_rows(3 * count) if blind or images_of(row)][:count]


def behind(module: Any, trajectories: Any) -> float:
    """The largest difference between what is said of the actions now and when they were taken, in nats."""
    with torch.no_grad():
        said = module.distribution(module.policies["student"], trajectories)
        index = trajectories.mask.flatten().nonzero().squeeze(-1)
        chunk = said.at(index).chunk(slice(0, len(index)))
        now = chunk.log_prob(trajectories.actions.flatten(0, 1)[index])
    return float((now - trajectories.behavior_log_probs.flatten()[index]).abs().max())


@pytest.mark.parametrize("rollout", [{}, {"max_staleness": 1}, {"epochs": 2}, {"behavior": {"dataset": 1.0}}])
def test_pending_rollouts_are_trained_with_the_view_that_sampled_them(eyes, rollout, tmp_path):
    module = looking(eyes, **rollout)
    turned = Curriculum({"student_view.views.1.longest": Staircase(64, 24, every=1, by=-8)})
    fit(module, tmp_path, rows_of(eyes, 16), steps=4, callbacks=[turned])
    assert module.student_view.views[1].longest == 32


def test_what_is_said_of_a_rollout_does_not_change_with_the_view(seeing):
    module = looking(seeing)
    rows = rows_of(seeing, 4)
    acted = module.act("student", rows, [1, 2, 3, 4])
    assert behind(module, acted) < 1e-4
    first = module.streams.query("teacher", acted).distribution
    for part in module.student_view.views:
        (argument,) = vars(part)
        Knob(module, f"student_view.views.{module.student_view.views.index(part)}.{argument}").turn(2)
    assert behind(module, acted) < 1e-4
    index = acted.mask.flatten().nonzero().squeeze(-1)
    for before, after in zip(
        _values(first, index), _values(module.streams.query("teacher", acted).distribution, index), strict=True
    ):
        torch.testing.assert_close(before, after)  # without a view of its own, the teacher sees what the student saw


def _values(said: Any, index: torch.Tensor) -> list[torch.Tensor]:
    chunk = said.at(index).chunk(slice(0, len(index)))
    return [chunk.entropy(), chunk.log_probs() if hasattr(chunk, "log_probs") else chunk.mean]


def test_a_checkpoint_knows_what_was_seen(eyes, tmp_path):
    rows = rows_of(eyes, 16)
    module = attach(looking(eyes), tmp_path)
    loader = module.rollout_loader(rows)
    next(iter(loader))
    Knob(module, "student_view.views.1.longest").turn(16)
    state = loader.state_dict()

    resumed = attach(looking(eyes), tmp_path)
    resumed.student.load_state_dict(module.student.state_dict())
    Knob(resumed, "student_view.views.1.longest").turn(8)
    again = resumed.rollout_loader(rows)
    again.load_state_dict(state)
    assert again.pending.student_view == settings_of(looking(eyes).student_view)
    assert behind(resumed, again.pending) < 1e-4

    other = attach(eyes.module({"teacher": Teacher(Initial())}, rollout=module.rollout), tmp_path)
    with pytest.raises(ValueError, match=r"sampled with model\.student_view: Compose, which is now none"):
        other.rollout_loader(rows).load_state_dict(state)


def test_a_job_of_the_worker_keeps_the_view_of_its_generation(eyes, tmp_path):
    module = attach(looking(eyes, max_staleness=1), tmp_path)
    loader = module.rollout_loader(rows_of(eyes, 24))
    batches = iter(loader)
    next(batches)  # the second generation batch is on its way
    Knob(module, "student_view.views.1.longest").turn(16)
    seen = [next(batches).trajectories.student_view["views"][1]["longest"] for _ in range(5)]
    loader.close()
    assert seen == [64, 64, 64, 16, 16]


def test_a_click_in_pixels_is_read_by_the_screen_that_it_was_written_for(make_world):
    world = make_world("gui_grounding")
    module = dataclasses.replace(world, settings={**world.settings, "answer_format": AbsolutePixels()}).module(
        {"teacher": Teacher(Initial())}, student_view=Downscale(56)
    )
    (row,) = world.make_rows(1)
    row["image"] = Image.new("RGB", (112, 112))
    then = settings_of(module.student_view)
    text = module.answer_format.write(
        (10, 10, 30, 30), (112, 112), module.model_size((56, 56), module.policies["student"])
    )
    before = module.predicted(text, row)
    Knob(module, "student_view.longest").turn(28)
    assert module.predicted(text, row, then) == before != module.predicted(text, row)
