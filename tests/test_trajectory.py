"""Trajectories move, split, cut and join as one."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.objective import Steps
from opd_lightning.trajectory import Trajectories
from tests.objective.reference import examples

PAD = {"ids": (-7.0, "left"), "ids_mask": (0.0, "left")}


def make(lengths: list[int], steps: int | None = None, prompt: int = 3, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    steps = steps or max(1, *lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    count = len(lengths)
    return Trajectories(
        observation={
            "ids": torch.randint(100, (count, prompt), generator=generator),
            "ids_mask": torch.ones(count, prompt, dtype=torch.bool),
            "position": torch.arange(count),
        },
        actions=torch.randint(100, (count, steps), generator=generator),
        mask=mask,
        examples=[{"row": i} for i in range(count)],
        stopped=torch.rand(count, generator=generator) < 0.5,
        behavior_log_probs=torch.randn(count, steps, generator=generator),
        row=torch.arange(count) + 10,
        group=torch.arange(count) // 2,
        weights_version=torch.full((count,), 4),
        seed=torch.randint(2**62, (count,), generator=generator),
        reward=torch.rand(count, generator=generator),
    )


def same(a: Trajectories, b: Trajectories) -> bool:
    """On every trained step, and on everything that is not a step."""
    ours, theirs = ({f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in (a, b))
    for name in ("actions", "behavior_log_probs"):
        if not torch.equal(ours.pop(name)[a.mask], theirs.pop(name)[b.mask]):
            return False
    ours.pop("mask"), theirs.pop("mask")
    observation = ours.pop("observation"), theirs.pop("observation")
    if not all(torch.equal(observation[0][name], observation[1][name]) for name in observation[0]):
        return False
    return all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


def test_what_the_loader_fills_in_later_starts_at_zero():
    mask = torch.ones(2, 1, dtype=torch.bool)
    plain = Trajectories({}, torch.zeros(2, 1), mask, [{}, {}], mask[:, 0], torch.zeros(2, 1))
    for name in ("row", "group", "source", "weights_version", "seed"):
        assert getattr(plain, name).tolist() == [0, 0]
    assert len(plain) == 2
    assert plain.reward is None


def test_select_takes_everything_along_in_order():
    batch = make([3, 1, 2])
    part = batch.select(torch.tensor([2, 0]))
    assert part.row.tolist() == [12, 10]
    assert part.examples == [{"row": 2}, {"row": 0}]
    assert torch.equal(part.observation["ids"], batch.observation["ids"][[2, 0]])
    assert torch.equal(part.reward, batch.reward[[2, 0]])
    assert part.length.tolist() == [2, 3]


def test_what_a_horizon_cuts_has_not_stopped():
    batch = dataclasses.replace(make([3, 1, 2]), stopped=torch.tensor([True, True, False]))
    cut = batch.truncate(2)
    assert cut.length.tolist() == [2, 1, 2]
    assert cut.stopped.tolist() == [False, True, False]
    assert cut.actions.shape == cut.behavior_log_probs.shape == (3, 2)
    assert batch.truncate(3) is batch


@examples(30)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_splitting_loses_no_trained_step(lengths, size, seed):
    batch = make(lengths, seed=seed)
    parts = list(batch.split(size))
    assert [len(part) for part in parts] == [min(size, len(lengths) - i) for i in range(0, len(lengths), size)]
    for part in parts:
        assert part.mask.shape[1] == max(1, int(part.length.max()))
    assert torch.cat([part.length for part in parts]).tolist() == lengths
    for name in ("actions", "behavior_log_probs"):
        together = torch.cat([getattr(part, name)[part.mask] for part in parts])
        assert torch.equal(together, getattr(batch, name)[batch.mask])
    assert torch.equal(torch.cat([part.stopped for part in parts]), batch.stopped)


def test_a_mask_with_holes_is_not_cut():
    batch = make([4, 4])
    batch.mask[:, 0] = False
    assert all(part.mask.shape[1] == 4 for part in batch.split(1))


@examples(30)
@given(
    widths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_joining_pads_prompts_on_their_side_and_steps_on_the_right(widths, seed):
    parts = [make([steps, steps - 1], prompt=prompt, seed=seed + i) for i, (steps, prompt) in enumerate(widths)]
    whole = Trajectories.concatenate(parts, PAD)
    prompt, steps = max(p for _, p in widths), max(s for s, _ in widths)
    assert whole.observation["ids"].shape == (2 * len(parts), prompt)
    assert whole.mask.shape == whole.actions.shape == (2 * len(parts), steps)
    for i, part in enumerate(parts):
        rows = slice(2 * i, 2 * i + 2)
        width = part.observation["ids"].shape[1]
        assert torch.equal(whole.observation["ids"][rows, prompt - width :], part.observation["ids"])
        assert (whole.observation["ids"][rows, : prompt - width] == -7).all()
        assert not whole.observation["ids_mask"][rows, : prompt - width].any()
        assert torch.equal(whole.actions[rows][whole.mask[rows]], part.actions[part.mask])
        assert torch.equal(whole.row[rows], part.row)
    assert whole.length.tolist() == [n for part in parts for n in part.length.tolist()]
    assert len(whole.examples) == len(whole)


def with_channels(lengths: list[int]) -> Trajectories:
    """A number, a vector, a picture and a flag of every step, each of which says whose and which it is."""
    batch = make(lengths)
    number = batch.row[:, None] + torch.arange(batch.mask.shape[1]) / 10
    shapes = {"number": (), "vector": (3,), "picture": (2, 4, 1)}
    channels = {
        name: number.view(*number.shape, *(1 for _ in s)).expand(*number.shape, *s) for name, s in shapes.items()
    }
    return dataclasses.replace(batch, channels={**channels, "flag": batch.row[:, None] % 2 == batch.mask})


def test_channels_of_any_shape_go_with_their_steps():
    batch = with_channels([1, 4, 2])
    parts = [part for size in (1, 2) for part in batch.split(size)] + [batch.truncate(2)]
    parts += [Trajectories.concatenate([with_channels([2, 1]), batch], PAD), batch.select(torch.tensor([2, 0]))]
    parts += [Trajectories.from_state_dict(batch.state_dict(), batch.examples)]
    for part in parts:
        for name, values in part.channels.items():
            assert values.shape[:2] == part.mask.shape
            steps = Steps.of(part)
            row = part.row[steps.trajectory]
            said = steps.channel(name)
            assert said.shape == (len(steps), *values.shape[2:])
            expected = row % 2 == 1 if name == "flag" else row + steps.column / 10
            assert torch.equal(said.flatten(1)[:, 0] if said.dim() > 1 else said, expected), name


def test_sources_with_different_channels_are_refused():
    with pytest.raises(ValueError, match=r"different channels: \[\] and \[flag, number, picture, vector\]"):
        Trajectories.concatenate([with_channels([2, 1]), make([1])], PAD)


def test_the_state_passes_through_a_weights_only_checkpoint():
    batch = dataclasses.replace(make([3, 1, 2]), sources=("student", "dataset"))
    file = io.BytesIO()
    torch.save(batch.state_dict(), file)
    file.seek(0)
    back = Trajectories.from_state_dict(torch.load(file, weights_only=True), batch.examples)
    assert same(back, batch)
    assert torch.equal(back.mask, batch.mask)


def test_moving_moves_every_tensor():
    moved = make([2, 1]).to("meta")
    for item in dataclasses.fields(moved):
        value = getattr(moved, item.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", item.name
    assert all(tensor.device.type == "meta" for tensor in moved.observation.values())


# -- trajectories of several policies -------------------------------------------------------------------------------


def names(batch: Trajectories) -> list[str]:
    return [batch.sources[int(i)] for i in batch.source]


def test_joining_keeps_weights_and_unites_sources():
    """Weights that a callback set before a resume with another number of ranks (catalogue D12)."""
    mine = dataclasses.replace(make([3, 1]), weight=torch.tensor([0.5, 2.0]))
    theirs = dataclasses.replace(make([2]), sources=("teacher", "student"), source=torch.tensor([0]))
    whole = Trajectories.concatenate([mine, theirs], PAD)
    assert whole.weight.tolist() == [0.5, 2.0, 1.0]
    assert names(whole) == ["student", "student", "teacher"]
    assert names(whole.select(torch.tensor([2, 0]))) == ["teacher", "student"]


def test_what_has_no_reward_abstains_beside_others():
    judged, unknown = make([1, 2]), dataclasses.replace(make([3]), reward=None)
    for parts, places in (([judged, unknown], [0, 1]), ([unknown, judged], [1, 2])):
        reward = Trajectories.concatenate(parts, PAD).reward
        assert torch.equal(reward[places], judged.reward)
        assert int(reward.isnan().sum()) == 1


@examples(30)
@given(data=st.data(), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_putting_others_in_their_place_changes_these_alone(data, lengths, seed):
    batch = make(lengths, seed=seed)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True, min_size=1))
    other = make(data.draw(st.lists(st.integers(1, 7), min_size=len(index), max_size=len(index))), prompt=4, seed=seed)
    other.sources = ("teacher",)
    whole = batch.put(torch.tensor(index), other, PAD)
    assert whole.reward is whole.group_mean is whole.group_std is None
    assert whole.examples == batch.examples
    assert torch.equal(whole.row, batch.row)
    assert torch.equal(whole.group, batch.group)
    for i in range(len(batch)):
        part, place = (other, index.index(i)) if i in index else (batch, i)
        assert names(whole)[i] == ("teacher" if i in index else "student")
        assert torch.equal(whole.actions[i][whole.mask[i]], part.actions[place][part.mask[place]])
        assert whole.seed[i] == part.seed[place]
        assert torch.equal(
            whole.observation["ids"][i][-part.observation["ids"].shape[1] :], part.observation["ids"][place]
        )


def test_as_many_are_put_as_are_named():
    with pytest.raises(ValueError, match="2 trajectories can't take the place of 1"):
        make([1, 2]).put(torch.tensor([0]), make([1, 2]), PAD)


# -- draws of parts -------------------------------------------------------------------------------------------------


@examples(30)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), size=st.integers(1, 8), seed=st.integers(0, 99))
def test_draws_depend_neither_on_micro_batches_nor_on_neighbors(lengths, size, seed):
    batch = make(lengths, seed=seed)
    draws = Steps.of(batch).uniform("mask")
    pieces = [Steps.of(piece).uniform("mask") for piece in batch.split(size)]
    assert torch.equal(torch.cat(pieces), draws)
    backwards = Steps.of(batch.select(torch.arange(len(batch)).flip(0))).uniform("mask")
    assert torch.equal(torch.cat(backwards.split(lengths[::-1])[::-1]), draws)
    resumed = Trajectories.from_state_dict(batch.state_dict(), batch.examples)
    assert torch.equal(Steps.of(resumed).uniform("mask"), draws)
    assert torch.equal(Steps.of(batch).at(slice(1, None)).uniform("mask"), draws[1:])


def test_draws_are_uniform_and_those_of_two_purposes_are_apart():
    steps = Steps.of(make([50] * 200))
    one, two = steps.uniform("one"), steps.uniform("two")
    assert ((one >= 0) & (one < 1)).all()
    counts = torch.histc(one, 10, 0, 1) / len(one)
    assert (counts - 0.1).abs().max() < 0.015
    for other in (two, one.roll(1), one.roll(50)):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.04
