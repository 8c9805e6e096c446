"""MiniWoB++ as an environment: clicks, screens, rewards, and what becomes of browsers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.environment import Episode, Turn
from opd_lightning.images import open_image
from opd_lightning.modalities.gui_grounding import (
    AbsolutePixels,
    BoxTags,
    GUIGroundingDistillation,
    JSONAnswer,
    MiniWoB,
    Normalized1000,
    PyAutoGUI,
    Spotlight,
    ToolCall,
    miniwob_rows,
)
from opd_lightning.modalities.gui_grounding.screens.browser import SUPERVISOR, Browser
from opd_lightning.modalities.gui_grounding.screens.supervisor import descendants
from opd_lightning.objective import CrossEntropy, Objective, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Teacher
from tests.processes import FORKS
from tests.tiny import act, make_module, no_teacher
from tests.tiny_vlm import save_vlm

PAGES = ["click-collapsible", "click-button-sequence", "click-option"]


@pytest.mark.parametrize(
    "form", [Normalized1000(), Normalized1000(box=True), BoxTags("qwen"), JSONAnswer(), ToolCall(), PyAutoGUI()]
)
def test_a_click_is_read_as_the_setting_writes_it(form):
    environment = MiniWoB()
    environment.adopt(form)
    x, y = environment.read(environment.write((32.0, 64.0, 96.0, 128.0)))
    assert (x, y) == pytest.approx((0.2, 0.3), abs=1e-3)
    assert environment.read("click there") is None


def test_what_is_no_click_is_answered_and_costs_no_browser():
    environment = MiniWoB()
    state = environment.reset({"page": "click-option", "seed": 3}, 0)
    assert environment.step(state, "(1, 2") == Turn("error: '(1, 2' is no click", state)


def test_pixels_that_only_a_model_knows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.answer_format: AbsolutePixels names pixels of a resized screenshot"):
        GUIGroundingDistillation(environment=MiniWoB(), answer_format=AbsolutePixels(), student=None)


@pytest.mark.parametrize("settings", [{"browsers": 0}, {"seconds": 0.0}])
def test_limits_must_be_positive(settings):
    with pytest.raises(ValueError, match="must be positive"):
        MiniWoB(**settings)


def test_a_page_that_nobody_can_solve_is_named():
    with pytest.raises(ValueError, match="what has to be clicked on 'use-slider' is not known; of click-button-seq"):
        miniwob_rows(["use-slider"], 1)


def alive(pids: list[int]) -> list[int]:
    """Those that still run; one that has ended and that nobody waited for does not."""
    found = []
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found += [pid] if stat.rpartition(")")[2].split()[0] != "Z" else []
    return found


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def supervising(folder: str) -> None:
    """Starts a program that starts another one in a session of its own, and never ends."""
    inner = "import tempfile, time; open(tempfile.mkdtemp() + '/file', 'w'); time.sleep(1000)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {inner!r}], start_new_session=True)"
    command = [sys.executable, "-S", "-c", f"{outer}; import time; time.sleep(1000)"]
    subprocess.Popen(
        [sys.executable, "-P", str(SUPERVISOR), str(os.getpid()), *command], env={**os.environ, "TMPDIR": folder}
    )
    time.sleep(1000)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_driver_started_ends_with_the_run(number, tmp_path):
    process = FORKS.Process(target=supervising, args=(str(tmp_path),))
    process.start()
    wait_until(lambda: [*tmp_path.rglob("file")])
    pids = descendants(process.pid)
    assert len(pids) == 3, "the supervisor, its program, and what that started"
    os.kill(process.pid, number)
    process.join()
    wait_until(lambda: not alive(pids))
    wait_until(lambda: not [*tmp_path.iterdir()])


# -- with a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browsers():
    """What the tests below need."""
    for module in ("selenium", "miniwob"):
        pytest.importorskip(module)
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("Chromium or its driver is not installed: make browser")


@pytest.fixture(scope="module")
def rows(browsers) -> list[dict[str, Any]]:
    return miniwob_rows(PAGES, 3, repeat=True)


@pytest.fixture
def environment(browsers):
    one = MiniWoB(repeat=True)
    yield one
    one.close()


def clicks_of(row: dict[str, Any]) -> list[str]:
    return [turn["content"][0]["text"] for turn in row["completion"] if turn["role"] == "assistant"]


LIMITS = Rollout(turn_timeout=60)


@pytest.mark.browser
@pytest.mark.slow
def test_what_solves_a_row_is_rewarded_and_leads_over_the_same_screens(rows, environment):
    assert {row["page"] for row in rows} == {*PAGES}
    for row in rows:
        episode = Episode(environment, row, LIMITS, {"image"})
        screens = [turn["content"] for turn in row["completion"] if turn["role"] == "user"]
        *others, last = [episode.step(text) for text in clicks_of(row)]
        assert (last.done, last.reward, episode.over) == (True, 1.0, True)
        assert len(others) == len(screens) == 1
        (screen, words), (recorded, _) = others[0].observation, screens[0]
        assert screen["image"] == recorded["image"]["bytes"], "pixel by pixel"
        assert (words["text"], screen["box"]) == (row["prompt"], recorded["box"])
        # a button that was pressed looks as before
        assert (screen["image"] == row["image"]["bytes"]) == (row["page"] == "click-button-sequence")
        assert not episode.failed
    elsewhere = Episode(environment, next(r for r in rows if r["page"] == "click-collapsible"), LIMITS, {"image"})
    missed = elsewhere.step("(990, 990)")
    assert (missed.done, missed.reward) == (False, 0.0)
    submitted = elsewhere.step(clicks_of(rows[0])[1])
    assert submitted.reward in (0.0, -1.0), "the section is not expanded"


@pytest.mark.browser
@pytest.mark.slow
def test_a_page_that_hangs_costs_its_trajectory_and_leaves_nothing_behind(rows, environment, monkeypatch, recwarn):
    begin, hangs = Browser.begin, [True]
    before = descendants(os.getpid())

    def hanging(self: Browser, *arguments: Any) -> Any:
        instruction = begin(self, *arguments)
        if hangs:
            self._driver.execute_script("document.addEventListener('mousedown', () => { while (true); })")
        return instruction

    monkeypatch.setattr(Browser, "begin", hanging)
    environment.seconds = 3.0
    episode = Episode(environment, rows[0], LIMITS, {"image"})
    turn = episode.step(clicks_of(rows[0])[0])
    assert turn.observation.startswith("error: "), turn
    assert episode.failed
    assert not episode.over
    assert alive([pid for pid in descendants(os.getpid()) if pid not in before]) == []
    hangs.clear()
    assert [episode.step(text).reward for text in clicks_of(rows[0])] == [0.0, 1.0], "the policy may go on"


def looking(row: dict[str, Any], text: str, folder: str, began: Any) -> None:
    """Takes a step in an environment, and stays in the middle of the episode."""
    os.environ["TMPDIR"] = folder
    environment = MiniWoB()
    environment.step(environment.reset(row, 0), text)
    began.set()
    time.sleep(1000)


@pytest.mark.browser
@pytest.mark.slow
def test_a_killed_run_leaves_no_browser_behind(rows):
    # a path that leaves room for the names of Chromium's sockets
    tmp_path = Path(tempfile.mkdtemp(dir="/tmp"))
    began = FORKS.Event()
    process = FORKS.Process(target=looking, args=(rows[0], clicks_of(rows[0])[0], str(tmp_path), began))
    process.start()
    assert began.wait(120)
    pids = descendants(process.pid)
    assert len(pids) > 4
    assert [*tmp_path.iterdir()]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not alive(pids))
    wait_until(lambda: not [*tmp_path.iterdir()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("eyes"))


@pytest.mark.browser
@pytest.mark.slow
def test_recorded_episodes_are_trained_and_gone_on_from(rows, environment, folder):
    """Given completions of several screens: the clicks are trained, screens are not; and turns go on behind them."""
    objective = Objective([Term(CrossEntropy(), teacher=None)])
    given = Rollout(batch_size=2, horizon=300, behavior={"dataset": 1.0})
    replayed = make_module(folder, {}, objective, GUIGroundingDistillation, rollout=given)
    acted = act(replayed, rows[:3], who="dataset")
    for i, row in enumerate(rows[:3]):
        own = acted.actions[i][acted.mask[i]].tolist()
        assert replayed.tokenizer().decode(own).replace("<|im_end|>", "") == "".join(clicks_of(row))
        assert [value["box"] for value in acted.observed[i]] == [row["completion"][1]["content"][0]["box"]]
    teachers = {"teacher": Teacher(Initial(), view=Spotlight())}
    rollout = Rollout(batch_size=2, horizon=300, turns=2, prefix_turns=1, turn_timeout=60)
    setting = GUIGroundingDistillation
    module = make_module(folder, teachers, no_teacher(), setting, environment=environment, rollout=rollout)
    behind = act(module, rows[:3])
    assert behind.observed == acted.observed
    assert not behind.mask[behind.channels["turn"] == 0].any()
    assert open_image(behind.observed[0][0]["image"]).size == (320, 320)
