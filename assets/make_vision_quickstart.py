"""Makes the vision-language quickstart's student with the project's own command: ``make assets-vision``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from qwen3_vl import architecture
from transformers import AutoModelForImageTextToText

from opd_lightning.modalities.vision_language.quickstart import scenes

HERE, RUN = Path(__file__).parent / "vision_quickstart" / "student", Path("runs/vision_warm_start")


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


for old in (HERE, RUN):
    shutil.rmtree(old, ignore_errors=True)
architecture(HERE, (row["prompt"] for row in scenes(500, kinds=["which"])), vocabulary=400, patch=8, side=96)
opd("fit", "-c", "opd:vision_language/warm_start.yaml")
opd("export", str(RUN / "checkpoints" / "last.ckpt"), str(RUN / "export"))
shutil.rmtree(HERE)
shutil.move(RUN / "export", HERE)
# half the size on disk; trained weights are loaded in float32
AutoModelForImageTextToText.from_pretrained(HERE, dtype=torch.float16).save_pretrained(HERE)
