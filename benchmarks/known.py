"""Known benchmarks on local files, before and after: ``python benchmarks/known.py BEFORE AFTER``, with OPD_DATA set.

EleutherAI's lm-evaluation-harness does the measuring (``pip install 'opd-lightning[eval]'``): its own tasks for GSM8K
and BIG-Bench Hard, whose rows come from files instead of the hub, and a task for SVAMP in the manner of its GSM8K.
Arguments are folders of transformers, such as `opd export` writes, or names on the hub. Prompts are plain text, as in
the tasks, unless ``--chat`` is given. Results are kept in runs/known, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

RUNS = Path("runs/known")


def gsm8k(data: Path) -> list[dict[str, Any]]:
    files = {"train": str(data / "gsm8k/train.jsonl"), "test": str(data / "gsm8k/test.jsonl")}
    return [task("gsm8k", files) | {"generation_kwargs": limited(256, ["Question:", "</s>", "<|im_end|>"])}]


def bbh(data: Path) -> list[dict[str, Any]]:
    files = sorted((data / "bbh/bbh").glob("*.json"))
    stops = limited(32, ["</s>", "Q", "\n\n"])
    return [
        task(f"bbh_fewshot_{path.stem}", {"test": str(path)}, field="examples") | {"generation_kwargs": stops}
        for path in files
    ]


def svamp(data: Path) -> list[dict[str, Any]]:
    """Word problems of one step; the answer is the last number of what is written, as in GSM8K's flexible match."""
    like = task("gsm8k", {"test": str(data / "svamp/SVAMP.json")})
    for key in ("training_split", "fewshot_split", "tag"):
        like.pop(key, None)
    shots = [
        ("Tom has 3 pens and buys 4 more.", "How many pens has he?", 7.0),
        ("There were 9 birds on a tree and 5 flew away.", "How many birds are left?", 4.0),
        ("A box holds 6 eggs.", "How many eggs do 3 boxes hold?", 18.0),
    ]
    rows = [{"Body": body, "Question": question, "Answer": answer} for body, question, answer in shots]
    return [
        like
        | {
            "task": "svamp",
            "doc_to_text": "Question: {{Body}} {{Question}}\nAnswer:",
            "doc_to_target": "{{Answer | int}}",
            "fewshot_config": {"sampler": "first_n", "samples": rows},
            "num_fewshot": 3,
            "generation_kwargs": limited(32, ["Question:", "\n\n", "<|im_end|>"]),
            "filter_list": [entry for entry in like["filter_list"] if entry["name"] == "flexible-extract"],
        }
    ]


SUITES = {"gsm8k": gsm8k, "bbh": bbh, "svamp": svamp}


def limited(tokens: int, stops: list[str]) -> dict[str, Any]:
    return {"until": stops, "do_sample": False, "max_gen_toks": tokens}


def task(name: str, files: dict[str, str], **settings: Any) -> dict[str, Any]:
    """The harness's task of this name, with rows from files."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(TaskManager().task_index[name].yaml_path)
    config.pop("dataset_name", None)
    return config | {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files, **settings}}


def measure(model: str, suite: str, data: Path, count: int, chat: bool) -> dict[str, float]:
    """Exact match, in percent, of each task; from runs/known where it was measured before."""
    kept = (
        RUNS / f"{Path(model).resolve().as_posix().strip('/').replace('/', '-')}-{suite}-{count}{'-chat' * chat}.json"
    )
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    from lm_eval import simple_evaluate

    answer = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=SUITES[suite](data),
        limit=count,
        batch_size=8,
        device="cpu",
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert answer is not None
    # what the last filter of a task finds: for GSM8K the last number, which asks for no form
    found = {
        name: 100 * next(value for key, value in reversed(result.items()) if key.startswith("exact_match,"))
        for name, result in answer["results"].items()
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of transformers, or names on the hub")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--count", type=int, default=20, help="the first rows of each task; BBH has 27 tasks")
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    options = parser.parse_args()
    if "OPD_DATA" not in os.environ:
        sys.exit("OPD_DATA names no folder with gsm8k, bbh and svamp")
    data = Path(os.environ["OPD_DATA"])
    for model in options.models:
        AutoTokenizer.from_pretrained(model)  # whatever is wrong with a folder is said before anything is measured
    print(f"| benchmark (first {options.count} of each task) | {' | '.join(options.models)} |")
    print("|---" * (1 + len(options.models)) + "|")
    for suite in options.suites:
        measured = [measure(model, suite, data, options.count, options.chat) for model in options.models]
        means = [sum(result.values()) / len(result) for result in measured]
        print(f"| {suite} ({len(measured[0])} tasks) | {' | '.join(f'{mean:.1f} %' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
