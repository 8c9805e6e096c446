"""Sampling: what is drawn, and that the stored log-probabilities are those of a teacher-forced pass (rule 16)."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from opd_lightning.modalities.autoregressive.engines.engine import until_stop
from opd_lightning.modalities.autoregressive.engines.generate import Sampler, generate
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.pretrained import Lora
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Teacher
from tests.tiny import act, attach, log_softmax, make_module, make_rows, no_teacher, teacher_forced
from tests.worlds import World

TOLERANCE = 1e-4
SHAPES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 5, "min_p": 0.02},
]


def agree(world: World, module: OnPolicyDistillation, who: str, **settings) -> None:
    rolled = act(module, world.make_rows(8), who, **settings)
    assert len(set(rolled.observation["attention_mask"].sum(1).tolist())) > 2, "prompts of mixed length"
    error = (teacher_forced(module, who, rolled) - rolled.behavior_log_probs).abs().max()
    assert error < TOLERANCE
    assert (rolled.behavior_log_probs[rolled.mask] < 0).all()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_behavior_log_probs_are_the_plain_ones(any_world, who, shape):
    """Whatever shaped the rollout: temperature and filters are the behavior policy's alone (rule 9)."""
    agree(any_world, any_world.module(), who, **shape)


def test_no_stale_cache_after_an_optimizer_step(any_world, tmp_path):
    module = any_world.module()
    before = act(module, any_world.make_rows(8))
    any_world.fit(module, tmp_path, steps=2)
    after = teacher_forced(module, "student", before)
    assert (after - before.behavior_log_probs).abs().max() > 100 * TOLERANCE, "the step did nothing"
    agree(any_world, module, "student")


def test_with_adapters(any_world, tmp_path):
    module = any_world.module({"teacher": Teacher(EMA(0.5))}, lora=Lora(r=4))
    any_world.fit(module, tmp_path, steps=2)
    agree(any_world, module, "student")
    agree(any_world, module, "teacher")


DEFAULTS = {"repetition_penalty": 3.0, "temperature": 0.1, "top_k": 1, "do_sample": True, "suppress_tokens": [3, 4]}


def test_generation_defaults_of_the_checkpoint_are_not_used(any_world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(any_world.student, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | DEFAULTS), encoding="utf-8")
    plain, opinionated = any_world.alone(), dataclasses.replace(any_world, student=folder).alone()
    kept = opinionated.policies["student"].model.generation_config
    assert kept.repetition_penalty == 3.0
    mine, theirs = act(plain, any_world.make_rows(8)), act(opinionated, any_world.make_rows(8))
    assert torch.equal(mine.actions, theirs.actions)
    assert torch.equal(mine.behavior_log_probs, theirs.behavior_log_probs)
    assert opinionated.policies["student"].model.generation_config is kept, "exported with the model, as it came"


# -- what a draw depends on ---------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_prompt_only(any_world):
    module, rows = any_world.alone(), any_world.make_rows(8)
    seeds = list(range(50, 58))
    together = module.act("student", rows, seeds)
    backwards = module.act("student", rows[::-1], seeds[::-1])
    for i in range(8):
        alone = module.act("student", rows[i : i + 1], seeds[i : i + 1])
        length = int(alone.mask.sum())
        for other in (together.select(torch.tensor([i])), backwards.select(torch.tensor([7 - i]))):
            assert int(other.mask.sum()) == length
            assert torch.equal(other.actions[0, :length], alone.actions[0, :length])
            assert (other.behavior_log_probs[0, :length] - alone.behavior_log_probs[0]).abs().max() < TOLERANCE
    again = module.act("student", rows, [seed + 1 for seed in seeds])
    assert not torch.equal(again.actions, together.actions)


def test_the_horizon_does_not_change_the_draws(any_world):
    module, rows = any_world.alone(), any_world.make_rows(8)
    short, long = (act(module, rows, horizon=horizon) for horizon in (5, 10))
    assert short.mask.shape[1] <= 5
    assert torch.equal(short.actions, long.truncate(5).actions)
    assert torch.equal(short.mask, long.truncate(5).mask)
    assert torch.equal(short.stopped, long.truncate(5).stopped)


def test_greedy_is_the_likeliest(any_world):
    module = any_world.alone()
    rolled = act(module, any_world.make_rows(8), temperature=0.0)
    likeliest = log_softmax(module, "student", rolled).argmax(-1)
    assert torch.equal(likeliest[rolled.mask], rolled.actions[rolled.mask])


FILTERS = [
    ({}, lambda p: torch.ones_like(p, dtype=torch.bool)),
    ({"temperature": 2.0}, lambda p: torch.ones_like(p, dtype=torch.bool)),
    ({"top_k": 4}, lambda p: p >= p.sort(descending=True).values[3]),
    ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
    ({"top_p": 0.7}, lambda p: _nucleus(p, 0.7)),
]


def _nucleus(p: torch.Tensor, share: float) -> torch.Tensor:
    """The smallest set of likeliest ids with at least this much probability."""
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < share).sum()) + 1
    return torch.zeros_like(p, dtype=torch.bool).index_fill(0, order[:size], True)


@pytest.mark.parametrize(("shape", "kept"), FILTERS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_frequencies_are_those_of_the_filtered_distribution(make_world, shape, kept):
    world = make_world("text")
    module, count = world.alone(), 4000
    rolled = module.act(
        "student",
        world.make_rows(1) * count,
        list(range(count)),
        dataclasses.replace(module.rollout, horizon=1, **shape),
    )
    plain = log_softmax(module, "student", rolled.select(torch.tensor([0])))[0, 0]
    p = (plain / shape.get("temperature", 1.0)).softmax(0)
    p = p * kept(p)
    expected = count * p / p.sum()
    seen = torch.bincount(rolled.actions[:, 0], minlength=len(p)).float()
    assert seen[expected == 0].sum() == 0
    rare = expected < 5  # too few for the approximation: counted together
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    chi_square = ((seen - expected).square() / expected.clamp(min=1)).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, "about four standard deviations"


def test_padded_rows_and_suppressed_ids_are_never_sampled(any_world, monkeypatch):
    module = any_world.alone()
    suppressed = sorted({*module.suppressed(), *range(2, 8)})
    monkeypatch.setattr(module, "suppressed", lambda: suppressed)
    with torch.no_grad():  # make all of them nearly certain
        head = module.student.get_output_embeddings()
        head.weight[[*suppressed, *range(module.vocabulary, len(head.weight))]] *= 20
    rolled = act(module, any_world.make_rows(24), temperature=2.0, horizon=20)
    assert module.vocabulary < len(head.weight)
    assert int(rolled.actions.max()) < module.vocabulary
    assert not torch.isin(rolled.actions[rolled.mask], torch.tensor(suppressed)).any()
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < TOLERANCE


def test_a_draw_next_to_one_never_picks_the_impossible():
    """Rounding of the last cumulative sum must not point behind the last id that has any probability."""
    head = type("Head", (), {"vocabulary": 6, "suppressed": None})()
    sampler = Sampler(head, Rollout(horizon=1), seeds=[0])  # type: ignore[arg-type]
    sampler._uniform[:] = 1 - 2**-53
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, -torch.inf, -torch.inf, 5.0]])
    assert int(sampler(None, scores).argmax()) == 2
    sampler = Sampler(head, Rollout(horizon=1), seeds=[0])  # type: ignore[arg-type]
    sampler._uniform[:] = 0.0
    assert int(sampler(None, torch.tensor([[-torch.inf, -torch.inf, 1.0, 0.0, 0.0, 0.0]])).argmax()) == 2


# -- stop tokens (rule 6) -----------------------------------------------------------------------------------------


def test_until_stop():
    tokens = torch.tensor([[5, 1, 1, 1], [5, 5, 5, 5], [1, 5, 1, 5], [5, 3, 5, 1]])
    mask, stopped = until_stop(tokens, [1, 3])
    assert mask.tolist() == [
        [True, True, False, False],
        [True] * 4,
        [True, False, False, False],
        [True, True, False, False],
    ]
    assert stopped.tolist() == [True, False, True, True]


@pytest.mark.parametrize("pad", ["pad", "eos"])
def test_the_stop_token_is_trained_also_as_padding(any_world, pad):
    """Each row is trained up to and including its first stop token, and every trained id was really sampled."""
    module = any_world.alone()
    (eos,) = module.eos
    if pad == "eos":
        module.tokenizer().pad_token_id = eos
    rolled = act(module, any_world.make_rows(24), temperature=1.5, horizon=20)
    assert 0 < int(rolled.stopped.sum()) < 24
    for actions, mask, stopped in zip(rolled.actions, rolled.mask, rolled.stopped, strict=True):
        trained = actions[mask].tolist()
        assert mask.tolist() == [True] * len(trained) + [False] * (len(mask) - len(trained))
        assert eos not in trained[:-1]
        assert bool(stopped) == (trained[-1] == eos)
        assert stopped or len(trained) == 20
        assert (actions[~mask] == module.tokenizer().pad_token_id).all()
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < TOLERANCE


def test_every_stop_id_stops(chat_student):
    module = make_module(chat_student, {}, no_teacher())
    assert module.eos == [3, 4]
    with torch.no_grad():
        module.student.get_output_embeddings().weight[[3, 4]] *= 3
    rolled = act(module, make_rows(24), horizon=20)
    last = [int(actions[mask][-1]) for actions, mask in zip(rolled.actions, rolled.mask, strict=True)]
    assert {3, 4} <= set(last)
    assert rolled.stopped.tolist() == [token in (3, 4) for token in last]


def test_generation_leaves_the_model_in_its_mode(any_world):
    module = any_world.alone()
    model = module.policies["student"].model
    for mode in (True, False):
        model.train(mode)
        rows = any_world.make_rows(2)
        prompts = module.collate(rows, module.policies["student"]) | module.media(rows, module.policies["student"])
        generate(model, module.head(module.policies["student"]), prompts, Rollout(horizon=2), [0, 1], [1], 0)
        assert model.training is mode


def test_the_loader_trains_on_what_was_sampled(any_world, tmp_path):
    """The observation of a micro-batch is exactly the prompt that was sampled from, however it was cut."""

    module = attach(any_world.module(rollout=Rollout(batch_size=8, micro_batch_size=2, horizon=8)), tmp_path)
    for micro_batch in module.rollout_loader(any_world.make_rows(24)):
        batch = micro_batch.trajectories
        for i, example in enumerate(batch.examples):
            mine = batch.observation["input_ids"][i][batch.observation["attention_mask"][i].bool()]
            assert mine.tolist() == module.collate([example], module.policies["student"])["input_ids"][0].tolist()
        assert (teacher_forced(module, "student", batch) - batch.behavior_log_probs).abs().max() < TOLERANCE
