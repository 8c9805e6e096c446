"""A setting of one's own: what its four methods have to be, and that the core takes it as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from opd_lightning.agreement import Agreement
from opd_lightning.callbacks import DistillationCallback, TeacherSync, WeightExtrapolation, WhenConsolidated
from opd_lightning.distribution import Gaussian
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.diffusion import Euler, VelocityMatching
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import (
    GroupRelative,
    ImportanceRatio,
    LogRatio,
    Objective,
    Outcome,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    RewardTimesLogRatio,
    Term,
)
from opd_lightning.optimizer_step import OptimizerStep
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Teacher
from tests.callbacks import toy
from tests.tiny import Rows, make_trainer

GROUPS = Rollout(batch_size=4, group_size=2, horizon=4)


# -- the four methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["collate", "sample", "distribution", "rewards"])
def test_a_setting_without_a_method_is_refused_by_name_when_it_is_built(missing):
    class Mine(toy.Moves):
        pass

    setattr(Mine, missing, getattr(OnPolicyDistillation, missing))
    with pytest.raises(
        TypeError, match=rf"Mine has no method {missing}: a setting implements collate, sample, distribution and"
    ):
        toy.make_module(setting=Mine)
    with pytest.raises(
        TypeError, match="OnPolicyDistillation has no method collate, no sample, no distribution, no rewards"
    ):
        toy.make_module(setting=OnPolicyDistillation)


def returning(method: str, change: Any) -> type[toy.Moves]:
    """The toy, one of whose methods returns what ``change`` makes of what it should."""

    def changed(self, *args, **kwargs):
        return change(getattr(toy.Moves, method)(self, *args, **kwargs))

    return type("Mine", (toy.Moves,), {method: changed})


def acting(**changes: Any) -> Any:
    return lambda acted: dataclasses.replace(acted, **{name: change(acted) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("collate", lambda _: None, r"Mine\.collate returned None, of type NoneType; it has to return a dict"),
        ("collate", lambda p: list(p.values()), r"Mine\.collate returned a list of 2; it has to return a dict"),
        ("collate", lambda p: p | {"x": [1]},
         r"Mine\.collate: 'x' is a list of 1; it has to be a tensor \[B, \.\.\.\]"),
        ("collate", lambda p: {n: t[1:] for n, t in p.items()},
         r"Mine\.collate: 'start' has the shape \[7, 2\]; there are 8"),
        ("collate", lambda p: p | {"x": torch.tensor(1)}, r"Mine\.collate: 'x' has the shape \[\]"),
        ("sample", lambda _: None, r"Mine\.sample returned None, of type NoneType; it has to return Trajectories"),
        ("sample", acting(mask=lambda a: a.mask.long()), r"mask is a tensor \[8, 6\] of int64; it has to be a bool"),
        ("sample", acting(mask=lambda a: a.mask[0]), r"mask is a tensor \[6\] of bool"),
        ("sample", acting(mask=lambda a: a.mask[1:]), r"mask has 7 rows; there are 8 examples"),
        ("sample", acting(actions=lambda a: a.actions[:, 1:]),
         r"actions is a tensor \[8, 5, 2\] of float32; beside a mask "
         r"\[8, 6\] it is \[8, 6, \.\.\.\]"),
        ("sample", acting(behavior_log_probs=lambda a: a.actions),
         r"behavior_log_probs is a tensor \[8, 6, 2\] .* is \[8, 6\]"),
        ("sample", acting(behavior_log_probs=lambda _: None),
         r"behavior_log_probs is None, of type NoneType; beside"),
        ("sample", acting(stopped=lambda a: a.mask),
         r"stopped is a tensor \[8, 6\] of bool; beside a mask \[8, 6\] it is \[8\]"),
        ("sample", acting(stopped=lambda a: a.mask.long()[:, 0]),
         r"stopped is a tensor \[8\] of int64; it has to be a bool"),
        ("sample", acting(channels=lambda a: {"c": a.mask.T}), r"channels\['c'\] is a tensor \[6, 8\] of bool; beside"),
        ("sample", acting(observation=lambda a: {"start": a.observation["start"][:3]}),
         r"observation\['start'\] is a tensor \[3, 2\]"),
        ("rewards", lambda _: None, r"Mine\.rewards returned None, of type NoneType; it has to return rewards"),
        ("rewards", lambda s: s[1], r"Mine\.rewards returned a list of 8; it has to return rewards"),
        ("rewards", lambda s: (s[0], s[1][1:]),
         r"Mine\.rewards: what to show is a list of 7; it has to be a list of 8 dicts"),
        ("rewards", lambda s: (None, s[1]), r"Mine\.rewards has no rewards, although"),
        ("rewards", lambda s: (torch.ones(7), s[1]),
         r"rewards are a tensor \[7\] of float32; they have to be 8, one for each"),
        ("rewards", lambda s: (torch.ones(8, 1), s[1]), r"rewards are a tensor \[8, 1\] of float32; they have to be 8"),
        ("rewards", lambda s: (torch.tensor(1.0), s[1]), r"rewards are a tensor \[\] of float32; they have to be 8"),
        ("rewards", lambda s: ([1.0] * 9, s[1]), r"rewards are a list of 9; they have to be 8"),
        ("rewards", lambda s: (0.5, s[1]), r"rewards are 0\.5, of type float; they have to be 8"),
        ("rewards", lambda s: (["a"] * 8, s[1]),
         r"the row with the prompt '\d+' is 'a', of type str; it has to be a finite"),
        ("rewards", lambda s: (torch.full((8,), torch.nan), s[1]),
         r"the row with the prompt '\d+' is nan; it has to be a finite"),
        ("rewards", lambda s: ([float("inf")] * 8, s[1]), r"is inf; it has to be a finite number, or None"),
        ("rewards", lambda s: (torch.ones(8) * 1j, s[1]), r"is 1j, of type complex; it has to be a finite number"),
    ],
)  # fmt: skip
def test_what_a_method_returns_is_checked_and_named(method, change, message, tmp_path):
    setting = returning(method, change)
    setting.provides = frozenset({"reward"})
    module = toy.make_module(
        setting=setting,
        reward=lambda *_: 1.0,
        objective=Objective([Term(ReverseKL(), weights=[Outcome()])]),
        agreement=Agreement(rows=8),  # which acts before training does
    )
    with pytest.raises((TypeError, ValueError), match=message):
        toy.fit(module, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, r"`distribution` returned None, of type NoneType; it has to return a Distribution"),
        (lambda p: p.mean, r"`distribution` returned tensor\(.* of type Tensor; it has to return a Distribution"),
        (
            lambda p: Gaussian(p.mean[1:], p.scale),
            r"`distribution` returned .* at \d × 6 states; the trajectories have \d × 6",
        ),
        (
            lambda p: Gaussian(p.mean.flatten(0, 1), p.scale),
            r"`distribution` returned .* states; the trajectories have \d × 6",
        ),
    ],
)
def test_what_steps_returns_is_checked_and_named(change, message, tmp_path):
    setting = returning("distribution", change)
    setting._log_probs = lambda self, policy, acted: torch.zeros(acted.mask.shape)
    with pytest.raises((TypeError, ValueError), match=message):
        toy.fit(toy.make_module(setting=setting), tmp_path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_rewards_of_any_kind_of_number_are_rewards(kind, tmp_path):
    module = toy.make_module(
        setting=returning("rewards", lambda s: (torch.ones(len(s[1]), dtype=kind), s[1])), reward=len
    )
    (found,) = make_trainer(tmp_path).validate(module, datamodule=Rows([], toy.make_rows(3)), verbose=False)
    assert found["val/accuracy"] == 1


def test_log_probs_that_nobody_knows_are_refused_where_a_part_reads_them(tmp_path):
    unknown = returning("sample", acting(behavior_log_probs=lambda a: torch.full(a.mask.shape, torch.nan)))
    toy.fit(toy.make_module(setting=unknown), tmp_path / "not read", steps=1)
    for term in (Term(PolicyGradient(LogRatio())), Term(ReverseKL(), weights=[ImportanceRatio()])):
        with pytest.raises(
            ValueError, match=r"Mine\.sample: behavior_log_probs are NaN at trained steps, and (Impor|Policy)"
        ):
            toy.fit(toy.make_module(setting=unknown, objective=Objective([term])), tmp_path / "read", steps=1)


class Forgetful(DistillationCallback):
    """Looks, and returns nothing."""

    def on_rollouts(self, module, trajectories):
        trajectories.length.float().mean()


def test_a_callback_that_returns_no_trajectories_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"Forgetful\.on_rollouts returned None, .* it has to return the Trajectories"):
        toy.fit(toy.make_module(), tmp_path, [Forgetful()])


@pytest.mark.parametrize(
    ("method", "provides", "change", "message"),
    [
        (
            "distribution",
            "categorical",
            lambda said: said,
            r"Mine\.distribution returned a Gaussian, and `provides` names 'categorical'",
        ),
        ("rewards", "", lambda s: ([1.0] * len(s[1]), s[1]), r"Mine\.rewards has rewards, although .* name 'reward'"),
    ],
)
def test_what_is_served_is_what_is_returned(method, provides, change, message, tmp_path):
    setting = returning(method, change)
    setting.provides = frozenset({provides} - {""})
    with pytest.raises((TypeError, ValueError), match=message):
        toy.fit(
            toy.make_module(setting=setting, evaluation=Evaluation(before=True)), tmp_path, validation=toy.make_rows(4)
        )


def test_where_every_reward_abstains_that_is_said(tmp_path, caplog):
    module = toy.make_module(setting=returning("rewards", lambda s: ([None] * len(s[1]), s[1])), reward=lambda *_: None,
                             evaluation=Evaluation(before=True))  # fmt: skip
    with pytest.warns(UserWarning, match=r"val/abstained is 1: .* nothing is scored"):
        toy.fit(module, tmp_path, validation=toy.make_rows(4))
    messages = [record.message for record in caplog.records]
    assert "Evaluating before training (4 held-out prompts)" in messages
    (said,) = [message for message in messages if message.startswith("Before training: ")]
    assert "val/abstained 1.000" in said
    assert "{" not in said


# -- rewards of one's own -------------------------------------------------------------------------------------------


class Near(toy.Moves):
    """Has rewards without a verifier: on another device's dtype, and with a gradient that nobody wants."""

    provides = frozenset({"reward"})

    def rewards(self, trajectories):
        ends = trajectories.observation["start"] + (trajectories.actions * trajectories.mask[..., None]).sum(1)
        return (-ends.norm(dim=1)).double().requires_grad_(), super().rewards(trajectories)[1]


def test_a_setting_may_have_rewards_without_a_verifier(tmp_path):
    objective = Objective([Term(PolicyGradient(GroupRelative()), teacher=None), Term(ReverseKL(), "slow")])
    module = toy.make_module(
        {"slow": Teacher(EMA(rate=0.5))},
        objective,
        Near,
        rollout=GROUPS,
        evaluation=Evaluation(before=True, by=["prompt"]),
    )
    callbacks = [WeightExtrapolation(examples=4), TeacherSync(WhenConsolidated(), "slow")]
    trainer = toy.fit(module, tmp_path, callbacks, 2, toy.make_rows(8), validation=toy.make_rows(4))
    assert trainer.callback_metrics["val/accuracy"] < 0
    assert trainer.callback_metrics["train/reward"] < 0


def test_without_rewards_what_reads_them_is_still_refused(tmp_path):
    module = toy.make_module(objective=Objective([Term(ReverseKL(), weights=[Outcome()])]))
    with pytest.raises(ValueError, match=r"Outcome needs 'reward': set model\.reward .* `rewards` .* `provides`"):
        toy.fit(module, tmp_path)


# -- log-probs without a vocabulary ---------------------------------------------------------------------------------

ADVANTAGES = [LogRatio(clip=3.0), LogRatio(discount=0.9), RewardPlusLogRatio(), RewardTimesLogRatio()]


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=lambda a: f"{type(a).__name__} {vars(a)}")
def test_log_ratios_of_gaussians_train(advantage, tmp_path):
    objective = Objective([Term(PolicyGradient(advantage), weights=[ImportanceRatio()])])
    module = toy.make_module(setting=Near, objective=objective, rollout=GROUPS)
    toy.fit(module, tmp_path, steps=3, rows=toy.make_rows(8))
    assert not torch.equal(module.student.layers[0].weight, toy.Mover(0).layers[0].weight)


def test_the_gradient_of_a_log_ratio_is_what_the_formula_says(tmp_path):
    """−Σ (log q − log p)·∇ log p / steps, with normals written out."""
    module = toy.make_module(objective=Objective([Term(PolicyGradient(LogRatio()))]))
    toy.fit(module, tmp_path, steps=1)
    batch = module.act("student", toy.make_rows(6), list(range(6)))
    step = OptimizerStep([batch])
    module.reader.prepare(step)
    streams = module.streams.query_all(module.objective.teachers(), batch)
    module.student.zero_grad()
    module.objective(module.distribution(module.policies["student"], batch), streams, batch, step.normalizers)[
        0
    ].backward()
    found = [p.grad.clone() for p in module.student.parameters()]

    def log_prob(policy):
        mean = module.distribution(policy, batch).mean
        return (-0.5 * ((batch.actions - mean) / toy.SCALE) ** 2).sum(-1)

    p, q = log_prob(module.policies["student"]), log_prob(module.policies["teacher"]).detach()
    loss = -((q - p.detach()) * p)[batch.mask].sum() / batch.mask.sum()
    for mine, expected in zip(found, torch.autograd.grad(loss, list(module.student.parameters())), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_diffusion_has_log_probs_with_a_sampler_that_has_densities(make_world, tmp_path):
    world = make_world("diffusion")
    objective = Objective([Term(ReverseKL(), weights=[ImportanceRatio(cap=1.5)])])
    module = world.module(objective=objective)
    trainer = world.fit(module, tmp_path)
    assert trainer.callback_metrics["train/loss/ReverseKL"] > 0
    objective = Objective([Term(VelocityMatching(), weights=[ImportanceRatio()])])
    with pytest.raises(ValueError, match=r"ImportanceRatio reads densities, which the sampler Euler has none of"):
        world.module(objective=objective, sampler=Euler())
