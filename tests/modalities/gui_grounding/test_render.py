import importlib.util
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opd_lightning.modalities.gui_grounding import readers, render
from opd_lightning.modalities.gui_grounding.screens import targets
from opd_lightning.modalities.gui_grounding.screens.browser import Browser
from opd_lightning.modalities.gui_grounding.screens.targets import Element, Screen


def element(text: str, at: targets.Box, **other: object) -> Element:
    made = Element("button", text, text, at, at, at, interactive=True, holds_text=bool(text), lines=1)
    return replace(made, **other)


def screen(*elements: Element, seed: int = 0) -> Screen:
    return Screen("click-button", seed, 'Click on the "OK" button.', elements, b"")


AROUND = element("", (0, 50, 160, 210), interactive=False)
ROW = element("Briana", (2, 100, 158, 114), tag="li", holds_text=False)
ICON = element("", (2, 101, 18, 115.5), tag="div")
NAME = element("Briana", (18, 101, 158, 113), tag="span")
OTHER = element("Olin", (2, 120, 158, 134), tag="li")


@pytest.mark.parametrize(
    ("rewarded", "target"),
    [
        ([], None),
        ([NAME], NAME),
        ([AROUND, NAME], NAME),
        ([NAME, OTHER], None),
        ([ROW, ICON, NAME], ROW),
        ([AROUND, ROW, ICON, NAME], ROW),
        ([AROUND, ICON, NAME], None),
    ],
    ids=["nothing", "one", "its surroundings", "two answers", "all parts of a row", "and around it", "not the row"],
)
def test_the_target_is_the_smallest_element_that_is_rewarded(rewarded: list[Element], target: Element | None) -> None:
    candidates = [AROUND, ROW, ICON, NAME, OTHER]
    assert targets.choose_target(candidates, [float(one in rewarded) for one in candidates]) == target


def test_a_penalty_is_no_reward() -> None:
    assert targets.choose_target([NAME, OTHER], [-1.0, 0.5]) == OTHER


def texts(*elements: Element, limit: int = 9) -> list[str]:
    return [one.text for one in targets.choose_elements(screen(*elements), limit)]


def test_elements_are_named_by_a_text_that_is_on_the_screen_once() -> None:
    ok, cancel, again = (element(t, (4, y, 40, y + 16)) for t, y in (("OK", 60), ("Cancel", 80), ("cancel", 100)))
    assert texts(ok, cancel) == ["OK", "Cancel"]
    assert texts(ok, cancel, again) == ["OK"]


@pytest.mark.parametrize(
    "unfit",
    [
        element("word " * 9, (4, 60, 150, 76)),
        element(">", (4, 60, 20, 76)),
        element("cut off", (4, 200, 40, 220), box=(4, 200, 40, 210)),
        element("two lines", (4, 60, 150, 90), lines=2),
        element("within", (4, 60, 150, 90), holds_text=False),
    ],
)
def test_elements_that_can_not_be_named_or_pointed_at_are_left_out(unfit: Element) -> None:
    assert texts(unfit) == []


def test_the_box_is_that_of_what_is_clicked_or_of_the_text_itself() -> None:
    button = element("OK", (4, 60, 60, 80), holds_text=False)
    span = element("OK", (10, 64, 50, 76), tag="span", interactive=False)
    line = element("lorem", (2, 90, 158, 102), tag="div", interactive=False, text_box=(2, 91, 30, 101))
    chosen = targets.choose_elements(screen(button, span, line), 9)
    assert [one.box for one in chosen] == [button.box, line.text_box]


def test_which_elements_are_drawn_depends_on_the_seed_alone() -> None:
    many = [element(f"b{n}", (4, 50 + 10 * n, 40, 60 + 10 * n)) for n in range(10)]
    drawn = {tuple(e.text for e in targets.choose_elements(screen(*many, seed=s), 2)) for s in range(20)}
    assert len(drawn) > 5
    assert targets.choose_elements(screen(*many), 2) == targets.choose_elements(screen(*many), 2)
    assert targets.choose_elements(screen(*many), 0) == []


def test_rows_say_where_an_element_is_in_the_picture() -> None:
    ok = element("OK", (4, 60, 60, 80))
    task, named = targets.rows_of(screen(ok, seed=7), ok, limit=1)
    assert task == {
        "image": "images/click-button_00007.png",
        "width": 320,
        "height": 320,
        "prompt": 'Click on the "OK" button.',
        "box": [8, 20, 120, 60],
        "platform": "web",
        "element_type": "text",
        "page": "click-button",
        "kind": "task",
        "seed": 7,
        "tag": "button",
        "label": "OK",
    }
    assert (named["kind"], named["prompt"], named["box"]) == ("element", 'Click on "OK"', task["box"])
    assert targets.rows_of(screen(ICON), ICON, 0)[0]["element_type"] == "icon"


@given(colors=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=400), width=st.integers(1, 20))
def test_packing_a_picture_loses_nothing(colors: list[tuple[int, int, int]], width: int) -> None:
    image = Image.new("RGB", (width, -(-len(colors) // width)))
    image.putdata(colors)
    raw = io.BytesIO()
    image.save(raw, "PNG")
    packed = Image.open(io.BytesIO(render.smallest_png(raw.getvalue())))
    assert packed.mode == ("P" if len(image.getcolors(1000)) <= 256 else "RGB")
    assert packed.convert("RGB").tobytes() == image.tobytes()


def test_the_readme_says_how_to_make_the_folder_again() -> None:
    pytest.importorskip("miniwob")
    text = render.readme(["click-link"], range(3, 5), 2, Counter(task=2, element=3), "156")
    assert "opd render-gui OUT --pages click-link --seed 3 --count 2 --elements 2" in text
    assert "5 rows (2 of the kind `task`, 3 of the kind `element`)" in text
    assert "miniwob 1" in text
    assert "Chromium 156" in text


def test_pages_are_checked_before_the_browser_starts() -> None:
    pytest.importorskip("miniwob")
    assert render.check_pages("click-link,click-tab") == ["click-link", "click-tab"]
    assert {*render.SINGLE_CLICK} < {*render.check_pages("all")}
    with pytest.raises(ValueError, match=r"no page 'click-lnk'; it has .*click-link"):
        render.check_pages("click-lnk")
    with pytest.raises(ValueError, match="chase-circle can't be drawn: it moves"):
        render.check_pages("chase-circle")


@pytest.mark.parametrize("module", ["selenium", "miniwob"])
def test_a_missing_library_is_named_with_its_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ModuleNotFoundError, match=rf"{module}: pip install 'opd-lightning\[gui\]'"):
        Browser()


@pytest.mark.parametrize(
    ("present", "missing"), [("chromedriver", "Chromium is"), ("chromium", "Chromium's driver is")]
)
def test_a_missing_browser_is_named_with_its_packages(
    present: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("selenium", "miniwob"):
        pytest.importorskip(module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == present else None)
    with pytest.raises(FileNotFoundError, match=f"{missing} not installed.*apt-get install chromium chromium-driver"):
        Browser()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        render.render_gui([str(tmp_path)])


# -- with a browser ---------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="Chromium or its driver is not installed: make browser",
)


@pytest.fixture(scope="module")
def browser():
    for module in ("selenium", "miniwob"):
        pytest.importorskip(module)
    with Browser() as one:
        yield one


def picture(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


@pytest.mark.browser
@needs_chromium
def test_a_box_covers_its_element(browser: Browser) -> None:
    colors = {"black": (0, 0, 0), "red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
    colors |= {"yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255), "grey": (128,) * 3}
    colors |= {"pink": (255, 192, 203), "orange": (255, 165, 0), "purple": (128, 0, 128), "olive": (128, 128, 0)}
    for seed in range(6):
        one = browser.open("click-color", seed)
        target = browser.target(one)
        assert target is not None
        x1, y1, x2, y2 = targets.row(one, target, "task", one.instruction)["box"]
        (color,) = {picture(one.png).getpixel(((x1 + x2) // 2, (y1 + y2) // 2))}
        name = one.instruction.split()[3]
        assert colors[name] == color, one.instruction


@pytest.mark.browser
@needs_chromium
def test_the_picture_is_the_work_area_without_the_instruction(browser: Browser) -> None:
    one = browser.open("click-button", 0)
    assert one.instruction == 'Click on the "okay" button.'
    assert picture(one.png).size == (320, 320)
    shades = {color for _, color in picture(one.png).getcolors(10000)}
    assert (255, 255, 0) not in shades
    assert len(shades) > 8, "smoothed text has many shades"


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("page", ["click-button", "focus-text-2", "click-dialog-2", "number-checkboxes"])
def test_no_trace_of_an_earlier_probe_is_in_a_picture(browser: Browser, page: str) -> None:
    fresh = browser.open(page, 1)
    browser.target(fresh)
    assert browser.open(page, 1) == fresh


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize(
    ("page", "tag", "events"),
    [("click-dialog-2", "button", ["mouseMoved"]), ("enter-text", "input", ["mousePressed", "mouseReleased"])],
    ids=["hover", "focus"],
)
def test_what_a_probe_leaves_behind_would_be_seen(browser: Browser, page: str, tag: str, events: list[str]) -> None:
    fresh = browser.open(page, 0)
    x1, y1, x2, y2 = next(one.box for one in fresh.elements if one.tag == tag)
    for event in events:
        browser._mouse(event, (x1 + x2) / 2, (y1 + y2) / 2)
    assert browser.picture() != fresh.png
    assert browser.open(page, 0).png == fresh.png


@pytest.mark.browser
@needs_chromium
def test_the_command_writes_a_folder_that_the_reader_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("selenium", "miniwob"):
        pytest.importorskip(module)
    arguments = ["--pages", "click-link,click-tab", "--seed", "5", "--count", "2", "--elements", "1"]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        render.render_gui([str(folder), *arguments])
    assert "4 task rows, 4 element rows" in capsys.readouterr().out
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(files) == 4 + 3
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    rows = readers.rendered(str(folders[0]))
    assert {(row["page"], row["seed"]) for row in rows} == {(p, s) for p in ("click-link", "click-tab") for s in (5, 6)}
    first = json.loads((folders[0] / "annotations.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"].startswith("Click on the link")
    assert "The MIT License" in (folders[0] / "LICENSE").read_text(encoding="utf-8")
