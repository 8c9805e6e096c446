"""Memory of each rank while a sharded student is loaded, beside one whole student.

    python benchmarks/start.py [--layers 24]

Two processes under FSDP2 (gloo) load a Qwen3 of random weights in float32 that teaches itself. Counted is the most
memory that is resident while the models are loaded and cut, less what was resident before. A third process loads it
whole, alone. Writes runs/bench/start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import read_whole, record, reset_peak, resident

GB = 1e9


def write(folder: Path, layers: int) -> int:
    """Saves the student, and returns its bytes."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from opd_lightning.catalog import shipped_configs

    tokenizer = AutoTokenizer.from_pretrained(shipped_configs().parent / "assets" / "quickstart" / "student")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


def load(folder: Path, strategy: str, ranks: int) -> None:
    """Runs `opd fit` until its models are loaded, and prints what that took."""
    import torch

    from opd_lightning.cli import OPDCLI
    from opd_lightning.module import OnPolicyDistillation

    configure = OnPolicyDistillation.configure_model

    def configure_model(module: Any) -> None:
        reset_peak()
        before = resident("VmRSS")
        configure(module)
        if ranks == 1:
            read_whole(module.student)
        taken = {"peak": resident("VmHWM") - before, "held": resident("VmRSS") - before}
        print(json.dumps({name: value / GB for name, value in taken.items()}), flush=True)
        if ranks > 1:
            torch.distributed.barrier()
        os._exit(0)

    OnPolicyDistillation.configure_model = configure_model  # type: ignore[method-assign]
    teacher = "{weights: Live, view: {class_path: PromptView, init_args: {prompt: '{{ solution }}?{{ prompt }}'}}}"
    arguments = [
        "fit", "-c", "opd:text/quickstart.yaml", f"--model.student.path={folder}",
        f"--model.teachers={{teacher: {teacher}}}",
        f"--trainer.strategy={strategy}", f"--trainer.devices={ranks}", f"--trainer.default_root_dir={folder / 'run'}",
        "--data.train_options.count=100",
    ]  # fmt: skip
    OPDCLI(arguments)


def measured(folder: Path, strategy: str, ranks: int) -> list[dict[str, float]]:
    """Starts one process for each rank, and returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--load", str(folder), strategy, str(ranks)]
    processes = []
    for rank in range(ranks):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **(place if ranks > 1 else {})}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=24, help="of the student; default 24")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "STRATEGY", "RANKS"), help="load one here")
    options = parser.parse_args()
    if options.load:
        folder, strategy, ranks = options.load
        load(Path(folder), strategy, int(ranks))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = write(folder, options.layers) / GB
        results = {"whole": whole, "alone": measured(folder, "auto", 1), "fsdp2": measured(folder, "fsdp2", 2)}
    print(json.dumps(results, indent=1))
    record("start", {"layers": options.layers}, results)


if __name__ == "__main__":
    main()
