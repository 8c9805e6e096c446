"""Makes the teacher of gui_grounding/miniwob_agent.yaml: ``make assets-miniwob``. It renders episodes first, which
needs Chromium (``make browser``); some three CPU minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE, RUN = Path(__file__).parent / "miniwob" / "teacher", Path("runs/miniwob_warm_start")


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


for old in (HERE, RUN):
    shutil.rmtree(old, ignore_errors=True)
opd("fit", "-c", "opd:gui_grounding/miniwob_warm_start.yaml")
opd("export", str(RUN / "checkpoints" / "last.ckpt"), str(HERE))
