"""Kills at random moments, three of each of 16 runs: settings, ranks 1 and 2, rollouts and files made beside or not."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.processes import FORKS, Running, finish, last, start
from tests.test_resume import EMA, configuration
from tests.worlds import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 3
SEED = int(os.environ.get("KILLS_SEED", 0))  # another one kills at other moments


def written(config: Path, world: World, ahead: int) -> Path:
    """The configuration of a run whose teacher moves and whose generation batches last for two optimizer steps."""
    path = configuration(config, world, {**EMA, "rollout": {**EMA["rollout"], "max_staleness": ahead}})
    if ahead:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["checkpoint"]["asynchronous"] = True
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def running(run: Running) -> bool:
    return all(rank.is_alive() for rank in run.ranks)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("setting", ["text", "vision_language", "gui_grounding", "diffusion"])
def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(setting, ranks, ahead, tmp_path, make_world):
    world, moment = make_world(setting), random.Random(f"{setting} {ranks} {ahead} {SEED}")
    unbroken = written(tmp_path / "unbroken", world, ahead)
    warm = FORKS.Process(target=int)  # the first process waits until everything is imported
    warm.start()
    warm.join()
    since = time.perf_counter()
    finish(start(unbroken, ranks=ranks))
    unbroken_time = time.perf_counter() - since
    config = written(tmp_path / "killed", world, ahead)
    checkpoint, steps = config.parent / "checkpoints" / "last.ckpt", []
    since = time.perf_counter()
    run = start(config, ranks=ranks)
    run.wait_for(checkpoint)
    start_time = time.perf_counter() - since
    rest = max(0.0, unbroken_time - start_time)
    time.sleep(moment.uniform(0, 0.3 * rest))
    for _ in range(KILLS):
        if running(run):
            run.kill()
            steps.append(last(config)["global_step"])
        else:
            assert run.end() == 0, run.output
        run = start(config, "--ckpt_path=last", ranks=ranks)
        # while it starts, mostly in its first half, now and then when it is done
        time.sleep(moment.uniform(0.6 * start_time, start_time + 0.3 * rest))
    finish(run)
    expected, found = last(unbroken), last(config)
    print(
        f"{setting}, ranks {ranks}, ahead {ahead}: killed at optimizer steps {steps} of {found['global_step']}; "
        f"unbroken {unbroken_time:.1f} s, of which {start_time:.1f} s to the first checkpoint"
    )
    assert found["global_step"] == expected["global_step"]
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    bits = sum(int((found["state_dict"][key] != value).sum()) for key, value in expected["state_dict"].items())
    assert bits == 0, f"{bits} numbers differ after kills at {steps}"
    for name in ("optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert steps, "all kills came too late"
    assert min(steps) < found["global_step"]
