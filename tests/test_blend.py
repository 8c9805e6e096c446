"""`Blend` against probabilities in float64, its budget, and who acts by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.blend import Blend
from opd_lightning.distribution import IMPOSSIBLE
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Live, Teacher
from tests.objective.reference import examples
from tests.tiny import act, make_rows

N, V = 5, 7
HOWS = ("mixture", "geometric")


def log_probs(*names: str, seed: int = 0, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = {name: spread * torch.randn(N, V, generator=generator, dtype=torch.float64) for name in names}
    return {name: z.log_softmax(-1).to(dtype) for name, z in logits.items()}


def dense(how: str, shares: dict[str, float], said: dict[str, Tensor]) -> Tensor:
    """Probabilities ``[n, V]``, as such."""
    probs = {name: said[name].double().exp() for name in shares}
    if how == "mixture":
        return torch.stack([w * probs[name] for name, w in shares.items()]).sum(0)
    product = torch.stack([probs[name] ** w for name, w in shares.items()]).prod(0)
    return product / product.sum(-1, keepdim=True)


def kl(one: Tensor, other: Tensor) -> Tensor:
    """``[n]`` of log-probs."""
    return (one.double().exp() * (one.double() - other.double())).sum(-1)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shares", [{"teacher": 0.2}, {"teacher": 0.3, "other": 0.5}, {"teacher": 0.25, "other": 0.75}])
def test_it_mixes_as_its_formula_says(how, shares):
    said = log_probs("student", "teacher", "other")
    expected = dense(how, {"student": 1 - sum(shares.values()), **shares}, said)
    blend = Blend(shares, how)
    assert torch.allclose(blend.mixed({name: said[name] for name in blend.policies}).exp(), expected, atol=1e-12)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@examples(60)
@given(budget=st.floats(1e-4, 3.0), share=st.floats(0.1, 1.0), seed=st.integers(0, 10_000))
def test_the_budget_is_kept_and_used_up(how, dtype, budget, share, seed):
    said = log_probs("student", "teacher", seed=seed, dtype=dtype)
    mixed = Blend({"teacher": share}, how, budget).mixed(said)
    spent = kl(mixed, said["student"])
    assert torch.allclose(mixed.exp().sum(-1), torch.ones(N, dtype=dtype), atol=1e-5)
    assert (spent <= budget + 1e-5).all()
    # all of it, unless the whole blend is within it
    whole = Blend({"teacher": share}, how).mixed(said)
    expected = torch.minimum(kl(whole, said["student"]), torch.full((N,), budget, dtype=torch.float64))
    assert torch.allclose(spent, expected, atol=1e-4)


@pytest.mark.parametrize("how", HOWS)
def test_within_the_budget_is_the_blend_of_one_smaller_share(how):
    said, budget = log_probs("student", "teacher"), 0.05
    mixed = Blend({"teacher": 1.0}, how, budget).mixed(said)
    low, high = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        rows = [
            dense(how, {"student": 1 - float(b), "teacher": float(b)}, {k: v[i : i + 1] for k, v in said.items()})
            for i, b in enumerate(middle)
        ]
        fits = kl(torch.cat(rows).log(), said["student"]) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    assert ((low > 0) & (low < 1)).all()
    assert torch.allclose(mixed.exp(), torch.cat(rows), atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_a_budget_beyond_the_teachers_kl_leaves_the_teacher(how):
    said = log_probs("student", "teacher")
    mixed = Blend({"teacher": 1.0}, how, budget=50.0).mixed(said)
    assert torch.allclose(mixed, said["teacher"], atol=1e-12)


def test_who_has_no_share_is_not_asked():
    assert Blend({"teacher": 0.2, "other": 0.0}).policies == {"student": 0.8, "teacher": 0.2}
    assert Blend({"teacher": 1.0}).policies == {"teacher": 1.0}
    assert Blend({"teacher": 0.1, "other": 0.9}).policies == {"teacher": 0.1, "other": 0.9}
    assert Blend({"teacher": 1.0}, "geometric", 0.1).policies == {"student": 0.0, "teacher": 1.0}
    assert Blend({"teacher": 1.0}, "geometric", 0.0).policies == {"student": 1.0}
    assert Blend({"teacher": 0.0}).policies == {"student": 1.0}


@pytest.mark.parametrize("how", HOWS)
def test_what_is_impossible_for_all_stays_so(how):
    said = {name: z.clone() for name, z in log_probs("student", "teacher", dtype=torch.float32).items()}
    for z in said.values():
        z[:, 2] = IMPOSSIBLE
        z.copy_(z.log_softmax(-1))
    for budget in (None, 0.01, 9.0):
        mixed = Blend({"teacher": 0.7}, how, budget).mixed(said)
        assert (mixed[:, 2].exp() == 0).all()
        assert not mixed.isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {}}, "sum to 1 or less"),
        ({"shares": {"a": 0.6, "b": 0.6}}, "sum to 1 or less"),
        ({"shares": {"a": -0.1}}, "sum to 1 or less"),
        ({"shares": {"a": 1.0}, "how": "both"}, "mixture or geometric"),
        ({"shares": {"a": 1.0}, "budget": -1.0}, ">= 0 nats"),
        ({"shares": {"a": 1.0}, "budget": float("nan")}, "must be a number"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Blend(**arguments)


def test_nobody_acts_by_a_blend_that_is_not_named():
    with pytest.raises(ValueError, match="nobody acts by it"):
        Rollout(blend=Blend({"teacher": 0.5}))
    with pytest.raises(ValueError, match="says nothing of whom"):
        Rollout(behavior={"blend": 1.0})
    assert Rollout(blend=Blend({"teacher": 0.5}), members={"student": 1, "blend": 3}).policies == {"student", "teacher"}


def test_a_setting_without_a_loop_of_steps_refuses(make_world):
    world = make_world("diffusion")
    blend = Rollout(behavior={"blend": 1.0}, blend=Blend({"teacher": 0.5}))
    with pytest.raises(ValueError, match="no loop in which several policies"):
        world.module({"teacher": Teacher(Live())}, Objective([Term(ReverseKL())]), rollout=blend, load=False)


def test_a_blend_of_nobody_known_is_refused(world):
    blend = Rollout(behavior={"blend": 1.0}, blend=Blend({"expert": 0.5}))
    with pytest.raises(ValueError, match=r"rollout.blend names 'expert', .*\['teacher'\]"):
        world.module(rollout=blend, load=False)


def test_a_teacher_cannot_be_called_so(tiny_student, make_world):
    with pytest.raises(ValueError, match="'blend' has its meaning"):
        make_world("text").module({"blend": Teacher(Initial())}, load=False)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_blend_of_one_is_that_policy(make_world, who):
    """Bit for bit: by a budget of nothing or a share of nothing the student, by a share of all the teacher."""
    module, rows = make_world("text").module(), make_rows(6)
    blends = {
        "student": [Blend({"teacher": 1.0}, budget=0.0), Blend({"teacher": 0.0})],
        "teacher": [Blend({"teacher": 1.0})],
    }
    alone = act(module, rows, who)
    for blend in blends[who]:
        rolled = act(module, rows, "blend", blend=blend, behavior={"blend": 1.0})
        assert torch.equal(rolled.actions, alone.actions)
        assert torch.equal(rolled.behavior_log_probs, alone.behavior_log_probs)
        assert rolled.sources == ("blend",)
