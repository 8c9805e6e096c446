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

import importlib.metadata
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image

from ...printable import printable
from .screens.browser import Browser, all_pages
from .screens.targets import rows_of

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


def check_pages(names: str) -> list[str]:
    """Lists the pages of names with commas between, or all that can be drawn.

    Raises:
        ModuleNotFoundError: as `pages_folder`.
        ValueError: a page that MiniWoB++ does not have, or one of `UNFIT`.
    """
    drawable = [page for page in all_pages() if page not in UNFIT]
    if names == "all":
        return drawable
    for page in names.split(","):
        if page in UNFIT:
            raise ValueError(f"--pages: {page} can't be drawn: {UNFIT[page]}")
        if page not in drawable:
            raise ValueError(f"--pages: MiniWoB++ has no page {page!r}; it has {', '.join(drawable)}")
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
    """Writes the README of a folder: its contents, versions, and the command that renders it."""
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


def smallest_png(png: bytes) -> bytes:
    """Encodes a picture in fewer bytes: with a palette for at most 256 colors, opaque, at full compression."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    red, green, blue = np.asarray(image, dtype=np.uint32).transpose(2, 0, 1)
    colors, indices = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    if len(colors) <= 256:
        image = Image.fromarray(indices.reshape(red.shape).astype(np.uint8))
        image.putpalette([int(color) >> shift & 255 for color in colors for shift in (16, 8, 0)])
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return packed.getvalue()
