"""Rollouts of several turns: what is trained, what is read, and that each token is read once."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning import Rollout
from opd_lightning.blend import Blend
from opd_lightning.callbacks import Curriculum, Staircase
from opd_lightning.environment import Environment, Turn, seed_of
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.autoregressive import DecodeLoop, Generate
from opd_lightning.modalities.autoregressive.engines.decode_loop import Remembering
from opd_lightning.modalities.autoregressive.engines.engine import Rereading
from opd_lightning.modalities.autoregressive.observing import between, check_observations
from opd_lightning.objective import CrossEntropy, Objective, PolicyGradient, Term, Turns
from opd_lightning.objective.advantage import GroupRelative
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Teacher
from tests.modalities.autoregressive.test_rendering import CHATML, FORGETFUL, MISTRAL3, QWEN3, R1, renderer, stops
from tests.modalities.autoregressive.test_turns import TEMPLATES, close_to_replay
from tests.objective.reference import examples
from tests.tiny import CHAT_TEMPLATE, act, chat_tokenizer, fit, make_module, make_rows, no_teacher, save_model

ENDS = 24  # ids that end a turn beside the stop token, so that random models write short turns


class Echo(Environment):
    """Says back how long the turn was; ends at a turn of the seed's choice, with a reward for every turn."""

    rewards = True

    def __init__(self, most: int = 100, failing: bool = False) -> None:
        self.most, self.failing = most, failing

    def reset(self, row: Any, seed: int) -> Any:
        return {"turn": 0, "last": min(self.most, 2 + seed % 3)}

    def step(self, state: Any, text: str) -> Turn:
        turn = state["turn"] + 1
        if self.failing and turn == 1:
            raise RuntimeError("broken")
        return Turn("1+" * (turn % 3) + f"{len(text)}=", state | {"turn": turn}, turn >= state["last"], float(turn))


class Endless(Echo):
    def reset(self, row: Any, seed: int) -> Any:
        return {"turn": 0, "last": 10**9}


def acting(folder: Any, environment: Environment | None = None, ends: int = 0, **settings: Any) -> Any:
    rollout = Rollout(batch_size=4, **{"horizon": 120, **settings.pop("rollout", {})})
    module = make_module(folder, {}, no_teacher(), environment=environment or Echo(), rollout=rollout, **settings)
    if ends:
        module.eos = [*module.eos, *range(10, 10 + ends)]
    return module


def check(module: Any, acted: Any) -> None:
    """Every turn is trained up to its stop token, observations are those of the environment, and masked."""
    environment, student = module.environment, module.policies["student"]
    made = module.renderer(student)
    for i, row in enumerate(acted.examples):
        ids, mask, turn = (
            values[i, : int(acted.extent[i])].tolist() for values in (acted.actions, acted.mask, acted.channels["turn"])
        )
        state, place = environment.reset(row, seed_of(row)), 0
        rewards = []
        for number in range(turn[-1] + 1):
            own = [t for t, m, n in zip(ids, mask, turn, strict=True) if m and n == number]
            assert not any(t in module.eos for t in own[:-1])
            assert mask[place : place + len(own)] == [True] * len(own)
            place += len(own)
            if own[-1] not in module.eos:
                break
            answer = environment.step(state, made.tokenizer.decode(own[:-1], skip_special_tokens=False))
            state = answer.state
            rewards.append(answer.reward)
            if number < turn[-1]:
                expected = between(made, module.asked(row), answer.observation, "user", module.eos)
                assert ids[place : place + len(expected)] == expected
                assert mask[place : place + len(expected)] == [False] * len(expected)
                assert set(turn[place : place + len(expected)]) == {number + 1}
                place += len(expected)
            else:
                assert bool(acted.stopped[i]) == answer.done
        assert place == len(ids)
        assert float(acted.channels["reward"][i].sum()) == sum(rewards)
    close_to_replay(module, acted)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Any:
    return save_model(tmp_path_factory.mktemp("chat"), tokenizer=chat_tokenizer())


@pytest.mark.parametrize("engine", [DecodeLoop(), DecodeLoop(packed=False), Generate()], ids=["packed", "own", "slow"])
def test_turns_are_trained_and_observations_are_not(engine, chat):
    module = acting(chat, ends=ENDS, engine=engine, rollout={"horizon": 200})
    acted = act(module, [*make_rows(6), *make_rows(2)], horizon=200)
    assert int(acted.channels["turn"].max()) >= 2
    check(module, acted)


THINKS_NOT = QWEN3.replace("enable_thinking is defined and not enable_thinking", "true")


OWN = {"tiny": CHAT_TEMPLATE, "Mistral 3": MISTRAL3, "ChatML": CHATML, "Qwen 3, no thinking": THINKS_NOT}
OTHERS = [name for name in TEMPLATES if name not in {*OWN, "Qwen 3"}]  # which thinks, and is refused below


@pytest.fixture(scope="module", params=[*OWN, *OTHERS])
def talker(request, tmp_path_factory) -> Any:
    """A student of each template, of letters or of a tokenizer that knows the template's own tokens."""
    name, folder = request.param, tmp_path_factory.mktemp("talker")
    if name in OWN:
        save_model(folder, tokenizer=chat_tokenizer(OWN[name]))
    else:
        template, end = TEMPLATES[name]
        tokenizer = renderer(template).tokenizer
        tokenizer.pad_token = "<unk>"
        save_model(folder, tokenizer=tokenizer, generation={"eos_token_id": stops(renderer(template), end)})
    return acting(folder, ends=ENDS, chat_template_kwargs={"tools": []} if name == "ChatML" else None)


@examples(8)
@given(questions=st.lists(st.text("abc 42,?", min_size=1).filter(str.strip), min_size=1, max_size=5), data=st.data())
def test_whatever_is_asked_no_observation_prompt_or_padding_is_trained(talker, questions, data):
    settings = {"seed": data.draw(st.integers(0, 99)), "temperature": data.draw(st.sampled_from([0.7, 1.0]))}
    acted = act(
        talker, [{"prompt": question} for question in questions], horizon=data.draw(st.integers(5, 150)), **settings
    )
    check(talker, acted)


@pytest.mark.parametrize("name", ["text", "gemma3", "vision_language", "gui_grounding"])
def test_every_setting_acts_in_turns(name, make_world):
    world = make_world(name)
    module = world.alone(environment=Echo(), rollout=Rollout(horizon=120))
    module.eos = [*module.eos, *[i for i in range(module.vocabulary) if i not in module.suppressed()][3::4]]
    acted = act(module, world.make_rows(5), horizon=60)
    assert int(acted.channels["turn"].max()) >= 1
    check(module, acted)


def test_keeping_what_was_read_changes_nothing_of_what_is_written(chat):
    rows = [*make_rows(5), *make_rows(3)]
    kept = act(acting(chat, ends=ENDS), rows, seed=3)
    again = act(acting(chat, ends=ENDS, engine=Generate()), rows, seed=3)
    alone = [act(acting(chat, ends=ENDS), [row], seed=3 + 1000 * i) for i, row in enumerate(rows)]
    assert torch.equal(kept.actions, again.actions)
    assert torch.equal(kept.mask, again.mask)
    torch.testing.assert_close(kept.behavior_log_probs, again.behavior_log_probs, atol=1e-4, rtol=0)
    for i, one in enumerate(alone):
        extent = int(kept.extent[i])
        assert one.actions[0].tolist()[:extent] == kept.actions[i].tolist()[:extent]
        assert int(one.extent) == extent
    assert float(again.channels["read"].sum()) > 1.5 * float(kept.channels["read"].sum()), "Generate reads all again"


@pytest.mark.parametrize("packed", [True, False])
def test_each_token_is_read_once_over_eight_turns(packed, chat, monkeypatch):
    module = acting(chat, Endless(), ends=60, engine=DecodeLoop(packed=packed), rollout={"horizon": 230})
    read: list[int] = []
    embedding = module.policies["student"].model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    (prompt,) = [len(module.prompt_ids(row, module.policies["student"])) for row in make_rows(1)]
    act(module, make_rows(1))  # in which a trial of the model is made
    read.clear()
    acted = act(module, make_rows(1), horizon=230, seed=1)
    assert int(acted.channels["turn"].max()) == 7, "eight turns, and no more"
    assert not acted.stopped.any()
    expected = prompt + int(acted.extent) - 1  # nobody reads the last one
    assert int(acted.channels["read"].sum()) == expected
    assert sum(read) == expected


def test_episodes_go_on_from_recorded_turns(chat):
    """The environment is where the recorded turns led, and what it says is read from there on."""
    environment = Endless()
    module = acting(chat, environment, ends=40)
    recorded = [{"role": "assistant", "content": "abc"}, {"role": "user", "content": "recorded"}]
    row = {"prompt": "1+2=", "completion": [*recorded, {"role": "assistant", "content": "xyz"}]}
    acted = act(module, [row, row], prefix_turns=1, horizon=200, turns=4)
    student = module.policies["student"]
    ids, written = module.renderer(student).completion(row, [module.eos[0]])
    begin = written.index(False)
    begin += written[begin:].index(True)
    for i in range(2):
        assert acted.actions[i, :begin].tolist() == ids[:begin]
        assert not acted.mask[i, :begin].any()
        turn, mask = acted.channels["turn"][i], acted.mask[i]
        assert int(turn[begin]) == 1
        assert int(turn[mask].max()) == 3, "recorded turns count"
        own = acted.actions[i][mask & (turn == 1)].tolist()
        state = environment.step(environment.reset(row, 0), "abc").state
        answer = environment.step(state, module.tokenizer().decode(own[:-1]))
        expected = between(module.renderer(student), row, answer.observation, "user", module.eos)
        place = begin + len(own)
        assert acted.actions[i, place : place + len(expected)].tolist() == expected
        assert float(acted.channels["reward"][i].sum()) == 2 + 3 + 4, "what was recorded has none"
    close_to_replay(module, acted)


class Sleepy(Echo):
    """Takes another time for each step; what it says is the same."""

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self.at_once, self.threads = at_once, set()

    def step(self, state: Any, text: str) -> Turn:
        self.threads.add(threading.get_ident())
        time.sleep(0.02 * (len(text) % 3))
        return super().step(state, text)


class Watched(Echo):
    """Says when it was asked."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def step(self, state: Any, text: str) -> Turn:
        self.events.append("step")
        return super().step(state, text)


def test_the_environment_answers_while_others_are_written(chat):
    events: list[str] = []
    module = acting(chat, Watched(events), ENDS)
    embedding = module.policies["student"].model.get_input_embeddings()
    act(module, make_rows(1), turns=1)  # in which a trial of the model is made
    events.clear()
    embedding.register_forward_hook(lambda *_: events.append("read"))
    act(module, make_rows(6), turns=1, horizon=150)
    assert events.count("step") > 1
    assert "read" in events[events.index("step") :], "of the same turn, since there is one alone"


def test_however_long_steps_take_the_rollout_is_the_same(chat):
    alone, beside = Sleepy(1), Sleepy(4)
    one, other = (act(acting(chat, environment, ENDS), make_rows(6), horizon=150) for environment in (alone, beside))
    for name in ("actions", "mask", "behavior_log_probs", "stopped"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert all(torch.equal(one.channels[name], other.channels[name]) for name in one.channels)
    assert len(alone.threads) == 1
    assert len(beside.threads) > 1


def test_what_recorded_turns_have_ended_is_not_trained(chat):
    module = acting(chat, Echo(most=1), ends=ENDS)
    recorded = [{"role": "assistant", "content": "abc"}, {"role": "user", "content": "recorded"}]
    row = {"prompt": "1+2=", "completion": [*recorded, {"role": "assistant", "content": "xyz"}]}
    acted = act(module, [row, make_rows(1)[0]], prefix_turns=1, horizon=100)
    assert not acted.mask[0].any()
    assert acted.mask[1].any()


def test_turns_and_horizon_end_an_episode(chat):
    module = acting(chat, Endless(), ends=60)
    acted = act(module, make_rows(4), turns=3, horizon=200)
    assert int(acted.channels["turn"].max()) == 2
    acted = act(module, make_rows(4), horizon=17)
    assert acted.mask.shape[1] <= 17
    assert not acted.stopped.any()
    assert bool(acted.mask.gather(1, acted.extent[:, None] - 1).all())


def test_the_environments_rewards_are_the_trajectorys(chat, tmp_path):
    objective = Objective([Term(PolicyGradient(GroupRelative()), teacher=None)])
    module = make_module(
        chat, {}, objective, environment=Echo(), rollout=Rollout(batch_size=2, group_size=2, horizon=60)
    )
    module.eos = [*module.eos, *range(10, 40)]
    rewards: list[Any] = []
    judged = type(module.actor).judged

    def watch(self: Any, trajectories: Any) -> Any:
        rewards.append((value := judged(self, trajectories)).reward)
        torch.testing.assert_close(value.reward, value.channels["reward"].sum(1))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module.actor), "judged", watch)
        trainer = fit(module, tmp_path, steps=2)
    assert len(rewards) >= 2
    logged = trainer.logged_metrics
    assert logged["train/turns"] >= 1
    assert {"train/read", "train/observed", "train/failures"} <= logged.keys()


def test_depth_grows_over_training_and_turns_are_weighed(chat, tmp_path):
    depth = Curriculum(schedules={"rollout.turns": Staircase(1, 3, every=1)})
    objective = Objective([Term(CrossEntropy(), teacher=None, weights=[Turns(last=1)], normalizer="on")])
    rollout = Rollout(batch_size=4, horizon=200, turns=1)
    module = make_module(chat, {}, objective, environment=Endless(), rollout=rollout)
    module.eos = [*module.eos, *range(10, 70)]
    seen: list[int] = []
    sample = type(module).sample

    def watch(self: Any, *arguments: Any) -> Any:
        acted = sample(self, *arguments)
        seen.append(int(acted.channels["turn"][acted.mask].max()) + 1)
        return acted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "sample", watch)
        fit(module, tmp_path, steps=3, callbacks=[depth])
    assert seen[-3:] == [1, 2, 3]


def test_evaluation_goes_as_far_as_was_configured_whatever_callbacks_turn(chat):
    module = acting(chat, ends=ENDS, environment=Endless(), rollout={"turns": 3})
    module.rollout.turns = 1
    assert module.evaluation.applied_to(module.rollout).turns == 3
    own = acting(chat, environment=Endless(), evaluation=Evaluation(before=False, turns=2))
    assert own.evaluation.applied_to(own.rollout).turns == 2
    with pytest.raises(ValueError, match=r"evaluation\.turns must be >= 1, got 0"):
        Evaluation(turns=0)


class Last:
    """A verifier that sees the answer alone: what was written in the last turn."""

    columns = ()

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, completion: str, example: Any) -> float:
        self.texts.append(completion)
        return 0.5


def test_a_verifier_reads_the_last_turn_and_goes_before_the_environment(chat):
    verifier = Last()
    module = acting(chat, ends=ENDS, reward=verifier)
    acted = act(module, make_rows(4))
    scores, samples = module.rewards(acted)
    assert scores == [0.5] * 4
    for i, text in enumerate(verifier.texts):
        own = acted.mask[i] & (acted.channels["turn"][i] == acted.channels["turn"][i][acted.mask[i]].max())
        assert text == module.written_as(acted.actions[i][own].tolist())
        assert samples[i]["completion"] == text
        assert samples[i]["conversation"] == module.tokenizer().decode(acted.actions[i][: int(acted.extent[i])])


def test_given_completions_beside_an_environment_abstain(chat, tmp_path):
    rollout = Rollout(batch_size=4, horizon=60, behavior={"student": 0.5, "dataset": 0.5})
    module = make_module(chat, {}, no_teacher(), environment=Echo(), rollout=rollout)
    fit(module, tmp_path, steps=3)
    assert module.rewards(act(module, make_rows(2), who="dataset"))[0] == [None, None]


def test_an_environment_that_fails_costs_a_message(chat, tmp_path, recwarn):
    module = acting(chat, Echo(failing=True), ends=ENDS)
    acted = act(module, make_rows(4))
    assert "error: RuntimeError: broken" in module.tokenizer().decode(acted.actions[0])
    assert bool((acted.channels["failures"].sum(1) > 0).any())
    fit(module, tmp_path, steps=1)


def test_rollouts_ahead_act_in_turns(chat, tmp_path):
    settings = {"environment": Echo(), "rollout": Rollout(batch_size=2, horizon=60, max_staleness=1)}
    fit(make_module(chat, {}, no_teacher(), **settings), tmp_path, steps=3)


def test_engines_say_whether_they_remember(chat, student):
    module = acting(chat)
    policy = module.policies["student"]
    prompts: Any = type("P", (), {"examples": []})
    assert isinstance(DecodeLoop().begin(policy, module.head(policy), prompts, [], 0), Remembering)
    assert isinstance(Generate().begin(policy, module.head(policy), prompts, [], 0), Rereading)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": None, "rollout": Rollout(turns=2)}, r"rollout\.turns=2, and nothing answers to a turn"),
        (
            {"rollout": Rollout(blend=Blend({"teacher": 0.5}), behavior={"blend": 1.0}), "teachers": 1},
            r"rollout\.blend: policies that act as one write one turn",
        ),
    ],
)
def test_what_means_nothing_together_is_refused(settings, message, chat):
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(chat))))} if settings.pop("teachers", 0) else {}
    with pytest.raises(ValueError, match=message):
        make_module(chat, teachers, no_teacher(), load=False, **{"environment": Echo(), **settings})


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (QWEN3, "user", r"leaves out or rewrites what an earlier turn wrote.* Turn 1 wrote '<think>.*template writes"),
        (FORGETFUL, "user", "leaves out or rewrites what an earlier turn wrote"),
        (R1, "user", "leaves out or rewrites what an earlier turn wrote"),
        (CHAT_TEMPLATE.replace("{{ m.content }}", "{{ '' if m.role == 'tool' else m.content }}"), "tool", "nothing of"),
    ],
)
def test_templates_that_do_not_keep_a_conversation_are_refused(template, role, message):
    made = renderer(template)
    with pytest.raises(ValueError, match=rf"(?s)model\.environment: .*{message}"):
        check_observations(made, role, stops(made, "<|im_end|>"))


def test_templates_that_keep_it_are_not(chat):
    for template, options in ((CHAT_TEMPLATE, {}), (QWEN3, {"enable_thinking": False})):
        made = renderer(template, options=options)
        check_observations(made, "user", stops(made, "<|im_end|>"))
