"""After ROPD on the quickstart, where a program writes rubrics and grades: what is learned from a judge that is right.

    python benchmarks/rubric.py [METHOD SEED | table]

Without an argument everything that is not there yet, into runs/rubric, and then the table. The program answers like a
chat endpoint, on this machine: as the expert it writes the worked solution; its rubric names each column of the sum and
the result, heavier where the group's answers differ; it grades by adding itself. GRPO by the result alone is beside it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean

from opd_lightning.modalities.text.quickstart import scratchpad
from opd_lightning.report import read_curves

RUNS, UPDATES, SEEDS = Path("runs/rubric"), 60, (0, 1, 2)
COLUMNS = ("ones", "tens", "hundreds", "thousands")
CRITERIA = [*(f"The column of the {name} is added right, with its carry" for name in COLUMNS), "The sum is right"]


def met(task: str, answer: str) -> list[bool]:
    """Tells which criteria an answer meets."""
    expected, given = _solution(task).split(" "), answer.strip().split(" ")
    columns = [place < len(given) and given[place] == expected[place] for place in range(len(COLUMNS))]
    return [*columns, given[-1] == expected[-1]]


def rubric(task: str, answers: list[str]) -> list[dict[str, object]]:
    """Writes a rubric: what the expert's answers all meet, heavier where the others differ."""
    graded = [met(task, answer) for answer in answers]
    differ = [len({row[place] for row in graded}) > 1 for place in range(len(CRITERIA))]
    return [{"criterion": text, "weight": 10 if d else 1} for text, d in zip(CRITERIA, differ, strict=True)]


def reply(messages: list[dict[str, str]], form: str | None) -> str:
    """Answers a chat as the expert, as who writes the rubric, or as who grades."""
    asked = messages[-1]["content"]
    if form == "Rubric":
        others = asked.partition("Other answers:")[2]
        answers = re.findall(r"^\(\d+\) ?(.*)$", others, re.MULTILINE)
        return json.dumps({"criteria": rubric(asked, answers)})
    if form == "Criteria":
        return json.dumps({"met": met(asked, asked.split("=====")[1])})
    return _solution(asked)


def _solution(text: str) -> str:
    first, second = re.findall(r"(\d{4})\+(\d{4})=", text)[0]
    return scratchpad(int(first), int(second))


class Handler(BaseHTTPRequestHandler):
    """One request to the program."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "a-program"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        form = body.get("response_format", {}).get("json_schema", {}).get("name")
        message = {"role": "assistant", "content": reply(body["messages"], form)}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        self._answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})

    def _answer(self, content: object) -> None:
        packed = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(packed)))
        self.end_headers()
        self.wfile.write(packed)

    def log_message(self, *args: object) -> None:
        """Says nothing of single requests."""


def train(method: str, seed: int) -> None:
    """Trains the shipped student: 8 prompts of 8 rollouts an update."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder, endpoint = RUNS / f"{method}-{seed}", "--model.reward.init_args.endpoint"
    own = [] if method != "ropd" else [
        f"{endpoint}.url=http://127.0.0.1:{server.server_address[1]}", f"{endpoint}.keep={folder}/asked",
        "--model.notes.teacher_texts.init_args.count=1",
    ]  # fmt: skip
    group = ["--model.rollout.batch_size=8", "--model.rollout.group_size=8"]
    try:
        subprocess.run(
            [sys.executable, "-m", "opd_lightning", "fit", "-c", "opd:text/quickstart.yaml",
             "-c", f"opd:methods/{'text/' if method == 'ropd' else ''}{method}.yaml", *group, *own,
             "--model.optimizer.init_args.lr=1e-4", f"--trainer.max_steps={UPDATES}", f"--seed_everything={seed}",
             f"--trainer.val_check_interval={UPDATES // 2}", f"--trainer.default_root_dir={folder}",
             "--model.evaluation.metrics={right: {class_path: ExactMatch, init_args: {after: '#'}}}"],
            check=True,
        )  # fmt: skip
    finally:
        server.shutdown()


def table() -> None:
    """Prints held-out accuracy in % by student updates, the mean and each seed's last."""
    for method in ("ropd", "grpo"):
        curves = [read_curves(RUNS / f"{method}-{seed}")["val/right"] for seed in SEEDS]
        means = [100 * mean(curve[place][1] for curve in curves) for place in range(len(curves[0]))]
        last = [round(100 * curve[-1][1], 1) for curve in curves]
        print(f"{method}: {' -> '.join(f'{value:.1f}' for value in means)} % right; each seed's last: {last}")


def main() -> None:
    """Runs what is asked for, or all that is not there."""
    if sys.argv[1:2] == ["table"]:
        table()
    elif len(sys.argv) == 3:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        for method in ("ropd", "grpo"):
            for seed in SEEDS:
                if not (RUNS / f"{method}-{seed}").exists():
                    train(method, seed)
        table()


if __name__ == "__main__":
    main()
