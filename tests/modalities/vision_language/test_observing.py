"""Episodes in which images are observed: their places, their tokens, and that none of them is trained."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning import Rollout
from opd_lightning.environment import Environment, Turn, checked, cut, seed_of
from opd_lightning.images import as_stored
from opd_lightning.modalities.autoregressive import DecodeLoop, Generate, Tools
from opd_lightning.modalities.autoregressive.tools import TAGS
from opd_lightning.modalities.gui_grounding import Spotlight
from opd_lightning.modalities.vision_language import Downscale, VisionLanguageDistillation
from opd_lightning.modalities.vision_language.observing import image_ids, seen_by
from opd_lightning.teacher import Initial, Teacher
from opd_lightning.trajectory import Trajectories
from tests.modalities.autoregressive.test_turns import close_to_replay
from tests.objective.reference import examples
from tests.tiny import act, make_module, no_teacher, save_model, teacher_forced
from tests.tiny_vlm import PLACEHOLDER, VLMS, picture, save_vlm, vlm_rows

SIZES = ((40, 32), (24, 56), (32, 32))


class Painter(Environment):
    """Answers a turn by 0 to 2 pictures among words, other ones in each turn; ends after four."""

    columns, rewards = ("prompt",), True
    shows = frozenset({"image"})

    def reset(self, row: Any, seed: int) -> Any:
        return {"turn": 0, "seed": seed % 1000}

    def step(self, state: Any, text: str) -> Turn:
        turn, seed = state["turn"] + 1, state["seed"]
        parts: list[Any] = [{"type": "text", "text": f"{len(text)}:"}]
        for number in range((seed + turn) % 3):
            image = picture(seed + 7 * turn + number, *SIZES[(seed + number) % 3])
            parts.append({"type": "image", "image": image if turn % 2 else as_stored(image)["bytes"]})
        return Turn([*parts, {"type": "text", "text": "go on"}], state | {"turn": turn}, turn == 4, 1.0)


def acting(folder: Any, environment: Environment | None = None, **settings: Any) -> Any:
    rollout = Rollout(batch_size=4, **{"horizon": 400, **settings.pop("rollout", {})})
    settings = {"environment": environment or Painter(), "blank_check": False, **settings}
    module = make_module(folder, settings.pop("teachers", {}), settings.pop("objective", None) or no_teacher(),
                         VisionLanguageDistillation, rollout=rollout, **settings)  # fmt: skip
    module.eos = [*module.eos, *[i for i in range(module.vocabulary) if i not in module.suppressed()][3::5]]
    return module


def check(module: Any, acted: Any) -> int:
    """Observations stand as the processor writes them, and none of their tokens is trained; returns their images."""
    student, environment, seen = module.policies["student"], module.environment, 0
    processor, pads = student.processor, image_ids(student.processor)
    for i, row in enumerate(acted.examples):
        extent = int(acted.extent[i])
        ids, mask, turn = (
            values[i, :extent].tolist() for values in (acted.actions, acted.mask, acted.channels["turn"])
        )
        assert not any(own and token in module.suppressed() for token, own in zip(ids, mask, strict=True))
        assert not acted.mask[i, extent:].any()
        state, images = environment.reset(row, seed_of(row)), []
        for number in range(turn[-1]):
            own = [t for t, m, n in zip(ids, mask, turn, strict=True) if m and n == number]
            answer = environment.step(state, processor.tokenizer.decode(own[:-1]))
            state = answer.state
            new = [part["image"] for part in answer.observation if part["type"] == "image"]
            images += new
            observed = [t for t, m, n in zip(ids, mask, turn, strict=True) if not m and n == number + 1]
            heard = module.heard(student, row, answer.observation, "user")
            assert observed == heard.ids
            text = "".join(
                PLACEHOLDER[processor.kind] if part["type"] == "image" else part["text"] for part in answer.observation
            )
            given = {"images": [[as_image(image) for image in new]]} if new else {}
            whole = processor(text=[f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"], **given)
            assert observed == list(whole["input_ids"][0])
        values = acted.visible[i] if acted.visible is not None else []
        assert [as_image(v["image"]).tobytes() for v in values] == [as_image(v).tobytes() for v in images]
        assert all(ids[value["at"]] in {*pads, *module.suppressed()} for value in values)
        seen += len(images)
    close_to_replay(module, acted)
    return seen


def as_image(value: Any) -> Any:
    from opd_lightning.images import open_image

    return open_image(value)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in VLMS if name not in ("qwen3_vl", "idefics3")]


@pytest.fixture(scope="module", params=["qwen3_vl", "idefics3", *OTHERS])
def eyes(request, tmp_path_factory) -> tuple[str, Any]:
    return request.param, save_vlm(tmp_path_factory.mktemp(request.param), request.param)


def painted(eyes: tuple[str, Any], **settings: Any) -> Any:
    module = acting(eyes[1], **settings)
    module.policies["student"].processor.kind = eyes[0]
    return module


@pytest.fixture(scope="module")
def painter(eyes) -> Any:
    return painted(eyes)


def test_images_are_read_where_they_were_observed_and_none_is_trained(painter):
    acted = act(painter, vlm_rows(6), horizon=400)
    assert int(acted.channels["turn"].max()) >= 2
    assert check(painter, acted) > 6


@pytest.mark.parametrize("engine", [DecodeLoop(packed=False), Generate()], ids=["own", "slow"])
def test_keeping_what_was_read_changes_nothing(engine, eyes, painter):
    rows = vlm_rows(4)
    kept, again = act(painter, rows, seed=3), act(painted(eyes, engine=engine), rows, seed=3)
    assert torch.equal(kept.actions, again.actions)
    assert torch.equal(kept.mask, again.mask)
    assert kept.observed == again.observed
    torch.testing.assert_close(kept.behavior_log_probs, again.behavior_log_probs, atol=1e-4, rtol=0)
    alone = act(painter, rows[:1], seed=3)
    assert alone.actions[0].tolist() == kept.actions[0, : alone.actions.shape[1]].tolist()


def test_each_token_is_read_once(painter):
    acted = act(painter, vlm_rows(1), seed=1)
    length = len(painter.prompt_ids(acted.examples[0], painter.policies["student"]))
    assert int(acted.channels["turn"].max()) >= 2
    assert int(acted.channels["read"].sum()) == length + int(acted.extent) - 1


@examples(6)
@given(count=st.integers(1, 4), horizon=st.integers(3, 300), seed=st.integers(0, 999))
def test_whatever_is_shown_nothing_observed_is_trained(count, horizon, seed, painter):
    rows = [row | {"prompt": f"{seed} {row['prompt']}"} for row in vlm_rows(count)]
    acted = act(painter, rows, horizon=horizon, seed=seed)
    assert acted.actions.shape[1] <= horizon
    check(painter, acted)


def test_wherever_a_trajectory_is_cut_its_images_are_those_before(painter):
    """Micro-batches, horizons and terms leave out steps, and with them what was observed there."""
    acted = act(painter, vlm_rows(3), seed=5)
    whole = teacher_forced(painter, "student", acted)
    for horizon in range(1, acted.mask.shape[1] + 1, 7):
        part = acted.truncate(horizon)
        apart = (teacher_forced(painter, "student", part) - whole[:, : part.mask.shape[1]])[part.mask].abs()
        assert float(apart.max() if len(apart) else 0) < 1e-4
    for i, one in enumerate(acted.split(1)):
        own = one.mask.shape[1]
        apart = (teacher_forced(painter, "student", one)[0] - whole[i, :own])[one.mask[0]].abs()
        assert float(apart.max()) < 1e-4


def test_what_was_observed_is_part_of_the_state(painter):
    rows = vlm_rows(4)
    acted = act(painter, rows, seed=5)
    file = io.BytesIO()
    torch.save(acted.state_dict(), file)
    file.seek(0)
    again = Trajectories.from_state_dict(torch.load(file, weights_only=True), rows)
    assert again.observed == acted.observed
    other = act(painter, vlm_rows(2), horizon=4)
    joined = Trajectories.concatenate([other, again], painter.padding).select(torch.tensor([4, 0, 2]))
    assert joined.observed == [acted.observed[2], [], acted.observed[0]]
    close_to_replay(painter, joined)


def test_others_go_on_behind_what_was_observed(painter):
    acted = act(painter, vlm_rows(3), seed=5)
    steps = (acted.extent - 1).clamp(min=1)
    branches = painter.actor.branch("student", acted, torch.arange(3), steps, horizon=6, seeds=[1, 2, 3])
    assert branches.observed is not None
    close_to_replay(painter, branches)


def test_other_images_are_other_states(painter):
    acted = act(painter, vlm_rows(4), seed=5)
    blank = as_stored(as_image(picture(0)).point(lambda _: 127))["bytes"]
    first = [[values[0] | {"image": blank}] for values in acted.observed if values]
    row = next(i for i, values in enumerate(acted.observed) if values)
    one = acted.select(torch.tensor([row]))
    size = as_image(one.observed[0][0]["image"]).size
    gray = as_stored(as_image(blank).resize(size))["bytes"]
    other = [[one.observed[0][0] | {"image": gray}, *one.observed[0][1:]]]
    assert first
    before = torch.arange(one.mask.shape[1]) <= one.observed[0][0]["at"]
    apart = teacher_forced(painter, "student", one)[0]
    one.observed = other
    apart = (apart - teacher_forced(painter, "student", one)[0]).abs()
    assert float(apart[before].max()) < 1e-6
    assert float(apart[~before].max()) > 1e-4


# -- one architecture ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return save_vlm(tmp_path_factory.mktemp("one"))


def test_a_teacher_sees_what_its_view_marks_and_the_student_does_not(folder):
    class Boxed(Painter):
        def step(self, state: Any, text: str) -> Turn:
            turn = super().step(state, text)
            return Turn(
                [part | ({"box": [4, 4, 20, 20]} if part["type"] == "image" else {}) for part in turn.observation],
                turn.state, turn.done, turn.reward,
            )  # fmt: skip

    module = acting(folder, Boxed(), teachers={"teacher": Teacher(Initial(), view=Spotlight(hint=""))})
    rows = [row | {"box": [2, 2, 12, 12]} for row in vlm_rows(4)]
    acted = act(module, rows, seed=5)
    values = next(v for v in acted.observed if v)
    assert values[0]["box"] == [4, 4, 20, 20]
    (plain, *_), (marked, *_) = seen_by(None, values), seen_by(Spotlight(), values)
    assert plain.size == marked.size
    assert plain.tobytes() != marked.tobytes()
    seen = module.observing(module.policies["teacher"], {}, values[:1])
    assert [image.tobytes() for image in next(iter(seen.values()))] == [marked.tobytes()]
    seen = module.observing(module.policies["student"], {}, values[:1])
    assert [image.tobytes() for image in next(iter(seen.values()))] == [plain.tobytes()]
    close_to_replay(module, act(module, rows, seed=5))


def draw(size: int) -> Any:
    """Draws a picture.

    Args:
        size: of its sides.
    """
    return picture(size, size, size)


def test_tools_may_return_images(folder, tmp_path):
    tools = Tools([f"{__name__}.draw"], tags=list(TAGS), describe=False)
    call = f'{TAGS[0]}{{"name": "draw", "arguments": {{"size": 24}}}}{TAGS[1]}'
    answer = tools.step(tools.reset({}, 0), call + call)
    assert [message["content"][0]["type"] for message in answer.observation] == ["image", "image"]
    assert checked(answer, None, {"image"}).observation == answer.observation
    with pytest.raises(TypeError, match="a part of the type 'image', which is not read here"):
        checked(answer, None)
    module = acting(folder, tools)
    heard = module.heard(module.policies["student"], vlm_rows(1)[0], answer.observation, "tool")
    assert len(heard.values) == 2


# -- refusals --------------------------------------------------------------------------------------------------------


def test_who_has_no_eyes_refuses_an_environment_that_shows_images(tmp_path):
    with pytest.raises(ValueError, match=r"Painter shows images, which policies of TextDistillation don't read"):
        make_module(save_model(tmp_path), {}, no_teacher(), environment=Painter(), load=False)


def test_a_student_view_would_not_be_shown_observations(folder):
    with pytest.raises(ValueError, match=r"model\.student_view: it is shown rows alone, and the images"):
        acting(folder, student_view=Downscale(32))


class Broken(Painter):
    """Shows what is no image."""

    def step(self, state: Any, text: str) -> Turn:
        return Turn([{"type": "image", "image": b"none"}], state)


class Empty(Painter):
    def step(self, state: Any, text: str) -> Turn:
        return Turn([{"type": "image"}], state)


@pytest.mark.parametrize("environment", [Broken(), Empty()], ids=["broken", "empty"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_image_costs_its_trajectory(environment, folder):
    acted = act(acting(folder, environment), vlm_rows(3))
    assert acted.channels["failures"].sum(1).tolist() == [1.0] * 3
    assert acted.mask.any(1).all()


def test_long_texts_of_parts_are_cut():
    parts = [{"type": "text", "text": "a" * 9}, {"type": "image", "image": b"" * 9}]
    assert cut(parts, 4)[0]["text"] == "aaaa… [5 more characters]"
    assert cut([{"role": "user", "content": parts}], 4)[0]["content"] == cut(parts, 4)
