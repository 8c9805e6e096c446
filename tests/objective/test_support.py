"""Supports: which ids, and what happens to the rest."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.distribution import IMPOSSIBLE
from opd_lightning.objective import JSD, ReverseKL, Support
from tests.objective.reference import close

STUDENT = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
TEACHER = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
ACTION = torch.tensor([1])


def restrict(*settings) -> tuple[list[float], list[float]]:
    return tuple(
        [round(v, 4) for v in side.exp()[0].tolist()] for side in Support(*settings).restrict(STUDENT, TEACHER, ACTION)
    )


def test_each_support_by_hand():
    assert restrict() == ([0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4])
    assert restrict("teacher", 2) == ([0.05, 0.15, 0.8], [0.4, 0.3, 0.3])
    assert restrict("student", 2) == ([0.5, 0.3, 0.2], [0.1, 0.2, 0.7])
    assert restrict("student", 2, "drop") == ([0.5, 0.3], [0.1, 0.2])
    assert restrict("student", 2, "renormalize") == ([0.625, 0.375], [0.3333, 0.6667])
    assert restrict("sampled") == ([0.3, 0.7], [0.2, 0.8])
    assert restrict("sampled", None, "drop") == ([0.3], [0.2])
    assert restrict("ids", None, "tail", (0, 3)) == ([0.5, 0.05, 0.45], [0.1, 0.4, 0.5])
    assert restrict("ids", None, "stop", (3,)) == ([0.05], [0.4])
    # both rank the third among their three likeliest, and the second
    assert restrict("intersection", 3) == ([0.0, 0.3, 0.15, 0.55], [0.0, 0.2, 0.3, 0.5])
    assert restrict("intersection", 3, "renormalize") == ([0.0, 0.6667, 0.3333], [0.0, 0.4, 0.6])
    assert restrict("difference", 3) == ([0.5, 0.0, 0.0, 0.0, 0.0, 0.05, 0.45], [0.1, 0.0, 0.0, 0.0, 0.0, 0.4, 0.5])
    assert restrict("difference", 9)[0][-1] == 1, "all are on both sides"


def test_an_empty_intersection_counts_nothing():
    logits = STUDENT.clone().requires_grad_()
    for remainder in ("tail", "renormalize", "drop", "stop"):
        log_p, log_q = Support("intersection", 1, remainder).restrict(logits.log_softmax(-1), TEACHER, ACTION)
        value = ReverseKL(Support("intersection", 1, remainder)).categorical(log_p, log_q).sum()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-6


def test_stopping_leaves_an_equal_student_where_it_is():
    """The naive gradient is that of the student's mass on the support beside it, also at p = q (2605.11182)."""
    logits = torch.tensor([[0.4, 1.0, -0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.5, -0.2]], dtype=torch.float64).log_softmax(-1)

    def gradient(remainder, log_q, k=2):
        log_p = logits.log_softmax(-1)
        restricted = Support("student", k, remainder).restrict(log_p, log_q, ACTION)
        value = ReverseKL(Support("student", k, remainder)).categorical(*restricted).sum()
        return torch.autograd.grad(value, logits)[0]

    log_p = logits.log_softmax(-1)
    mass = torch.autograd.grad(log_p.exp().topk(2).values.sum(), logits)[0]
    close(gradient("drop", teacher) - gradient("stop", teacher), mass, 1e-12)
    same = logits.detach().log_softmax(-1)
    close(gradient("stop", same), torch.zeros(1, 4), 1e-12)
    close(gradient("drop", same), mass, 1e-12)
    close(gradient("stop", teacher, k=4), gradient("drop", teacher, k=4), 1e-12)
    with pytest.raises(ValueError, match="stop leaves the reverse KL's log p without gradient; JSD is no ReverseKL"):
        JSD(support=Support("student", 2, "stop"))


def test_an_id_in_both_halves_of_a_union_counts_once():
    student, teacher = Support("union", 3).restrict(STUDENT, TEACHER, ACTION)
    close(student.exp().sum(-1), torch.ones(1), 1e-6)
    close(teacher.exp().sum(-1), torch.ones(1), 1e-6)
    assert sorted(round(v, 2) for v in student.exp()[0].tolist()) == [0, 0, 0, 0.05, 0.15, 0.3, 0.5]


def test_the_tail_of_a_nearly_certain_distribution_is_exact():
    """1 − Σ would be rounding noise of 1e-7 in float32."""
    logits = torch.tensor([[40.0, 0.0, 0.0, 1.0]])
    log_probs = logits.log_softmax(-1)
    student, _ = Support("student", 1).restrict(log_probs, log_probs, ACTION)
    expected = torch.tensor([0.0, 0.0, 1.0]).double().logsumexp(0) - 40
    close(student[0, 1:], expected[None], 1e-6)


def test_a_support_that_holds_all_that_is_possible_has_an_impossible_tail():
    log_probs = torch.tensor([[0.0, 1.0, IMPOSSIBLE, IMPOSSIBLE]]).log_softmax(-1)
    student, _ = Support("student", 3).restrict(log_probs, log_probs, ACTION)
    assert student.exp()[0, -1] == 0
    assert torch.isfinite(student).all()


@pytest.mark.parametrize("ids", [None, (), (1, 1)])
def test_given_ids_are_there_and_different(ids):
    with pytest.raises(ValueError, match=r"support\.ids: different ids for a support of 'ids' and no other"):
        Support("ids", ids=ids)
    with pytest.raises(ValueError, match=r"support\.ids: .* and no other, got \(1,\)"):
        Support("student", 2, ids=(1,))


@pytest.mark.parametrize("k", [None, 0, -2])
@pytest.mark.parametrize("of", ["teacher", "student", "union", "intersection", "difference"])
def test_ranked_supports_need_k(of, k):
    with pytest.raises(ValueError, match=rf"support\.k: a support of '{of}' needs k >= 1, got {k}"):
        Support(of, k)


@pytest.mark.parametrize("of", ["full", "sampled"])
def test_a_k_that_nothing_reads_is_refused(of):
    with pytest.raises(ValueError, match=rf"support\.k: a support of '{of}' takes no k, got 5"):
        Support(of, 5)


def test_remainders_that_mean_nothing_are_refused():
    for remainder in ("renormalize", "drop"):
        with pytest.raises(ValueError, match=f"the full vocabulary leaves nothing to {remainder}"):
            Support("full", None, remainder)
    with pytest.raises(ValueError, match="one sampled id renormalizes to probability 1 on both sides"):
        Support("sampled", None, "renormalize")
