"""Makes the GUI quickstart's student with the project's own commands: ``make assets-gui``. It renders screens first,
which needs Chromium (``make browser``) and some ten minutes on 2 cores, the training another ten.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from qwen3_vl import architecture
from transformers import AutoModelForImageTextToText

from opd_lightning.modalities.gui_grounding.readers import rendered
from opd_lightning.modalities.gui_grounding.view import HINT, TOLD

HERE, RUN = Path(__file__).parent / "gui_quickstart" / "student", Path("runs/gui_warm_start")
SCREENS, CONFIG = Path("runs/gui_screens"), Path("configs/gui_grounding/warm_start.yaml")


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


with open(CONFIG, encoding="utf-8") as file:
    pages = yaml.safe_load(file)["data"]["init_args"]["train_options"]["pages"]
if not SCREENS.exists():
    opd("render-gui", str(SCREENS), "--pages", ",".join(pages), "--seed", "100", "--count", "100", "--elements", "0")
for old in (HERE, RUN):
    shutil.rmtree(old, ignore_errors=True)
texts = [row["prompt"] for row in rendered(str(SCREENS), seeds="100-160")] + [
    "(123, 456)",
    HINT.format(color="green"),
    TOLD.format(x=123, y=456),
] * 50
architecture(HERE, texts, vocabulary=800, patch=12, side=192)
opd("fit", "-c", "opd:gui_grounding/warm_start.yaml")
opd("export", str(RUN / "checkpoints" / "last.ckpt"), str(RUN / "export"))
shutil.rmtree(HERE)
shutil.move(RUN / "export", HERE)
# half the size on disk; trained weights are loaded in float32
AutoModelForImageTextToText.from_pretrained(HERE, dtype=torch.float16).save_pretrained(HERE)
