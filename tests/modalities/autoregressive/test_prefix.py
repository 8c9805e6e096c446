"""A prefix that rows share is read once, and nothing that is said or learned depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.modalities.autoregressive import PromptView, prefix, reading
from opd_lightning.modalities.autoregressive.engines import DecodeLoop, decode_loop
from opd_lightning.modalities.autoregressive.engines.trial import shares_prefixes
from opd_lightning.modalities.autoregressive.models import bare
from opd_lightning.modalities.autoregressive.prefix import Prefix, shared_prefixes
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import Frozen, Initial, Teacher
from tests.tiny import act, make_module, no_teacher

SYSTEM = "12+34=46 5+6=11 70+7=77 "
NESTED = [f"{SYSTEM}{'9' * 12 if i % 3 else '4' * 14}+{'3' * (i % 2)}=" for i in range(8)]
PROMPTS = {
    "nothing shared": [f"{i}{i + 1}+{'1' * i}=" for i in range(8)],
    "a prefix of all": [f"{SYSTEM}{i}+{'2' * (i % 4)}{i}=" for i in range(8)],
    "of all, then of some": NESTED,
    "of some": [f"{SYSTEM}{i}=" if i % 2 else f"{i}+1=" for i in range(8)],
    "all rows": [SYSTEM] * 8,
    "one row": [SYSTEM],
}


def costing(device, most):
    """Makes a pass cost as little as tiny rows are worth."""
    return most or 10**6, 2


@pytest.fixture(autouse=True)
def cheap_passes(monkeypatch):
    monkeypatch.setattr(reading, "pass_limits", costing)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Switches sharing off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "shares_prefixes", lambda *_: False)
        yield


@contextmanager
def tokens_read(model) -> Iterator[list[int]]:
    """Lists the tokens of every forward pass."""
    read: list[int] = []
    handle = bare(model).base_model.register_forward_pre_hook(
        lambda _, inputs, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    yield read
    handle.remove()


def plan(prefix: Prefix) -> list:
    return [prefix.rows.tolist(), prefix.start, prefix.stop, *map(plan, prefix.longer)]


def encoded(*texts: str) -> torch.Tensor:
    width = max(map(len, texts))
    return torch.tensor([[*text.ljust(width, "\0").encode()] for text in texts])


# -- which prefixes there are -------------------------------------------------------------------------------------


def test_prefixes_of_all_rows_and_then_of_some():
    ids = encoded("aaaabbb1", "aaaabbb2", "aaaaccc1", "aaaaccc22", "aaaad", "x")
    found = shared_prefixes(ids, torch.tensor([8, 8, 8, 9, 5, 1]) - 1, 0)
    both = [[0, 1], 4, 7], [[2, 3], 4, 7]
    assert plan(found) == [[0, 1, 2, 3, 4, 5], 0, 0, [[0, 1, 2, 3, 4], 0, 4, *both]]
    assert found.rest.tolist() == [5]
    assert found.longer[0].rest.tolist() == [4]


def test_a_prefix_saves_more_than_two_passes():
    ids, limit = encoded("aaaab1", "aaaab2", "aaaac3"), torch.full((3,), 5)
    assert plan(shared_prefixes(ids, limit, 3)) == [[0, 1, 2], 0, 0, [[0, 1, 2], 0, 4]]
    assert plan(shared_prefixes(ids, limit, 4)) == [[0, 1, 2], 0, 0]
    # what all share is not worth it, what some do is
    ids = encoded("abbbbb1", "abbbbb2", "acdefgh")
    assert plan(shared_prefixes(ids, torch.full((3,), 6), 2)) == [[0, 1, 2], 0, 0, [[0, 1], 0, 6]]


def test_a_prefix_ends_before_the_limit_of_each_of_its_rows():
    """Behind it are the columns whose hidden states are wanted, such as those of a completion that rows share."""
    ids = encoded("aaaaaa", "aaaaaa", "aaaaaa")
    assert plan(shared_prefixes(ids, torch.tensor([5, 3, 5]), 0)) == [
        [0, 1, 2], 0, 0, [[0, 1, 2], 0, 3, [[0, 2], 3, 5]]
    ]  # fmt: skip
    assert plan(shared_prefixes(ids, torch.zeros(3).long(), 0)) == [[0, 1, 2], 0, 0]


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6), cost=st.integers(0, 3)
)
@settings(max_examples=100, deadline=None)
def test_every_row_is_read_once_and_begins_with_its_prefixes(rows, cost):
    length = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [2] * (7 - len(row)) for row in rows])

    def check(prefix: Prefix) -> list[int]:
        assert (ids[prefix.rows, : prefix.stop] == ids[prefix.rows[0], : prefix.stop]).all()
        assert (length[prefix.rows] > prefix.stop).all()
        for longer in prefix.longer:
            assert longer.start == prefix.stop
            assert (len(longer.rows) - 1) * (longer.stop - longer.start) > 2 * cost
            assert set(longer.rows.tolist()) <= set(prefix.rows.tolist())
        return [*prefix.rest.tolist(), *(row for longer in prefix.longer for row in check(longer))]

    assert sorted(check(shared_prefixes(ids, length - 1, cost))) == list(range(len(rows)))


# -- what is read -------------------------------------------------------------------------------------------------


def made(student, view=None, lora=None, **settings):
    """Returns a module in float64, taught by itself and by another model."""
    teachers = {"itself": Teacher(Initial(), view), "big": Teacher(Frozen(Pretrained(str(settings.pop("big")))), view)}
    objective = Objective([Term(ReverseKL(), teacher=name, name=name) for name in teachers])
    module = make_module(Pretrained(str(student), lora=lora), teachers, objective, **settings)
    for policy in module.policies.values():
        policy.model.double()
    return module


def outcome(module, rolled, size=None):
    """Computes log-probs of student and teachers, the loss, and gradients, in micro-batches of ``size`` rows."""
    log_probs, losses = [], []
    module.zero_grad()
    steps = dict.fromkeys(("itself", "big"), float(rolled.mask.sum()))
    for part in rolled.split(size or len(rolled)):
        streams = module.streams.query_all(module.objective.teachers(), part)
        student = module.distribution(module.policies["student"], part)
        loss, _ = module.objective(student, streams, part, steps)
        loss.backward()
        said = [student, *(stream.distribution for stream in streams.values())]
        log_probs.append(torch.stack([d.head(d.hidden).log_softmax(-1)[part.mask].detach() for d in said]))
        losses.append(loss.detach())
    gradients = [p.grad.clone() for p in module.student.parameters() if p.grad is not None]
    return torch.cat(log_probs, 1), sum(losses), gradients


def assert_equal(one, other):
    """Log-probs and the loss to float64's last digits; gradients to float32's, in which norms are computed."""
    torch.testing.assert_close(one[:2], other[:2], rtol=1e-9, atol=1e-12)
    for gradient, expected in zip(one[2], other[2], strict=True):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def ragged(rolled):
    """Cuts every row at another step, and drops one."""
    rolled.mask &= torch.arange(rolled.mask.shape[1]) < torch.arange(len(rolled))[:, None] % 4 + 1
    if len(rolled) > 1:
        rolled.mask[1] = False
    return rolled


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("name", PROMPTS)
def test_nothing_depends_on_shared_prefixes(saved, name, lora):
    """In float64, with ragged completions and a dropped row: log-probs, loss and gradients are those of whole rows."""
    module = made(saved(), PromptView("0+0=0 {{ prompt }}"), lora, big=saved(seed=2, hidden=48))
    rolled = ragged(act(module, [{"prompt": prompt} for prompt in PROMPTS[name]]))
    with tokens_read(module.student) as read:
        shared, once = outcome(module, rolled), sum(read)
        read.clear()
        with whole_rows():
            assert_equal(shared, outcome(module, rolled))
        assert shared[2]
        several = len(rolled) > 1 and (name != "nothing shared" or lora)  # there the view of the teacher is shared
        assert (once < sum(read)) == bool(several)


def test_neither_the_limit_of_a_pass_nor_the_cut_into_micro_batches_matters(saved):
    module = made(saved(), big=saved(seed=2, hidden=48))
    rolled = ragged(act(module, [{"prompt": prompt} for prompt in NESTED]))
    expected = outcome(module, rolled)
    for most, size in ((1, 8), (70, 8), (None, 4), (90, 3)):
        module.pass_tokens = most
        assert_equal(outcome(module, rolled, size), expected)


def test_the_limit_of_a_pass_counts_what_it_reads(saved):
    """And not the prefix before it."""
    module = made(saved(), big=saved(seed=2, hidden=48), pass_tokens=24)
    rolled = act(module, [{"prompt": f"{SYSTEM}{i}="} for i in range(8)])
    rolled.mask &= torch.arange(rolled.mask.shape[1]) < 5
    assert shares_prefixes(module.policies["student"], module.head(module.policies["student"]))
    with tokens_read(module.student) as read, torch.no_grad():
        module.distribution(module.policies["student"], rolled)
    # "i=" and five steps behind 24 shared tokens, in passes of three rows
    assert sorted(read) == [14, 21, 21, 24]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "own layers"])
@pytest.mark.parametrize("name", ["a prefix of all", "of all, then of some", "of some", "all rows"])
def test_rollouts_read_once_what_prompts_share(saved, monkeypatch, name, packed):
    """And write the same, for prompts of several lengths."""
    module = make_module(saved(), {}, no_teacher(), engine=DecodeLoop(packed))
    rows = [{"prompt": prompt} for prompt in PROMPTS[name]]
    monkeypatch.setattr(decode_loop, "pass_limits", lambda *_: (10**6, 10**6))
    with tokens_read(module.student) as whole:
        expected = act(module, rows)
    monkeypatch.setattr(decode_loop, "pass_limits", lambda *_: (50, 2))
    assert shares_prefixes(module.policies["student"], module.head(module.policies["student"]))
    with tokens_read(module.student) as once:
        rolled = act(module, rows)
    assert torch.equal(rolled.actions, expected.actions)
    assert (rolled.behavior_log_probs - expected.behavior_log_probs).abs().max() < 1e-5
    assert (sum(once) < sum(whole)) == (name != "all rows"), "that is one prompt"


# -- when whole rows are read -------------------------------------------------------------------------------------


def shares(module, who="student") -> bool:
    with tokens_read(module.policies[who].model) as read, torch.no_grad():
        rolled = act(module, [{"prompt": f"{SYSTEM}{i}="} for i in range(8)])
        read.clear()
        module.distribution(module.policies[who], rolled)
    return max(read) < 8 * len(SYSTEM)


def test_layers_that_keep_other_things_read_whole_rows(saved):
    assert shares(make_module(saved(architecture="llama"), {}, no_teacher()))
    module = make_module(saved(architecture="gemma3"), {}, no_teacher())
    assert not shares(module)
    row = dict(module.audit_rows())["shared prefixes"]
    assert row == {
        "student": "read in every row (layers that keep other things than the keys and values of every token)"
    }


def test_rotations_by_the_longest_row_read_whole_rows(saved):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    module = make_module(saved(rope_parameters=rope), {}, no_teacher())
    assert not shares(module)
    assert "rope_type dynamic" in dict(module.audit_rows())["shared prefixes"]["student"]


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"dropout": True}], ids=str)
def test_training_mode_may_need_whole_rows(saved, setting):
    student = Pretrained(str(saved(attention_dropout=0.1)), **setting)
    module = make_module(student, {}, no_teacher())
    module.student.eval()
    assert shares(module)
    module.student.train()
    assert not shares(module)


@pytest.mark.parametrize("fault", ["apart", "raises"])
def test_a_model_that_fails_the_trial_reads_whole_rows(saved, monkeypatch, fault):
    module = make_module(saved(), {}, no_teacher())
    update = prefix._Passing.update

    def faulty(self, *states):
        if fault == "raises":
            raise NotImplementedError("no such cache")
        keys, values = update(self, *states)
        return keys, values.roll(1, -2)

    monkeypatch.setattr(prefix._Passing, "update", faulty)
    assert not shares(module)
    reason = dict(module.audit_rows())["shared prefixes"]["student"]
    assert ("nats apart" in reason) if fault == "apart" else ("NotImplementedError: no such cache" in reason)


def test_the_table_says_who_reads_a_prefix_once(saved):
    module = make_module(saved(), saved(seed=2, hidden=48))
    assert dict(module.audit_rows())["shared prefixes"] == {"student": "read once", "teacher": "read once"}
