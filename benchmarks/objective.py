"""Peak memory and time of the objective alone, beside the dense computation and TRL's chunked loss.

    python benchmarks/objective.py [--steps 1024 --vocabulary 151936 --divergence reverse_kl …]

The same hidden states and heads on every side. ``plain`` is the divergence alone; ``full`` adds three weights per step
(teacher's entropy, teacher's confidence, importance ratio) and every diagnostic; TRL's loss knows neither. Each run is
a process of its own. Memory is the kernel's high-water mark of the resident set (VmHWM, reset before the call), less
what was resident before (weights, hidden states, the interpreter) and less the gradients that any computation returns.
Time is forward and backward of one call, after one call on a few steps; CPU time is that of all threads and suffers
less when other programs run. Linux only. Writes runs/bench/objective.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from side_by_side import MB, PEER_PYTHON, medians, record, reset_peak, resident, rounds
from torch import Tensor, nn

CASES = ("plain", "full", "trl", "dense", "plain-bf16", "trl-bf16")


class Side:
    """Student and teacher: hidden states ``[1, steps, H]`` and heads, the student's with gradient."""

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        torch.manual_seed(0)
        wide = {"student": args.student_hidden, "teacher": args.teacher_hidden}
        self.heads = {who: nn.Linear(width, args.vocabulary, bias=False) for who, width in wide.items()}
        self.hidden = {who: torch.randn(1, steps, width) for who, width in wide.items()}
        self.actions = torch.randint(args.vocabulary, (1, steps))
        self.heads["teacher"].requires_grad_(False)
        self.heads["student"].requires_grad_(not args.frozen_head)
        self.inputs = [self.hidden["student"].requires_grad_()]
        self.inputs += [] if args.frozen_head else [self.heads["student"].weight]

    def few(self) -> Side:
        other = object.__new__(Side)
        other.__dict__ = dict(self.__dict__)
        other.hidden = {who: states[:, :8] for who, states in self.hidden.items()}
        other.actions = self.actions[:, :8]
        return other


def ours(side: Side, args: argparse.Namespace, full: bool) -> Tensor:
    from opd_lightning.distribution import Categorical, Head, Stream
    from opd_lightning.objective import JSD, Confidence, Entropy, ImportanceRatio, Objective, ReverseKL, Term
    from opd_lightning.trajectory import Trajectories

    steps = side.actions.shape[1]
    trajectories = Trajectories(
        {},
        side.actions,
        torch.ones(1, steps, dtype=torch.bool),
        [{}],
        torch.ones(1, dtype=torch.bool),
        torch.full((1, steps), -11.0),
    )
    student, teacher = (
        Categorical(side.hidden[who], Head(side.heads[who], args.vocabulary)) for who in ("student", "teacher")
    )
    signal = JSD(args.beta) if args.divergence == "jsd" else ReverseKL()
    weights = [Entropy(beta=0.01), Confidence(), ImportanceRatio()] if full else []
    objective = Objective([Term(signal, weights=weights)], **({"chunk_mib": args.chunk_mib} if args.chunk_mib else {}))
    return objective(student, {"teacher": Stream(teacher)}, trajectories, diagnose=full).loss


def peer(side: Side, args: argparse.Namespace) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    beta = args.beta if args.divergence == "jsd" else 1.0
    student, teacher = (side.hidden[who] for who in ("student", "teacher"))
    heads = [side.heads[who].weight for who in ("student", "teacher")]
    return _chunked_divergence_loss(student, teacher, *heads, torch.ones(side.actions.shape), beta)[0]


def dense(side: Side, args: argparse.Namespace) -> Tensor:
    log_p, log_q = (side.heads[who](side.hidden[who]).log_softmax(-1) for who in ("student", "teacher"))
    if args.divergence == "jsd":
        b = torch.tensor(args.beta)
        log_m = torch.logaddexp(log_q + b.log(), log_p + (1 - b).log())
        return (b * log_q.exp() * (log_q - log_m) + (1 - b) * log_p.exp() * (log_p - log_m)).sum(-1).mean()
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def measure(case: str, args: argparse.Namespace) -> dict[str, float]:
    """One case in this process."""
    torch.set_num_threads(args.threads)

    def run(side: Side) -> Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16) if case.endswith("bf16") else nullcontext()
        kind = case.removesuffix("-bf16")
        with autocast:
            if kind == "trl":
                loss = peer(side, args)
            else:
                loss = dense(side, args) if kind == "dense" else ours(side, args, kind == "full")
        loss.backward()
        return loss.detach()

    side = Side(args, args.steps)
    run(side.few())
    for tensor in side.inputs:
        tensor.grad = None
    reset_peak()
    before, start, used = resident("VmRSS"), time.perf_counter(), time.process_time()
    loss = run(side)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    gradients = [tensor.grad for tensor in side.inputs if tensor.grad is not None]
    size = sum(gradient.nbytes for gradient in gradients)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": (resident("VmHWM") - before - size) / MB,
        "loss": float(loss),
        "gradient_norm": float(torch.stack([gradient.norm() for gradient in gradients]).norm()),
        "gradients_mb": size / MB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="default: that of Qwen3")
    parser.add_argument("--student-hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=384)
    parser.add_argument("--divergence", choices=["reverse_kl", "jsd"], default="reverse_kl", help="TRL's default")
    parser.add_argument("--beta", type=float, default=0.5, help="of the JSD")
    parser.add_argument("--frozen-head", action="store_true")
    parser.add_argument("--chunk-mib", type=int, help="default: the objective's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="objective", help="of the file in runs/bench")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--case", choices=CASES, help="measure one case here, and print JSON")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.case, args)))
        return

    print(f"{args.divergence}, {args.steps} steps × {args.vocabulary} ids, {args.threads} thread(s)")
    sides = {
        case: [str(PEER_PYTHON) if case.startswith("trl") else sys.executable, __file__, *sys.argv[1:], "--case", case]
        for case in args.cases
    }
    runs = rounds(sides, args.repeats)
    results: dict[str, Any] = {case: medians(found) | {"runs": found} for case, found in runs.items()}
    print(f"{'':12}{'time':>10}{'CPU time':>11}{'peak':>10}{'loss':>12}{'gradient':>12}")
    for case, found in results.items():
        print(
            f"{case:12}{found['seconds']:>8.2f} s{found['cpu_seconds']:>9.2f} s{found['peak_mb']:>7.0f} MB"
            f"{found['loss']:>12.6f}{found['gradient_norm']:>12.6f}"
        )
    record(args.name, {name: value for name, value in vars(args).items() if name != "case"}, results)


if __name__ == "__main__":
    main()
