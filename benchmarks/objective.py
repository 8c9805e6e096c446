"""Peak memory and time of the objective beside the dense computation: reverse KL over the full vocabulary.

    python benchmarks/objective.py [--steps 1024 --vocabulary 151936 --repeats 3 ...]

Each case runs in a child process of its own. Memory is the kernel's high-water mark of the resident set (VmHWM, reset
before the call), less what was resident before (weights, hidden states, the interpreter) and less the gradients that
any computation returns (of the student's hidden states and head). Time is forward and backward of one call, after one
call on a few steps. Linux only. Writes runs/bench/objective.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_lightning.distribution import Categorical, Head
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.trajectory import Trajectories

MB = 1e6  # megabytes, as in "400 MB"


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (most since the last reset)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trajectories(steps: int, vocabulary: int) -> Trajectories:
    mask = torch.ones(1, steps, dtype=torch.bool)
    actions = torch.randint(vocabulary, (1, steps))
    return Trajectories({}, actions, mask, [{}], torch.ones(1, dtype=torch.bool), torch.zeros(1, steps))


def chunked(student: Categorical, teacher: Categorical, chunk_mib: int) -> Tensor:
    objective = Objective([Term(ReverseKL())], chunk_mib=chunk_mib)
    loss, _ = objective(student, {"teacher": teacher}, trajectories(student.hidden.shape[1], student.head.vocabulary))
    return loss


def dense(student: Categorical, teacher: Categorical) -> Tensor:
    log_p = student.head.module(student.hidden).log_softmax(-1)
    with torch.no_grad():
        log_q = teacher.head.module(teacher.hidden).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def measure(case: str, args: argparse.Namespace) -> dict[str, float]:
    """One case in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    def policy(hidden: int, trained: bool) -> Categorical:
        layer = nn.Linear(hidden, args.vocabulary, bias=False).requires_grad_(trained)
        states = torch.randn(1, args.steps, hidden).requires_grad_(trained)
        return Categorical(states, Head(layer, args.vocabulary))

    def run(student: Categorical, teacher: Categorical) -> Tensor:
        loss = chunked(student, teacher, args.chunk_mib) if case == "chunked" else dense(student, teacher)
        loss.backward()
        return loss.detach()

    student, teacher = policy(args.student_hidden, True), policy(args.teacher_hidden, False)
    few = slice(0, 8)
    run(Categorical(student.hidden[:, few], student.head), Categorical(teacher.hidden[:, few], teacher.head))
    inputs = [student.hidden, *student.head.trainable()]
    for tensor in inputs:
        tensor.grad = None

    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    loss = run(student, teacher)
    seconds = time.perf_counter() - start
    gradients = sum(tensor.grad.nbytes for tensor in inputs if tensor.grad is not None)
    return {
        "peak_mb": (resident("VmHWM") - before - gradients) / MB,
        "seconds": seconds,
        "loss": float(loss),
        "gradients_mb": gradients / MB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="default: that of Qwen3")
    parser.add_argument("--student-hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=384)
    parser.add_argument("--chunk-mib", type=int, default=Objective.chunk_mib)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/objective.json"))
    parser.add_argument("--case", choices=["chunked", "dense"], help="measure one case here, and print JSON")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.case, args)))
        return

    results = {}
    print(f"reverse KL, {args.steps} steps × {args.vocabulary} ids, float32, {args.threads} thread(s)")
    print(f"{'':10}{'peak above inputs':>20}{'time':>12}{'loss':>12}")
    for case in ("chunked", "dense"):
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(args.repeats)
        ]
        results[case] = {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}
        found = results[case]
        print(f"{case:10}{found['peak_mb']:>17.0f} MB{found['seconds']:>10.1f} s{found['loss']:>12.6f}")
    print(f"median of {args.repeats}; beside it {results['dense']['gradients_mb']:.0f} MB of gradients in both cases")
    settings = {name: value for name, value in vars(args).items() if name not in ("case", "output")}
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"settings": settings, "versions": versions, **results}, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
