"""Several teachers at once, wherever they are: routed by a column, and as an ensemble."""

from __future__ import annotations

import json

import pytest
import torch

from opd_lightning.modalities.autoregressive import Cached, PromptView, Remote
from opd_lightning.modalities.autoregressive.elsewhere.score import Recorder
from opd_lightning.objective import LogLinear, Objective, ReverseKL, Support, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Same, Teacher
from tests.modalities.autoregressive.elsewhere.servers import answering
from tests.tiny import Rows, fit, make_module, make_rows, make_trainer

ROWS = 24
VIEW = PromptView("{{ solution }}?{{ prompt }}")
TASKS = {"plain": {"task": "even"}, "shown": {"task": "odd"}}
TOLD = {"top_k": 4, "hidden": True}


def routed():
    return Objective([Term(ReverseKL(support=Support("teacher", 4)), teacher=name, name=name) for name in TASKS])


def together():
    return Objective([Term(ReverseKL(), teacher="plain", target=LogLinear({"teacher": 0.5, "shown": 0.5}))])


def module_of(student, weights, objective, is_routed, **acting):
    """Two teachers: one sees what the student does, the other one the solution, too."""
    rollout = Rollout(**{"batch_size": ROWS, "horizon": 10, "micro_batch_size": 8} | acting)
    teachers = {
        name: Teacher(origin, VIEW if name == "shown" else None, where=TASKS[name] if is_routed else {})
        for name, origin in weights.items()
    }
    return make_module(student, teachers, objective, rollout=rollout, load=False)


@pytest.fixture(scope="module")
def server(tiny_teacher):
    with answering(make_module(tiny_teacher, tiny_teacher, load=False)) as running:
        yield running


@pytest.fixture(scope="module", params=[True, False], ids=["routed", "ensemble"])
def recorded(request, tiny_student, tiny_teacher, tmp_path_factory):
    """Answers of both, and whether each is asked about rows of its own."""
    root = tmp_path_factory.mktemp("recorded")
    both = {name: Frozen(Pretrained(str(tiny_teacher))) for name in TASKS}
    module = module_of(tiny_student, both, (routed if request.param else together)(), request.param)
    Recorder(root / "answers", **TOLD).record(module, Rows(make_rows(ROWS)), make_trainer(root))
    return root / "answers", request.param


@pytest.mark.parametrize("kind", ["remote", "cached", "same", "remote and cached"])
def test_they_teach_as_two_that_are_here(tiny_student, tiny_teacher, server, recorded, kind, tmp_path):
    folder, is_routed = recorded
    here = {name: Frozen(Pretrained(str(tiny_teacher))) for name in TASKS}
    served = {name: Remote(server.url, dialect="opd", hidden=True, deadline=20.0) for name in TASKS}
    kept = {name: Cached(str(folder), name) for name in TASKS}
    weights = {
        "remote": served,
        "cached": kept,
        "same": {"plain": here["plain"], "shown": Same("plain")},
        "remote and cached": {"plain": served["plain"], "shown": kept["shown"]},
    }[kind]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    students = []
    for origins, replayed in ((here, False), (weights, "cached" in kind)):
        acting = {"behavior": {"dataset": 1.0}} if replayed else {}
        module = module_of(tiny_student, origins, (routed if is_routed else together)(), is_routed, **acting)
        fit(module, tmp_path, rows if replayed else make_rows(ROWS), steps=3)
        students.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    assert torch.allclose(*students, atol=1e-5)
