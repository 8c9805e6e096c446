"""Chooses what is to be clicked on a screen, and writes it down as a row; no browser needed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SCALE = 2
AREA = (0, 50, 160, 160)
"""Left, top, width and height of a page's work area, in CSS pixels; above it is the instruction."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Element:
    """Visible element of the page; its boxes are [left, top, right, bottom] in CSS pixels of the window.

    Attributes:
        tag: in lower case.
        text: its visible text.
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


def area_of(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def contains(outer: Box, inner: Box, tolerance: float = 2.0) -> bool:
    """Tells whether `inner` lies in `outer`, edges within `tolerance`."""
    return (
        outer[0] <= inner[0] + tolerance
        and outer[1] <= inner[1] + tolerance
        and outer[2] >= inner[2] - tolerance
        and outer[3] >= inner[3] - tolerance
    )


def choose_target(elements: Sequence[Element], rewards: Sequence[float]) -> Element | None:
    """Selects the smallest element that is rewarded; None: nothing is, or the instruction has two answers.

    Where the parts of an element are rewarded apart from each other (the icon and the name of a row), the answer is
    the smallest rewarded element around them in which everything is rewarded.

    Args:
        elements: the candidates.
        rewards: the page's rewards of a click at the center of each.
    """
    rewarded = [element for element, reward in zip(elements, rewards, strict=True) if reward > 0]
    missed = [element for element, reward in zip(elements, rewards, strict=True) if reward <= 0]
    for target in sorted(rewarded, key=lambda element: area_of(element.box)):
        apart = [e for e in rewarded if not contains(e.box, target.box) and not contains(target.box, e.box)]
        if not apart:
            return None if any(contains(target.box, element.box) for element in missed) else target
    return None


def choose_elements(screen: Screen, limit: int, longest: int = 40) -> list[Element]:
    """Draws at most `limit` elements, by the screen's page and seed, that can be named by their text.

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


def in_picture(box: Box) -> Box:
    """Converts a box from CSS pixels of the window to pixels of the picture."""
    left, top, _, _ = AREA
    x1, y1, x2, y2 = (round(SCALE * edge, 2) for edge in (box[0] - left, box[1] - top, box[2] - left, box[3] - top))
    return x1, y1, x2, y2


def row(screen: Screen, element: Element, kind: str, prompt: str) -> dict[str, Any]:
    """Builds the annotation of an element; its box is in pixels of the picture."""
    _, _, width, height = AREA
    return {
        "image": f"images/{screen.page}_{screen.seed:05d}.png",
        "width": SCALE * width,
        "height": SCALE * height,
        "prompt": prompt,
        "box": list(in_picture(element.box)),
        "platform": "web",
        "element_type": "text" if element.text else "icon",
        "page": screen.page,
        "kind": kind,
        "seed": screen.seed,
        "tag": element.tag,
        "label": element.label,
    }


def rows_of(screen: Screen, target: Element | None, limit: int) -> list[dict[str, Any]]:
    """Lists the annotations of a screen: its task's, where there is one target, and at most `limit` of its elements."""
    task = [] if target is None else [row(screen, target, "task", screen.instruction)]
    return task + [
        row(screen, element, "element", f'Click on "{element.text}"') for element in choose_elements(screen, limit)
    ]
