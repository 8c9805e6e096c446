"""The quickstart with a teacher of another tokenizer: trains one, lets it write texts, and distills it in several ways.

    python benchmarks/other_tokenizer.py [teacher | texts | METHOD SEED | table]

Without an argument everything that is not there yet, into runs/other_tokenizer, and then the table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from opd_lightning.modalities.text.quickstart import ALPHABET, EOS, PAD, sums
from opd_lightning.report import read_curves

RUNS = Path("runs/other_tokenizer")
TEACHER, TEXTS = RUNS / "teacher", RUNS / "texts.jsonl"
UPDATES, ROWS = 60, 3840
METHODS: dict[str, list[str]] = {
    "tokenizer_barrier": ["opd:methods/text/tokenizer_barrier.yaml"],
    "gold": ["opd:methods/text/gold.yaml"],
    "uld": ["opd:methods/text/uld.yaml"],
    "sft": ["opd:methods/sft.yaml"],
}
RATES = {"tokenizer_barrier": 3e-4}
"""Learning rates other than the quickstart's 1e-3, at which sampled tokens alone are too noisy a guide."""
SEEDS = (0, 1, 2)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a BPE tokenizer whose longest tokens are a carry with what follows (+0=1) and the sign of the answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\+[01]=[01]| #|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=64, special_tokens=[PAD, EOS], initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator([row["prompt"] + row["solution"] for row in sums(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


def teach() -> None:
    """Trains a teacher of the shipped one's size from random weights, by supervised fine-tuning."""
    folder, run = RUNS / "architecture", RUNS / "pretrained"
    tokenizer = piece_tokenizer()
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        head_dim=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    since = time.process_time(), time.time()
    opd("fit", "-c", "opd:text/pretrain_teacher.yaml", f"--model.student.path={folder}",
        "--data.train_options.count=6400", "--model.rollout.batch_size=64", "--trainer.max_steps=300",
        "--trainer.val_check_interval=150", f"--trainer.default_root_dir={run}")  # fmt: skip
    print(f"teacher: {time.time() - since[1]:.0f} s", read_curves(run)["val/accuracy"])
    opd("export", str(run / "checkpoints" / "last.ckpt"), str(RUNS / "export"))
    shutil.move(RUNS / "export", TEACHER)


@torch.no_grad()
def write() -> None:
    """Lets the teacher write a solution of each problem, at temperature 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    torch.manual_seed(0)
    rows, right = sums(ROWS), 0
    with TEXTS.open("w", encoding="utf-8") as file:
        for begin in range(0, ROWS, 256):
            some = rows[begin : begin + 256]
            inputs = tokenizer([row["prompt"] for row in some], return_tensors="pt", padding=True)
            written = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                max_new_tokens=56,
            )
            texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(some, texts, strict=True):
                right += text.endswith(f"#{row['answer']}")
                file.write(json.dumps(row | {"completion": text}) + "\n")
    print(f"texts: {right} of {ROWS} are right")


def distill(method: str, seed: int) -> None:
    """Trains the shipped student, on its own rollouts or on the teacher's texts."""
    folder = RUNS / f"{method}-{seed}"
    overlays = [part for overlay in METHODS[method] for part in ("-c", overlay)]
    own = ["--model.rollout.behavior={dataset: 1.0, student: 0.0}"] if method == "sft" else []
    own += [f"--model.optimizer.init_args.lr={RATES[method]}"] if method in RATES else []
    opd("fit", "-c", "opd:text/quickstart.yaml", *overlays, *own, f"--trainer.default_root_dir={folder}",
        f"--trainer.max_steps={UPDATES}", f"--trainer.val_check_interval={UPDATES // 2}", f"--seed_everything={seed}",
        "--model.evaluation.before=false", f"--data.train={TEXTS}", "--data.train_options=null",
        "--data.on_bad_row=skip")  # what the teacher left empty, where it is trained on  # fmt: skip


def table() -> None:
    """Prints held-out accuracy in % by student updates, the mean and each seed's last."""
    for method in METHODS:
        curves = [read_curves(RUNS / f"{method}-{seed}")["val/accuracy"] for seed in SEEDS if done(method, seed)]
        if curves:
            values = [[value for _, value in curve] for curve in curves]
            means = " | ".join(f"{100 * mean(points):.1f}" for points in zip(*values, strict=True))
            print(f"| `{method}` | {means} | {', '.join(f'{100 * curve[-1][1]:.1f}' for curve in curves)} |")


def done(method: str, seed: int) -> bool:
    return (RUNS / f"{method}-{seed}" / "checkpoints" / "last.ckpt").exists()


def main(arguments: list[str]) -> None:
    if arguments == ["teacher"] or (not arguments and not TEACHER.exists()):
        teach()
    if arguments == ["texts"] or (not arguments and not TEXTS.exists()):
        write()
    if len(arguments) == 2:
        distill(arguments[0], int(arguments[1]))
    for seed in SEEDS if not arguments else ():
        for method in METHODS:
            if not done(method, seed):
                distill(method, seed)
    if arguments in ([], ["table"]):
        table()


if __name__ == "__main__":
    main(sys.argv[1:])
