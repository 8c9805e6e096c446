"""The page of a run: what is on it, that it is one file, and that what models wrote stays text."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from opd_lightning.picture import Picture
from opd_lightning.report import main, read_run, write_page
from opd_lightning.report_chart import charts, interpolated, svg, thinned, ticks
from opd_lightning.report_page import form_of, verdict

EVIL = '</script><script>document.title = "taken over"</script><img src="http://127.0.0.1:9/x.png">'
BEST = [["7", -0.1], ["<b>8</b>", -2.5], ["9", -4.0], ["5", -5.0], [" ", -6.0]]


def make_run(folder: Path, accuracy: float = 0.75, points: int = 11, rollouts: int = 2) -> Path:
    """A run's folder as training leaves it, with a hostile model."""
    logs = folder / "logs" / "version_0"
    logs.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 7}), encoding="utf-8")
    columns = (
        "step",
        "val/accuracy",
        "val/teacher/accuracy",
        "val/accuracy/hard",
        "train/length",
        "train/tokens_so_far",
    )
    with (logs / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, "train/teacher/kl_student_teacher", "train/own"])
        table.writerow([0, 0.25, 1.0, "", "", "", "", ""])
        for step in range(1, points):
            table.writerow([step, "", "", "", 8 + step % 3, 100 * step, 1 / step, step % 7])
        table.writerow([points - 1, accuracy, "", 0.5, "", "", "", ""])
    samples = [
        {"step": step, "who": who, "prompt": f"1+1= {EVIL}", "completion": f"{text} {EVIL}", "reward": reward}
        for step, who, text, reward in (
            (0, "teacher", "two", 1.0),
            (0, "student", "three", 0.0),
            (points - 1, "student", "two", 1.0),
        )
    ]
    write(folder / "samples.jsonl", samples)
    shown = {"prompt": "3+4=", "completion": f"7{EVIL}", "reward": 1.0, "length": 2, "signal": 0.5, "source": "student"}
    shown |= {"steps": ["7", EVIL], "signals": [0.1, 0.9], "teacher_log_probs": [-0.1, -9.0], "likeliest": [BEST, BEST]}
    write(folder / "rollouts.jsonl", [{**shown, "step": step} for step in range(rollouts)])
    write(folder / "alarms.jsonl", [{"step": 3, "message": f"train/length is 99: {EVIL}"}])
    told = {"files": ["opd:text/quickstart.yaml"], "changes": [["model.rollout.horizon", "56", "7"]]}
    told |= {"versions": {"torch": "2.13"}, "hardware": {"processor": "of a test"}}
    (folder / "run.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut sho', encoding="utf-8")


def test_a_run_is_told_on_one_page(tmp_path, capsys):
    main([str(make_run(tmp_path / "mine"))])
    path = tmp_path / "mine" / "report.html"
    assert str(path) in capsys.readouterr().out
    text = path.read_text(encoding="utf-8")
    for part in (
        "After 10 optimizer steps the student solves 75.0% of the held-out prompts, before training it was 25.0% "
        "(+50.0 points); teacher has 100.0%, 67% of the gap is closed.",
        "held-out accuracy by tokens generated",
        "KL at the student&#39;s states",
        "3 more metrics",
        "<td>hard</td>",
        "<code>model.rollout.horizon</code></td><td>56</td><td>7</td>",
        "of a test",
        "optimizer step 3",
    ):
        assert part in text, part


def test_the_verdict_says_what_was_kept(tmp_path):
    folder = make_run(tmp_path / "mine")
    table = folder / "logs" / "version_1" / "metrics.csv"
    table.parent.mkdir()
    table.write_text(
        "step,val/retention/kl,val/retention/accuracy,val/retention/perplexity\n0,0,0.8,\n10,0.25,0.775,13.5\n",
        encoding="utf-8",
    )
    run = read_run(folder, "mine")
    assert verdict(run).endswith(
        "is closed. On prompts of another kind accuracy went from 80.0% to 77.5%, perplexity went to 13.50, KL to the "
        "model that is to be kept went from 0.000 nats to 0.250 nats."
    )
    assert "<td>retention/kl</td>" in write_page([folder]).read_text(encoding="utf-8")


def test_how_few_prompts_were_held_out_is_told(tmp_path):
    """As long as samples of all of them are shown: fewer than `evaluation.show`, of one rank."""
    folder = make_run(tmp_path / "mine")
    row = {"who": "student", "stage": "val", "completion": "2", "reward": 1.0}

    def of(count: int, devices: str = "1") -> str:
        shown = [{**row, "step": step, "prompt": str(i)} for step in (0, 10, 10) for i in range(count)]
        write(folder / "samples.jsonl", [*shown, {**row, "step": 10, "stage": "test", "prompt": "another"}])
        (folder / "run.json").write_text(json.dumps({"hardware": {"devices of the run": devices}}), encoding="utf-8")
        return read_run(folder, "mine").held_out

    assert of(1) == "1 held-out prompt"
    assert of(2) == "2 held-out prompts"
    assert of(3) == of(1, devices="2") == of(0) == "held-out prompts"
    of(2)
    assert "solves 75.0% of the 2 held-out prompts" in verdict(read_run(folder, "mine"))
    assert "<th>accuracy on 2 held-out prompts</th>" in write_page([folder]).read_text(encoding="utf-8")


def test_what_models_wrote_is_text(tmp_path):
    text = write_page([make_run(tmp_path / EVIL.replace("/", "_"))]).read_text(encoding="utf-8")
    assert "<script>document" not in text
    assert "<img" not in text
    assert "<b>8</b>" not in text
    assert text.count("<script>") == 1
    assert "default-src 'none'" in text


def test_samples_are_colored_by_the_teacher(tmp_path):
    folder = make_run(tmp_path / "mine")
    assert write_page([folder]).read_text(encoding="utf-8").count("The redder a step") == 1, "of the rollouts alone"
    told = {"steps": ["two", EVIL], "teacher_log_probs": [-0.1, None], "likeliest": [BEST, None]}
    samples = [
        {"step": step, "who": "student", "prompt": "1+1=", "completion": "two", "reward": 1.0, **told}
        for step in (0, 10)
    ]
    write(folder / "samples.jsonl", samples)
    text = write_page([folder]).read_text(encoding="utf-8")
    assert text.count("The redder a step") == 2
    samples = text[text.index("<h2 id=samples>") : text.index("<h2 id=rollouts>")]
    assert samples.count("<i class=s0 data-l=") == 2, "before and after"
    assert "&lt;/script&gt;" in samples


def test_the_same_question_about_several_images_has_a_sample_each(tmp_path):
    folder = make_run(tmp_path / "mine")
    samples = [
        {"step": step, "who": who, "prompt": "Which digit?", "completion": f"{who} {step} {i}", "reward": 1.0}
        for step, who in ((0, "teacher"), (0, "student"), (10, "student"))
        for i in range(3)
    ]
    write(folder / "samples.jsonl", samples)
    shown = read_run(folder, "mine").samples
    assert [{who: row["completion"][-1] for who, row in sample["by"].items()} for sample in shown] == [
        dict.fromkeys(("before", "after", "teacher"), str(i)) for i in range(3)
    ]
    other = shutil.copytree(folder, tmp_path / "other")
    text = write_page([folder, other]).read_text(encoding="utf-8")
    assert text.count("<div class=prompt>Which digit?") == 3


def test_runs_are_compared_on_the_same_axes(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", accuracy=0.2)
    path = write_page([one, two])
    assert path == one / "comparison.html"
    text = path.read_text(encoding="utf-8")
    assert "one: val/accuracy" in text
    assert "two: val/accuracy" in text
    assert "<b>two</b>: After 10 optimizer steps the student solves 20.0%" in text
    for who in ("one, before", "two, before", "one, after", "two, teacher"):
        assert text.count(f"<div class=who>{who} ") == 1, "what was written to a prompt stands beside each other"
    main_charts, rest = charts({run.label: run.curves for run in (read_run(one, "one"), read_run(two, "two"))})
    assert [series.color for series in main_charts[0].series] == [0, 0, 1, 1], "a color for each run"
    assert [chart.title for chart in rest] == ["train/own", "train/tokens_so_far", "val/accuracy/hard"]


def test_a_run_of_images_tells_distances_and_no_empty_samples(tmp_path):
    folder = make_run(tmp_path / "mine")
    table = (
        "step,val/length,val/fid_16,val/fid_2,val/teacher/fid_2,val/teacher/length\n0,4,0.3,1.5,1.6,4\n10,4,0.2,0.5,,\n"
    )
    (folder / "logs" / "version_0" / "metrics.csv").write_text(table, encoding="utf-8")
    row = {"step": 10, "who": "student", "prompt": "a two", "completion": "", "reward": None}
    write(folder / "samples.jsonl", [row])
    text = write_page([folder]).read_text(encoding="utf-8")
    assert "accuracy on held-out prompts</th>" not in text
    assert text.index("<td>fid_2</td>") < text.index("<td>fid_16</td>")
    assert "What was measured" in text
    assert "None was written down as text" in text


def test_a_run_that_has_left_little_has_a_page(tmp_path):
    folder = make_run(tmp_path / "mine")
    for name in ("samples.jsonl", "rollouts.jsonl", "alarms.jsonl", "run.json"):
        (folder / name).unlink()
    (folder / "logs" / "version_0" / "metrics.csv").write_text("step,train/length\n4,8.0\n", encoding="utf-8")
    text = write_page([folder]).read_text(encoding="utf-8")
    assert "nobody knows whether training helped" in text
    assert text.count("None was written down") == 2
    assert "Nobody watched for a collapse" in text


def test_a_setting_that_cannot_draw_says_why(tmp_path):
    folder = make_run(tmp_path / "mine")
    config = {"seed_everything": 7, "model": {"class_path": "opd_lightning.no_such.Setting"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert "Not drawn. ModuleNotFoundError" in write_page([folder]).read_text(encoding="utf-8")


def test_what_shows_nothing_comes_last():
    shares = {f"time/{name}_share": [(1, 0.1), (2, 0.2)] for name in "abcdefgh"}
    run = {
        "val/accuracy": [(0, 0.0), (2, 0.0)],
        "train/alarms": [(1, 0.0), (2, 0.0)],
        "train/reward": [(1, 0.0), (2, 1.0)],
    }
    main_charts, rest = charts({"one": run | shares})
    assert [chart.title for chart in main_charts] == ["held-out accuracy", "share of the time", "reward in training"]
    main_charts, rest = charts({"one": run | shares, "two": run | shares})
    assert [chart.title for chart in main_charts] == ["held-out accuracy", "reward in training"]
    assert [chart.title for chart in rest] == ["share of the time", "alarms"], "16 curves, and one value"


def test_what_was_measured_before_training_alone_is_no_curve():
    before = {"val/accuracy": [(0, 0.25)], "val/teacher/accuracy": [(0, 1.0)], "train/tokens_so_far": [(1, 9.0)]}
    main_charts, rest = charts({"one": before})
    assert main_charts == []
    drawn = svg(rest[0])
    assert drawn.count("<circle") == 1, "the student's"
    assert drawn.count('class="once') == 1, "the teacher's, which training leaves alone"
    assert ">-1</text>" not in drawn
    main_charts, _ = charts({"one": {**before, "val/accuracy": [(0, 0.25), (3, 0.5)]}})
    assert [series.is_once for series in main_charts[0].series] == [False, True]


def test_what_is_measured_on_prompts_of_another_kind_has_charts_of_its_own():
    run = {f"val/{name}": [(0, 0.0), (4, 0.5)] for name in ("accuracy", "retention/accuracy", "retention/kl")}
    main_charts, _ = charts({"one": run})
    assert [[series.label for series in chart.series] for chart in main_charts] == [[name] for name in run]


def test_thinned_curves_keep_ends_and_peaks():
    points = [(float(x), 0.0) for x in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= 500
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[7_777] in kept
    assert kept == sorted(kept)
    assert thinned(points[:500]) == points[:500]


def test_axes_have_round_numbers():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 47) == [0, 10, 20, 30, 40]
    assert interpolated([(10, 100.0), (20, 300.0)], 5) == 50
    assert interpolated([(10, 100.0), (20, 300.0)], 15) == 200
    assert interpolated([(10, 100.0), (20, 300.0)], 99) == 300


def test_a_best_that_was_left_behind_is_told(tmp_path):
    run = read_run(make_run(tmp_path / "mine", accuracy=0.1), "mine")
    assert "It was better after step 0: 25.0%." in verdict(run)


def test_a_picture_is_small_enough_for_a_page():
    picture = Picture("screen", Image.effect_noise((1600, 900), 80))
    assert picture.data_uri().startswith("data:image/jpeg;base64,")
    assert len(picture.data_uri()) < 400_000
    assert Picture("digit", Image.new("L", (8, 8))).data_uri().startswith("data:image/png;base64,")


# -- with a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver():
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("Chromium or its driver is not installed: make browser")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.mark.browser
def test_it_opens_without_a_network_and_runs_nothing_of_a_models(driver, tmp_path):
    address = write_page([make_run(tmp_path / "mine")]).resolve().as_uri()
    driver.get(address)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {request["request"]["url"] for request in sent if request["documentURL"] == address}
    assert {url for url in asked if not url.startswith("data:")} == {address}
    assert driver.title == "mine"
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    # were something let through, the page's policy would stop it
    script = "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    driver.execute_script(script)
    assert driver.title == "mine"


@pytest.mark.browser
def test_nothing_is_wider_than_a_phone(driver, tmp_path):
    folder = make_run(tmp_path / "mine")
    word = "a1b2c3" * 40
    columns = [f"val/{who}length" for who in ("", "teacher/", "another_teacher/", "the_last_teacher/")]
    table = folder / "logs" / "version_1" / "metrics.csv"
    table.parent.mkdir()
    columns += ["val/retention/kl", "val/retention/perplexity"]
    table.write_text(f"step,{','.join(columns)}\n0{',1' * 6}\n10,1,,,,1,1\n", encoding="utf-8")
    rows = [{"step": 10, "who": "student", "prompt": word, "completion": word, "reward": 1.0}]
    write(folder / "samples.jsonl", rows)
    write(folder / "alarms.jsonl", [{"step": 3, "message": word}])
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        driver.get(write_page([folder]).resolve().as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        # names of measures are wider than what a phone leaves them, and stay whole
        name = driver.find_element("xpath", "//td[text()='retention/perplexity']")
        assert name.size["height"] < 40
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_pointing_at_a_step_shows_what_the_teacher_found_likeliest(driver, tmp_path):
    from selenium.webdriver import ActionChains

    driver.get(write_page([make_run(tmp_path / "mine")]).resolve().as_uri())
    step = driver.find_element("css selector", "i[data-l]")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", step)
    ActionChains(driver).move_to_element(step).perform()
    lines = driver.find_elements("css selector", "#tip div")
    assert [line.text.split() for line in lines] == [
        ["7", "(written)", "90.5%"],
        ["7", "90.5%"],
        ["<b>8</b>", "8.2%"],
        ["9", "1.8%"],
        ["5", "0.7%"],
        ["␣", "0.2%"],
    ]
    chart = driver.find_element("css selector", "svg[data-points]")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(driver).move_to_element(chart).perform()
    assert "val/accuracy" in driver.find_element("id", "tip").text


def test_a_measure_that_can_be_no_share_is_written_as_a_number():
    assert form_of("calls", [1.57, None, 2.0]).format(1.57) == "1.57"
    assert form_of("brief", [0.5, None, 1.0]).format(0.5) == "50.0%"
