"""How fast the report of a long run is written and opens: 20,000 logged points, 500 samples colored by the teacher.

    python benchmarks/report.py [--repeats 3]

A page is open when its load event ended and something was painted, as Chromium (`make browser`) tells it. It is to be
within two seconds. Writes runs/bench/report.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from selenium import webdriver
from side_by_side import record

from opd_lightning.report import write_page

POINTS, SAMPLES, STEPS = 20_000, 500, 60
CURVES = ("loss/ReverseKL", "reward", "length", "stopped", "teacher/kl_student_teacher", "student_entropy", "lr")
OPENED = """
const [page] = performance.getEntriesByType("navigation"), painted = performance.getEntriesByType("paint")
return page.loadEventEnd && painted.length ? Math.max(page.loadEventEnd, ...painted.map(p => p.startTime)) : 0
"""


def write_run(folder: Path) -> None:
    """A run's folder with as much in it as is to be opened."""
    draw = random.Random(0)
    table = folder / "logs" / "version_0" / "metrics.csv"
    table.parent.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0}), encoding="utf-8")
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "val/accuracy", *(f"train/{name}" for name in CURVES)])
        for step in range(POINTS):
            rows.writerow([step, draw.random() if step % 100 == 0 else "", *(draw.random() for _ in CURVES)])
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for step, i in ((step, i) for step in (0, POINTS) for i in range(SAMPLES)):
            told = {"steps": [f" word{draw.randrange(999)}" for _ in range(STEPS)]}
            told["teacher_log_probs"] = [-draw.expovariate(1.0) for _ in range(STEPS)]
            told["likeliest"] = [
                [[word, -0.5 - n] for n, word in enumerate((" one", " two", " three", " four", " five"))]
            ] * STEPS
            row = {
                "step": step,
                "who": "student",
                "prompt": f"Question {i}?",
                "completion": "".join(told["steps"]),
                "reward": 1.0,
            }
            file.write(json.dumps(row | told) + "\n")


def opened(address: str) -> tuple[float, float]:
    """Opens a page in a new browser: seconds until it is there, and CPU seconds of the page's process."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.execute_cdp_cmd("Performance.enable", {})
        browser.get(address)
        while not (found := browser.execute_script(OPENED)):
            time.sleep(0.05)
        metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return found / 1e3, next(metric["value"] for metric in metrics if metric["name"] == "ProcessTime")
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        write_run(folder)
        since = time.process_time()
        page = write_page([folder])
        written = time.process_time() - since
        times, spent = zip(*(opened(page.resolve().as_uri()) for _ in range(args.repeats)), strict=True)
        results = {"seconds": times, "cpu seconds": spent, "cpu seconds to write": written}
        results["mb"] = page.stat().st_size / 1e6
    found = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
    print(f"open after {found}, {statistics.median(spent):.2f} CPU seconds; {results['mb']:.1f} MB")
    record("report", {"points": POINTS, "samples": SAMPLES, "steps": STEPS}, results)


if __name__ == "__main__":
    main()
