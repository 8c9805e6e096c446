"""Before the first step every policy is compared with itself; a run whose replay is not its rollout does not start."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from opd_lightning.agreement import Agreement, Comparison
from opd_lightning.distribution import Gaussian, Stream
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Initial, Live, Teacher
from tests import tiny
from tests.callbacks import toy


class Compared:
    """What the comparison found, by policy and by what was compared."""

    def __init__(self, monkeypatch) -> None:
        self.apart: dict[str, dict[str, float]] = {}
        rows = Comparison.rows
        monkeypatch.setattr(Comparison, "rows", lambda one: self.apart.update(one.apart) or rows(one))


@pytest.fixture
def compared(monkeypatch):
    return Compared(monkeypatch)


def test_every_policy_of_every_setting_agrees_with_itself(every_world, tmp_path, compared, capsys):
    module = every_world.module(rollout=Rollout(batch_size=8, horizon=4, behavior={"student": 0.5, "teacher": 0.5}))
    every_world.fit(module, tmp_path)
    assert set(compared.apart) == {"student", "teacher"}
    assert set(compared.apart["student"]) == {
        "alone / beside others", "acted / replayed", "evaluation / training mode"
    }  # fmt: skip
    assert set(compared.apart["teacher"]) == {"alone / beside others", "acted / replayed"}
    assert all(value < 1e-4 for apart in compared.apart.values() for value in apart.values())
    assert "agreement (nats)" in capsys.readouterr().out


@pytest.mark.parametrize("weights", [Live, Initial, EMA])
@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_self_teachers(weights, lora, tiny_student, tmp_path, compared):
    module = tiny.make_module(Pretrained(str(tiny_student), lora=lora), {"teacher": Teacher(weights())})
    tiny.fit(module, tmp_path)
    assert compared.apart["teacher"]["alone / beside others"] < 1e-4


def test_what_is_no_number_agrees_with_nothing(tiny_student, tiny_teacher, tmp_path):
    class Broken(tiny.TextDistillation):
        def configure_model(self):
            super().configure_model()
            next(self.policies["teacher"].model.parameters()).data.fill_(torch.nan)

    with pytest.raises(RuntimeError, match=r"the teacher .* disagrees with itself: .* inf nats a step"):
        tiny.fit(tiny.make_module(tiny_student, tiny_teacher, setting=Broken), tmp_path)


def test_given_completions_have_no_log_probs_to_compare(tiny_student, tiny_teacher, tmp_path, compared):
    rollout = Rollout(batch_size=8, horizon=8, behavior={"dataset": 1.0})
    tiny.fit(tiny.make_module(tiny_student, tiny_teacher, rollout=rollout), tmp_path)
    assert set(compared.apart["student"]) == {"alone / beside others", "evaluation / training mode"}


def test_it_touches_no_random_numbers_and_no_counts(tiny_student, tiny_teacher, tmp_path, monkeypatch):
    states = []

    class Watched(tiny.TextDistillation):
        def on_train_start(self):
            before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
            super().on_train_start()
            after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
            states.append(torch.equal(before[0], after[0]) and before[1:] == after[1:])
            assert not self.recorded()
            assert self.student.training

    module = tiny.make_module(tiny_student, tiny_teacher, setting=Watched)
    count = tiny.fit(module, tmp_path).logged_metrics
    assert states == [True]
    monkeypatch.setattr("opd_lightning.module.check_agreement", lambda *_: None)
    without = tiny.fit(tiny.make_module(tiny_student, tiny_teacher, setting=Watched), tmp_path).logged_metrics
    assert {n: v for n, v in count.items() if "time/" not in n and "speed/" not in n} == {
        n: v for n, v in without.items() if "time/" not in n and "speed/" not in n
    }


# -- what is refused ------------------------------------------------------------------------------------------------


class Reversed(toy.Moves):
    """Takes each state for that of the other end."""

    def distribution(self, policy, trajectories, view=None):
        said = super().distribution(policy, trajectories, view)
        return Gaussian(said.mean.flip(1), said.scale)

    def _log_probs(self, policy, acted):
        flat = super().distribution(policy, acted).at(torch.arange(acted.mask.numel()))
        return flat.log_prob(acted.actions.flatten(0, 1)).view(acted.mask.shape)


class OneMore(toy.Moves):
    """Also says what would come after the last step."""

    def distribution(self, policy, trajectories, view=None):
        said = super().distribution(policy, trajectories, view)
        return Gaussian(torch.cat([said.mean, said.mean[:, -1:]], 1), said.scale)


class Crowded(toy.Moves):
    """Pulls every row towards the mean of its batch."""

    def distribution(self, policy, trajectories, view=None):
        said = super().distribution(policy, trajectories, view)
        return Gaussian(said.mean + 0.1 * said.mean.mean(0, keepdim=True), said.scale)


class Remembering(toy.Moves):
    """Keeps the states that it visited in the observation, which is not cut with the steps."""

    def sample(self, policy, prompts, examples, rollout, seeds):
        acted = super().sample(policy, prompts, examples, rollout, seeds)
        moved = nn.functional.pad(acted.actions.cumsum(1)[:, :-1], (0, 0, 1, 0))
        places = (prompts["start"][:, None] + moved).detach()
        return replace(acted, observation={**prompts, "places": places})

    def distribution(self, policy, trajectories, view=None):
        places = trajectories.observation.get("places")
        if places is None:
            return super().distribution(policy, trajectories, view)
        seen = trajectories.observation if view is None else self.collate(view, policy)
        return Gaussian(policy.model(places, seen["told"][:, None]), torch.tensor(toy.SCALE))


class RightlyRemembering(Remembering):
    """Keeps them in a channel."""

    def sample(self, policy, prompts, examples, rollout, seeds):
        acted = super().sample(policy, prompts, examples, rollout, seeds)
        return replace(acted, observation=prompts, channels={"places": acted.observation["places"]})

    def distribution(self, policy, trajectories, view=None):
        if not trajectories.channels:
            return super().distribution(policy, trajectories, view)
        seen = trajectories.observation if view is None else self.collate(view, policy)
        places = trajectories.channels["places"]
        return Gaussian(policy.model(places, seen["told"][:, None]), torch.tensor(toy.SCALE))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            Reversed,
            r"log-probs that it acts with are not those of its replay, .* Reversed\.distribution asks at other states",
        ),
        (
            Crowded,
            r"says of a row depends on the rows beside it .* Crowded\.sample or Crowded\.distribution lets a row",
        ),
        (OneMore, r"distributions at \d+ × 7 states; the trajectories have \d+ × 6"),
        (Remembering, "belongs in Trajectories.channels, which are cut with the mask, and not in the observation"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_steps_of_the_wrong_order_or_shape(setting, said, tmp_path):
    rows = [{**row, "start": [0.1, 0.0] if i % 3 else [4.0, 4.0]} for i, row in enumerate(toy.make_rows())]
    with pytest.raises((RuntimeError, ValueError), match=said):
        toy.fit(toy.make_module(setting=setting), tmp_path, rows=rows)


def test_states_in_a_channel_are_cut_with_the_steps(tmp_path):
    rows = [{**row, "start": [0.1, 0.0] if i % 3 else [4.0, 4.0]} for i, row in enumerate(toy.make_rows())]
    settings = {"rollout": Rollout(batch_size=8, micro_batch_size=2, horizon=6)}
    kept, plain = toy.make_module(setting=RightlyRemembering, **settings), toy.make_module(**settings)
    toy.fit(kept, tmp_path / "channel", rows=rows)
    toy.fit(plain, tmp_path / "plain", rows=rows)
    for mine, theirs in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_refusal_names_policy_key_and_cause(tiny_student, tiny_teacher, tmp_path):
    class Careless(tiny.TextDistillation):
        """Lets a teacher see its neighbors."""

        def distribution(self, policy, trajectories, view=None):
            said = super().distribution(policy, trajectories, view)
            if policy.name == "student":
                return said
            return replace(said, hidden=said.hidden + said.hidden.mean(0, keepdim=True))

    with pytest.raises(RuntimeError) as refused:
        tiny.fit(tiny.make_module(tiny_student, tiny_teacher, setting=Careless), tmp_path)
    told = str(refused.value)
    assert told.startswith(f"the teacher 'teacher' ({tiny_teacher}) disagrees with itself")
    assert "model.agreement.tolerance is 0.001" in told
    assert "student" not in told.replace(str(tiny_teacher), "")
    assert len(told.splitlines()) == 1


class Idle(toy.Moves):
    """Trains no step."""

    def sample(self, policy, prompts, examples, rollout, seeds):
        acted = super().sample(policy, prompts, examples, rollout, seeds)
        return replace(acted, mask=torch.zeros_like(acted.mask))


def test_rollouts_of_which_nothing_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.behavior\.student: none of 4 trajectories has a step that is"):
        toy.fit(toy.make_module(setting=Idle), tmp_path)


def test_a_tolerance_of_ones_own(tmp_path, compared):
    toy.fit(toy.make_module(setting=Crowded, agreement=Agreement(rows=3, tolerance=50.0)), tmp_path)
    assert compared.apart["student"]["alone / beside others"] > 1e-3


def test_half_precision_has_a_wider_tolerance(tiny_student, tiny_teacher, tmp_path, capsys):
    tiny.fit(tiny.make_module(tiny_student, tiny_teacher), tmp_path, precision="bf16-mixed")
    assert "0.05" in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "said"), [({"rows": 1}, "2 or more"), ({"tolerance": 0.0}, "must be > 0")])
def test_values_that_can_not_be_meant(settings, said):
    with pytest.raises(ValueError, match=said):
        Agreement(**settings)


def test_an_objective_alone_refuses_other_states(tiny_student, tiny_teacher):
    module = tiny.make_module(tiny_student, tiny_teacher)
    acted = tiny.act(module, tiny.make_rows(4))
    said = module.distribution(module.policies["student"], acted)
    wide = replace(said, hidden=torch.cat([said.hidden, said.hidden[:, -1:]], 1))
    objective = Objective([Term(ReverseKL())])
    with pytest.raises(ValueError, match="teacher 'teacher'"):
        objective(said, {"teacher": Stream(wide)}, acted)
