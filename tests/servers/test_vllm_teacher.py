"""A real vLLM server of SmolLM2 as a teacher, where `make servers` has installed it; numbers: docs/servers.md."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from opd_lightning.callback import DistillationCallback
from opd_lightning.endpoint import Endpoint
from opd_lightning.modalities.autoregressive import Judge, OtherTokenizer, PromptView, Remote
from opd_lightning.modalities.autoregressive.elsewhere.question import questions
from opd_lightning.objective import LogRatio, Objective, PolicyGradient, ReverseKL, Support, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher
from tests.servers.real import RealServer, vllm
from tests.tiny import Rows, act, make_module, make_rows, make_trainer, teacher_forced

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1800)]

TOLERANCE = 1e-3
"""Nats between log-probs of two implementations, in float32."""
SHOWN = PromptView(
    "Answer with JSON alone.\n"
    'What is 1 + 1?\n{"sum": 2}\nWhat is 3 + 4?\n{"sum": 7}\nWhat is 5 + 1?\n{"sum": 6}\n{{ prompt }}'
)
ROWS = [{"prompt": f"What is {i % 7} + {i % 5}?"} for i in range(80)]


@pytest.fixture(scope="module")
def server(smollm2_folder) -> Iterator[RealServer]:
    running = vllm(smollm2_folder, "--max-model-len", "512")
    yield running
    running.stop()


def student_of(folder, origin, objective, **settings):
    others = {name: Teacher(weights, SHOWN) for name, weights in settings.pop("others", {}).items()}
    return make_module(
        Pretrained(str(folder), dtype="float32", lora=Lora(r=8)),
        {"teacher": Teacher(origin, SHOWN), **others},
        objective,
        rollout=Rollout(batch_size=4, horizon=16, micro_batch_size=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        **settings,
    )


def test_log_probs_are_those_of_the_model_here(server, smollm2_folder):
    objective = Objective([Term(PolicyGradient(LogRatio()))])
    there = student_of(smollm2_folder, Remote(server.url, top_k=20), objective)
    print(there.elsewhere["teacher"])
    acted = act(there, ROWS[:8], horizon=24)
    told = there.streams.query("teacher", acted).distribution
    here = student_of(smollm2_folder, Frozen(Pretrained(str(smollm2_folder), dtype="float32")), objective)
    views = here.streams.seen("teacher", acted.examples, acted.student_view)
    expected = teacher_forced(here, "teacher", acted, views)
    gap = (told.log_probs - expected)[acted.mask].abs()
    print(f"{int(acted.mask.sum())} tokens, gap: mean {float(gap.mean()):.2e}, largest {float(gap.max()):.2e}")
    assert float(gap.max()) < TOLERANCE
    assert len(questions(here, acted, views)) == 8


def test_told_of_more_the_loss_is_larger_up_to_the_exact_one(server, smollm2_folder, tmp_path):
    """A divergence of coarser events is smaller, and the rest is one event."""
    local, losses = Frozen(Pretrained(str(smollm2_folder), dtype="float32")), dict[str, float]()
    told = {
        "sampled": (Remote(server.url), ReverseKL(support=Support("sampled"))),
        "top 20": (Remote(server.url, top_k=20), ReverseKL(support=Support("teacher", 20))),
        "exact": (local, ReverseKL()),
    }
    for name, (origin, signal) in told.items():
        module = student_of(smollm2_folder, origin, Objective([Term(signal, name="kl")]))
        trainer = make_trainer(tmp_path, 1)
        trainer.fit(module, datamodule=Rows(ROWS))
        losses[name] = float(trainer.callback_metrics["train/loss/kl"])
    print(json.dumps(losses))
    assert losses["sampled"] < losses["top 20"] < losses["exact"]


class Noted(DistillationCallback):
    """Notes losses and seconds, and compares what is told of each step's rollouts with the same model here."""

    def __init__(self, compares: bool) -> None:
        self.compares, self.gaps, self.losses, self.times = compares, [], [], [time.monotonic()]
        self.asks = frozenset({"here"}) if compares else frozenset()

    def on_rollouts(self, module, trajectories):
        if self.compares:
            views = module.streams.seen("here", trajectories.examples, trajectories.student_view)
            told = module.streams.query("teacher", trajectories).distribution.log_probs
            expected = teacher_forced(module, "here", trajectories, views)
            self.gaps.append(float((told - expected)[trajectories.mask].abs().max()))
        return trajectories

    def on_train_batch_end(self, trainer, module, *arguments):
        super().on_train_batch_end(trainer, module, *arguments)
        self.times.append(time.monotonic())
        self._note(trainer)

    def on_train_end(self, trainer, module):
        self._note(trainer)

    def _note(self, trainer):
        """Notes the loss of the step before, since the module logs behind its callbacks."""
        if "train/loss/kl" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss/kl"]))


@pytest.mark.parametrize("kind", ["compared", "served", "local"])
def test_a_student_with_an_adapter_learns_from_it(server, smollm2_folder, tmp_path, kind):
    """Both teach the same, to the tolerance; the times of the served and of the local one are printed."""
    local = Frozen(Pretrained(str(smollm2_folder), dtype="float32"))
    module = student_of(
        smollm2_folder,
        local if kind == "local" else Remote(server.url, top_k=20),
        Objective([Term(ReverseKL(support=Support("teacher", 20)), name="kl")]),
        others={"here": local} if kind == "compared" else {},
    )
    noted, spent = Noted(kind == "compared"), time.process_time()
    make_trainer(tmp_path, 20, callbacks=[noted]).fit(module, datamodule=Rows(ROWS))
    print(kind, "losses", [round(loss, 3) for loss in noted.losses])
    seconds = sorted(b - a for a, b in pairwise(noted.times[1:]))
    own = time.process_time() - spent
    print(f"{kind}: {seconds[len(seconds) // 2]:.2f} s a step (median of 19), {own:.0f} CPU s in this process")
    if noted.gaps:
        print("largest gap of each step", [f"{gap:.1e}" for gap in noted.gaps])
        assert len(noted.gaps) == 20
        assert max(noted.gaps) < TOLERANCE
    assert len(noted.losses) == 20
    assert sum(noted.losses[-5:]) < 0.7 * sum(noted.losses[:5])


def test_a_student_of_another_tokenizer_is_told_what_the_model_here_would_tell(server, smollm2_folder, tiny_student):
    """Its text, in SmolLM2's tokens; the folder brings the tokenizer, and no weights are read from it."""
    spec = Pretrained(str(smollm2_folder), dtype="float32")
    objective = Objective([Term(PolicyGradient(LogRatio(against="behavior")))])
    told = []
    for remote in (Remote(server.url), None):
        module = make_module(tiny_student, {"teacher": Teacher(OtherTokenizer(spec, server=remote))}, objective)
        acted = act(module, make_rows(8))
        told.append(module.streams.query("teacher", acted).distribution.log_probs[acted.mask])
    gap = (told[0] - told[1]).abs()
    print(f"another tokenizer: {len(gap)} tokens, gap: mean {float(gap.mean()):.2e}, largest {float(gap.max()):.2e}")
    assert float(gap.max()) < TOLERANCE


def test_a_schema_holds_its_answers_to_the_form(server, tmp_path):
    judge = Judge(Endpoint(server.url, keep=str(tmp_path), timeout=300.0), max_tokens=200, unreadable="stop")
    grade = judge("Paris.", {"prompt": "What is the capital of France?", "answer": "Paris"})
    print("grade", grade)
    assert grade in [grade / 10 for grade in range(11)]
