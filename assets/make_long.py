"""Makes the models of configs/text/long.yaml, with the project's own commands: ``make assets-long``, minutes on a core.

Both learn by SFT, in stages: from short problems the form and the sums, from long ones to find each digit. The teacher
stops when it makes no mistakes; the student, a fraction of its size, while it makes many.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.modalities.text.totals import ALPHABET

HERE = Path(__file__).parent / "long"
MODELS: dict[str, dict[str, Any]] = {
    "teacher": {
        "sizes": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 16},
        # the fewest and the most digits of a problem, and the optimizer steps
        "stages": [(3, 8, 600), (8, 16, 250), (24, 26, 300), (26, 26, 100), (26, 26, 150)],
        "schedules": ["constant", "constant", "linear", "linear", "linear"],
        "slips": 0.03,
        "hinted": {},
    },
    "student": {
        "sizes": {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 12},
        "stages": [(3, 8, 500), (8, 16, 200), (24, 26, 250), (26, 26, 150)],
        "schedules": ["constant", "constant", "constant", "linear"],
        # it has never seen a slip undone: that is what the teacher has to teach
        "slips": 0.0,
        # what is shown in some of its prompts, so that it can be its own teacher
        "hinted": {"hint": 0.2, "solution": 0.2, "answer": 0.1},
    },
}


def architecture(folder: Path, sizes: dict[str, Any]) -> None:
    """A folder with a configuration and a tokenizer, but no weights yet."""
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen3ForCausalLM"],
        **sizes,
    ).save_pretrained(folder)


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


def make(role: str) -> None:
    """Trains a model stage by stage, each from where the one before ended; a stage that is there is not made again."""
    folder, model = Path("runs/pretrain_long") / role, MODELS[role]
    source = folder / "untrained"
    architecture(source, model["sizes"])
    for number, (fewest, most, steps) in enumerate(model["stages"]):
        last, run = number == len(model["stages"]) - 1, folder / str(number)
        settings = {
            "trainer.default_root_dir": run,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": int(last),
            "trainer.val_check_interval": 50,
            "model.student.path": source,
            "model.student.random_init": number == 0,
            "model.schedule.name": model["schedules"][number],
            "data.train_options.fewest": fewest,
            "data.train_options.most": most,
            "data.train_options.seed": number,
            "data.train_options.slips": model["slips"],
            "data.train_options.hinted": model["hinted"],
        }
        if not (run / "export").exists():
            opd("fit", "-c", "opd:text/pretrain_long.yaml", *(f"--{key}={value}" for key, value in settings.items()))
            opd("export", str(run / "checkpoints" / "last.ckpt"), str(run / "export"))
        source = run / "export"
    shutil.rmtree(HERE / role, ignore_errors=True)
    shutil.copytree(source, HERE / role)


for role in sys.argv[1:] or MODELS:
    make(role)
