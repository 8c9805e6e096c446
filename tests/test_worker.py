"""Rollouts ahead of training: which weights they see, what they share, and how they end."""

from __future__ import annotations

import threading
import traceback

import pytest
import torch

from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Teacher
from tests.tiny import attach


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]


def watched(world, seen, **settings):
    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            acted = batch.trajectories
            version = int(acted.weights_version[0])
            seen.append((self.global_step, version, acted.actions.clone(), acted.behavior_log_probs))
            return super().training_step(batch, batch_idx)

    return world.module(setting=Watching, **settings)


@pytest.mark.parametrize(
    ("setting", "staleness"),
    [("text", 0), ("text", 1), ("text", 3), ("vision_language", 1), ("gui_grounding", 1), ("diffusion", 1)],
)
def test_the_lag_is_fixed_and_runs_repeat_themselves(setting, staleness, make_world, tmp_path):
    runs = []
    world = make_world(setting)
    for _ in range(2):
        seen: list = []
        rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=6, max_staleness=staleness)
        module = watched(world, seen, rollout=rollout)
        world.fit(module, tmp_path, steps=10)
        runs.append((seen, [p.detach().clone() for p in module.student.parameters()]))
        assert not workers(), "its thread has ended"
    (one, weights), (two, again) = runs
    generations = [(step // 2, version) for step, version, *_ in one]
    assert generations == [(g, 2 * max(0, g - staleness)) for g, _ in generations], "two optimizer steps a generation"
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_what_is_rolled_out_ahead_is_what_those_weights_do(every_world, tmp_path):
    """The behavior log-probs of generation g are those of the student before generation g − 1."""
    seen: list = []
    rows = every_world.make_rows(24)
    module = watched(every_world, seen, rollout=Rollout(batch_size=8, horizon=6, max_staleness=1))
    before = []
    start = module.training_step

    def keep(batch, batch_idx):
        before.append({name: p.detach().clone() for name, p in module.student.named_parameters()})
        return start(batch, batch_idx)

    module.training_step = keep
    every_world.fit(module, tmp_path, rows, steps=6)
    fresh = every_world.alone(rollout=module.rollout)
    loader = attach(fresh, tmp_path).rollout_loader(rows)
    for generation in range(6):
        fresh.student.load_state_dict(before[max(0, generation - 1)], strict=False)
        rolled = loader._roll_out(generation, 0, loader.actor)
        (rolled,) = rolled.split(len(rolled))  # without the steps that nobody trains
        assert torch.equal(rolled.actions, seen[generation][2])
        assert (rolled.behavior_log_probs - seen[generation][3]).abs().max() < 1e-5


def test_what_the_worker_raises_reaches_the_trainer(every_world, tmp_path):
    class Fails(every_world.setting):
        def sample(self, policy, prompts, examples, rollout, seeds):
            if threading.current_thread() in workers():
                self.calls = getattr(self, "calls", 0) + 1
                if self.calls == 3:
                    raise RuntimeError("the third generation fails")
            return super().sample(policy, prompts, examples, rollout, seeds)

    module = every_world.module(setting=Fails, rollout=Rollout(batch_size=8, horizon=4, max_staleness=1))
    with pytest.raises(RuntimeError, match="the third generation fails") as caught:
        every_world.fit(module, tmp_path, steps=6)
    assert any(frame.name == "sample" for frame in traceback.extract_tb(caught.tb))
    assert not workers(), "its thread has ended"


@pytest.mark.parametrize("staleness", [1, 3])
def test_it_never_gets_further_ahead_than_max_staleness_however_slow_training_is(world, staleness, tmp_path):
    module = attach(world.alone(rollout=Rollout(batch_size=4, horizon=4, max_staleness=staleness)), tmp_path)
    loader, made = module.rollout_loader(world.make_rows(24)), []
    roll_out = loader._roll_out
    loader._roll_out = lambda number, *rest: made.append(number) or roll_out(number, *rest)
    for trained, _ in enumerate(loader):
        for rolled in loader._ahead:
            rolled.result()
        assert made == list(range(trained + staleness + 1))
        assert len(loader._ahead) == staleness
        if trained == 3:
            break
    loader.close()
    assert not workers()


def test_knobs_are_those_of_when_it_was_asked(world, tmp_path):
    module = attach(world.alone(rollout=Rollout(batch_size=4, horizon=8, max_staleness=1)), tmp_path)
    loader = module.rollout_loader(world.make_rows(24))
    batches = iter(loader)
    next(batches)
    module.rollout.horizon = 2
    widths = [next(batches).trajectories.actions.shape[1] for _ in range(3)]
    assert widths[0] > 2, "on its way before the knob was turned"
    assert widths[1:] == [2, 2]
    loader.close()


def test_what_no_copy_of_the_student_can_do_is_refused(every_world, tmp_path):
    rollout = Rollout(batch_size=4, behavior={"student": 0.5, "teacher": 0.5}, max_staleness=2)
    module = every_world.module({"teacher": Teacher(EMA())}, Objective([Term(ReverseKL())]), rollout=rollout)
    with pytest.raises(ValueError, match=r"rollout\.max_staleness=2: the worker .* copy of the student only.*teacher"):
        attach(module, tmp_path).rollout_loader(every_world.make_rows(8))
    with pytest.raises(ValueError, match=r"rollout\.max_staleness must be >= 0, got -1"):
        Rollout(max_staleness=-1)


@pytest.mark.parametrize("setting", ["vision_language", "gui_grounding"])
def test_the_worker_leaves_what_training_remembers_alone(setting, make_world, tmp_path):
    """Its copy of the student has a processor and remembered inputs of its own: two threads never use the same."""
    world = make_world(setting)
    module = attach(world.alone(rollout=Rollout(batch_size=4, horizon=4, max_staleness=1)), tmp_path)
    loader = module.rollout_loader(world.make_rows(24))
    student, processors = module.policies["student"], []
    sample = module.sample
    module.sample = lambda policy, *rest: processors.append(policy.processor) or sample(policy, *rest)
    student.cache.clear()
    next(iter(loader))
    loader.close()
    assert len(processors) == 2
    assert all(processor is not student.processor for processor in processors)
    assert not student.cache
