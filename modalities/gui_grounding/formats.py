"""Answer formats: prompts for coordinates, writing and parsing them, a small class for each format of the field.

Places are points ``(x, y)`` or boxes ``(x1, y1, x2, y2)``, counted from the image's top left corner to its edges: the
bottom right corner of a screenshot of W × H pixels is (W, H), (1000, 1000) or (1, 1), as the unit has it. Sizes are
(width, height); ``model_size`` is what the processor resized the screenshot to.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

Size = tuple[int, int]
Unit = Literal["pixels", "thousandths", "fractions"]

_IN_WORDS = {
    "pixels": "in pixels",
    "thousandths": "from 0 to 1000 across the width and the height",
    "fractions": "from 0 to 1 across the width and the height",
}
_DECIMALS = {"pixels": 0, "thousandths": 0, "fractions": 4}
_LIMIT = {"pixels": 99_999, "thousandths": 1000, "fractions": 1}  # parsing does not know the size of the image
_TAGS = {  # of a box, and of the name before it
    "qwen2": ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    "qwen": ("<box>", "</box>", "<ref>", "</ref>"),
}
_INTEGER = "(0|[1-9][0-9]{0,4})"
_FRACTION = r"([01](?:\.[0-9]{1,9})?)"


class AnswerFormat(ABC):
    """Format of an answer that names a place to click.

    Attributes:
        prompt: the question, with ``{instruction}`` for the instruction (a `str.format` template).
        box: whether `write` answers with a box rather than with a point.
        absolute: whether numbers are pixels of the resized image, so that they depend on ``model_size``.
    """

    def __init__(self, unit: Unit, box: bool, prompt: str | None) -> None:
        self.unit, self.box, self.absolute = unit, box, unit == "pixels"
        self.prompt = self._default_prompt() if prompt is None else prompt
        name = f"{type(self).__name__}.prompt"
        try:
            asked = self.prompt.format(instruction="\0")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{name} is no template: {self.prompt!r}: {error!r}; write other braces twice") from None
        if "\0" not in asked:
            raise ValueError(f"{name} has no place for the {{instruction}}: {self.prompt!r}")

    @abstractmethod
    def _spell(self, numbers: Sequence[str]) -> str:
        """Writes an answer of two or four numbers."""

    @abstractmethod
    def _read(self, text: str) -> list[float] | None:
        """Reads the numbers of a text that is one answer and nothing else; None if it is not."""

    def parse(self, text: str) -> tuple[float, ...] | None:
        """Parses a text as a point (two numbers) or box (four), in the format's units; None if it is malformed.

        The text must be one answer and nothing else, white space around it aside, with the digits of this format:
        integers without sign or leading zeros, or for fractions 0 to 1 with up to nine decimals. Boxes need
        x1 < x2 and y1 < y2. A point and a box are both understood, whichever was asked for, where the format has
        both. Pixels may have five digits: a place outside of the screen is well-formed, and a miss.
        """
        numbers = self._read(text.strip())
        if numbers is None or len(numbers) not in (2, 4) or not all(0 <= n <= _LIMIT[self.unit] for n in numbers):
            return None
        if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            return None
        return tuple(map(float, numbers))

    def write(self, box: Sequence[float], size: Size, model_size: Size) -> str:
        """Writes an answer with a box, or with its center.

        Numbers are rounded to the nearest unit, fractions to four decimals. A box thinner than a unit is written as
        the unit that its center is in, so that every answer can be parsed.

        Args:
            box: x1, y1, x2, y2 in pixels of the original image.
            size: of the original image.
            model_size: of the resized image; only formats in pixels read it.
        """
        axes = [self._rounded(box[axis], box[axis + 2], size[axis], model_size[axis]) for axis in (0, 1)]
        return self._spell([axes[axis][end] for end in range(len(axes[0])) for axis in (0, 1)])

    def to_pixels(self, parsed: Sequence[float], size: Size, model_size: Size) -> tuple[float, ...]:
        """Converts a parsed answer to pixels of the original image; ``size`` and ``model_size`` as in `write`."""
        return tuple(
            value * size[i % 2] / self._extent(model_size[i % 2])  # x and y take turns
            for i, value in enumerate(parsed)
        )

    def _extent(self, model_length: int) -> int:
        """Returns the number of units in the image's width or height."""
        return model_length if self.absolute else _LIMIT[self.unit]

    def _rounded(self, low: float, high: float, length: int, model_length: int) -> list[str]:
        """Rounds one axis of a box or of its center to units."""
        decimals = _DECIMALS[self.unit]
        steps = self._extent(model_length) * 10**decimals
        center = (low + high) / 2
        ends = [_nearest(end * steps / length, steps) for end in ((low, high) if self.box else (center,))]
        if self.box and ends[0] == ends[1]:
            start = min(max(math.floor(center * steps / length), 0), steps - 1)
            ends = [start, start + 1]
        return [f"{end / 10**decimals:.{decimals}f}" for end in ends]

    def _default_prompt(self) -> str:
        what, names = ("bounding box", ("x1", "y1", "x2", "y2")) if self.box else ("point", ("x", "y"))
        form = self._spell(names).replace("{", "{{").replace("}", "}}")
        return (
            f"Where on this screenshot is what the instruction asks for? Answer only with its {what}, "
            f"{_IN_WORDS[self.unit]}, written as\n{form}\nInstruction: {{instruction}}"
        )


class _Bare(AnswerFormat):
    _pattern = re.compile(rf"\({_INTEGER}, ?{_INTEGER}(?:, ?{_INTEGER}, ?{_INTEGER})?\)")

    def _spell(self, numbers: Sequence[str]) -> str:
        return f"({', '.join(numbers)})"

    def _read(self, text: str) -> list[float] | None:
        return _match(self._pattern, text)


class AbsolutePixels(_Bare):
    """Format ``(x, y)`` in pixels of the image that the processor made, the coordinates of Qwen2.5-VL (2502.13923).

    Its own notebooks wrap them in JSON or in a tool call: see `JSONAnswer` and `ToolCall`.

    Args:
        box: answer with ``(x1, y1, x2, y2)`` instead of the center.
        prompt: template with ``{instruction}``; default: a question that describes the format.

    Raises:
        ValueError: the prompt is no template, or has no place for the instruction.
    """

    def __init__(self, box: bool = False, prompt: str | None = None) -> None:
        super().__init__("pixels", box, prompt)


class Normalized1000(_Bare):
    """Format ``(x, y)`` from 0 to 1000 across the image, of UGround (2410.05243; its V1 on Qwen2-VL) and OS-Atlas.

    Qwen3-VL has the same coordinates, in JSON or in a tool call: see `JSONAnswer` and `ToolCall`. A fraction such as
    ``(0.5, 0.3)`` is malformed here, not the top left corner. Places are value / 1000 × width, as those models'
    scripts read them; a target smaller than a thousandth of the screen can be missed by rounding alone.

    Args:
        box: as in `AbsolutePixels`.
        prompt: as in `AbsolutePixels`.

    Raises:
        ValueError: as in `AbsolutePixels`.
    """

    def __init__(self, box: bool = False, prompt: str | None = None) -> None:
        super().__init__("thousandths", box, prompt)


class BoxTags(AnswerFormat):
    """Format of a box from 0 to 1000 between tags, after the name of the object or alone.

    ``qwen2``: ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``, after ``<|object_ref_start|>…<|object_ref_end|>`` in
    Qwen2-VL (2409.12191) and OS-Atlas-Base-7B (2410.23218); UI-TARS (2501.12326) has a point between these tags.
    ``qwen``: ``<box>(x1,y1),(x2,y2)</box>``, after ``<ref>…</ref>``, in Qwen-VL (2308.12966).

    The tags of ``qwen2`` are special tokens of its tokenizers: a completion must be decoded with them.

    Args:
        style: which tags.
        box: whether to answer with the box or with its center, ``(x,y)``.
        prompt: as in `AbsolutePixels`.

    Raises:
        ValueError: an unknown style; otherwise as in `AbsolutePixels`.
    """

    def __init__(self, style: Literal["qwen2", "qwen"] = "qwen2", box: bool = True, prompt: str | None = None) -> None:
        if style not in _TAGS:
            raise ValueError(f"BoxTags.style is {style!r}; it must be one of {', '.join(_TAGS)}")
        self.style = style
        start, end, ref_start, ref_end = map(re.escape, _TAGS[style])
        corner = rf"\({_INTEGER}, ?{_INTEGER}\)"
        self._pattern = re.compile(rf"(?:{ref_start}[^<]*{ref_end})?{start}{corner}(?:, ?{corner})?{end}")
        super().__init__("thousandths", box, prompt)

    def _spell(self, numbers: Sequence[str]) -> str:
        corners = (f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
        start, end, *_ = _TAGS[self.style]
        return f"{start}{','.join(corners)}{end}"

    def _read(self, text: str) -> list[float] | None:
        return _match(self._pattern, text)


class JSONAnswer(AnswerFormat):
    """Format ``{"point_2d": [x, y]}`` or ``{"bbox_2d": [x1, y1, x2, y2]}``, of Qwen2.5-VL's and Qwen3-VL's notebooks.

    Understood with a ``label``, in a list of one, and in a fence (three backticks and ``json``): Qwen answers with all
    of them. More than one object, a key that comes twice and other keys are malformed.

    Args:
        unit: ``thousandths`` (Qwen3-VL, default) or ``pixels`` of the resized image (Qwen2.5-VL).
        box: as in `AbsolutePixels`.
        prompt: as in `AbsolutePixels`.

    Raises:
        ValueError: as in `AbsolutePixels`.
    """

    def __init__(
        self, unit: Literal["thousandths", "pixels"] = "thousandths", box: bool = False, prompt: str | None = None
    ) -> None:
        super().__init__(unit, box, prompt)

    def _spell(self, numbers: Sequence[str]) -> str:
        return f'{{"{"point_2d" if len(numbers) == 2 else "bbox_2d"}": [{", ".join(numbers)}]}}'

    def _read(self, text: str) -> list[float] | None:
        if text.startswith("```") and text.endswith("```"):
            text = text[3:-3].removeprefix("json")
        value = _json(text)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict) or not isinstance(value.pop("label", ""), str) or len(value) != 1:
            return None
        ((key, numbers),) = value.items()
        return _integers(numbers, {"point_2d": 2, "bbox_2d": 4}.get(key))


class ToolCall(AnswerFormat):
    """Format of a click as a call of Qwen's ``computer_use`` tool, as of GUI-SD (2605.00642) and Qwen's own agents.

    ``<tool_call>`` and ``</tool_call>`` around
    ``{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [x, y]}}``. The description of the
    tool, which Qwen was trained with, belongs into a system message.

    Args:
        unit: ``thousandths`` (Qwen3-VL, GUI-SD, default) or ``pixels`` of the resized image (Qwen2.5-VL).
        prompt: as in `AbsolutePixels`.

    Raises:
        ValueError: as in `AbsolutePixels`.
    """

    def __init__(self, unit: Literal["thousandths", "pixels"] = "thousandths", prompt: str | None = None) -> None:
        super().__init__(unit, False, prompt)

    def _spell(self, numbers: Sequence[str]) -> str:
        call = f'{{"action": "left_click", "coordinate": [{", ".join(numbers)}]}}'
        return f'<tool_call>\n{{"name": "computer_use", "arguments": {call}}}\n</tool_call>'

    def _read(self, text: str) -> list[float] | None:
        if not (text.startswith("<tool_call>") and text.endswith("</tool_call>")):
            return None
        call = _json(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        if not isinstance(call, dict) or not isinstance(arguments := call.pop("arguments", None), dict):
            return None
        numbers = arguments.pop("coordinate", None)
        if call != {"name": "computer_use"} or arguments != {"action": "left_click"}:
            return None
        return _integers(numbers, 2)


class PyAutoGUI(AnswerFormat):
    """Format ``pyautogui.click(x=0.4815, y=0.1024)`` of Aguvis (2412.04454), in pixels of OpenCUA (2508.09123).

    Args:
        unit: ``fractions`` of the width and height (default), written with four decimals, or ``pixels`` of the resized
            image.
        prompt: as in `AbsolutePixels`.

    Raises:
        ValueError: as in `AbsolutePixels`.
    """

    def __init__(self, unit: Literal["fractions", "pixels"] = "fractions", prompt: str | None = None) -> None:
        number = _FRACTION if unit == "fractions" else _INTEGER
        self._pattern = re.compile(rf"pyautogui\.click\(x={number}, ?y={number}\)")
        super().__init__(unit, False, prompt)

    def _spell(self, numbers: Sequence[str]) -> str:
        x, y = numbers
        return f"pyautogui.click(x={x}, y={y})"

    def _read(self, text: str) -> list[float] | None:
        return _match(self._pattern, text)


def _nearest(value: float, limit: int) -> int:
    return min(max(math.floor(value + 0.5), 0), limit)


def _match(pattern: re.Pattern[str], text: str) -> list[float] | None:
    match = pattern.fullmatch(text)
    return None if match is None else [float(group) for group in match.groups() if group is not None]


def _integers(value: Any, count: int | None) -> list[float] | None:
    right = isinstance(value, list) and len(value) == count and all(type(number) is int for number in value)
    return value if right else None


def _json(text: str) -> Any:
    """Parses JSON; None if a text is none, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)
