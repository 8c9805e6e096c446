"""A real vLLM server of SmolLM2 that writes the student's rollouts, with its adapter; numbers: docs/servers.md."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from opd_lightning.modalities.autoregressive import DecodeLoop, VllmServer
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Teacher
from tests.servers.real import RealServer, free_port, vllm
from tests.tiny import act, fit, make_module, reverse_kl, teacher_forced

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1800)]

TOLERANCE = 1e-3
"""Nats between log-probs of two implementations, in float32."""
ROWS = [{"prompt": f"What is {i % 7} + {i % 5}?"} for i in range(16)]


@pytest.fixture(scope="module")
def server(smollm2_folder) -> Iterator[RealServer]:
    running = vllm(smollm2_folder, "--max-model-len", "256", "--enable-lora", "--max-lora-rank", "8")
    yield running
    running.stop()


@pytest.fixture
def module(server, smollm2_folder, tmp_path):
    engine = VllmServer(server.url, str(tmp_path / "adapters"), tolerance=TOLERANCE)
    built = make_module(
        Pretrained(str(smollm2_folder), dtype="float32", lora=Lora(r=8)),
        {"teacher": Teacher(Initial())},
        reverse_kl(),
        rollout=Rollout(batch_size=4, horizon=16, micro_batch_size=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        engine=engine,
    )
    yield built
    engine.close()


def move(module, by=0.02):
    torch.manual_seed(0)
    for parameter in module.student.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)


def gap(module, acted):
    return float((teacher_forced(module, "student", acted) - acted.behavior_log_probs).abs()[acted.mask].max())


def test_it_follows_an_adapter_that_moves(module):
    names, gaps, texts = [], [], []
    for _ in range(4):
        acted = act(module, ROWS[:8], horizon=24)
        names.append(module.engine.replicas[0].given.name)
        gaps.append(gap(module, acted))
        texts.append(module.completions(acted))
        move(module)
    print("gaps", [f"{value:.1e}" for value in gaps])
    assert len({*names}) == 4
    assert texts[0] != texts[-1]
    assert max(gaps) < TOLERANCE


@pytest.mark.parametrize("shape", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_log_probs_are_those_before_temperature_and_filters(module, shape):
    move(module)
    value = gap(module, act(module, ROWS[:4], horizon=16, **shape))
    print(shape, f"{value:.1e}")
    assert value < TOLERANCE


def test_greedy_rollouts_are_those_of_the_engine_here(module):
    move(module)
    there = module.completions(act(module, ROWS[:8], horizon=16, temperature=0.0))
    module.engine, engine = DecodeLoop(), module.engine
    here = module.completions(act(module, ROWS[:8], horizon=16, temperature=0.0))
    module.engine = engine
    same = sum(a == b for a, b in zip(here, there, strict=True))
    print(f"{same} of 8 equal")
    assert same >= 7, "a near tie may fall either way"


def test_it_trains_and_leaves_no_adapter_behind(module, tmp_path):
    trainer = fit(module, tmp_path, ROWS, steps=3)
    assert trainer.global_step == 3
    assert not list((tmp_path / "adapters").glob("*"))


def test_two_servers_share_a_batch_and_one_that_dies_comes_back(server, module, smollm2_folder, tmp_path):
    port = free_port()
    options = ("--max-model-len", "256", "--enable-lora", "--max-lora-rank", "8")
    second = vllm(smollm2_folder, *options, port=port)
    engine = VllmServer([server.url, second.url], str(tmp_path / "shared"), tolerance=TOLERANCE)
    module.engine.close()
    module.engine = engine
    gaps = []
    try:
        for event in ("both", "killed", "moved", "back"):
            if event == "killed":
                second.kill()
            if event == "back":
                second = vllm(smollm2_folder, *options, port=port)
            if event != "both":
                move(module)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                gaps.append(gap(module, act(module, ROWS[:8], horizon=16)))
            said = " ".join(str(warning.message) for warning in told)
            assert ("left out" in said) == (event == "killed"), said
            assert ("as before" in said) == (event == "back"), said
            assert engine.replicas[1].left_out == (event in ("killed", "moved"))
        print("gaps", [f"{value:.1e}" for value in gaps])
        assert max(gaps) < TOLERANCE
    finally:
        engine.close()
        second.stop()
