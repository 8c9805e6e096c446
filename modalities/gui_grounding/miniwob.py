"""MiniWoB++ as an environment: a policy clicks on a real page, sees the next screenshot, and the page rewards it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from ...environment import Environment, Turn
from ...images import as_stored
from ...printable import quoted
from ...trajectory import Example
from ..vision_language.observing import seen_by
from .formats import AnswerFormat, Normalized1000
from .screens.browser import Browser
from .screens.targets import Box
from .view import Spotlight

TARGETS = {
    "click-button-sequence": ("#subbtn", "#subbtn2"),
    "click-collapsible": ("h3", "#subbtn"),
    "click-option": ("label", "#subbtn"),
    "click-test": ("#subbtn",),
    "click-test-2": ("#subbtn",),
}
"""What has to be clicked on a page, one after the other, by CSS selectors; of several elements, the one it names."""
SIZE = (320, 320)
"""Pixels of a screenshot (`render`)."""


class MiniWoB(Environment):
    """Environment of MiniWoB++'s pages (1802.08802) in headless Chromium: one click a turn.

    An episode is a page, a seed and the clicks so far, from which every screen can be had again. A click is answered by
    the next screenshot, or ends the episode, with the page's reward (−1 to 1, without its discount of time). Text that
    is no click is answered by an error. Where it is known what is to be clicked next (`TARGETS`), the box of that goes
    with the screenshot, for views such as `Spotlight`; the student never sees it.

    Rows come from `miniwob_rows`. Browsers start when they are needed, one for each step that is made at the same time,
    and wait for the next; one that takes too long or dies is ended, with all of its processes, and costs its trajectory
    a message. They end with the run, however that ends.

    Args:
        repeat: write the instruction below every screenshot, for models that are too small to remember it.
        browsers: how many run at the same time at most. Default 2.
        seconds: the longest that a browser may take for one command. Default 8; ``rollout.turn_timeout`` should be
            longer, and long enough for a browser's start.

    Raises:
        ModuleNotFoundError, FileNotFoundError: as `Browser`.
        ValueError: browsers or seconds that are not positive.
    """

    columns = ("page", "seed")
    shows = frozenset({"image"})
    rewards = True

    def __init__(self, repeat: bool = False, browsers: int = 2, seconds: float = 8.0) -> None:
        if browsers < 1 or not seconds > 0:
            raise ValueError(f"MiniWoB: browsers={browsers} and seconds={seconds} must be positive")
        self.repeat, self.seconds, self.at_once = repeat, seconds, browsers
        self.answer_format: AnswerFormat = Normalized1000()

    def adopt(self, answer_format: AnswerFormat) -> None:
        """Takes over the format in which clicks are written.

        Raises:
            ValueError: it names pixels of what a model's processor makes, which nobody here knows.
        """
        if answer_format.absolute:
            raise ValueError(
                f"model.answer_format: {type(answer_format).__name__} names pixels of a resized screenshot; MiniWoB "
                "reads places across it: take Normalized1000, or thousandths or fractions as the unit"
            )
        self.answer_format = answer_format

    def reset(self, row: Example, seed: int) -> Any:
        return {"page": str(row["page"]), "seed": int(row["seed"]), "clicks": [], "hit": 0}

    def step(self, state: Any, text: str) -> Turn:
        if (click := self.read(text)) is None:
            return Turn(f"error: {quoted(text)} is no click", state)
        with self._browser() as browser:
            episode = PageEpisode(browser, **state)
            reward = episode.click(click)
            if reward is not None:
                return Turn(state=episode.state, done=True, reward=reward)
            return Turn(episode.shown(self.repeat), episode.state, reward=0.0)

    def read(self, text: str) -> tuple[float, float] | None:
        """Reads a click as shares of the screenshot's width and height; None: it is none."""
        if (parsed := self.answer_format.parse(text)) is None:
            return None
        numbers = self.answer_format.to_pixels(parsed, (1, 1), (1, 1))
        x, y = ((numbers[axis] + numbers[axis - 2]) / 2 for axis in (0, 1))
        return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)

    def write(self, box: Box) -> str:
        """Writes a click at the center of a box, in pixels of a screenshot."""
        return self.answer_format.write(box, SIZE, SIZE)

    @contextmanager
    def _browser(self) -> Iterator[Browser]:
        """Lends a browser that waits, or a new one; what fails within ends it."""
        with _LOCK:
            browser = self._waiting.pop() if self._waiting else None
        browser = browser or Browser(self.seconds)
        try:
            yield browser
        except BaseException:  # of a thread that is interrupted, too
            browser.kill()
            raise
        with _LOCK:
            self._waiting.append(browser)

    @property
    def _waiting(self) -> list[Browser]:
        waiting: list[Browser] = vars(self).setdefault("_browsers", [])
        return waiting

    def close(self) -> None:
        while self._waiting:
            self._waiting.pop().kill()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_browsers"}


_LOCK = threading.Lock()


class PageEpisode:
    """Episode of a page in a browser, which is led to where its state says.

    Args:
        browser: any; what it shows is left.
        page, seed: of the episode.
        clicks: so far, as shares of width and height.
        hit: how many of the page's `TARGETS` these have hit, one after the other.
    """

    def __init__(self, browser: Browser, page: str, seed: int, clicks: Sequence[Sequence[float]], hit: int) -> None:
        self._browser, self._page, self._seed = browser, page, seed
        self._clicks, self._hit = [list(click) for click in clicks], hit
        self.instruction = browser.begin(page, seed)
        for x, y in clicks:
            browser.click_at(x, y)

    @property
    def state(self) -> dict[str, Any]:
        return {"page": self._page, "seed": self._seed, "clicks": self._clicks, "hit": self._hit}

    @property
    def target(self) -> Box | None:
        """The box of what is to be clicked next, in pixels of the screenshot; None where nobody knows or sees it."""
        targets = TARGETS.get(self._page, ())
        return self._browser.place_of(targets[self._hit]) if self._hit < len(targets) else None

    def click(self, click: tuple[float, float]) -> float | None:
        """Clicks; returns the page's reward, None where the episode goes on."""
        box, (x, y) = self.target, (share * length for share, length in zip(click, SIZE, strict=True))
        if box is not None and box[0] <= x <= box[2] and box[1] <= y <= box[3]:
            self._hit += 1
        self._clicks.append(list(click))
        return self._browser.click_at(*click)

    def shown(self, repeat: bool) -> list[dict[str, Any]]:
        """Returns the parts of what is seen now."""
        box = self.target
        screen = {"type": "image", "image": self._browser.picture(), **({} if box is None else {"box": list(box)})}
        return [screen, {"type": "text", "text": self.instruction}] if repeat else [screen]


def miniwob_rows(
    pages: list[str], count: int, first: int = 0, repeat: bool = False, marked: float = 0.0
) -> list[dict[str, Any]]:
    """Makes rows for `MiniWoB`: the first screens of episodes, with what solves them as given completions.

    ``data.train: python:opd_lightning.modalities.gui_grounding.miniwob_rows``. Episodes that clicks on the page's
    `TARGETS` don't solve (a button below the edge of the screen) are left out.

    Args:
        pages: of those in `TARGETS`.
        count: seeds of each page.
        first: of them.
        repeat: as in `MiniWoB`, for completions.
        marked: share of the rows all of whose screenshots a `Spotlight` marks, for the warm start of a student that
            will be its own teacher.

    Raises:
        ModuleNotFoundError, FileNotFoundError: as `Browser`.
        ValueError: a page that is not known.
    """
    if unknown := [page for page in pages if page not in TARGETS]:
        raise ValueError(
            f"miniwob_rows: what has to be clicked on {unknown[0]!r} is not known; of {', '.join(TARGETS)}"
        )
    environment, rows = MiniWoB(repeat), []
    with Browser() as browser:
        for page in pages:
            for seed in range(first, first + count):
                if (row := _solved(environment, browser, page, seed)) is not None:
                    rows.append(_marked(row) if Random(f"{page} {seed}").random() < marked else row)
    return rows


def _solved(environment: MiniWoB, browser: Browser, page: str, seed: int) -> dict[str, Any] | None:
    """Solves an episode; returns its row, None where clicks on the targets don't."""
    episode = PageEpisode(browser, page, seed, [], 0)
    row: dict[str, Any] = {"prompt": episode.instruction, "image": stored(browser.picture())}
    completion: list[dict[str, Any]] = []
    for number in range(len(TARGETS[page])):
        if (box := episode.target) is None:
            return None
        if number:
            parts = [
                p | {"image": stored(p["image"])} if "image" in p else p for p in episode.shown(environment.repeat)
            ]
            completion.append({"role": "user", "content": parts})
        else:
            row["box"] = list(box)
        text = environment.write(box)
        # in parts, as tables want all contents alike
        completion.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        click = environment.read(text)
        reward = episode.click(click) if click is not None else None
    return None if reward is None or reward <= 0 else {**row, "completion": completion, "page": page, "seed": seed}


def stored(png: bytes) -> dict[str, Any]:
    """Returns an image as tables hold it."""
    return {"bytes": png, "path": None}


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    """Shows a row, and what it observes, as `Spotlight` does."""
    spotlight = Spotlight()

    def seen(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image": as_stored(seen_by(spotlight, [part])[0])} if part["type"] == "image" else part

    completion = [turn | {"content": [seen(part) for part in turn["content"]]} for turn in row["completion"]]
    view = spotlight(row) or row
    return {**view, "image": as_stored(view["image"]), "completion": completion}
