"""Headless Chromium with MiniWoB++'s pages."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .targets import AREA, Box, Element, Screen, choose_target, in_picture

SUPERVISOR = Path(__file__).with_name("supervisor.py")
ARGUMENTS = (
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
)
_ELSEWHERE = (590, 340)


class Browser:
    """Headless Chromium with MiniWoB++'s pages; a context manager.

    Its processes and files live no longer than this process, however that ends (`supervisor`).

    Args:
        seconds: the longest that one command may take; None: selenium's own limits.

    Attributes:
        process: the driver's supervisor.

    Raises:
        ModuleNotFoundError: selenium or miniwob is missing.
        FileNotFoundError: Chromium or its driver is missing.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._pages = pages_folder()
        chromium, chromedriver = _executables()
        from selenium import webdriver

        # 1. the same pixels everywhere and every time
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ARGUMENTS:
            options.add_argument(argument)

        # 2. a driver that ends with this process
        class Supervised(webdriver.ChromeService):
            def command_line_args(self) -> list[str]:
                return ["-P", str(SUPERVISOR), str(os.getpid()), str(chromedriver), *super().command_line_args()]

        # Ctrl-C must not reach it: the trainer finishes its step
        service = Supervised(popen_kw={"start_new_session": True})
        service.path = sys.executable  # whatever the environment names as driver
        self._driver = webdriver.Chrome(options=options, service=service)
        self.process: subprocess.Popen[bytes] = service.process
        # 3. limits, and what runs in every page
        if seconds is not None:
            self._driver.set_script_timeout(seconds)
            self._driver.set_page_load_timeout(seconds)
            connection: Any = self._driver.command_executor
            connection.client_config.timeout = seconds
        source = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.version = self._driver.capabilities["browserVersion"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.quit()

    def kill(self) -> None:
        """Ends it at once, whatever it is doing."""
        with suppress(OSError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def open(self, page: str, seed: int) -> Screen:
        """Opens the screen of a seed: a freshly loaded page, without any input.

        Raises:
            ValueError: MiniWoB++ has no such page.
        """
        self.begin(page, seed)
        png = self.picture()
        elements = tuple(Element(**element) for element in self._call("elements"))
        return Screen(page, seed, self._call("instruction"), elements, png)

    def begin(self, page: str, seed: int) -> str:
        """Loads a page, and begins the episode of a seed; returns its instruction.

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
        return str(self._call("instruction"))

    def click_at(self, x: float, y: float) -> float | None:
        """Clicks with the mouse at shares of the area's width and height; returns the reward, None: it goes on."""
        left, top, width, height = AREA
        self._press(left + x * width, top + y * height)
        reward: float | None = self._call("outcome")
        return reward

    def place_of(self, selector: str) -> Box | None:
        """Finds an element, of several the one that the instruction names; returns its box in pixels of the picture."""
        box: Box | None = self._call("place", selector)
        return None if box is None else in_picture(box)

    def rewards(self, screen: Screen) -> list[float]:
        """Collects the open screen's reward for a click at the center of each element, each in a new episode."""
        return self._call("rewards", screen.seed, [asdict(element) for element in screen.elements])

    def click(self, screen: Screen, element: Element) -> float:
        """Clicks with the mouse at the element's center in a new episode of the open screen; returns its reward."""
        if not self._call("ready", screen.seed, asdict(element)):
            return 0.0
        self._press((element.box[0] + element.box[2]) / 2, (element.box[1] + element.box[3]) / 2)
        return self._call("reward")

    def target(self, screen: Screen) -> Element | None:
        """Finds the element that solves the open screen's task with one click; None unless there is exactly one."""
        target = choose_target(screen.elements, self.rewards(screen))
        return target if target is not None and self.click(screen, target) > 0 else None

    def picture(self) -> bytes:
        """Draws the area, as PNG."""
        left, top, width, height = AREA
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        arguments = {"format": "png", "optimizeForSpeed": True, "clip": clip}
        return base64.b64decode(self._driver.execute_cdp_cmd("Page.captureScreenshot", arguments)["data"])

    def _press(self, x: float, y: float) -> None:
        for event in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._mouse(event, x, y)

    def _mouse(self, event: str, x: float, y: float) -> None:
        pressed = {} if event == "mouseMoved" else {"button": "left", "clickCount": 1}
        self._driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": event, "x": x, "y": y, **pressed})

    def _call(self, function: str, *arguments: Any) -> Any:
        return self._driver.execute_script(f"return renderer.{function}(...arguments)", *arguments)


def pages_folder() -> Path:
    """Returns the folder of pages of the installed miniwob.

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
