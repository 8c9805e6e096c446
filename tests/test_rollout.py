"""Rollouts are data: the loader, its state, and what each micro-batch knows."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.actor import group_statistics
from opd_lightning.modalities import DiffusionDistillation
from opd_lightning.objective import (
    Confidence,
    ForwardKL,
    LogRatio,
    Objective,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    Term,
    TopEntropy,
)
from opd_lightning.optimizer_step import MicroBatch
from opd_lightning.rollout import RolloutLoader
from opd_lightning.rollout_settings import Rollout, derived_seed
from opd_lightning.trajectory import Trajectories
from tests.tiny import LongerIsBetter, Rows, attach, fit, make_module, make_trainer
from tests.worlds import World


@pytest.fixture
def rows(make_world):
    return make_world("text").make_rows(24)


def builder(world: World, folder: Path) -> Callable[..., RolloutLoader]:
    """A module with a trainer attached, and a loader over 24 rows."""

    def get(accumulate: int = 1, rows=None, seed: int = 0, **changes) -> RolloutLoader:
        module = world.alone(rollout=Rollout(**{"batch_size": 4, "horizon": 5} | changes))
        attach(module, folder, accumulate_grad_batches=accumulate)
        return module.rollout_loader(world.make_rows(24) if rows is None else rows, seed)

    return get


@pytest.fixture
def built(make_world, tmp_path):
    return builder(make_world("text"), tmp_path)


@pytest.fixture
def built_everywhere(every_world, tmp_path):
    return builder(every_world, tmp_path)


def steps_of(loader: RolloutLoader) -> Any:
    """Lightning's count of optimizer steps."""
    return loader.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total


def train(loader: RolloutLoader) -> Iterator[MicroBatch]:
    """Its micro-batches, epoch after epoch, with an optimizer step after every `accumulate`-th."""
    while True:
        for batch in loader:
            steps_of(loader).completed += batch.is_last
            yield batch


def same(mine: Trajectories, theirs: Trajectories) -> None:
    for field in dataclasses.fields(Trajectories):
        a, b = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name in ("observation", "channels"):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
        else:
            assert a == b, field.name


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"rollout\.batch_size must be >= 1, got 0"),
        ({"epochs": 0}, r"rollout\.epochs must be >= 1, got 0"),
        ({"horizon": 0}, r"rollout\.horizon must be >= 1, got 0"),
        ({"top_k": 0}, r"rollout\.top_k must be >= 1"),
        ({"temperature": -0.1}, r"rollout\.temperature must be >= 0 \(0 is greedy\), got -0\.1"),
        ({"top_p": 0.0}, r"rollout\.top_p must be in \(0, 1\], got 0\.0"),
        ({"min_p": 1.5}, r"rollout\.min_p must be in \(0, 1\], got 1\.5"),
        ({"behavior": {}}, r"rollout\.behavior: shares must be >= 0 and sum to 1"),
        (
            {"behavior": {"student": 0.5}},
            r"rollout\.behavior: shares must be >= 0 and sum to 1, got \{'student': 0\.5",
        ),
        ({"behavior": {"student": 1.5, "dataset": -0.5}}, r"rollout\.behavior: shares must be >= 0"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**changes)


def test_a_generation_batch_is_cut_into_whole_optimizer_steps():
    assert Rollout(batch_size=8).micro_batches(1) == (8, 1)
    assert Rollout(batch_size=8).micro_batches(4) == (2, 4)
    assert Rollout(batch_size=8, group_size=2, micro_batch_size=4).micro_batches(2) == (4, 4)
    for rollout, accumulate in (
        (Rollout(batch_size=8, micro_batch_size=3), 1),
        (Rollout(batch_size=8, micro_batch_size=4), 4),
        (Rollout(batch_size=2), 4),
    ):
        with pytest.raises(ValueError, match=r"cannot be cut into optimizer steps of \d × \d .*make it a multiple"):
            rollout.micro_batches(accumulate)


def test_too_small_a_dataset_is_refused(built, rows):
    with pytest.raises(ValueError, match="the training data has 3 examples, fewer than one generation batch of 4"):
        built(rows=rows[:3])


# -- micro-batches ------------------------------------------------------------------------------------------------


def test_lengths(built):
    loader = built(accumulate=2, batch_size=5, group_size=4, micro_batch_size=2)
    assert len(loader) == 4 * 10, "24 rows are 4 generation batches of 5 prompts; 4 rows wait for another epoch"
    assert len(list(loader)) == len(loader)
    assert len(list(loader)) == len(loader), "and so in the next epoch"
    assert loader.epoch == 1


def test_one_generation_serves_several_optimizer_steps(built, monkeypatch):
    loader = built(accumulate=2, batch_size=4, group_size=2, micro_batch_size=2)
    generated = []
    monkeypatch.setattr(loader, "_generate", lambda plain=loader._generate: generated.append(1) or plain())
    batches = []
    for i, batch in enumerate(loader):
        batches.append(batch)
        assert len(generated) == i // 4 + 1, "generated when its first micro-batch is asked for, no sooner"
    assert [batch.index for batch in batches[:4]] == [0, 1, 0, 1]
    first, second = batches[0].step, batches[2].step
    assert first is batches[1].step
    assert first is not second
    for step, mine in ((first, batches[:2]), (second, batches[2:4])):
        assert [id(one) for one in step.trajectories] == [id(batch.trajectories) for batch in mine]
    assert all(len(batch) == 2 for batch in batches)


def test_a_generation_batch_is_trained_for_several_epochs(built):
    changes = {"accumulate": 2, "batch_size": 8, "group_size": 2, "micro_batch_size": 2, "horizon": 8}
    plain, loader = list(built(**changes)), built(**changes, epochs=3)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 * len(plain)
    orders = []
    for start in range(0, len(plain), 8):
        once = plain[start : start + 8]
        for i in range(3):
            again = batches[3 * start + 8 * i : 3 * start + 8 * i + 8]
            order = []
            for batch in (micro_batch.trajectories for micro_batch in again):
                # two members of a group each: the behavior's log-probs tell them apart
                known = [torch.equal(one.trajectories.behavior_log_probs, batch.behavior_log_probs) for one in once]
                order.append(known.index(True))
                same(batch, once[order[-1]].trajectories)
            assert sorted(order) == list(range(8))
            orders.append(order)
            assert [batch.index for batch in again] == [0, 1] * 4
            for left, right in zip(again[::2], again[1::2], strict=True):
                assert left.step is right.step
                trained = left.step.trajectories
                assert trained[0] is left.trajectories
                assert trained[1] is right.trajectories
    assert orders[0] == orders[3] == list(range(8)), "the first time as they were rolled out"
    assert len({str(order) for order in orders}) > 4
    assert [str(b.trajectories.row) for b in built(**changes, epochs=3)] == [str(b.trajectories.row) for b in batches]


def test_a_group_is_one_prompt_with_different_draws(built, rows):
    loader = built(batch_size=4, group_size=3, horizon=8)
    batch = next(iter(loader)).trajectories
    assert batch.group.tolist() == [draw for draw in batch.group.tolist()[::3] for _ in range(3)]
    assert len(set(batch.group.tolist())) == 4
    for start in range(0, 12, 3):
        members = batch.select(torch.arange(start, start + 3))
        assert len(set(members.row.tolist())) == 1
        assert members.examples[0] == rows[int(members.row[0])]
    drawn = {str(actions.tolist()) for actions in batch.actions}
    assert len(drawn) > 6


def test_every_prompt_comes_once_per_epoch_and_the_order_changes(built):
    loader = built()
    epochs = [[int(row) for batch in loader for row in batch.trajectories.row] for _ in range(3)]
    assert all(sorted(rows) == list(range(24)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = built()
    assert [int(row) for batch in again for row in batch.trajectories.row] == epochs[0]
    other = built(seed=1)
    assert [int(row) for batch in other for row in batch.trajectories.row] != epochs[0]


def test_no_epoch_of_a_run_is_empty(every_world, tmp_path):
    module = every_world.alone(rollout=Rollout(batch_size=8, horizon=2))
    trainer = make_trainer(tmp_path, steps=-1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=Rows(every_world.make_rows(24)))
    assert trainer.global_step == 9


def test_the_same_prompt_is_drawn_anew_in_the_next_epoch(built):
    loader = built(batch_size=24, horizon=8)
    first, second = next(iter(loader)).trajectories, next(iter(loader)).trajectories
    second_by_row = {int(row): i for i, row in enumerate(second.row)}
    repeated = sum(
        first.actions[i][first.mask[i]].tolist() == second.actions[j][second.mask[j]].tolist()
        for i, row in enumerate(first.row)
        for j in (second_by_row[int(row)],)
    )
    assert repeated < 12
    assert not set(first.group.tolist()) & set(second.group.tolist())


def test_draws_do_not_depend_on_the_number_of_ranks(built_everywhere):
    whole = built_everywhere(batch_size=8)
    one = [batch.trajectories for batch in whole]
    parts = []
    for rank in range(2):
        loader = built_everywhere(batch_size=4)
        loader.rank, loader.world_size, loader.prompts = rank, 2, 8
        loader.generations = 24 // 8
        parts.append([batch.trajectories for batch in loader])
    for batch, left, right in zip(one, *parts, strict=True):
        both = Trajectories.concatenate([left, right], whole.actor.setting.padding)
        assert both.row.tolist() == batch.row.tolist()
        assert both.group.tolist() == batch.group.tolist()
        width = batch.actions.shape[1]
        assert torch.equal(both.actions[:, :width], batch.actions)
        assert torch.equal(both.mask[:, :width], batch.mask)


def test_the_weights_version_is_the_number_of_steps_done(every_world, tmp_path):
    seen = []

    class Watching(every_world.setting):
        def training_step(self, batch, batch_idx):
            seen.append((self.global_step, batch.trajectories.weights_version.tolist(), batch.step))
            return super().training_step(batch, batch_idx)

    module = every_world.module(setting=Watching, rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=4))
    every_world.fit(module, tmp_path, steps=4)
    assert [(step, set(version)) for step, version, _ in seen] == [(0, {0}), (1, {0}), (2, {2}), (3, {2})]


# -- behavior ----------------------------------------------------------------------------------------------------


def test_a_mixture_is_drawn_per_prompt_and_never_within_a_group(built_everywhere, every_world):
    shares = {"student": 0.3, "dataset": 0.7}
    loader = built_everywhere(rows=every_world.make_rows(200), batch_size=100, group_size=2, behavior=shares)
    batches = [batch.trajectories for _ in range(2) for batch in loader]
    for batch in batches:
        assert batch.sources == ("student", "dataset")
        by_group = batch.source.view(-1, 2)
        assert torch.equal(by_group[:, 0], by_group[:, 1])
        replayed = batch.source == 1
        known = ~batch.behavior_log_probs.isnan()
        assert not known[replayed][batch.mask[replayed]].any()
        assert known[~replayed].all()
        for i in replayed.nonzero().flatten().tolist()[:5]:
            given = loader.actor.act("dataset", [batch.examples[i]], [0])
            assert batch.actions[i][batch.mask[i]].tolist() == given.actions[0][given.mask[0]].tolist()
    shares = torch.cat([batch.source for batch in batches]).float().mean()
    assert 0.6 < float(shares) < 0.8
    assert not torch.equal(batches[0].source, batches[1].source)


def test_the_dataset_alone_never_asks_the_generator(built_everywhere, every_world, monkeypatch):
    """GKD's λ = 0, and SFT."""
    loader = built_everywhere(behavior={"student": 0.0, "dataset": 1.0})
    monkeypatch.setattr(every_world.setting, "sample", lambda *_: pytest.fail("nothing is to be sampled"))
    for batch in (micro_batch.trajectories for micro_batch in loader):
        assert set(batch.source.tolist()) == {1}


def test_a_group_of_several_policies_has_fixed_members(built_everywhere):
    members = {"student": 3, "dataset": 1}
    loader = built_everywhere(batch_size=4, members=members)
    assert loader.actor.rollout.group_size == 4
    mixed = [batch.trajectories for batch in loader]
    plain = [batch.trajectories for batch in built_everywhere(batch_size=4, group_size=4)]
    for both, alone in zip(mixed, plain, strict=True):
        assert both.sources == ("student", "dataset")
        assert torch.equal(both.source.view(-1, 4), torch.tensor([[0, 0, 0, 1]]).expand(4, 4))
        assert torch.equal(both.seed, alone.seed)
        for i in (both.source == 0).nonzero().flatten().tolist():  # its draws are its own, whoever is in the group
            ours, theirs = (batch.actions[i][batch.mask[i]].float() for batch in (both, alone))
            assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": {"student": 0, "dataset": 1}}, r"rollout\.members: every policy must make at least one"),
        (
            {"members": {"student": 2}, "behavior": {"dataset": 1.0}},
            r"rollout\.members=.* and rollout\.behavior=.* both",
        ),
        ({"members": {"student": 2}, "group_size": 3}, r"rollout\.group_size=3, but rollout\.members are 2; leave"),
    ],
)
def test_members_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**settings)


def test_members_keep_their_place_in_a_mixture(built_everywhere, every_world):
    """Whoever acts, a row's prompt, example and reward belong together."""
    rows = every_world.make_rows(24)
    loader = built_everywhere(batch_size=24, behavior={"student": 0.5, "dataset": 0.5})
    loader.actor.setting.reward = LongerIsBetter(2)
    batch = next(iter(loader)).trajectories
    assert batch.reward is not None
    for i, example in enumerate(batch.examples):
        assert example == rows[int(batch.row[i])]
        if every_world.setting is DiffusionDistillation:
            continue
        assert _prompt(batch.observation, i) == _prompt(
            loader.actor.setting.collate([example], loader.actor.policies["student"]), 0
        )
        text = loader.actor.setting.tokenizer().decode(batch.actions[i][batch.mask[i]], skip_special_tokens=True)
        assert float(batch.reward[i]) == float(len(text) >= 2)


def _prompt(inputs: dict[str, torch.Tensor], i: int) -> list[int]:
    return inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()


@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=24),
    groups=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_group_statistics_are_numpys(rewards, groups, seed):
    group = np.random.default_rng(seed).integers(100, 100 + groups, len(rewards))
    mean, std = group_statistics(torch.tensor(rewards), torch.tensor(group))
    for i in range(len(rewards)):
        mine = np.array(rewards)[group == group[i]]
        assert float(mean[i]) == pytest.approx(mine.mean(), abs=1e-5)
        assert float(std[i]) == pytest.approx(mine.std(), abs=1e-4)


def test_seeds_differ_and_are_fixed():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2**33, 0)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)
    assert derived_seed(3, 1, 4) == derived_seed(3, 1, 4)
    assert all(0 <= derived_seed(i) < 2**63 for i in range(50))


# -- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "done", "staleness", "epochs"),
    [
        *(("text", done, *how) for done in (0, 1, 3, 4, 5, 11, 12, 13, 20) for how in ((0, 1), (2, 1), (0, 2), (1, 3))),
        *(
            (name, *how)
            for name in ("vision_language", "gui_grounding", "diffusion")
            for how in ((5, 2, 1), (13, 1, 3))
        ),
    ],
)
def test_a_resumed_loader_goes_on_exactly(setting, done, staleness, epochs, make_world, tmp_path):
    """Also in the middle of a generation batch, of an epoch over it, and across the border of an epoch over the data
    (12 micro-batches each, if every generation batch is trained once). A step that is not done is begun again."""
    built = builder(make_world(setting), tmp_path)
    changes = {"batch_size": 8, "group_size": 2, "micro_batch_size": 4, "accumulate": 2}
    changes |= {"max_staleness": staleness, "epochs": epochs}
    unbroken = built(**changes)
    unbroken.actor.setting.reward = LongerIsBetter()
    seen, stream = [], train(unbroken)
    for _ in range(done):
        seen.append(next(stream))
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    assert unbroken.unfinished == done % 2
    expected = [*seen[done - done % 2 :], *(next(stream) for _ in range(6))]

    file.seek(0)
    resumed = built(**changes)
    resumed.actor.setting.reward = LongerIsBetter()
    steps_of(resumed).completed = done // 2
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for mine, theirs in zip(train(resumed), expected, strict=False):
        same(mine.trajectories, theirs.trajectories)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:20], r"with 24 training examples, there are now 20, and row 21 is missing"),
        (lambda rows: [*rows, rows[0]], r"there are now 25, and row 25 is new \{'prompt': '0\+0="),
        (lambda rows: rows[:3] + rows[4:], r"there are now 23, and row 4 is now \{'prompt': '4\+4="),
        (lambda rows: rows[::-1], r"written with other training examples \(the same in another order\): row 1 is now"),
        (lambda rows: [*rows[:7], {**rows[7], "answer": "15"}, *rows[8:]], r"row 8 is now .*'answer': '15'"),
        (lambda rows: [{**row, "task": row["answer"]} for row in rows], r"row 1 is now .*'task': '0'"),
        (lambda rows: [*rows[:9], {**rows[9], "more": None}, *rows[10:]], r"row 10 is now .*'more': None"),
    ],
)
def test_other_rows_are_refused_on_resume(change, message, built, rows):
    state = built(rows=rows).state_dict()
    built(rows=[dict(reversed(row.items())) for row in rows]).load_state_dict(state)
    with pytest.raises(ValueError, match=message + r"(.|\n)*Its position and pending rollouts mean nothing here"):
        built(rows=change(rows)).load_state_dict(state)


def test_pending_rollouts_stay_with_their_rows(built, rows):
    loader = built(rows=rows, batch_size=8, micro_batch_size=2)
    next(iter(loader))
    with pytest.raises(ValueError, match="the same in another order"):
        built(rows=rows[::-1], batch_size=8, micro_batch_size=2).load_state_dict(loader.state_dict())


def test_another_seed_is_refused_on_resume(built):
    with pytest.raises(ValueError, match="seed_everything was 0 in the checkpoint and is now 5: the order of the rows"):
        built(seed=5).load_state_dict(built().state_dict())


def test_another_accumulation_is_refused_in_the_middle_of_its_step(built):
    loader = built(batch_size=8, micro_batch_size=2)
    stream = train(loader)
    next(stream)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"middle of an optimizer step of trainer.accumulate_grad_batches=2"):
        built(batch_size=8, micro_batch_size=2, accumulate=2).load_state_dict(state)
    next(stream)
    built(batch_size=8, micro_batch_size=2, accumulate=2).load_state_dict(loader.state_dict())


def test_no_epoch_repeats_anothers_order_or_draws(every_world, tmp_path):
    """Also where Lightning asks for another loader at each."""
    seen = []

    class Watching(every_world.setting):
        def training_step(self, batch, batch_idx):
            seen.append((batch.trajectories.row.tolist(), batch.trajectories.group.tolist()))
            return super().training_step(batch, batch_idx)

    module = every_world.alone(setting=Watching, rollout=Rollout(batch_size=24, horizon=2))
    every_world.fit(module, tmp_path, steps=3, reload_dataloaders_every_n_epochs=1)
    rows, groups = zip(*seen, strict=True)
    assert len({str(order) for order in rows}) == 3
    assert len({draw for of_epoch in groups for draw in of_epoch}) == 3 * 24


def test_other_cuts_of_a_generation_batch_are_refused_on_resume(built):
    """Its position counts micro-batches: with others it would repeat or leave out some."""
    loader = built(batch_size=8, micro_batch_size=2)
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    with pytest.raises(ValueError, match=r"rollout\.(batch_size|micro_batch_size)"):
        built(batch_size=8, micro_batch_size=4).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"trained 1 times \(rollout\.epochs\); now these would be 8, 4, 2 and 3"):
        built(batch_size=8, micro_batch_size=2, epochs=3).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"rollout\.(batch_size|micro_batch_size)"):
        built(batch_size=4, micro_batch_size=2).load_state_dict(loader.state_dict())


# -- the gradient does not depend on how the batch is cut (rule 2) ------------------------------------------------


def cut_objectives() -> dict[str, Objective]:
    return {
        "steps": Objective([Term(ReverseKL())]),
        "weights": Objective([Term(ForwardKL(), weights=[TopEntropy(0.4)], normalizer="weights")]),
        "group": Objective([Term(PolicyGradient(RewardPlusLogRatio())), Term(ReverseKL(), coefficient=0.3)]),
        "means": Objective(
            [
                Term(ReverseKL(), weights=[TopEntropy(0.4, of="teacher")], normalizer="on"),
                Term(PolicyGradient(LogRatio(against="behavior")), normalizer="trajectories"),
                Term(ForwardKL(), weights=[Confidence()], normalizer="weights"),
            ]
        ),
    }


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "qwen3") for name in ("steps", "weights", "group", "means")),
        *(("group", setting) for setting in ("gemma3", "llama", "vision_language", "gui_grounding")),
    ],
)
def test_the_gradient_does_not_depend_on_micro_batches(name, setting, make_world, tmp_path):
    found = []
    world = make_world(setting)

    class Watching(world.setting):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            self.gradient = torch.cat([p.grad.flatten().double() for p in self.student.parameters()])

    for size, accumulate in ((16, 1), (4, 4), (1, 16)):
        module = world.module(
            objective=cut_objectives()[name],
            setting=Watching,
            rollout=Rollout(batch_size=8, group_size=2, horizon=8, micro_batch_size=size),
            reward=LongerIsBetter(6),
        )
        world.fit(module, tmp_path, accumulate_grad_batches=accumulate)
        weights = torch.cat([p.detach().flatten().double() for p in module.student.parameters()])
        found.append((module.gradient, weights))
    gradient, weights = found[0]
    assert gradient.norm() > 1e-3
    for other, theirs in found[1:]:
        # what float32 leaves after the longer way through eyes and language model
        assert (other - gradient).norm() / gradient.norm() < 3e-6
        assert (theirs - weights).norm() / weights.norm() < 1e-6


@pytest.mark.parametrize("name", ["steps", "weights", "group", "means"])
def test_several_epochs_over_a_generation_batch_do_not_depend_on_micro_batches(name, make_world, tmp_path):
    """Optimizer steps are shuffled from the second time on, and each keeps its trajectories."""
    world, found = make_world("text"), []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        module = world.module(
            objective=cut_objectives()[name],
            rollout=Rollout(batch_size=16, group_size=2, horizon=8, micro_batch_size=size, epochs=3),
            reward=LongerIsBetter(6),
        )
        world.fit(module, tmp_path, steps=12, accumulate_grad_batches=accumulate)
        found.append(torch.cat([p.detach().flatten().double() for p in module.student.parameters()]))
    for other in found[1:]:
        assert (other - found[0]).norm() / found[0].norm() < 1e-5


def test_an_epoch_that_ends_in_the_middle_of_an_optimizer_step_is_refused(tiny_student, tiny_teacher, tmp_path):
    """Lightning would take it with some of its micro-batches, and begin the next one with the others."""
    module = make_module(tiny_student, tiny_teacher, rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=4))
    with pytest.raises(ValueError, match=r"limit_train_batches=3 ends an epoch after 3 micro-batches, in the middle"):
        fit(module, tmp_path, accumulate_grad_batches=2, limit_train_batches=3)
    fit(module, tmp_path, accumulate_grad_batches=2, limit_train_batches=4)
