"""Several policies in one loop, against plain passes of each over the tokens that were written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.adapters import adapter_parameters
from opd_lightning.blend import Blend
from opd_lightning.cli import run
from opd_lightning.modalities.autoregressive import DecodeLoop, Generate, PromptView
from opd_lightning.modalities.autoregressive.engines.decode_loop import one_end
from opd_lightning.modalities.autoregressive.engines.draw import draw, uniforms
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Initial, Same, Teacher
from tests.processes import last
from tests.test_blend import dense
from tests.test_resume import PLAIN, configuration
from tests.tiny import fit, log_softmax, make_module, make_rows, save_model, teacher_forced

WHERE = ("text", "llama", "vision_language", "gui_grounding")
HOWS = ("mixture", "geometric")
SEEDS = [7, 8, 9, 10, 11, 12]


def rollout(blend: Blend, **settings: Any) -> Rollout:
    return Rollout(**{"horizon": 10, "behavior": {"blend": 1.0}, "blend": blend, **settings})


def expected(module: Any, rolled: Any, blend: Blend) -> Tensor:
    """Log-probs ``[B, T, V]`` of the mixture, float64, by one plain pass of each policy."""
    said = {}
    for name in blend.policies:
        own = module.shown(rolled.examples)
        view = None if name == "student" else module.teachers[name].seen(rolled.examples, own)
        seen = None if view is None else [a if b is None else b for a, b in zip(own, view, strict=True)]
        said[name] = log_softmax(module, name, rolled, seen).double()
    return dense(blend.how, blend.policies, said).log()


def agrees(module: Any, rolled: Any, blend: Blend, tolerance: float = 2e-4) -> None:
    """Stored log-probs are those of the mixture, and each token is the one that its uniform number draws from it."""
    mixed, mask = expected(module, rolled, blend), rolled.mask
    of_action = mixed.gather(-1, rolled.actions[..., None]).squeeze(-1)
    assert float((of_action - rolled.behavior_log_probs)[mask].abs().max()) < tolerance
    uniform = uniforms(rolled.seed.tolist(), 10)[:, : mask.shape[1]]
    tokens, _ = draw(mixed[mask].float(), uniform[mask], Rollout())
    assert (tokens == rolled.actions[mask]).float().mean() > 0.99  # a draw may lie within rounding of its neighbor


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("where", WHERE)
def test_log_probs_and_draws_are_those_of_two_plain_passes(where, how, make_world):
    """Student and a teacher with another prompt, prompts several times, rows that end at different steps."""
    world = make_world(where)
    module = world.module({"teacher": Teacher(Frozen(Pretrained(str(world.teacher))), world.view)})
    rows, blend = world.make_rows(6), Blend({"teacher": 0.4}, how)
    rolled = module.act("blend", [rows[i] for i in (0, 1, 0, 2, 5, 1)], SEEDS, rollout(blend))
    assert len(rolled.length.unique()) > 1
    agrees(module, rolled, blend)
    assert all(torch.equal(rolled.observation[k], v) for k, v in module.collate(
        [rows[i] for i in (0, 1, 0, 2, 5, 1)], module.policies["student"]).items())  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["text", "vision_language"])
def test_two_views_of_one_model(where, packed, make_world):
    """One set of weights, twice in the loop: the student's with its adapter off, and two teachers that share it."""
    world = make_world(where)
    teachers = {"expert": Teacher(Initial(), world.view), "naive": Teacher(Same("expert"))}
    module = world.module(teachers, Objective([Term(CrossEntropy(), None)]), Lora(r=2), engine=DecodeLoop(packed))
    with torch.no_grad():
        for parameter in adapter_parameters(module.student).values():
            parameter.normal_(0, 0.2)
    for blend in (Blend({"expert": 0.5, "naive": 0.5}), Blend({"expert": 0.3, "naive": 0.3})):
        agrees(module, module.act("blend", world.make_rows(6), SEEDS, rollout(blend)), blend)


def test_minillms_importance_weight(make_world):
    """w = p / ((1−α)·p + α·q), by the stored log-probs: at most 1/(1−α), and 1 where the two agree."""
    world, share = make_world("text"), 0.2
    module, rows = world.module(), make_rows(6)
    rolled = module.act("blend", rows, SEEDS, rollout(Blend({"teacher": share})))
    p, q = (teacher_forced(module, name, rolled).exp() for name in ("student", "teacher"))
    w = (p.log() - rolled.behavior_log_probs).exp()[rolled.mask]
    assert torch.allclose(w, (p / ((1 - share) * p + share * q))[rolled.mask], atol=1e-4)
    assert w.max() <= 1 / (1 - share) + 1e-4
    alike = world.module({"teacher": Teacher(Initial())})
    rolled = alike.act("blend", rows, SEEDS, rollout(Blend({"teacher": share})))
    assert torch.allclose(teacher_forced(alike, "student", rolled), rolled.behavior_log_probs, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbors(make_world):
    module, rows = make_world("text").module(), make_rows(6)
    settings = rollout(Blend({"teacher": 1.0}, "geometric", 0.05), temperature=1.3, top_p=0.9)
    together = module.act("blend", rows, SEEDS, settings)
    for i, row in enumerate(rows):
        alone, width = module.act("blend", [row], [SEEDS[i]], settings), int(together.mask[i].sum())
        assert alone.actions[0, :width].tolist() == together.actions[i, :width].tolist()


def chi_square(counts: Tensor, probs: Tensor) -> tuple[float, float]:
    """The statistic, and what it exceeds once in a thousand times; ids that are expected less than 5 times are one."""
    total = int(counts.sum())
    rare = probs * total < 5
    pools = [
        (counts[~rare].double(), probs[~rare] * total),
        (counts[rare].sum()[None].double(), (probs[rare] * total).sum()[None]),
    ]
    seen, wanted = (torch.cat(pair) for pair in zip(*(pool for pool in pools if float(pool[1].sum()) > 0), strict=True))
    freedom = len(seen) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return float(((seen - wanted).square() / wanted).sum()), bound


def test_mixsd_samples_from_the_mixed_distribution(make_world):
    """Each token with or without the fact, by a coin, is a draw from the mixture: by the loop, and by coins."""
    world = make_world("text")
    teachers = {
        "expert": Teacher(Initial(), PromptView("{{ solution }}?{{ prompt }}")),
        "naive": Teacher(Same("expert")),
    }
    module = world.module(teachers, Objective([Term(CrossEntropy(), None)]))
    row, count, share = make_rows(2)[1], 6000, 0.4
    blend = Blend({"expert": 1 - share, "naive": share})
    rolled = module.act("blend", [row] * count, list(range(count)), rollout(blend, horizon=1))
    probs = expected(module, rolled.select(torch.arange(1)), blend)[0, 0].exp()
    by_loop = rolled.actions[:, 0].bincount(minlength=len(probs))
    parts = [module.act(name, [row] * count, list(range(count)), Rollout(horizon=1)).actions[:, 0] for name in teachers]
    coin = torch.rand(count, generator=torch.Generator().manual_seed(0)) < share
    by_coins = torch.where(coin, parts[1], parts[0]).bincount(minlength=len(probs))
    for counts in (by_loop, by_coins):
        statistic, bound = chi_square(counts, probs)
        assert statistic < bound
    # and it is neither of the two
    for actions in parts:
        statistic, bound = chi_square(actions.bincount(minlength=len(probs)), probs)
        assert statistic > 2 * bound


def test_other_stop_ids_speak_of_one_end():
    """Row by row in probabilities: what anyone gives to 2, 5 or 6 is the end, which the student writes as 5."""
    log_probs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    moved = one_end([5, 6], [5, 2, 6, 99])(log_probs.clone()).exp()
    before = log_probs.exp()
    assert torch.allclose(moved[:, 5], before[:, 2] + before[:, 5] + before[:, 6])
    assert (moved[:, [2, 6]] == 0).all()
    assert torch.equal(moved[:, [0, 1, 3, 4, 7]], before[:, [0, 1, 3, 4, 7]])
    same = one_end([5, 6], [6, 5])(log_probs)
    assert same is log_probs


def test_a_teacher_with_its_own_stop_id_ends_the_students_completions(tiny_student, tmp_path):
    """The teacher ends with another id, and is sure of it: completions end at once, by the student's id."""
    folder = save_model(tmp_path / "teacher", seed=2, hidden=48, rows=28, generation={"eos_token_id": 9})
    module = make_module(tiny_student, folder)
    head = module.head(module.policies["teacher"]).module
    with torch.no_grad():
        head.weight.zero_()
    row, blend = make_rows(1), Blend({"teacher": 0.5})
    (eos,) = module.eos
    rolled = module.act("blend", row * 400, list(range(400)), rollout(blend, horizon=1))
    student = log_softmax(module, "student", rolled.select(torch.arange(1)))[0, 0].exp()
    share = float(0.5 * (student[eos] + student[9]) + 0.5 * 2 / module.vocabulary)
    assert not (rolled.actions == 9).any()
    assert abs(float((rolled.actions == eos).float().mean()) - share) < 4 * math.sqrt(share / 400)
    ended = rolled.actions[:, 0] == eos
    assert torch.allclose(rolled.behavior_log_probs[ended, 0].exp(), torch.tensor(share), atol=1e-5)


def test_engines_that_write_by_one_policy_refuse(tiny_student, tiny_teacher, saved):
    settings = rollout(Blend({"teacher": 0.5}))
    with pytest.raises(ValueError, match=r"model.engine=Generate writes by one policy.*DecodeLoop"):
        make_module(tiny_student, tiny_teacher, engine=Generate(), rollout=settings, load=False)
    sliding = make_module(saved(architecture="gemma3"), tiny_teacher, rollout=dataclasses.replace(settings))
    with pytest.raises(ValueError, match=r"rollout.blend needs a loop in which this policy writes beside"):
        sliding.audit_rows()


def test_not_ahead_of_training(tiny_student, tiny_teacher, tmp_path):
    module = make_module(
        tiny_student, tiny_teacher, rollout=rollout(Blend({"teacher": 0.5}), max_staleness=1, batch_size=8)
    )
    with pytest.raises(ValueError, match=r"rollout.behavior or rollout.blend names teacher"):
        fit(module, tmp_path)


def test_groups_of_students_and_blends_train_each_by_its_term(tiny_student, tiny_teacher, tmp_path):
    members = {"student": 1, "blend": 2}
    settings = Rollout(batch_size=8, horizon=6, members=members, blend=Blend({"teacher": 0.5}))
    terms = [
        Term(ReverseKL(), source="student", normalizer="on"),
        Term(CrossEntropy(), None, source="blend", normalizer="on"),
    ]
    module = make_module(tiny_student, tiny_teacher, Objective(terms), rollout=settings)
    logged = fit(module, tmp_path, steps=2).logged_metrics
    assert {"train/loss/ReverseKL", "train/loss/CrossEntropy"} <= {*logged}


def test_a_budget_that_shrinks_resumes_exactly(make_world, tmp_path):
    """Turned by a curriculum to nothing, where the teacher no longer acts."""
    world = make_world("text")
    blend = {"shares": {"teacher": 1.0}, "how": "geometric", "budget": 0.5}
    setup = {**PLAIN, "rollout": {**PLAIN["rollout"], "behavior": {"blend": 1.0}, "blend": blend}}
    schedule = {"class_path": "Linear", "init_args": {"start": 0.5, "end": 0.0, "steps": 3}}
    schedules = {"schedules": {"rollout.blend.budget": schedule}}
    curriculum = f"--trainer.callbacks+={{class_path: Curriculum, init_args: {schedules}}}"
    found = {}
    for name, stops in {"whole": [4], "resumed": [1, 2, 4]}.items():
        config = configuration(tmp_path / name, world, setup)
        for i, stop in enumerate(stops):
            run(["fit", "-c", str(config), f"--trainer.max_steps={stop}", "--model.schedule.name=constant", curriculum,
                 "--model.schedule.warmup_steps=0", *(["--ckpt_path=last"] if i else [])])  # fmt: skip
        found[name] = last(config)
    for key, value in found["whole"]["state_dict"].items():
        assert torch.equal(found["resumed"]["state_dict"][key], value), key
