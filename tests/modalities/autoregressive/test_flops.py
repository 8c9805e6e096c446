"""Operations and padding of passes, against torch's own counter and a count by hand."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opd_lightning.modalities.autoregressive import passes
from opd_lightning.modalities.autoregressive.flops import Operations
from opd_lightning.modalities.autoregressive.models import bare
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Teacher
from tests.tiny import act, fit, make_module, make_rows, no_teacher, save_model

ROWS, TOKENS, STEPS = 3, 20, 7


def counted(policy, backward):
    """What torch counts in a pass without padding, and in the head at some steps."""
    model = bare(policy.model)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    body, head = FlopCounterMode(display=False), FlopCounterMode(display=False)
    # the kernel of CPUs has no entry in torch's table
    with policy.active(), sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        with body:
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
            if backward:
                hidden.sum().backward()
        states = hidden.detach()[0, :STEPS].requires_grad_(backward)
        with head:
            logits = model.get_output_embeddings()(states)
            if backward:
                logits.sum().backward()
    return body.get_total_flops(), head.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3"])
def test_they_are_those_that_torch_counts(architecture, backward, tmp_path):
    save_model(tmp_path, architecture, **({"sliding_window": 64} if architecture == "gemma3" else {}))
    policy = make_module(tmp_path, objective=no_teacher()).policies["student"]
    operations = Operations.of(policy)
    body, head = counted(policy, backward)
    assert operations.body(ROWS * TOKENS, ROWS * TOKENS**2, backward) == body
    assert operations.of_head(STEPS, backward) == head


def test_adapters_need_no_gradient_of_their_base(tiny_student):
    """The first layer's input has none, and needs none: torch counts less by what its queries, keys and values take."""
    module = make_module(Pretrained(str(tiny_student), lora=Lora(r=4)), {"teacher": Teacher(Initial())})
    operations = Operations.of(module.policies["student"])
    found = operations.body(ROWS * TOKENS, ROWS * TOKENS**2, backward=True)
    first = bare(module.student).base_model.layers[0].self_attn
    spared = sum(p.base_layer.weight.numel() + 4 * p.in_features for p in (first.q_proj, first.k_proj, first.v_proj))
    assert found - 2 * spared * ROWS * TOKENS == counted(module.policies["student"], backward=True)[0]
    teacher = Operations.of(module.policies["teacher"])
    assert teacher.trained == 0
    assert teacher.frozen == operations.frozen
    assert teacher.body(ROWS * TOKENS, ROWS * TOKENS**2, False) == counted(module.policies["teacher"], False)[0]


def test_padding_is_what_a_count_by_hand_says(tiny_student):
    """Rows of one pass: the longest one is as wide as it, the others lack what they are shorter."""
    module = make_module(tiny_student, objective=no_teacher(), pass_tokens=10_000)
    acted = act(module, rows := [{"prompt": prompt} for prompt in ("1+1=", "12+345=", "1234567+1=")])
    with patch.object(passes, "CPU_PASS_COST", 10_000):
        module.distribution(module.policies["student"], acted)
    lengths = [len(row["prompt"]) + int(steps) for row, steps in zip(rows, acted.mask.sum(1), strict=True)]
    read = module.metrics.stopwatch.read()
    assert read["work/padding_share"] == pytest.approx(1 - sum(lengths) / (3 * max(lengths)))
    assert "work/mfu" not in read, "of a CPU no peak is known"


def test_what_rows_share_is_read_and_counted_once(tiny_student):
    module = make_module(tiny_student, objective=no_teacher())
    acted = act(module, [{"prompt": "12345678" * 12 + f"{i}="} for i in range(8)])
    stopwatch = module.metrics.stopwatch
    with patch.object(passes, "CPU_PASS_COST", 1):
        module.distribution(module.policies["student"], acted)
    shared, own = 96, acted.mask.sum(1) + 2
    assert stopwatch.places["all"] - stopwatch.places["padding"] == shared + int(own.sum())
    pairs = shared**2 + int((own * (shared + own)).sum())
    operations = Operations.of(module.policies["student"])
    assert stopwatch.flops["student"] == operations.body(shared + int(own.sum()), pairs, backward=True)


def test_utilization_is_what_was_needed_of_what_the_device_could_do(tiny_student, tmp_path, monkeypatch):
    monkeypatch.setattr("opd_lightning.gauges.peak_of", lambda device, precision: 1e9)
    module = make_module(tiny_student, {"teacher": Teacher(Initial())})
    metrics = fit(module, tmp_path, steps=2).callback_metrics
    parts = [float(metrics[f"work/mfu_{part}"]) for part in ("student", "teacher", "head")]
    assert all(part > 0 for part in parts)
    assert float(metrics["work/mfu"]) == pytest.approx(sum(parts), rel=1e-4)
    assert parts[0] == pytest.approx(3 * parts[1], rel=1e-4), "the same model, with a backward pass"


def test_layers_that_work_otherwise_are_not_counted(tmp_path):
    settings = {"config_class": "Qwen3MoeConfig", "num_experts": 2, "num_experts_per_tok": 1}
    module = make_module(save_model(tmp_path, moe_intermediate_size=16, **settings), objective=no_teacher())
    assert Operations.of(module.policies["student"]) is None


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_with_a_worker_tells_how_long_it_waited_for_it(staleness, tiny_student, tmp_path):
    rollout = Rollout(batch_size=8, horizon=6, max_staleness=staleness)
    module = make_module(tiny_student, {"teacher": Teacher(Initial())}, rollout=rollout)
    metrics = fit(module, tmp_path, make_rows(), steps=2).callback_metrics
    assert ("time/waited_worker_share" in metrics) == bool(staleness)
    if staleness:
        assert 0 < float(metrics["time/waited_worker_share"]) <= float(metrics["time/rollout_share"]) <= 1
    assert "time/waited_server_share" not in metrics
