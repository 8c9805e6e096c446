"""Killed between notes and training: what is saved is not asked about again, and the run ends as if it had not been."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from tests.processes import finish, last, start
from tests.test_resume import configuration

STEPS, GENERATIONS, PROMPTS = 6, 3, 16


def run(folder: Path, world, ranks: int, kill_at: int | None = None):
    """Two optimizer steps to a generation batch, of as many rollouts on any number of ranks."""
    rollout = {"batch_size": PROMPTS // ranks, "micro_batch_size": 4 // ranks, "horizon": 6}
    config = configuration(folder, world, {"rollout": rollout, "teacher": "ema", "accumulate": 2})
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["trainer"] |= {"max_steps": STEPS, "callbacks": ["tests.faults.counting.Killed"]}
    settings["trainer"]["strategy"] = "ddp" if ranks > 1 else "auto"
    model = settings["model"]["init_args"]
    model["notes"] = {"counted": "tests.faults.counting.Counted"}
    template = {"prompt": "{{ reflection }}+{{ number }}+{{ prompt }}"}
    model["teachers"]["teacher"]["view"] = {"class_path": "PromptView", "init_args": template}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {"CALLS": str(folder / "calls")} | ({} if kill_at is None else {"KILL_AT": str(kill_at)})
    return start(config, "--ckpt_path=last", ranks=ranks, environment=environment), config


def calls(folder: Path) -> Counter:
    """How often each rollout was asked about, by its seed."""
    lines = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return Counter(seed for line in lines for seed in json.loads(line))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, make_world):
    made = {}

    def get(ranks: int):
        if ranks not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            process, config = run(folder, make_world("text"), ranks)
            finish(process)
            made[ranks] = last(config), calls(folder)
        return made[ranks]

    return get


@pytest.mark.parametrize(
    ("before", "after", "kill_at"),
    [
        (1, 1, 3),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 3, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_notes_of_saved_rollouts_are_never_made_again(before, after, kill_at, unbroken, tmp_path, make_world):
    """Step 3 is the second of its generation batch, which a checkpoint has. At step 2 its notes were just made and are
    in none, so those alone are made again, with the rollouts."""
    expected, asked = unbroken(after)
    assert len(asked) == GENERATIONS * PROMPTS
    assert set(asked.values()) == {1}
    process, config = run(tmp_path, make_world("text"), before, kill_at)
    assert process.end() != 0
    assert last(config)["global_step"] == kill_at
    process, config = run(tmp_path, make_world("text"), after)
    finish(process)
    # 1. who was asked about how often
    found = calls(tmp_path)
    assert found.keys() == asked.keys(), "the same rollouts"
    assert Counter(found.values()) == (
        {1: GENERATIONS * PROMPTS} if kill_at == 3 else {1: (GENERATIONS - 1) * PROMPTS, 2: PROMPTS}
    )
    # 2. what came out
    assert last(config)["global_step"] == STEPS
    assert last(config)["notes"] == expected["notes"] == {"counted": {"count": GENERATIONS}}
    if before == after:  # another number of ranks trains other rollouts in one optimizer step
        for name, value in expected["state_dict"].items():
            assert torch.equal(last(config)["state_dict"][name], value), name
