"""A real vLLM server that takes all of a student's weights before each rollout; numbers: docs/servers.md."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.modalities.autoregressive import PromptView, VllmServer
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Teacher
from tests.servers.real import RealServer, vllm
from tests.tiny import act, fit, make_module, reverse_kl

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(3600)]

TOLERANCE = 1e-3
"""Nats between log-probs of two implementations, in float32."""
ROWS = [{"prompt": f"What is {i % 9} + {i % 7}? Answer in a sentence."} for i in range(80)]


class Watched(VllmServer):
    """Keeps how far apart log-probs were whenever they were compared, and what the server was asked for."""

    def __init__(self, url: str, *args: object, **settings: object) -> None:
        super().__init__(url, *args, **settings)
        self.apart: list[float] = []
        self.sent: list[str] = []
        (replica,) = self.replicas
        ask = replica.ask
        replica.ask = lambda path, *rest, **more: (self.sent.append(path), ask(path, *rest, **more))[1]

    def _compare(self, *args: object) -> float:
        self.apart.append(super()._compare(*args))
        return self.apart[-1]


def write(folder: Path, tied: bool, source: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if not tied:
        embeddings = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(embeddings.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def serve(folder: Path) -> RealServer:
    return vllm(folder, "--max-model-len", "256")


def student(folder: Path, engine: VllmServer):
    return make_module(
        Pretrained(str(folder), dtype="float32"),
        {"teacher": Teacher(Initial(), PromptView("Answer with one word. {{ prompt }}"))},
        reverse_kl(),
        rollout=Rollout(batch_size=4, horizon=16, micro_batch_size=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        engine=engine,
    )


def test_all_weights_move_with_the_student_and_other_servers_are_found_out(smollm2_folder, tmp_path):
    folder = write(tmp_path / "untied", False, smollm2_folder)
    server = serve(folder)
    try:
        engine = Watched(server.url, str(tmp_path / "weights"), tolerance=TOLERANCE)
        module = student(folder, engine)
        trainer = fit(module, tmp_path / "run", ROWS, steps=20)
        print("apart", [f"{value:.1e}" for value in engine.apart])
        assert trainer.global_step == 20
        assert engine.sent.count("/collective_rpc") == engine.sent.count("/reset_prefix_cache") == 20
        # 21 batches, one of them before the first step, and 19 prompts that had been read before
        assert len(engine.apart) == 40
        assert max(engine.apart) < TOLERANCE
        assert not list((tmp_path / "weights").iterdir())

        act(module, ROWS[:4], horizon=8)  # the last update
        server.process.send_signal(signal.SIGSTOP)
        engine.replicas[0].timeout = 5
        with pytest.raises(ConnectionError, match=r"no answer.*timed out"):
            act(module, ROWS[:4], horizon=8)
        server.process.send_signal(signal.SIGCONT)
        engine.replicas[0].timeout = 600
        act(module, ROWS[:4], horizon=8)

        server.stop()
        server = serve(folder)  # with the weights from before training
        engine.replicas[0].url = server.url
        with pytest.raises(RuntimeError, match="does not sample from the student"):
            act(module, ROWS[:4], horizon=8)
        since = time.perf_counter()
        act(module, ROWS[:4], horizon=8)  # as a run that goes on would begin
        print(f"all weights sent, and 4 x 8 tokens: {time.perf_counter() - since:.1f} s")
        server.stop()
        with pytest.raises(ConnectionError, match=r"no answer.*Connection refused"):
            act(module, ROWS[:4], horizon=8)
    finally:
        server.stop()


def test_a_tied_head_is_refused_on_a_cpu(smollm2_folder, tmp_path):
    server = serve(smollm2_folder)
    try:
        module = student(smollm2_folder, VllmServer(server.url, str(tmp_path / "weights")))
        act(module, ROWS[:4], horizon=8)
        with torch.no_grad():
            module.student.get_input_embeddings().weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="keeps the old head of a model whose head"):
            act(module, ROWS[:4], horizon=8)
    finally:
        server.stop()
