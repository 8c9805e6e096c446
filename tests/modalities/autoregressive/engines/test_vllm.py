"""Rollouts by a server: what it writes is what the student would, before and after the adapter moves.

The server is a fake that speaks the documented protocol; docs/vllm.md says what was tried with a real one.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.modalities.autoregressive.engines.vllm import VllmServer
from opd_lightning.pretrained import Lora
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
        names.append(server.model)
        assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == [server.model], "the old one is gone"
        moved(module)
    assert names[0] != names[1]
    rolled = act(module, rows, horizon=8, temperature=0.5)
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4, (
        "at temperature 1"
    )


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
    assert adapters(url) == [*before, server.model], "another stage loads it again"
    server.close()
    server.close()
    assert adapters(url) == before


def test_a_run_that_fails_leaves_nothing_behind_either(text, url, tmp_path):
    class Fails(text.setting):
        def training_step(self, batch, batch_idx):
            assert adapters(url) == [*before, server.model]
            raise KeyError("here")

    before, server = adapters(url), VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    with pytest.raises(KeyError, match="here"):
        text.fit(text.module(lora=Lora(r=4), engine=server, setting=Fails), tmp_path)
    assert adapters(url) == before
    assert not list((tmp_path / "adapters").iterdir())


def test_a_server_that_is_gone_hides_no_error(text, url, tmp_path):
    class Fails(text.setting):
        def training_step(self, batch, batch_idx):
            server.url = "http://127.0.0.1:1"
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
    with pytest.raises(ConnectionError, match=r"no vLLM server answers at http://127\.0\.0\.1:1/v1/load_lora_adapter"):
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
    assert server.model == "base"
    trainer = text.fit(text.module(engine=server), tmp_path / "run", steps=2)
    assert trainer.global_step == 2


def test_weights_that_have_not_changed_are_not_sent_again(text, url, tmp_path, monkeypatch):
    server = VllmServer(url, str(tmp_path))
    module, rows = text.module(engine=server), text.make_rows(2)
    sent, post = [], server._post
    monkeypatch.setattr(server, "_post", lambda path, body: (sent.append(path), post(path, body))[1])
    act(module, rows, horizon=4)
    act(module, rows, horizon=4)
    assert sent.count("/collective_rpc") == sent.count("/reset_prefix_cache") == 1
    with torch.no_grad():
        next(module.student.parameters()).view(-1)[0].add_(1e-3)
    act(module, rows, horizon=4)
    assert sent.count("/collective_rpc") == 2


@pytest.mark.parametrize(("fault", "where"), [("stale", "^http"), ("cached", "^Behind a prompt that it had read")])
def test_old_weights_and_old_prefixes_are_found_out(text, url, tmp_path, fault, where):
    VllmServer(url, str(tmp_path))._post("/reset_prefix_cache", {})  # what other tests asked
    server = VllmServer(f"{url}/{fault}", str(tmp_path))
    module, rows = text.module(engine=server), text.make_rows(8)
    if fault == "stale":
        moved(module)
    else:
        act(module, rows[:4], horizon=8)
        moved(module)
    with pytest.raises(RuntimeError, match=f"{where}.*does not sample from the student"):
        act(module, rows[4:], horizon=8)


@pytest.mark.slow
def test_a_server_that_was_started_again_has_other_weights(text, tmp_path):
    def start() -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen([sys.executable, str(FAKE), str(text.student)], stdout=subprocess.PIPE, text=True)
        return process, f"http://127.0.0.1:{int(process.stdout.readline())}"

    process, where = start()
    server = VllmServer(where, str(tmp_path))
    module, rows = text.module(engine=server), text.make_rows(4)
    moved(module)
    act(module, rows, horizon=8)
    process.kill()
    process.communicate()
    with pytest.raises(ConnectionError, match="no vLLM server answers"):
        act(module, rows, horizon=8)
    process, server.url = start()
    try:
        with pytest.raises(RuntimeError, match="does not sample from the student"):
            act(module, rows, horizon=8)
    finally:
        process.kill()
        process.communicate()
