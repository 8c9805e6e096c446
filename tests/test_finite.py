"""NaN and infinity are refused wherever a setting is set, in Python as in YAML."""

from __future__ import annotations

import math

import pytest

from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.diffusion import SDE, NoiseLevel
from opd_lightning.modalities.gui_grounding import DigitSignificance
from opd_lightning.objective import (
    AlphaDivergence,
    Constant,
    CrossEntropy,
    Entropy,
    ImportanceRatio,
    LogLinear,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    Term,
)
from opd_lightning.pretrained import Lora
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Live, Teacher

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rollout(temperature=NAN), r"Rollout\.temperature must be a number, got nan"),
        (lambda: Rollout(behavior={"student": NAN}), r"Rollout\.behavior\.student must be a number"),
        (lambda: Constant(NAN), r"Constant\.\w+ must be a number"),
        (lambda: Entropy(beta=INF), r"Entropy\.beta must be a number, got inf"),
        (lambda: ImportanceRatio(cap=NAN), r"cap"),
        (lambda: ReverseKL(temperature=NAN), r"temperature"),
        (lambda: ReverseKL(clip=NAN), r"clip"),
        (lambda: AlphaDivergence(alpha=-INF), r"alpha"),
        (lambda: Term(CrossEntropy(), teacher=None, coefficient=NAN), r"Term\.coefficient must be a number"),
        (lambda: PolicyGradient(RewardPlusLogRatio(coefficient=INF)), r"coefficient"),
        (lambda: LogLinear({"teacher": NAN}), r"LogLinear\.coefficients\.teacher must be a number"),
        (lambda: EMA(rate=NAN), r"rate"),
        (lambda: Evaluation(top_p=NAN), r"Evaluation\.top_p must be a number"),
        (lambda: Lora(alpha=INF), r"Lora\.alpha must be a number"),
        (lambda: Teacher(Live(), where={"level": NAN}), r"Teacher\.where\.level must be a number"),
        (lambda: DigitSignificance(other=NAN), r"other"),
        (lambda: NoiseLevel(power=NAN), r"power"),
        (lambda: SDE(noise_level=INF), r"noise_level"),
    ],
)
def test_what_is_no_number_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_knob_that_is_turned_to_nan_is_refused_too():
    rollout, term = Rollout(), Term(ReverseKL())
    with pytest.raises(ValueError, match=r"Rollout\.temperature must be a number, got nan"):
        rollout.temperature = NAN
    with pytest.raises(ValueError, match=r"Term\.coefficient"):
        term.coefficient = INF
    assert (rollout.temperature, term.coefficient) == (1.0, 1.0)
    assert Term(ReverseKL(), name="nan").name == "nan", "a word is one"
