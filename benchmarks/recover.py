"""A pruned language model relearns what it lost: ``make recover``, with OPD_DATA naming the folder of real data.

The model is stories260K (a Llama of 260,032 parameters, trained on TinyStories). One of its five layers is cut out;
then the rest learns from the whole on its own rollouts. Prompts are the first words of stories that the original
writes; perplexity is measured on other stories of the original, KL on the damaged model's own rollouts.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.export import write
from opd_lightning.report import draw, read_curves

RUN = Path("runs/recover")
CUT_LAYER = 2
OPENING_TOKENS = 8


def prune(source: Path, folder: Path) -> None:
    """A copy without one layer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    del model.model.layers[CUT_LAYER]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers -= 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@torch.no_grad()
def write_stories(source: Path, count: int, tokens: int) -> torch.Tensor:
    """``[count, 1 + tokens]`` ids of stories sampled from the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    start = torch.full((count, 1), model.config.bos_token_id)
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, **length)


@torch.no_grad()
def perplexity(folder: Path, stories: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return math.exp(float(model(stories, labels=stories).loss))


def main() -> None:
    data = os.environ.get("OPD_DATA")
    if not data:
        sys.exit("set OPD_DATA to the folder that holds stories260K/hf")
    source = Path(data) / "stories260K" / "hf"
    RUN.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(RUN / "original")
    tokenizer.save_pretrained(RUN / "original")
    prune(source, RUN / "damaged")
    stories = write_stories(source, 640, 120)
    openings = tokenizer.batch_decode(stories[128:, 1 : 1 + OPENING_TOKENS])
    rows = [json.dumps({"prompt": text}) for text in openings if text.strip()]
    (RUN / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    subprocess.run([sys.executable, "-m", "opd_lightning", "fit", "-c", "opd:text/recover.yaml"], check=True)
    write(RUN / "checkpoints" / "last.ckpt", RUN / "recovered")

    curves = read_curves(RUN)
    result = {
        f"perplexity_{name}": round(perplexity(RUN / name, stories[:128]), 3)
        for name in ("original", "damaged", "recovered")
    }
    for direction in ("kl_student_teacher", "kl_teacher_student"):
        values = curves[f"val/teacher/{direction}"]
        result |= {f"{direction}_before": round(values[0][1], 4), f"{direction}_after": round(values[-1][1], 4)}
    draw(curves, RUN / "curves.png")
    (RUN / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
