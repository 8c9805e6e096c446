"""The methods on a task, side by side: ``make methods`` writes the two tables of docs/methods.md.

The tasks are text/long.yaml, with every overlay of configs/methods/ that is for texts and the variants of
benchmarks/long.yaml, and text/quickstart.yaml (``--task quickstart``), with those whose teacher is shown something,
which helps there: from the same student, with as many updates on as many trajectories each. A run whose result is in
benchmarks/<task>.json is not made again: stopped, it goes on with the next. Names on the command line run these alone;
``--table`` runs nothing and writes the table, and what it says into the heads of the overlays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from opd_lightning.catalog import read_all, shipped_configs
from opd_lightning.cli import run
from opd_lightning.entry_points import import_parts
from opd_lightning.modalities.autoregressive.elsewhere.score import score
from opd_lightning.modalities.autoregressive.elsewhere.store import write_whole
from opd_lightning.report import read_curves

BENCHMARKS, RUNS, PAGE = Path(__file__).parent, Path("runs/methods"), Path("docs/methods.md")
TASKS = ("long", "quickstart")
MEASURED = re.compile(r"^# Measured: .*(\n#   .*)*$", re.MULTILINE)
"""What was measured, in the head of an overlay, with the lines that continue it."""
END = "<!-- end -->"
SHOWN_NOTHING = {"none", "any", "model"}
"""Privileges of methods whose teacher sees what the student does."""
HEAD = (
    "| method | lr | before, % | after, % | thousand tokens generated | read by teachers | CPU s | seeds | remark |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: of an overlay without its folders, or of a variant.
        overlays: names of files, laid over each other.
        arguments: of `opd fit`, after them.
        rate: learning rate; None: that of the task.
        remark: what is to be said of it.
        default: whether it runs where no names are given.
    """

    name: str
    overlays: list[str]
    arguments: list[str] = field(default_factory=list)
    rate: float | None = None
    remark: str = ""
    default: bool = True


class Task:
    """Configuration that methods are laid over, and what is known of them there.

    Args:
        name: ``long`` or ``quickstart``: of a file beside this one and of one in configs/text.
    """

    def __init__(self, name: str) -> None:
        self.name, self.config = name, f"text/{name}"
        self.settings = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))
        self.results, self.runs = BENCHMARKS / f"{name}.json", RUNS / name
        self.start = f"<!-- make methods: {name} -->"
        self.arms = self._arms()

    def _arms(self) -> dict[str, Arm]:
        """Lists the rows: the overlays in the order of their heads, each with its variants after it."""
        overlays = {
            m.name.rpartition("/")[2]: m for m in read_all() if m.name.startswith("methods/") and "text" in m.settings
        }
        rows = {}
        remarks = self.settings["remarks"]
        for name, method in overlays.items():
            rates = [rate for part, rate in self.settings["rates"].items() if part in method.parts]
            rate = min(rates, default=None)
            own = self.settings["arguments"].get(name, [])
            default = not self.settings["shown"] or not {*method.privilege} <= SHOWN_NOTHING
            rows[name] = Arm(name, [method.name], own, rate, remarks.get(name, ""), default)
            for variant, changed in self.settings["variants"].items():
                if changed["over"][-1] == name:
                    stack = [overlays[over].name for over in changed["over"]]
                    rows[variant] = Arm(variant, stack, changed["arguments"], rate, remarks.get(variant, ""))
        return rows

    def command(self, arm: Arm, seed: int, folder: Path, extra: list[str]) -> list[str]:
        """Writes the arguments of `opd fit`; groups are of fewer prompts, so that all train as many trajectories."""
        base = yaml.safe_load((shipped_configs() / f"{self.config}.yaml").read_text(encoding="utf-8"))
        trajectories = base["model"]["init_args"]["rollout"]["batch_size"]
        files = [part for name in [self.config, *arm.overlays] for part in ("-c", f"opd:{name}.yaml")]
        rate = [] if arm.rate is None else [f"--model.optimizer.lr={arm.rate}"]
        return [
            *files,
            f"--trainer.default_root_dir={folder}",
            f"--seed_everything={seed}",
            f"--model.rollout.batch_size={trajectories // group_size(arm.overlays)}",
            *rate,
            *self.settings["all"],
            *arm.arguments,
            *extra,
        ]

    def known(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Reads all results, by method and seed: those that are kept, and those of runs in this checkout."""
        results: dict[str, dict[str, dict[str, Any]]] = {}
        if self.results.exists():
            results = json.loads(self.results.read_text(encoding="utf-8"))
        for path in self.runs.glob("*/*/result.json"):
            name, seed = path.parts[-3:-1]
            results.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
        return results

    def train(self, arm: Arm, seed: int, extra: list[str]) -> None:
        """Makes a run unless its result is there; one that raises has an ``error``, and is made again the next time."""
        result = self.known().get(arm.name, {}).get(str(seed), {"error": "not made yet"})
        if "error" not in result:
            return
        folder = self.runs / arm.name / str(seed)
        path = folder / "result.json"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if (rows := self.settings["recorded"].get(arm.name)) is not None:
            base = ["-c", f"opd:{self.config}.yaml", f"--seed_everything={seed}", *self.settings["all"], *rows]
            in_fork(score, [*base, f"--into={folder / 'teacher'}"], folder / "score.txt")
            recorded = folder / "teacher"
            extra = [
                f"--model.teachers.teacher.weights.path={recorded}",
                f"--data.train={recorded / 'rows.jsonl'}",
                *extra,
            ]
        status, usage = in_fork(run, ["fit", *self.command(arm, seed, folder, extra)], folder / "output.txt")
        said = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()
        result = {"cpu_s": round(usage.ru_utime + usage.ru_stime, 1)}
        result |= {"error": said[-1] if said else f"status {status}"} if status else measured(folder)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"{arm.name:28} {seed} {result}", flush=True)

    def write(self, seeds: int) -> None:
        """Keeps all results, and puts their table into the page, between its two comments."""
        results = self.known()
        write_whole(self.results, json.dumps(results, indent=1, sort_keys=True) + "\n")
        lines = []
        for arm in self.arms.values():
            if runs := [run for seed, run in sorted(results.get(arm.name, {}).items()) if int(seed) < seeds]:
                lines.append(line(arm, runs))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(self.start)
        _, _, after = rest.partition(END)
        write_whole(PAGE, "\n".join([f"{before}{self.start}", HEAD, *lines, f"{END}{after}"]))

    def said(self, overlay: str) -> str:
        """Says in a line what the table has of an overlay; nothing where no run ended."""
        arms = [arm for arm in self.arms.values() if arm.overlays == [overlay] and overlay.endswith(f"/{arm.name}")]
        runs = [run for arm in arms for run in self.known().get(arm.name, {}).values() if "error" not in run]
        if not runs:
            return ""
        first, last = ([100 * [*run["accuracy"].values()][place] for run in runs] for place in (0, -1))
        return f"{mean(last):.1f} % of {self.config}.yaml, {mean(first):.1f} % before"


def write_heads(configs: Path) -> None:
    """Puts what the tables say into the heads of the overlays, but for those in which another measurement stands."""
    tasks = [Task(name) for name in TASKS]
    for method in read_all(configs):
        ours = method.measured == "not measured" or any(f"{task.config}.yaml" in method.measured for task in tasks)
        if ours and (said := [text for task in tasks if (text := task.said(method.name))]):
            path = configs / f"{method.name}.yaml"
            measured = f"Measured: {'; '.join(said)} (docs/{PAGE.name})"
            wrapped = textwrap.fill(measured, 118, initial_indent="# ", subsequent_indent="#   ")
            before, after = MEASURED.split(path.read_text(encoding="utf-8"), maxsplit=1)[::2]
            write_whole(path, before + wrapped + after)


def group_size(overlays: list[str]) -> int:
    """Reads how many trajectories of a prompt the last of the overlays that says it asks for."""
    sizes = [1]
    for overlay in overlays:
        config = yaml.safe_load((shipped_configs() / f"{overlay}.yaml").read_text(encoding="utf-8"))
        sizes.append(config["model"]["init_args"].get("rollout", {}).get("group_size", sizes[-1]))
    return sizes[-1]


def in_fork(
    command: Callable[[list[str]], None], arguments: list[str], output: Path
) -> tuple[int, resource.struct_rusage]:
    """Runs a command of `opd` in a fork, which imports nothing again: its exit status, and what it used."""
    process = os.fork()
    if not process:
        status = 0
        with output.open("w", encoding="utf-8", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            try:
                command(arguments)
            except BaseException:  # whatever it is must not go on as the parent
                traceback.print_exc()
                status = 1
        os._exit(status)
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage


def measured(folder: Path) -> dict[str, Any]:
    """Reads what a run logged: accuracy by optimizer step, and steps that were sampled and that teachers evaluated."""
    curves = read_curves(folder)
    counted = {name: sum(value for _, value in curves.get(f"steps/{name}", [])) for name in ("rollout", "teacher")}
    return {"accuracy": dict(curves["val/accuracy"]), **counted}


def line(arm: Arm, results: list[dict[str, Any]]) -> str:
    """Formats a row: means over seeds, of the accuracy at the end also the deviation."""
    done = [result for result in results if "error" not in result]
    if not done:
        return f"| `{arm.name}` | | | | | | | {len(results)} | {arm.remark or results[0]['error']} |"
    ends = [[*result["accuracy"].values()] for result in done]
    after = [100 * accuracy[-1] for accuracy in ends]
    spread = f" ± {stdev(after):.1f}" if len(after) > 1 else ""
    cells = [
        f"`{arm.name}`",
        f"{arm.rate:g}" if arm.rate else "",
        f"{100 * mean(accuracy[0] for accuracy in ends):.1f}",
        f"{mean(after):.1f}{spread}",
        *(f"{mean(result[name] for result in done) / 1000:.0f}" for name in ("rollout", "teacher")),
        f"{mean(result['cpu_s'] for result in done):.0f}",
        str(len(done)),
        arm.remark,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of the task's table")
    parser.add_argument("--task", choices=TASKS, default="long", help="default: long")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default 3")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further arguments of `opd fit`, last")
    options = parser.parse_args()
    task = Task(options.task)
    if unknown := set(options.names) - set(task.arms):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(task.arms)}")
    import_parts()
    # seed by seed, so that a table of all methods is there early
    for seed in range(0 if options.table else options.seeds):
        for name in options.names or [arm.name for arm in task.arms.values() if arm.default]:
            task.train(task.arms[name], seed, options.extra)
            task.write(options.seeds)
    task.write(options.seeds)
    if not options.names:
        write_heads(shipped_configs())


if __name__ == "__main__":
    main()
