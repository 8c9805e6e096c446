"""Real runs that hang: they end by themselves, say who waited for whom, and lose no whole step."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from opd_lightning.watchdog import HUNG
from tests.faults.test_processes import HALF, broken, equal
from tests.processes import finish, last, start
from tests.test_resume import AHEAD, EMA, EPISODES, configuration

LIMIT = "--checkpoint.hang_limit=15"
# so that the last whole step is in no checkpoint but the watchdog's
NEVER = "--checkpoint.every_n_train_steps=1000"
PATIENT = {"timeout": None}


def reward(function: str) -> dict:
    return {"class_path": "CallableReward", "init_args": {"function": f"tests.faults.breaking.{function}"}}


def hung(config: Path, environment: dict[str, str], *extra: str, ranks: int | None = None) -> str:
    """Runs until it hangs and ends; returns what it said."""
    process = start(config, LIMIT, NEVER, *extra, environment=environment, ranks=ranks)
    process.end()
    assert {rank.exitcode for rank in process.ranks} == {HUNG}
    assert (config.parent / "hang.txt").read_text(encoding="utf-8").splitlines()[0] in process.output
    return process.output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_hangs_in_a_reward_ends_all_and_loses_no_step(strategy, make_world, tmp_path):
    """Of two ranks, in the reward of the fourth generation batch."""
    world, ranks = make_world("text"), [f"--trainer.strategy={strategy}"]
    if strategy == "ddp":
        ranks.append("--checkpoint.asynchronous=true")
    config = configuration(tmp_path / "whole", world, HALF)
    finish(start(broken(config, reward=reward("stalls"), scoring=PATIENT), *ranks, ranks=2))
    expected = last(config)["state_dict"]

    config = configuration(tmp_path / "hung", world, HALF)
    path = broken(config, reward=reward("stalls"), scoring=PATIENT)
    output = hung(path, {"HANGS_ON": "1", "HANGS_AT": "27"}, *ranks, ranks=2)
    assert "rank 1: is in hang_once, breaking.py:" in output
    assert "rank 0: waits for other ranks in " in output
    assert "Waiting: rank 0. For: rank 1." in output
    assert output.count("thread MainThread:") == 2  # of both ranks
    step = last(config)["global_step"]
    assert step == 3
    finish(start(path, "--ckpt_path=last", *ranks, ranks=2))
    equal(last(config)["state_dict"], expected)


@contextmanager
def server(answers: int):
    """A server that answers so often, and then never again."""
    count, ended = [0], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            count[0] += 1
            if count[0] > answers:
                ended.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"1.0")

        def log_message(self, *_: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    ended.set()
    served.shutdown()


@pytest.mark.slow
def test_a_server_that_hangs_ends_the_run_and_loses_no_step(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), EMA)
    path = broken(config, reward=reward("asks"), scoring=PATIENT)
    with server(answers=50) as url:
        output = hung(path, {"SERVER": url})
    assert "rank 0: is in _once, connection.py:" in output
    assert "asks" in output
    assert last(config)["global_step"] == 6
    with server(answers=10**6) as url:
        finish(start(path, "--ckpt_path=last", environment={"SERVER": url}))
    assert last(config)["global_step"] == 14


@pytest.mark.slow
def test_an_environment_that_hangs_ends_the_run_and_loses_no_step(make_world, tmp_path):
    stalls = {"environment": {"class_path": "tests.faults.breaking.Stalls"}}
    setup = {**EPISODES, "model": stalls, "rollout": {**EPISODES["rollout"], "turn_timeout": 1000.0}}
    config = configuration(tmp_path / "whole", make_world("text"), setup)
    finish(start(config))
    expected = last(config)["state_dict"]
    config = configuration(tmp_path / "hung", make_world("text"), setup)
    output = hung(config, {"HANGS_AT": "100"})
    assert "rank 0: is in end, environment.py:" in output
    assert "in hang_once" in output  # the thread in which the environment is
    assert "rollouts of student" in output
    assert last(config)["global_step"] > 0
    finish(start(config, "--ckpt_path=last"))
    equal(last(config)["state_dict"], expected)


@pytest.mark.slow
def test_a_thread_that_hangs_ends_the_run_which_goes_on_from_the_last_checkpoint(make_world, tmp_path):
    """What it was about to roll out, with weights that are gone, is in no checkpoint that could be made."""
    config = configuration(tmp_path, make_world("text"), AHEAD)
    path = broken(config, student_view={"class_path": "tests.faults.breaking.StallsAhead"})
    output = hung(path, {"HANGS_AT": "40"}, "--checkpoint.every_n_train_steps=1")
    assert "thread rollout_0" in output
    assert "at the last checkpoint" in output
    step = last(config)["global_step"]
    assert 0 < step < 14
    finish(start(path, "--ckpt_path=last"))
    assert last(config)["global_step"] == 14


@pytest.mark.slow
def test_what_holds_pythons_lock_ends_all_the_same(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), EMA)
    path = broken(config, reward=reward("locks"), scoring=PATIENT)
    process = start(path, "--checkpoint.hang_limit=2", environment={"HANGS_AT": "20"})
    assert process.end() != 0
    assert "Timeout" in process.output
    assert "breaking.py" in process.output
    assert torch.load(config.parent / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
