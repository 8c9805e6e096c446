"""The demos keep their promises, over seeds that the README does not show."""

from __future__ import annotations

import pytest

from opd_lightning.cli import run
from opd_lightning.modalities.diffusion import table
from opd_lightning.report import report


def demo(setting: str, seed: int, folder) -> dict[str, float]:
    arguments = [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
    run(["fit", "-c", f"opd:{setting}/quickstart.yaml", *arguments])
    return report(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_student_learns_to_add(seed, tmp_path):
    found = demo("text", seed, tmp_path)
    assert found["teacher"] >= 0.95
    assert 0.2 <= found["before"] <= 0.5
    assert found["after"] - found["before"] >= 0.4
    assert found["teacher"] - found["after"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "gain"), [("vision_language", 0.15), ("gui_grounding", 0.1)])
def test_a_student_that_sees_learns_from_itself(setting, gain, tmp_path):
    found = demo(setting, 1, tmp_path)
    assert found["teacher"] >= 0.8
    assert found["after"] - found["before"] >= gain


@pytest.mark.slow
def test_a_few_step_student_closes_most_of_the_gap_and_more_steps_do_no_harm(tmp_path):
    arguments = ["--seed_everything=1", f"--trainer.default_root_dir={tmp_path}"]
    run(["fit", "-c", "opd:diffusion/quickstart.yaml", *arguments])
    found = table.report(tmp_path)
    assert found["gap_closed"] >= 0.6
    after = [found["steps"]["student after"][str(count)] for count in (1, 2, 4, 8, 16, 32)]
    assert after[0] > after[1] > after[2]
    assert max(after[3:]) <= after[2] + 0.03, "the distance of 720 samples is no surer than that"
