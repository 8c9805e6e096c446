"""The recipes on SmolLM2-135M-Instruct, over seeds: ``make recipes`` writes the table of docs/recipes.md.

A run whose result is in benchmarks/recipes.json is not run again: stopped, it goes on with the next. Names on the
command line run these recipes alone; ``--prepare`` writes the models that recipes start from, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.modalities.autoregressive.elsewhere.store import write_whole
from opd_lightning.report import read_curves, report

RUNS, UNPACKED = Path("runs/recipes"), Path("models/smollm2/unpacked")
PAGE, RESULTS = Path("docs/recipes.md"), Path("benchmarks/recipes.json")
KEPT_LAYERS, FIRST_CUT = 24, 14
BITS, GROUP = 3, 64
# the same weights as the GGUF file's, which takes half a minute to be read
UNPACKED_STUDENT = f"--model.student.path={UNPACKED}"
# what is laid over opd:recipes/form.yaml
RECIPES: dict[str, list[str]] = {
    "form": [],
    "form, SFT on the teacher's text": ["-c", "opd:methods/sft.yaml"],
    "form, the student's rollouts alone": ["--model.rollout.behavior={student: 1.0}"],
    "form, reverse KL": ["--model.objective.terms=[{signal: ReverseKL}]"],
    "form, JSD": ["--model.objective.terms=[{signal: JSD}]"],
    "system prompt": ["-c", "opd:recipes/system_prompt.yaml"],
    "brief": ["-c", "opd:recipes/brief.yaml"],
    "recover pruned": ["-c", "opd:recipes/recover_pruned.yaml"],
    "half the width": ["-c", "opd:recipes/half_width.yaml"],
    "recover nf4": ["-c", "opd:recipes/recover_nf4.yaml"],
    "recover 3 bits": ["-c", "opd:recipes/recover_3bit.yaml"],
    "skill, SDFT": ["-c", "opd:recipes/sdft.yaml"],
    "skill, SFT": ["-c", "opd:recipes/skill_sft.yaml"],
    "persona, EDGE-OPD": ["-c", "opd:methods/text/edge_opd.yaml", "-c", "opd:recipes/persona.yaml"],
    "persona, OPSD": ["-c", "opd:methods/text/opsd.yaml", "-c", "opd:recipes/persona.yaml"],
    "form by reward, GRPO": [
        *("-c", "opd:recipes/form_reward.yaml", "-c", "opd:methods/grpo.yaml", "--model.rollout.batch_size=4")
    ],
    "form by reward, RLSD": [
        *("-c", "opd:recipes/form_reward.yaml", "-c", "opd:methods/text/rlsd.yaml"),
        *("-c", "opd:recipes/form_reward_rlsd.yaml"),
    ],
    "form by reward, SDPO": [
        *("-c", "opd:recipes/form_reward.yaml", "-c", "opd:methods/sdpo.yaml"),
        *("-c", "opd:recipes/form_reward_sdpo.yaml"),
    ],
    "form, PBSD": ["-c", "opd:methods/text/pbsd.yaml", "-c", "opd:recipes/preferred.yaml"],
}
START, END = "<!-- make recipes -->", "<!-- end -->"


def opd(*arguments: str) -> float:
    """Runs a command in a process of its own; returns the most memory that it had, in GiB."""
    process = subprocess.Popen([sys.executable, "-m", "opd_lightning", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"opd {' '.join(arguments)} failed")
    return usage.ru_maxrss / 2**20  # KiB on Linux


def prepare() -> None:
    """Fetches the model, and writes it without a fifth of its layers, half as wide, and rounded, unless it is there."""
    if not UNPACKED.exists():
        opd("fetch", "smollm2", "--unpack")
    prune(UNPACKED, RUNS / "pruned", KEPT_LAYERS)
    narrow(UNPACKED, RUNS / "narrowed")
    round_off(UNPACKED, RUNS / "rounded")


def save(model: Any, source: Path, folder: Path) -> None:
    """Writes a model with the source's tokenizer; the folder is there when it is complete."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source).save_pretrained(part)
    part.replace(folder)


def prune(source: Path, folder: Path, kept: int) -> None:
    """Writes a copy with that many layers: from the 15th on, where leaving six out costs least (docs/recipes.md)."""
    if folder.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = model.model.layers
    del layers[FIRST_CUT : FIRST_CUT + len(layers) - kept]
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = kept
    save(model, source, folder)


def narrow(source: Path, folder: Path) -> None:
    """Writes a copy of half the width: the channels of the stream and of each MLP whose weights are the largest."""
    if folder.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights, config = model.state_dict(), model.config
    half, half_mlp = config.hidden_size // 2, config.intermediate_size // 2
    stream = weights["model.embed_tokens.weight"].norm(dim=0).topk(half).indices.sort().values
    # the last dimension of what reads the stream, the first of what writes to it
    reads = ("embed_tokens", "norm", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    writes = ("o_proj", "down_proj")
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        neurons = weights[f"{mlp}.down_proj.weight"].norm(dim=0).topk(half_mlp).indices.sort().values
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}.{name}.weight"] = weights[f"{mlp}.{name}.weight"][neurons]
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, neurons]
    for name, weight in weights.items():
        if name.split(".")[-2].endswith(reads):
            weights[name] = weight[..., stream]
        elif name.split(".")[-2].endswith(writes):
            weights[name] = weight[stream]
    config.hidden_size, config.intermediate_size, config.head_dim = half, half_mlp, config.head_dim
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    save(model, source, folder)


def round_off(source: Path, folder: Path) -> None:
    """Writes a copy whose layers hold 3 bits a weight, in groups of 64, as torchao rounds them; unpacked."""
    if folder.exists():
        return
    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError:
        print(f"{folder} is not made: it needs torchao (pip install torchao)")
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = model.state_dict()
    quantize_(
        model.model.layers, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{BITS}"), granularity=PerGroup(GROUP))
    )
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights[f"model.layers.{name}.weight"] = module.weight.dequantize()
    model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    model.load_state_dict(weights)
    save(model, source, folder)


def train(name: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """Trains a recipe once and returns what was measured: with the first seed, before training too."""
    folder = RUNS / re.sub(r"\W+", "_", name) / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    since = time.time()
    own = [f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
    own += [] if seed == 0 else ["--model.evaluation.before=false"]
    peak = opd("fit", "-c", "opd:recipes/form.yaml", UNPACKED_STUDENT, *RECIPES[name], *own, *extra)
    tokens = sum(value for _, value in read_curves(folder).get("steps/rollout", []))
    return report(folder, since) | {"peak_gib": round(peak, 2), "tokens": int(tokens)}


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """Formats a recipe's row: means over its runs, before → after, and what came of the single seeds."""

    def change(read: Callable[[dict[str, Any]], dict[str, float]], form: str, scale: float = 1.0) -> str:
        rows = [read(run) for run in runs]
        known = {when: [row[when] for row in rows if row.get(when) is not None] for when in ("before", "after")}
        if not all(known.values()):
            return ""
        means = " → ".join(form.format(scale * mean(values)) for values in known.values())
        least, most = (form.format(scale * bound(known["after"])) for bound in (min, max))
        return means if least == most else f"{means} ({least} to {most})"

    def of(measure: str) -> Callable[[dict[str, Any]], dict[str, float]]:
        return lambda run: run["measures"].get(measure, {})

    cells = [
        name,
        change(of("in_form"), "{:.0f}", 100),
        # where another reward is trained on, facts are measured beside it
        change(lambda run: run["measures"].get("facts", run), "{:.1f}", 100),
        change(of("length"), "{:.1f}"),
        change(of("teacher/kl_teacher_student"), "{:.3f}"),
        change(of("retention/kl"), "{:.3f}"),
        change(of("retention/perplexity"), "{:.2f}"),
        f"{mean(run['tokens'] for run in runs) / 1000:.1f}" if all("tokens" in run for run in runs) else "",
        f"{mean(run['wall_s'] for run in runs) / 60:.1f}",
        f"{max(run['peak_gib'] for run in runs):.1f}",
        str(len(runs)),
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| recipe | in the form, % | facts right, % | tokens per answer | KL(teacher‖student) | KL kept | perplexity "
    "| thousand tokens generated | minutes | peak, GiB | seeds |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def write(results: dict[str, list[dict[str, Any]]]) -> None:
    """Puts the table into the page, between its two comments."""
    table = "\n".join([HEAD, *(line(name, runs) for name, runs in results.items() if runs)])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    write_whole(PAGE, f"{before}{START}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default 3")
    parser.add_argument("--prepare", action="store_true", help="write the models that recipes start from, and stop")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further arguments of `opd fit`, last")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RECIPES):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    prepare()
    if options.prepare:
        return
    names = [name for name in options.names or RECIPES if name != "recover 3 bits" or (RUNS / "rounded").exists()]
    # seed by seed, so that a table of all recipes is there early
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for seed in range(options.seeds):
        for name in names:
            if str(seed) not in results.setdefault(name, {}):
                results[name][str(seed)] = train(name, seed, options.extra)
                write_whole(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
                write({name: list(results.get(name, {}).values()) for name in RECIPES})


if __name__ == "__main__":
    main()
