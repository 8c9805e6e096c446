"""Teachers that are elsewhere: what they tell serves some parts and not others, and they cannot act."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.callbacks import ChangePoint, EarlyStopRollout, LowCorrection, Retention, Samples
from opd_lightning.distribution import Scored
from opd_lightning.methods.callback import RockTokens
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.objective import (
    Confidence,
    CrossEntropy,
    LogLinear,
    LogRatio,
    Objective,
    PolicyGradient,
    ReverseKL,
    Support,
    Term,
)
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Elsewhere, Frozen, Same, Teacher
from tests.tiny import fit, log_softmax, make_module, make_rows

VIEW = PromptView("{{ solution }}?{{ prompt }}")


class Oracle(Elsewhere):
    """Tells what a model of its own says."""

    def __init__(self, path, top_k=0):
        self.path, self.top_k = path, top_k

    def connect(self, teacher, setting):
        self.module = make_module(self.path, self.path)
        return {"weights": f"0123456789abcdef (Oracle, {self.path})"}

    def say(self, teacher, setting, batch, views):
        shown = [row if view is None else view for row, view in zip(batch.examples, views, strict=True)]
        log_q = log_softmax(self.module, "teacher", batch, shown)
        told = log_q.gather(-1, batch.actions[..., None]).squeeze(-1)
        top = reversed(log_q.topk(self.top_k)) if self.top_k else (None, None)
        return Scored(told, batch.actions, log_q.shape[-1], *top)


def k1(**settings):
    return PolicyGradient(LogRatio(**settings))


def trained(folder, module, **settings):
    fit(module, folder, **settings)
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


@pytest.mark.parametrize("view", [None, VIEW])
@pytest.mark.parametrize(
    ("signal", "top_k"),
    [
        (k1(), 0),
        (k1(discount=0.9), 0),
        (ReverseKL(support=Support("sampled")), 0),
        (ReverseKL(support=Support("teacher", 4)), 4),
        (ReverseKL(support=Support("teacher", 3, "renormalize")), 4),
    ],
)
def test_it_teaches_what_the_model_itself_would(tiny_student, tiny_teacher, tmp_path, signal, top_k, view):
    here = Teacher(Frozen(Pretrained(str(tiny_teacher))), view)
    there = Teacher(Oracle(tiny_teacher, top_k), view)
    students = [
        trained(tmp_path, make_module(tiny_student, {"teacher": t}, Objective([Term(signal)])), steps=2)
        for t in (here, there)
    ]
    assert torch.allclose(*students, atol=1e-5)


def test_the_log_has_what_is_known(tiny_student, tiny_teacher, tmp_path):
    module = make_module(tiny_student, {"teacher": Teacher(Oracle(tiny_teacher), VIEW)}, Objective([Term(k1())]))
    trainer = fit(module, tmp_path, validation=make_rows(4))
    logged = {name for name in trainer.logged_metrics if "teacher/" in name}
    assert logged == {"train/teacher/kl_sampled"}


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (
            Term(ReverseKL()),
            r"terms\[0\] \(ReverseKL\): ReverseKL needs the whole distribution",
        ),
        (Term(ReverseKL(support=Support("student", 4))), "needs the whole distribution"),
        (Term(ReverseKL(support=Support("teacher", 2), temperature=2.0)), "needs the whole distribution"),
        (Term(ReverseKL(support=Support("teacher", 5))), "reads the 5 likeliest actions .* of the 4 likeliest ones"),
        (Term(k1(), weights=[Confidence()]), "Confidence needs the whole distribution"),
        (Term(k1(baseline=ReverseKL())), "PolicyGradient needs the whole distribution"),
        (Term(k1(), target=LogLinear({"teacher": 1.0})), "target needs the whole distribution"),
    ],
)
def test_what_it_does_not_tell_is_refused_when_the_run_is_built(tiny_student, tiny_teacher, term, words):
    with pytest.raises(ValueError, match=words):
        make_module(tiny_student, {"teacher": Teacher(Oracle(tiny_teacher, 4))}, Objective([term]), load=False)


def test_it_cannot_act(tiny_student, tiny_teacher, tmp_path):
    teachers = {"teacher": Teacher(Oracle(tiny_teacher))}
    rollout = Rollout(batch_size=8, horizon=10, behavior={"teacher": 1.0})
    module = make_module(tiny_student, teachers, Objective([Term(CrossEntropy(), teacher=None)]), rollout=rollout)
    with pytest.raises(ValueError, match="Oracle has no model in this process, so it can't act"):
        fit(module, tmp_path)


def test_what_was_recorded_says_nothing_of_new_rollouts(tiny_student, tiny_teacher, tmp_path):
    weights = Oracle(tiny_teacher)
    weights.recorded = True
    module = make_module(tiny_student, {"teacher": Teacher(weights)}, Objective([Term(k1())]))
    with pytest.raises(ValueError, match=r"recorded completions alone, and student would write new ones"):
        fit(module, tmp_path)


def test_it_has_no_model_that_another_entry_could_share(tiny_student, tiny_teacher):
    teachers = {"teacher": Teacher(Oracle(tiny_teacher)), "other": Teacher(Same("teacher"), VIEW)}
    with pytest.raises(ValueError, match="no 'teacher' to share"):
        make_module(tiny_student, teachers, Objective([Term(k1())]), load=False)


@pytest.mark.parametrize(
    "callback",
    [EarlyStopRollout(ChangePoint()), EarlyStopRollout(LowCorrection()), RockTokens(), Samples(), Retention("rows")],
)
def test_callbacks_that_read_more_than_it_tells_are_refused(tiny_student, tiny_teacher, tmp_path, callback):
    module = make_module(tiny_student, {"teacher": Teacher(Oracle(tiny_teacher, 4))}, Objective([Term(k1())]))
    with pytest.raises(ValueError, match="log-probs of actions alone, and a callback reads its whole distribution"):
        fit(module, tmp_path, callbacks=[callback])


def test_callbacks_that_read_what_it_tells_are_served(tiny_student, tiny_teacher, tmp_path):
    module = make_module(tiny_student, {"teacher": Teacher(Oracle(tiny_teacher))}, Objective([Term(k1())]))
    callbacks = [
        EarlyStopRollout(ChangePoint("log_prob")),
        Samples(signal=ReverseKL(support=Support("sampled")), console=False),
    ]
    fit(module, tmp_path, callbacks=callbacks)
