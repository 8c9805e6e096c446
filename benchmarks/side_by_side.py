"""What the side-by-side benchmarks share: fresh processes that take turns, the kernel's memory counters, tables.

Every measurement is a process of its own that prints one line of JSON; `rounds` starts them one after the other and
turns the order around each time, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PEER_PYTHON = Path(".venv-trl/bin/python")
FOLDER = Path("runs/bench")
MB = 1e6  # megabytes, as in "400 MB"
STOP = 1  # the only stop token of the models made here


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (most since the last reset)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def read_whole(*models: nn.Module) -> None:
    """Weights are mapped from their files, and become resident only when they are read."""
    for model in models:
        for parameter in model.parameters():
            parameter.detach().sum()


def rounds(sides: dict[str, list[str]], count: int) -> dict[str, list[dict[str, Any]]]:
    """Runs each command ``count`` times in turn, every other round backwards; what each printed, in the order run."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(count):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            done = subprocess.run(sides[side], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(sides[side])}\n{done.stderr[-4000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number, nested ones too."""
    first = runs[0]
    return {
        name: medians([run[name] for run in runs])
        if isinstance(value, dict)
        else statistics.median(run[name] for run in runs)
        for name, value in first.items()
    }


def bare_trainer(updates: int, folder: str | Path, *callbacks: Any, **settings: Any) -> Any:
    """Lightning's Trainer on a CPU, with nothing on that is not part of an optimizer step."""
    import lightning as L  # the peer's environment has none

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(
        accelerator="cpu",
        max_steps=updates,
        max_epochs=-1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **dict.fromkeys(off, False),
        **settings,
    )


def record(name: str, settings: dict[str, Any], results: Any) -> None:
    """Writes ``runs/bench/<name>.json`` with hardware, versions and date."""
    peer = ""
    if PEER_PYTHON.exists():  # some benchmarks need none
        peer = subprocess.run([PEER_PYTHON, "-c", _VERSIONS], capture_output=True, text=True).stdout.strip()
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_memory()} GiB",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "lightning", "transformers")},
        "peer": json.loads(peer) if peer else None,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({**facts, "settings": settings, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


_VERSIONS = (
    "import json; from importlib.metadata import version; "
    "print(json.dumps({p: version(p) for p in ('trl', 'torch', 'transformers', 'accelerate')}))"
)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30


def share_of(phases: dict[str, float], total: float) -> str:
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in phases.items())


# -- models -------------------------------------------------------------------------------------------------------


def write_models(folder: Path, vocabulary: int) -> None:
    """A Qwen3 student (hidden 256, 4 layers) and teacher (hidden 384, 6 layers) of one vocabulary, random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    if (folder / "done").exists():
        return
    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token=f"t{STOP}")
    for name, hidden, layers in (("student", 256, 4), ("teacher", 384, 6)):
        torch.manual_seed(hidden)
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=STOP,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    (folder / "done").touch()


def prompts(count: int, vocabulary: int) -> list[dict[str, str]]:
    """Of 16 to 32 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 33, (count,), generator=generator).tolist()
    words = [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [{"prompt": " ".join(f"t{i}" for i in row)} for row in words]


def set_stop(model: Any, share: float) -> None:
    """Gives the head a fixed bias with which the stop token has this probability wherever else all are alike."""
    weight = model.lm_head.weight
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    head.weight = weight
    head.bias = nn.Parameter(torch.zeros(len(weight)), requires_grad=False)
    head.bias[STOP] = -1e4 if share == 0 else float(torch.tensor(share / (1 - share) * (len(weight) - 1)).log())
    model.lm_head = head
