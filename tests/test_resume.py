"""A killed and resumed run equals the unbroken one bit for bit (rule 14)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning import Environment, Turn
from tests.processes import finish, last, start
from tests.tiny_vlm import picture
from tests.worlds import World

STEPS = 14


def is_even(completion: str, example: dict) -> float:
    return float(len(completion) % 2 == 0)


class Slow(Environment):
    """Takes its time, so that a run is mostly killed in the middle of an episode."""

    rewards = True

    def reset(self, row: dict, seed: int) -> dict:
        return {"turn": 0, "last": 1 + seed % 4}

    def step(self, state: dict, text: str) -> Turn:
        time.sleep(0.003)
        turn = state["turn"] + 1
        return Turn(f"+{len(text)}=", {**state, "turn": turn}, turn >= state["last"], float(turn))


class Pictures(Slow):
    """Shows another picture after each turn."""

    shows = frozenset({"image"})

    def step(self, state: dict, text: str) -> Turn:
        turn = super().step(state, text)
        image = {"type": "image", "image": picture(turn.state["turn"] + len(text))}
        return Turn([image, {"type": "text", "text": str(turn.observation)}], turn.state, turn.done, turn.reward)


def written(prompt: str, **settings: object) -> dict:
    view = {"class_path": "PromptView", "init_args": {"prompt": prompt}}
    return {"class_path": "Written", "init_args": {"view": view, "about": "wrong", "horizon": 5, **settings}}


PLAIN = {"rollout": {"batch_size": 8, "micro_batch_size": 4, "horizon": 8}, "teacher": "frozen", "accumulate": 1}
# several optimizer steps per generation batch, so that trajectories are pending at every other checkpoint
EMA = {"rollout": {"batch_size": 16, "micro_batch_size": 4, "horizon": 8}, "teacher": "ema", "accumulate": 2}
# two generation batches made ahead are in every checkpoint
AHEAD = {**PLAIN, "rollout": {**PLAIN["rollout"], "max_staleness": 2}}
# most checkpoints are in the middle of an epoch over a generation batch
EPOCHS = {"rollout": {**EMA["rollout"], "epochs": 3}, "teacher": "frozen", "accumulate": 2}
# and a weight that was settled when the batch was rolled out
SETTLED = {**EPOCHS, "weights": ["TopEntropy"]}
# rollouts of several turns, some of which are pending at every other checkpoint
EPISODES = {
    **EMA,
    "teacher": "frozen",
    "rollout": {**EMA["rollout"], "horizon": 40, "turns": 4},
    "model": {"environment": {"class_path": "tests.test_resume.Slow"}},
}
# whose images wait in the checkpoint
PICTURES = {
    **EPISODES,
    "rollout": {**EPISODES["rollout"], "horizon": 120},
    "model": {"environment": {"class_path": "tests.test_resume.Pictures"}},
}
# and a memory of what was written about rollouts, which later ones are written with
PLAYBOOK = {
    **EMA,
    "model": {
        "reward": {"class_path": "CallableReward", "init_args": {"function": "tests.test_resume.is_even"}},
        "notes": {
            "playbook": {
                "class_path": "Playbook",
                "init_args": {
                    "most": 3,
                    "every": 2,
                    "reflection": written("{% for entry in playbook %}{{ entry.text }}{% endfor %}?{{ prompt }}"),
                    "lesson": written("{{ reflection }}?{{ prompt }}", column="lesson"),
                },
            }
        },
        "teachers": {
            "teacher": {
                "weights": {"class_path": "EMA", "init_args": {"rate": 0.2}},
                "view": {
                    "class_path": "PromptView",
                    "init_args": {"prompt": "{% for e in playbook %}{{ e.text }}{% endfor %}{{ prompt }}"},
                },
            }
        },
    },
}


def configuration(folder: Path, world: World, setup: dict) -> Path:
    weights = (
        {"class_path": "EMA", "init_args": {"rate": 0.2}}
        if setup["teacher"] == "ema"
        else {"class_path": "Frozen", "init_args": {"pretrained": {"path": str(world.teacher)}}}
    )
    view = world.yaml_view if setup["teacher"] == "ema" else None
    config = {
        "seed_everything": 3,
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "accumulate_grad_batches": setup["accumulate"],
            "log_every_n_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
        },
        "checkpoint": {"every_n_train_steps": 1},
        "model": {
            "class_path": world.setting.__name__,
            "init_args": {
                "student": {"path": str(world.student), "freeze": world.freeze},
                **world.yaml,
                "teachers": {"teacher": {"weights": weights, "view": view}},
                "objective": {"terms": [{"signal": "ReverseKL", "weights": setup.get("weights", [])}]},
                "rollout": setup["rollout"],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "schedule": {"name": "cosine", "warmup_steps": 2},
                **setup.get("model", {}),
            },
        },
        "data": {"class_path": "PromptData", "init_args": {"train": str(world.write(folder / "data"))}},
    }
    path = folder / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Final checkpoints of unbroken runs, each made once."""
    made: dict[str, dict] = {}

    def get(name: str, world: World, setup: dict) -> dict:
        name = f"{world.setting.__name__}-{name}"
        if name not in made:
            config = configuration(tmp_path_factory.mktemp(name), world, setup)
            finish(start(config))
            made[name] = last(config)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("setting", "name", "setup", "moment"),
    [
        pytest.param("text", "plain", PLAIN, 0.2, marks=pytest.mark.slow),
        pytest.param("text", "plain", PLAIN, 0.7, marks=pytest.mark.slow),
        pytest.param("text", "ema", EMA, 0.5, marks=pytest.mark.slow),
        ("text", "ahead", AHEAD, 0.5),
        ("text", "epochs", EPOCHS, 0.5),
        ("text", "settled", SETTLED, 0.5),
        ("text", "playbook", PLAYBOOK, 0.5),
        pytest.param("text", "episodes", EPISODES, 1.5, marks=pytest.mark.slow),
        pytest.param("vision_language", "ema", EMA, 0.5, marks=pytest.mark.slow),
        pytest.param("gui_grounding", "ema", EMA, 0.5, marks=pytest.mark.slow),
        pytest.param("gui_grounding", "pictures", PICTURES, 3.0, marks=pytest.mark.slow),
        # in the default run: tests/modalities/diffusion/test_setting.py
        pytest.param("diffusion", "ema", EMA, 0.5, marks=pytest.mark.slow),
    ],
)
def test_kill_and_resume_is_bit_exact(setting, name, setup, moment, unbroken, tmp_path, make_world):
    world = make_world(setting)
    expected = unbroken(name, world, setup)
    config = configuration(tmp_path / "run", world, setup)
    process = start(config)
    process.wait_for(config.parent / "checkpoints" / "last.ckpt")
    # from here a run takes a second or two: kill it anywhere in there, in mid-step or in mid-save
    time.sleep(moment * random.Random(f"{name}{moment}").random())
    process.kill()
    seen = last(config)["global_step"]
    if name == "ema":  # in a process that shares nothing with the killed one, not even in which order a set comes
        subprocess.run(
            [sys.executable, "-m", "opd_lightning", "fit", "-c", str(config), "--ckpt_path=last"], check=True
        )
    else:
        finish(start(config, "--ckpt_path=last"))

    found = last(config)
    assert found["global_step"] == expected["global_step"] == STEPS, f"killed at step {seen}"
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value), f"{key} differs after a kill at step {seen}"
    assert any(key.startswith("teacher_state.") for key in found["state_dict"]) == (setup["teacher"] == "ema")
    assert repr(found["notes"]) == repr(expected["notes"]), f"notes differ after a kill at step {seen}"
    assert (name == "playbook") == bool(expected["notes"].get("playbook", {}).get("entries"))
    assert not any("policies" in key for key in found["state_dict"])
