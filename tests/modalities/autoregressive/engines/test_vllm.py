"""Rollouts by a server: what it writes is what the student would, before and after the adapter moves.

The server is a fake that speaks the documented protocol; docs/vllm.md says what was tried with a real one.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.modalities.autoregressive.engines import replica
from opd_lightning.modalities.autoregressive.engines.vllm import VllmServer
from opd_lightning.pretrained import Lora
from opd_lightning.rollout_settings import Rollout
from tests.tiny import act, teacher_forced

FAKE = Path(__file__).parent / "fake_vllm.py"


@pytest.fixture(scope="module")
def text(make_world, tmp_path_factory):
    """A student whose head has no rows beyond the tokenizer's ids, which the server would sample."""
    world, folder = make_world("text"), tmp_path_factory.mktemp("student")
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    model = AutoModelForCausalLM.from_pretrained(world.student)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return dataclasses.replace(world, student=folder)


@pytest.fixture(scope="module")
def url(text):
    process = subprocess.Popen([sys.executable, str(FAKE), str(text.student)], stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.communicate()


def moved(module, by: float = 0.3):
    torch.manual_seed(0)
    for parameter in module.student.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)


def test_it_writes_as_the_student_does_and_follows_it(text, url, tmp_path):
    server = VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    module, rows = text.module(lora=Lora(r=4), engine=server), text.make_rows(6)
    names = []
    for _ in range(2):
        rolled = act(module, rows, horizon=8)
        assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4
        again = act(module, rows, horizon=8)
        assert torch.equal(rolled.actions, again.actions), "the seeds decide"
        names.append(adapter(server))
        assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == [adapter(server)], "the old one is gone"
        moved(module)
    assert names[0] != names[1]
    rolled = act(module, rows, horizon=8, temperature=0.5)
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4, (
        "at temperature 1"
    )


def adapter(server: VllmServer) -> str:
    """Under which name the server has the student."""
    return server.replicas[0].given.name


def adapters(url: str) -> list[str]:
    """What the server has loaded."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return [model["id"] for model in json.load(answer)["data"] if model["id"] not in ("first", "base")]


def test_it_trains_and_leaves_nothing_behind(text, url, tmp_path):
    before = adapters(url)
    server = VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    module = text.module(lora=Lora(r=4), engine=server)
    trainer = text.fit(module, tmp_path, steps=2)
    assert trainer.global_step == 2
    assert adapters(url) == before
    assert not list((tmp_path / "adapters").iterdir())
    act(module, text.make_rows(2), horizon=4)
    assert adapters(url) == [*before, adapter(server)], "another stage loads it again"
    server.close()
    server.close()
    assert adapters(url) == before


def test_a_run_that_fails_leaves_nothing_behind_either(text, url, tmp_path):
    class Fails(text.setting):
        def training_step(self, batch, batch_idx):
            assert adapters(url) == [*before, adapter(server)]
            raise KeyError("here")

    before, server = adapters(url), VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    with pytest.raises(KeyError, match="here"):
        text.fit(text.module(lora=Lora(r=4), engine=server, setting=Fails), tmp_path)
    assert adapters(url) == before
    assert not list((tmp_path / "adapters").iterdir())


def test_a_server_that_is_gone_hides_no_error(text, url, tmp_path):
    class Fails(text.setting):
        def training_step(self, batch, batch_idx):
            server.replicas[0].url = "http://127.0.0.1:1"
            raise KeyError("here")

    server = VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    with pytest.raises(KeyError, match="here"), pytest.warns(UserWarning, match="it keeps the adapter opd-"):
        text.fit(text.module(lora=Lora(r=4), engine=server, setting=Fails), tmp_path)
    assert not list((tmp_path / "adapters").iterdir())


def test_a_server_that_did_not_take_the_weights_is_found_out(text, url, tmp_path):
    server = VllmServer(f"{url}/stale", str(tmp_path))
    module, rows = text.module(lora=Lora(r=4), engine=server), text.make_rows(4)
    act(module, rows, horizon=8)
    moved(module)
    with pytest.raises(RuntimeError, match=r"mean log-prob is -\d.* there and -\d.* here, .* apart.*tolerance=0\.05"):
        act(module, rows, horizon=8)


def test_what_can_go_wrong_is_named(text, url, tmp_path):
    module, rows = text.module(lora=Lora(r=4)), text.make_rows(2)

    def use(where: str) -> None:
        module.engine = VllmServer(where, str(tmp_path))

    use("http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"no answer: http://127\.0\.0\.1:1/v1/load_lora_adapter"):
        act(module, rows)
    use(f"{url}/static")
    with pytest.raises(ConnectionError, match=r"answered 404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        act(module, rows)
    assert not list(tmp_path.iterdir()), "an adapter that was not taken is not kept"
    use(f"{url}/short")
    with pytest.raises(RuntimeError, match=r"ended after \d of \d tokens without one of the stop tokens"):
        act(module, rows, horizon=3, temperature=3.0)
    use(url)
    head = dataclasses.replace(module.head(module.policies["student"]), vocabulary=3)
    module.head = lambda policy: head
    with pytest.raises(RuntimeError, match=r"sampled id \d+; the tokenizer has 3"):
        act(module, rows, horizon=8)
    with pytest.raises(ConnectionError, match=r"collective_rpc answered 404.*VLLM_SERVER_DEV_MODE=1"):
        act(text.module(engine=VllmServer(f"{url}/static", str(tmp_path))), rows)
    with pytest.raises(ValueError, match="tolerance=0 must be > 0"):
        VllmServer("http://x", "y", tolerance=0)


def test_all_weights_go_to_the_server_and_it_follows_them(text, url, tmp_path):
    server = VllmServer(url, str(tmp_path / "weights"), tolerance=1e-3)
    module, rows = text.module(engine=server), text.make_rows(6)
    written = []
    for _ in range(3):
        rolled = act(module, rows, horizon=8)
        assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4
        written.append(rolled.actions)
        assert not list((tmp_path / "weights").iterdir()), "they are large"
        moved(module, 0.1)
    assert not torch.equal(written[0], written[1])
    assert server.replicas[0].base == "base"
    trainer = text.fit(text.module(engine=server), tmp_path / "run", steps=2)
    assert trainer.global_step == 2


def test_weights_that_have_not_changed_are_not_sent_again(text, url, tmp_path, monkeypatch):
    server = VllmServer(url, str(tmp_path))
    module, rows = text.module(engine=server), text.make_rows(2)
    (only,) = server.replicas
    sent, ask = [], only.ask
    monkeypatch.setattr(only, "ask", lambda path, *body, **rest: (sent.append(path), ask(path, *body, **rest))[1])
    act(module, rows, horizon=4)
    act(module, rows, horizon=4)
    assert sent.count("/collective_rpc") == sent.count("/reset_prefix_cache") == 1
    with torch.no_grad():
        next(module.student.parameters()).view(-1)[0].add_(1e-3)
    act(module, rows, horizon=4)
    assert sent.count("/collective_rpc") == 2


@pytest.mark.parametrize(("fault", "where"), [("stale", "^http"), ("cached", "^Behind a prompt that it had read")])
def test_old_weights_and_old_prefixes_are_found_out(text, url, tmp_path, fault, where):
    VllmServer(url, str(tmp_path)).replicas[0].ask("/reset_prefix_cache", {})  # what other tests asked
    server = VllmServer(f"{url}/{fault}", str(tmp_path))
    module, rows = text.module(engine=server), text.make_rows(8)
    if fault == "stale":
        moved(module)
    else:
        act(module, rows[:4], horizon=8)
        moved(module)
    with pytest.raises(RuntimeError, match=f"{where}.*does not sample from the student"):
        act(module, rows[4:], horizon=8)


class Servers:
    """Processes of a test, which end with it."""

    def __init__(self, model: Path) -> None:
        self._model, self._processes = model, dict[int, subprocess.Popen]()

    def start(self, port: int = 0) -> int:
        """Starts one; returns its port."""
        command = [sys.executable, str(FAKE), str(self._model), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        port = int(process.stdout.readline())
        self._processes[port] = process
        return port

    def signal(self, port: int, number: int) -> None:
        self._processes[port].send_signal(number)
        if number == signal.SIGKILL:
            self._processes.pop(port).communicate()

    def end(self) -> None:
        for port in list(self._processes):
            self.signal(port, signal.SIGKILL)


@pytest.fixture
def servers(text):
    started = Servers(text.student)
    yield started
    started.end()


def engine(ports: list[int], folder: Path, **settings: object) -> VllmServer:
    return VllmServer([f"http://127.0.0.1:{port}" for port in ports], str(folder), tolerance=1e-3, **settings)


def is_written_by_the_student(module, rows: list[dict], **settings: object) -> torch.Tensor:
    rolled = act(module, rows, horizon=8, **settings)
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4
    return rolled.actions


@pytest.mark.slow
def test_a_server_that_was_started_again_has_other_weights(text, servers, tmp_path):
    port = servers.start()
    module, rows = text.module(engine=engine([port], tmp_path)), text.make_rows(4)
    moved(module)
    act(module, rows, horizon=8)
    servers.signal(port, signal.SIGKILL)
    with pytest.raises(ConnectionError, match=r"no answer: http.*Connection refused"):
        act(module, rows, horizon=8)
    with pytest.raises(ConnectionError, match=rf"no vLLM server answers of http.*{port}"):
        act(module, rows, horizon=8)
    module = text.module(engine=engine([port], tmp_path))
    servers.start(port)
    moved(module)
    act(module, rows, horizon=8)
    servers.signal(port, signal.SIGKILL)
    servers.start(port)
    with pytest.raises(RuntimeError, match="does not sample from the student"):
        act(module, rows, horizon=8)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_servers_share_a_batch_and_one_that_dies_is_left_out_until_it_answers(
    text, servers, tmp_path, monkeypatch, lora
):
    monkeypatch.setattr(replica, "FIRST_PAUSE", 0.0)
    ports = [servers.start(), servers.start()]
    server = engine(ports, tmp_path / "weights", timeout=10)
    first, second = server.replicas
    module, rows = text.module(lora=lora, engine=server), text.make_rows(7)
    expected = is_written_by_the_student(module, rows)
    assert expected.shape[0] == 7
    assert first.read
    assert second.read

    servers.signal(ports[1], signal.SIGKILL)
    with pytest.warns(UserWarning, match=rf"{ports[1]} is left out.*the other 1.*Connection refused"):
        assert torch.equal(is_written_by_the_student(module, rows), expected), "the seeds decide, not who writes"
    moved(module, 0.1)
    written = is_written_by_the_student(module, rows)
    assert second.left_out

    servers.start(ports[1])
    with pytest.warns(UserWarning, match=rf"{ports[1]} answers again"):
        assert torch.equal(is_written_by_the_student(module, rows), written)
    assert second.given == first.given

    # hung, and with what it was asked still waiting when it goes on
    servers.signal(ports[0], signal.SIGSTOP)
    server.replicas[0].timeout = 2
    with pytest.warns(UserWarning, match=rf"{ports[0]} is left out.*the other 1.*timed out"):
        assert torch.equal(is_written_by_the_student(module, rows), written)
    servers.signal(ports[0], signal.SIGCONT)
    moved(module, 0.1)
    with pytest.warns(UserWarning, match=rf"{ports[0]} answers again"):
        is_written_by_the_student(module, rows)

    # started again between two batches, so that nothing but its log-probs gives it away
    servers.signal(ports[0], signal.SIGKILL)
    servers.start(ports[0])
    with pytest.warns(UserWarning, match=rf"{ports[0]} is left out.*does not (sample from the student|exist)"):
        is_written_by_the_student(module, rows)
    assert first.left_out
    with pytest.warns(UserWarning, match=rf"{ports[0]} answers again"):
        is_written_by_the_student(module, rows)
    assert not first.left_out

    for port in ports:
        servers.signal(port, signal.SIGKILL)
    with pytest.raises(ConnectionError, match="Connection refused"), pytest.warns(UserWarning, match="the other 1"):
        act(module, rows, horizon=8)
    server.close()
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_of_a_run_costs_it_nothing(text, servers, tmp_path):
    class Kills(text.setting):
        def training_step(self, batch, batch_idx):
            if self.global_step == 1:
                servers.signal(ports[0], signal.SIGKILL)
            if self.global_step == 3:
                servers.start(ports[0])
            return super().training_step(batch, batch_idx)

    ports = [servers.start(), servers.start()]
    server = engine(ports, tmp_path / "weights")
    trainer = text.fit(text.module(lora=Lora(r=4), engine=server, setting=Kills), tmp_path, steps=6)
    assert trainer.global_step == 6
    assert not any(each.left_out for each in server.replicas)


@pytest.mark.slow
def test_rollouts_ahead_are_written_by_a_server_with_the_weights_that_they_are_ahead_of(text, servers, tmp_path):
    server = engine([servers.start()], tmp_path / "weights")
    rollout = Rollout(batch_size=4, micro_batch_size=4, horizon=8, max_staleness=2)
    trainer = text.fit(text.module(engine=server, rollout=rollout), tmp_path, steps=5)
    assert trainer.global_step == 5
    assert not list((tmp_path / "weights").iterdir())


GOOD = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "length"}
RUBBISH = {
    "html": b"<html>busy</html>",
    "empty": b"",
    "cut": b'{"choices": [{"token_ids": [1',
    "list": b"[]",
    "none": b"null",
    "deep": b"[" * 100_000,
    "no choices": b'{"x": 1}',
    "two choices": json.dumps({"choices": [GOOD, GOOD]}).encode(),
    "no object": b'{"choices": ["x"]}',
    "no tokens": json.dumps({"choices": [GOOD | {"token_ids": []}]}).encode(),
    "text": json.dumps({"choices": [GOOD | {"token_ids": ["1", "2"]}]}).encode(),
    "negative": json.dumps({"choices": [GOOD | {"token_ids": [1, -2]}]}).encode(),
    "NaN": b'{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, NaN]}}]}',
    "null log-prob": b'{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [null]}}]}',
    "too few": b'{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}}]}',
    "too long": json.dumps({"choices": [{"token_ids": [1] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}}]}).encode(),
    "short": json.dumps({"choices": [GOOD | {"finish_reason": "abort"}]}).encode(),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_server_that_answers_rubbish_is_left_out_and_the_last_one_ends_the_run(
    text, url, tmp_path, monkeypatch, kind
):
    # two addresses of one server, which takes all weights twice
    server = VllmServer([url, url.replace("127.0.0.1", "localhost")], str(tmp_path), tolerance=1e-3)
    first, second = server.replicas
    module, rows = text.module(engine=server), text.make_rows(4)
    expected = act(module, rows, horizon=8).actions

    def answers(one: replica.Replica) -> None:
        ask = one.ask
        monkeypatch.setattr(
            one, "ask", lambda path, *a, **k: RUBBISH[kind] if path.endswith("completions") else ask(path, *a, **k)
        )

    answers(second)
    with pytest.warns(UserWarning, match=r"localhost:\d+ is left out \(1\).*the other 1: http://localhost"):
        assert torch.equal(act(module, rows, horizon=8).actions, expected)
    answers(first)
    with (
        pytest.raises(RuntimeError, match=r"http://(localhost|127\.0\.0\.1):\d+: a completion "),
        pytest.warns(UserWarning, match="answers again"),
    ):
        act(module, rows, horizon=8)


def test_a_model_list_that_names_none_leaves_a_server_out(text, url, tmp_path, monkeypatch):
    server = VllmServer([url, url.replace("127.0.0.1", "localhost")], str(tmp_path), tolerance=1e-3)
    _, second = server.replicas
    ask = second.ask
    monkeypatch.setattr(
        second, "ask", lambda path, *a, **k: b'{"data": []}' if path == "/v1/models" else ask(path, *a, **k)
    )
    with pytest.warns(UserWarning, match="names no model"):
        act(text.module(engine=server), text.make_rows(4), horizon=8)


@pytest.mark.slow
def test_a_cache_is_proven_when_its_server_has_a_row_again(text, servers, tmp_path):
    urls = [f"http://127.0.0.1:{servers.start()}", f"http://127.0.0.1:{servers.start()}/cached"]
    server = VllmServer(urls, str(tmp_path), tolerance=1e-3)
    _, cached = server.replicas
    module, rows = text.module(engine=server), text.make_rows(6)
    act(module, rows[:2], horizon=8)
    moved(module, 0.1)
    act(module, rows[2:3], horizon=8)  # nothing for the second one, which has new weights and old caches
    assert cached.unproven
    with pytest.warns(UserWarning, match="cached is left out.*Behind a prompt that it had read before"):
        act(module, rows[4:], horizon=8)


def test_an_adapter_that_was_loaded_without_an_answer_is_not_lost(text, url, tmp_path, monkeypatch):
    server = VllmServer(url, str(tmp_path), tolerance=1e-3)
    (only,) = server.replicas
    module, rows, ask, lost = text.module(lora=Lora(r=4), engine=server), text.make_rows(2), only.ask, []

    def forgets(path, *rest, **more):
        answer = ask(path, *rest, **more)
        if path.endswith("load_lora_adapter") and not lost:
            lost.append(path)
            raise ConnectionError("timed out")
        return answer

    before = adapters(url)
    monkeypatch.setattr(only, "ask", forgets)
    with pytest.raises(ConnectionError, match="timed out"):
        act(module, rows, horizon=4)
    with pytest.warns(UserWarning, match="answers again"):
        act(module, rows, horizon=4)
    moved(module)
    act(module, rows, horizon=4)
    assert adapters(url) == [*before, adapter(server)]
    server.close()
    assert adapters(url) == before


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x"])
def test_urls_of_another_form_are_refused(url, tmp_path):
    with pytest.raises(ValueError, match="must be such as http://localhost:8000"):
        VllmServer(url, str(tmp_path))
    with pytest.raises(ValueError, match="one server, or several different ones"):
        VllmServer(["http://x:1/v1", "http://x:1/"], str(tmp_path))
