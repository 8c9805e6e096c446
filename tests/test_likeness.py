"""Whether two models say the same."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.likeness import check_self_teachers, distance
from opd_lightning.pretrained import Lora
from opd_lightning.teacher import EMA, Initial, Live, Teacher


def test_distances_are_in_units_of_the_spread():
    one = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert distance(one, one) == 0
    assert distance(10 * one + 7, 10 * one + 6) == pytest.approx(0.1, rel=0.1)
    assert distance(one, one[:10]) == float("inf")
    assert distance(one * float("nan"), one) == float("inf")


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("weights", [Initial, EMA, Live])
def test_in_every_setting_a_self_teacher_is_compared_before_the_first_step(weights, lora, every_world, tmp_path):
    if lora is not None and every_world.setting.__name__ == "DiffusionDistillation":
        lora = Lora(r=2, target_modules=["to_q", "to_v"])
    module = every_world.module({"teacher": Teacher(weights())}, lora=lora)
    check_self_teachers(module.teachers, module.policies, module.probe)
    assert module.probe(module.policies["student"]).std() > 0.1

    if weights is Live:
        return
    with torch.no_grad():
        for name, p in module.policies["teacher"].model.named_parameters():
            if lora is None or "lora_B.default" in name:
                p.add_(0.1)
    with pytest.raises(RuntimeError, match=r"model\.teachers\.teacher: (Initial|EMA) should begin as the student"):
        every_world.fit(module, tmp_path, steps=1)
