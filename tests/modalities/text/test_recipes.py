"""The recipes on the language model that people know train, where `opd fetch smollm2` has put it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import run
from opd_lightning.pretrained import Pretrained

ROOT = Path(__file__).parents[3]
FEW = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--model.evaluation.before=false"]
# recover_nf4 and recover_pruned start from folders that are made first: benchmarks/recipes.py
OVERLAYS = ["", "system_prompt", "brief", "sdft", "skill_sft"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_recipe_trains(overlay, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    over = ["-c", f"opd:recipes/{overlay}.yaml"] if overlay else []
    own = [f"--trainer.default_root_dir={tmp_path}", "--model.rollout.batch_size=4"]
    run(["fit", "-c", "opd:recipes/form.yaml", *over, *FEW, *own])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_the_system_prompt_has_about_a_thousand_tokens(smollm2):
    tokenizer = Pretrained(str(smollm2)).tokenizer()
    config = yaml.safe_load((ROOT / "configs" / "recipes" / "system_prompt.yaml").read_text(encoding="utf-8"))
    system = config["model"]["init_args"]["teachers"]["teacher"]["view"]["init_args"]["prompt"][0]
    assert 800 <= len(tokenizer(system["content"]).input_ids) <= 1200
