"""Exported students elsewhere: ``python benchmarks/exports.py RUN ...`` compares what they write greedily.

Each run's student is exported, and the first held-out prompts are answered here (`opd predict`), by plain transformers
in a process that has never heard of this package, and, with ``--vllm PYTHON`` (of an environment with vLLM), by vLLM's
server. Printed is how many answers are the same, and where the first of the others part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml

PORT = 8123
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, prompts = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
answers = []
for start in range(0, len(prompts), 16):
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 16]]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    rows = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answers += tokenizer.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
assert not any(name.startswith("opd_lightning") for name in sys.modules)
print(json.dumps(answers))
"""


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


def own(run: Path, scratch: Path, count: int) -> dict[str, str]:
    """Returns the run's greedy completions of its first held-out prompts, by prompt."""
    config = max(run.rglob("config.yaml"), key=os.path.getmtime)
    place = scratch / "own"
    first = [f"--data.validation_batch_size={count}", "--trainer.limit_predict_batches=1"]
    opd("predict", "-c", str(config), f"--ckpt_path={newest(run)}", f"--trainer.default_root_dir={place}", *first)
    rows = [json.loads(line) for line in (place / "predictions-0.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["prompt"]: row["completion"] for row in rows}


def newest(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def horizon(run: Path) -> int:
    config = yaml.safe_load(max(run.rglob("config.yaml"), key=os.path.getmtime).read_text(encoding="utf-8"))
    return int(config["model"]["init_args"]["rollout"]["horizon"])


def plain(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """Returns what transformers alone writes."""
    command = [sys.executable, "-c", PLAIN, str(folder.resolve()), str(tokens)]
    # from an empty folder: nothing of this repository can be imported by accident
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, cwd=empty)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return list(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def served(python: str, folder: Path):
    """Starts vLLM's server on a folder, and ends it."""
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder.resolve()),
        "--dtype",
        "float32",
    ]
    command += ["--host", "127.0.0.1", "--port", str(PORT), "--enforce-eager", "--max-model-len", "512"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as empty, open(folder / "vllm.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, cwd=empty)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    sys.exit(f"vLLM ended with {process.returncode}; see {folder / 'vllm.log'}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield
        finally:
            process.terminate()
            process.wait(60)


def from_server(folder: Path, prompt: str, tokens: int) -> str:
    body = {
        "model": str(folder.resolve()),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def compared(name: str, ours: list[str], theirs: list[str]) -> str:
    """Formats how many answers are equal, and the first pair that is not."""
    apart = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.strip() != b.strip()]
    first = f"; first apart: {apart[0][0]!r} here, {apart[0][1]!r} there" if apart else ""
    return f"{name}: {len(ours) - len(apart)} of {len(ours)} answers are the same{first}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs on text")
    parser.add_argument("--count", type=int, default=50, help="held-out prompts; default 50")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    options = parser.parse_args()
    for run in options.runs:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "exported"
            opd("export", str(newest(run)), str(folder), "--dtype=float32")
            answers = own(run, Path(scratch), options.count)
            prompts = list(answers)
            ours, tokens = [answers[prompt] for prompt in prompts], horizon(run)
            print(compared(f"{run}, transformers", ours, plain(folder, prompts, tokens)), flush=True)
            if options.vllm:
                with served(options.vllm, folder):
                    theirs = [from_server(folder, prompt, tokens) for prompt in prompts]
                print(compared(f"{run}, vLLM", ours, theirs), flush=True)


if __name__ == "__main__":
    main()
