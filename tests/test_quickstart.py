"""The demo keeps its promise: the student gains at least 40 points and comes within 5 of the teacher."""

from __future__ import annotations

import pytest

from opd_lightning.cli import run
from opd_lightning.report import report


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_student_learns_to_add(seed, tmp_path):
    logs = f"--trainer.logger.init_args.save_dir={tmp_path}"
    run(["fit", "-c", "opd:text/quickstart.yaml", f"--seed_everything={seed}", logs,
         f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    found = report(tmp_path)
    assert found["teacher"] >= 0.95
    assert 0.2 <= found["before"] <= 0.5
    assert found["after"] - found["before"] >= 0.4
    assert found["teacher"] - found["after"] <= 0.05
