"""`opd render-gui OUT`: MiniWoB++ pages in headless Chromium, as a local data set in ScreenSpot form.

A screen is a page and a seed. Its picture is the page's work area of 160×160 CSS pixels at device scale factor 2, so
320×320 image pixels; the bar with the instruction is not in it. Two kinds of rows are made from a screen:

* `task`: the page's own instruction, where one click solves it. The page is seeded again for every candidate, the
  candidate's center is clicked, and the page's reward is read; the box is the smallest element that is rewarded, and
  a click of a real mouse confirms it. A screen that rewards two elements apart from each other gives no such row.
* `element`: 'Click on "…"' for an element whose visible text is on the screen once.

MiniWoB++ is Liu et al., 2018 (arXiv 1802.08802); the form of the rows is ScreenSpot's (arXiv 2401.10935).
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image

from ...printable import printable

SCALE = 2
AREA = (0, 50, 160, 160)
"""Left, top, width and height of a page's work area, in CSS pixels; above it is the instruction."""

SINGLE_CLICK = (
    "buy-ticket",
    "click-button",
    "click-color",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-shape",
    "click-tab",
    "click-tab-2",
    "click-tab-2-easy",
    "click-tab-2-hard",
    "click-tab-2-medium",
    "click-test",
    "click-test-2",
    "click-test-transfer",
    "click-widget",
    "count-shape",
    "count-sides",
    "email-inbox-delete",
    "email-inbox-important",
    "email-inbox-nl-turk",
    "email-inbox-noscroll",
    "focus-text",
    "focus-text-2",
    "grid-coordinate",
    "identify-shape",
    "navigate-tree",
    "sign-agreement",
)
"""The pages whose task one click solves, always or on some seeds."""

UNFIT = {
    "chase-circle": "it moves",
    "unicode-test": "its alphabets need fonts that Chromium does not bring",
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Element:
    """A visible element of the page; its boxes are [left, top, right, bottom] in CSS pixels of the window.

    Attributes:
        tag: in lower case.
        text: what the user reads in it.
        label: the text, or else what the page calls the element.
        whole: its box.
        box: its box as far as it lies in the work area.
        text_box: the box of its text alone.
        interactive: whether it is made to be clicked: a button, link, field, tab, …
        holds_text: whether the text is its own rather than that of elements within.
        lines: the number of lines that an element within running text is broken into, else 1.
    """

    tag: str
    text: str
    label: str
    whole: Box
    box: Box
    text_box: Box
    interactive: bool
    holds_text: bool
    lines: int


@dataclass(frozen=True)
class Screen:
    page: str
    seed: int
    instruction: str
    elements: tuple[Element, ...]
    png: bytes


# -- choosing what to click; no browser needed ------------------------------------------------------------------------


def area_of(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def contains(outer: Box, inner: Box, tolerance: float = 2.0) -> bool:
    """Whether `inner` lies in `outer`, edges within `tolerance`."""
    return (
        outer[0] <= inner[0] + tolerance
        and outer[1] <= inner[1] + tolerance
        and outer[2] >= inner[2] - tolerance
        and outer[3] >= inner[3] - tolerance
    )


def choose_target(elements: Sequence[Element], rewards: Sequence[float]) -> Element | None:
    """The smallest element that is rewarded, or None: nothing is, or the instruction has two answers.

    Where the parts of an element are rewarded apart from each other (the icon and the name of a row), the answer is
    the smallest rewarded element around them in which everything is rewarded.

    Args:
        elements: the candidates.
        rewards: what the page gave for a click at the center of each.
    """
    rewarded = [element for element, reward in zip(elements, rewards, strict=True) if reward > 0]
    missed = [element for element, reward in zip(elements, rewards, strict=True) if reward <= 0]
    for target in sorted(rewarded, key=lambda element: area_of(element.box)):
        apart = [e for e in rewarded if not contains(e.box, target.box) and not contains(target.box, e.box)]
        if not apart:
            return None if any(contains(target.box, element.box) for element in missed) else target
    return None


def choose_elements(screen: Screen, limit: int, longest: int = 40) -> list[Element]:
    """At most `limit` elements, drawn by the screen's page and seed, that can be named by their text.

    Such a text is on the screen once and has at most `longest` characters; its element is wholly in the work area,
    and no part of running text that goes on in a second line. Its box is that of the innermost element made to be
    clicked that holds the text and nothing else, or of the text itself.
    """
    holders = [element for element in screen.elements if element.holds_text]
    occurrences = Counter(element.text.casefold() for element in holders)
    named = [
        element
        for element in holders
        if occurrences[element.text.casefold()] == 1
        and len(element.text) <= longest
        and any(map(str.isalnum, element.text))
    ]
    targets = [target for holder in named if (target := _clickable(holder, screen.elements)) is not None]
    chosen = random.Random(f"{screen.page} {screen.seed}").sample(range(len(targets)), min(limit, len(targets)))
    return [targets[index] for index in sorted(chosen)]


def _clickable(holder: Element, elements: Iterable[Element]) -> Element | None:
    around = [e for e in elements if e.interactive and e.text == holder.text and contains(e.box, holder.box)]
    if around:
        target = min(around, key=lambda element: area_of(element.box))
    else:
        target = replace(holder, whole=holder.text_box, box=holder.text_box)
    left, top, width, height = AREA
    inside = contains((left, top, left + width, top + height), target.whole, tolerance=0.0)
    return target if inside and target.lines == 1 else None


def row(screen: Screen, element: Element, kind: str, prompt: str) -> dict[str, Any]:
    """An annotation of the element; its box is in pixels of the picture."""
    left, top, width, height = AREA
    x1, y1, x2, y2 = element.box
    box = [round(SCALE * edge, 2) for edge in (x1 - left, y1 - top, x2 - left, y2 - top)]
    return {
        "image": f"images/{screen.page}_{screen.seed:05d}.png",
        "width": SCALE * width,
        "height": SCALE * height,
        "prompt": prompt,
        "box": box,
        "platform": "web",
        "element_type": "text" if element.text else "icon",
        "page": screen.page,
        "kind": kind,
        "seed": screen.seed,
        "tag": element.tag,
        "label": element.label,
    }


def rows_of(screen: Screen, target: Element | None, limit: int) -> list[dict[str, Any]]:
    """The annotations of a screen: its task's, where there is one target, and at most `limit` of its elements."""
    task = [] if target is None else [row(screen, target, "task", screen.instruction)]
    return task + [
        row(screen, element, "element", f'Click on "{element.text}"') for element in choose_elements(screen, limit)
    ]


def smallest_png(png: bytes) -> bytes:
    """The same picture in fewer bytes: with a palette where it has at most 256 colors, opaque, at full compression."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    red, green, blue = np.asarray(image, dtype=np.uint32).transpose(2, 0, 1)
    colors, indices = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    if len(colors) <= 256:
        image = Image.fromarray(indices.reshape(red.shape).astype(np.uint8))
        image.putpalette([int(color) >> shift & 255 for color in colors for shift in (16, 8, 0)])
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return packed.getvalue()


# -- the browser ------------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium with MiniWoB++'s pages; a context manager.

    Raises:
        ModuleNotFoundError: selenium or miniwob is missing.
        FileNotFoundError: Chromium or its driver is missing.
    """

    def __init__(self) -> None:
        self._pages = pages_folder()
        chromium, chromedriver = _executables()
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=2",
            "--window-size=600,500",
            "--font-render-hinting=none",
            "--disable-lcd-text",
            "--lang=en-US",
            # else a tile is repainted in part or as a whole as time allows, and its edges are smoothed differently
            "--disable-partial-raster",
        ):
            options.add_argument(argument)
        self._driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
        source = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.version = self._driver.capabilities["browserVersion"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.quit()

    def open(self, page: str, seed: int) -> Screen:
        """The screen of a seed, as a freshly loaded page shows it to somebody who has touched nothing.

        Raises:
            ValueError: MiniWoB++ has no such page.
        """
        path = self._pages / f"{page}.html"
        if not path.is_file():
            raise ValueError(f"MiniWoB++ has no page {page!r}; it has {', '.join(all_pages())}")
        # a pointer that an earlier click left over the area would give the new page hover styles
        self._mouse("mouseMoved", *_ELSEWHERE)
        self._driver.get(path.as_uri())
        self._call("start", seed)
        png = self._picture()
        elements = tuple(Element(**element) for element in self._call("elements"))
        return Screen(page, seed, self._call("instruction"), elements, png)

    def rewards(self, screen: Screen) -> list[float]:
        """What the open screen gives for a click at the center of each of its elements, each in a new episode."""
        return self._call("rewards", screen.seed, [asdict(element) for element in screen.elements])

    def click(self, screen: Screen, element: Element) -> float:
        """The reward of a new episode of the open screen for a click of the mouse at the element's center."""
        if not self._call("ready", screen.seed, asdict(element)):
            return 0.0
        x, y = (element.box[0] + element.box[2]) / 2, (element.box[1] + element.box[3]) / 2
        self._mouse("mouseMoved", x, y)
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)
        return self._call("reward")

    def target(self, screen: Screen) -> Element | None:
        """The element that solves the open screen's task with one click, if there is exactly one."""
        target = choose_target(screen.elements, self.rewards(screen))
        return target if target is not None and self.click(screen, target) > 0 else None

    def _picture(self) -> bytes:
        left, top, width, height = AREA
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        arguments = {"format": "png", "optimizeForSpeed": True, "clip": clip}
        return base64.b64decode(self._driver.execute_cdp_cmd("Page.captureScreenshot", arguments)["data"])

    def _mouse(self, event: str, x: float, y: float) -> None:
        pressed = {} if event == "mouseMoved" else {"button": "left", "clickCount": 1}
        self._driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": event, "x": x, "y": y, **pressed})

    def _call(self, function: str, *arguments: Any) -> Any:
        return self._driver.execute_script(f"return renderer.{function}(...arguments)", *arguments)


_ELSEWHERE = (590, 340)


def pages_folder() -> Path:
    """Where the installed miniwob keeps its pages.

    Raises:
        ModuleNotFoundError: selenium or miniwob is missing.
    """
    for module in ("selenium", "miniwob"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"rendering needs {module}: pip install 'opd-lightning[gui]'", name=module)
    return Path(str(importlib.metadata.distribution("miniwob").locate_file("miniwob/html/miniwob")))


def all_pages() -> list[str]:
    return sorted(path.stem for path in pages_folder().glob("*.html"))


def _executables() -> tuple[str, str]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing = "Chromium" if chromium is None else "Chromium's driver"
        raise FileNotFoundError(
            f"{missing} is not installed; on Debian: apt-get install chromium chromium-driver fonts-liberation"
        )
    return chromium, chromedriver


# -- the command ------------------------------------------------------------------------------------------------------


def check_pages(names: str) -> list[str]:
    """The pages of a list with commas between, or all that can be drawn.

    Raises:
        ModuleNotFoundError: as `pages_folder`.
        ValueError: a page that MiniWoB++ does not have, or one of `UNFIT`.
    """
    known = [page for page in all_pages() if page not in UNFIT]
    if names == "all":
        return known
    for page in names.split(","):
        if page in UNFIT:
            raise ValueError(f"--pages: {page} can't be drawn: {UNFIT[page]}")
        if page not in known:
            raise ValueError(f"--pages: MiniWoB++ has no page {page!r}; it has {', '.join(known)}")
    return names.split(",")


def render(
    folder: str | Path, pages: Sequence[str], seeds: Iterable[int], elements: int, browser: Browser
) -> Iterator[dict[str, Any]]:
    """Writes the pictures of all screens that give rows, page by page, and yields the rows."""
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    for page in pages:
        for seed in seeds:
            screen = browser.open(page, seed)
            rows = rows_of(screen, browser.target(screen), elements)
            if rows:
                (Path(folder) / rows[0]["image"]).write_bytes(smallest_png(screen.png))
            yield from rows


def render_gui(arguments: Sequence[str]) -> None:
    """Renders MiniWoB++ web pages as training data for GUI grounding.

    ``opd render-gui OUT [--pages …] [--seed 0] [--count 20] [--elements 2]``

    Raises:
        FileExistsError: the folder holds something already.
        ModuleNotFoundError, FileNotFoundError: as `Browser`.
        ValueError: a page that MiniWoB++ does not have, or that gives no picture worth having.
    """
    parser = ArgumentParser(prog="opd render-gui", description="Render MiniWoB++ pages as a data set of GUI grounding.")
    parser.add_argument("folder", type=str, help="where to write; must not exist or be empty")
    parser.add_argument("--pages", type=str, default=",".join(SINGLE_CLICK), help="names with commas between, or all")
    parser.add_argument("--seed", type=int, default=0, help="of the first screen of each page")
    parser.add_argument("--count", type=int, default=20, help="screens of each page, one a seed")
    parser.add_argument("--elements", type=int, default=2, help="at most so many element rows a screen, 0 for none")
    options = parser.parse_args(list(arguments))
    folder = Path(options.folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; render into a new folder")
    pages = check_pages(options.pages)
    seeds = range(options.seed, options.seed + options.count)
    kinds: Counter[str] = Counter()
    with Browser() as browser:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "annotations.jsonl").open("w", encoding="utf-8") as annotations:
            for annotation in render(folder, pages, seeds, options.elements, browser):
                annotations.write(json.dumps(annotation, ensure_ascii=False) + "\n")
                kinds[annotation["kind"]] += 1
        (folder / "LICENSE").write_text(
            importlib.metadata.distribution("miniwob").read_text("licenses/LICENSE") or "", encoding="utf-8"
        )
        (folder / "README.md").write_text(
            readme(pages, seeds, options.elements, kinds, browser.version), encoding="utf-8"
        )
    rows = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items()) or "no rows"
    print(printable(f"wrote {folder}: {rows}"))


def readme(pages: Sequence[str], seeds: range, elements: int, kinds: Counter[str], chromium: str) -> str:
    """What the folder holds, from which versions, and how to make it again."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("miniwob", "selenium", "pillow"))
    counts = ", ".join(f"{count} of the kind `{kind}`" for kind, count in kinds.items())
    return f"""# Rendered screens of MiniWoB++

{kinds.total()} rows ({counts}) of {len(pages)} pages, seeds {seeds.start} to {seeds.stop - 1}. Made again with

    opd render-gui OUT --pages {",".join(pages)} --seed {seeds.start} --count {len(seeds)} --elements {elements}

Every line of `annotations.jsonl` is one instruction: `image` (relative to this folder), `width`, `height`, `prompt`
(the instruction), `box` ([x1, y1, x2, y2] in pixels of the picture), `platform`, `element_type` (`text` or `icon`),
`page`, `kind`, `seed`, and the element's `tag` and `label`.

* `task`: the page's own instruction. The box is the smallest element whose click the page rewarded.
* `element`: 'Click on "…"' for an element whose visible text is on the screen once.

Pictures show the page's work area of 160×160 CSS pixels at scale 2, without the bar with the instruction.
The seed is that of `Math.seedrandom` in the page; other versions of Chromium or fonts change pixels, not the tasks.

Made with {versions}, Chromium {chromium}.

The pages are MiniWoB++'s (Farama Foundation, https://github.com/Farama-Foundation/miniwob-plusplus), MIT license;
the pictures are renderings of them, under the same license, which is in `LICENSE`.
"""
