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
        names.append(server.adapter)
        assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == [server.adapter], "the old one is gone"
        moved(module)
    assert names[0] != names[1]
    rolled = act(module, rows, horizon=8, temperature=0.5)
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4, (
        "at temperature 1"
    )


def adapters(url: str) -> list[str]:
    """What the server has loaded."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return [model["id"] for model in json.load(answer)["data"] if model["id"] != "first"]


def test_it_trains_and_leaves_nothing_behind(text, url, tmp_path):
    before = adapters(url)
    server = VllmServer(url, str(tmp_path / "adapters"), tolerance=1e-3)
    module = text.module(lora=Lora(r=4), engine=server)
    trainer = text.fit(module, tmp_path, steps=2)
    assert trainer.global_step == 2
    assert adapters(url) == before
    assert not list((tmp_path / "adapters").iterdir())
    act(module, text.make_rows(2), horizon=4)
    assert adapters(url) == [*before, server.adapter], "another stage loads it again"
    server.close()
    server.close()
    assert adapters(url) == before


def test_a_run_that_fails_leaves_nothing_behind_either(text, url, tmp_path):
    class Fails(text.setting):
        def training_step(self, batch, batch_idx):
            assert adapters(url) == [*before, server.adapter]
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
    with pytest.raises(ValueError, match=r"one LoRA adapter.*has 0\. Set student\.lora"):
        act(text.module(engine=VllmServer(url, str(tmp_path))), rows)
    with pytest.raises(ValueError, match="tolerance=0 must be > 0"):
        VllmServer("http://x", "y", tolerance=0)
