from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from opd_lightning.modalities.gui_grounding.formats import (
    AbsolutePixels,
    AnswerFormat,
    BoxTags,
    JSONAnswer,
    Normalized1000,
    PyAutoGUI,
    ToolCall,
)
from opd_lightning.modalities.gui_grounding.metrics import grounding_metrics
from opd_lightning.modalities.gui_grounding.reward import Overlap, PointInBox

Size = tuple[int, int]
FORMATS: list[AnswerFormat] = [
    AbsolutePixels(),
    AbsolutePixels(box=True),
    Normalized1000(),
    Normalized1000(box=True),
    BoxTags(),
    BoxTags("qwen"),
    BoxTags(box=False),
    JSONAnswer(),
    JSONAnswer(box=True),
    JSONAnswer("pixels"),
    JSONAnswer("pixels", box=True),
    ToolCall(),
    ToolCall("pixels"),
    PyAutoGUI(),
    PyAutoGUI("pixels"),
]
CALL = """<tool_call>
{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [512, 30]}}
</tool_call>"""


def unit(answer: AnswerFormat, size: Size, model_size: Size) -> tuple[float, float]:
    """The format's unit, in pixels of the original image."""
    steps = {"pixels": model_size, "thousandths": (1000, 1000), "fractions": (10_000, 10_000)}[answer.unit]
    return size[0] / steps[0], size[1] / steps[1]


def check_round_trip(answer: AnswerFormat, box: Sequence[float], size: Size, model_size: Size) -> None:
    parsed = answer.parse(answer.write(box, size, model_size))
    assert parsed is not None
    found = answer.to_pixels(parsed, size, model_size)
    step = unit(answer, size, model_size)
    wanted = box if answer.box else [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    assert len(found) == len(wanted)
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        # what is thinner than a unit is written one unit wide
        thin = answer.box and box[2 + i % 2] - box[i % 2] < step[i % 2]
        assert abs(one - other) <= (1 if thin else 0.5) * step[i % 2] * (1 + 1e-9)


@st.composite
def boxes(draw: st.DrawFn, size: Size) -> list[float]:
    edges = [sorted(draw(st.tuples(*[st.floats(0, length)] * 2))) for length in size]
    assume(all(high - low > 1e-3 for low, high in edges))
    return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]


sizes = st.tuples(st.integers(1, 8000), st.integers(1, 8000))


@pytest.mark.parametrize("answer", FORMATS, ids=lambda a: f"{type(a).__name__}-{a.unit}-{a.box}")
class TestEveryFormat:
    @given(st.data())
    def test_what_is_written_comes_back_through_any_resizing(self, answer, data):
        size, model_size = data.draw(sizes), data.draw(sizes)
        check_round_trip(answer, data.draw(boxes(size)), size, model_size)

    @given(st.data())
    def test_what_is_written_comes_back_through_the_resizing_of_qwen(self, answer, data):
        width, height = size = data.draw(st.tuples(st.integers(30, 6000), st.integers(30, 6000)))
        assume(max(size) / min(size) < 150)
        low = data.draw(st.sampled_from([56 * 56, 512 * 512]))
        high = data.draw(st.sampled_from([512 * 512, 1280 * 28 * 28, 16384 * 28 * 28]))
        rows, columns = smart_resize(height, width, data.draw(st.sampled_from([28, 32])), low, high)
        check_round_trip(answer, data.draw(boxes(size)), size, (columns, rows))

    @given(st.text())
    def test_no_text_makes_it_raise(self, answer, text):
        assert answer.parse(text) is None

    @given(st.data())
    def test_a_broken_answer_is_none_or_numbers_in_range(self, answer, data):
        right = answer.write((3, 4, 50, 60), (80, 90), (84, 84))
        alphabet = sorted({*right, *"0123456789-+.e ,\n", "\u0664", "\u2212"})
        text = data.draw(st.lists(st.sampled_from(alphabet), max_size=4).map("".join))
        at, length = data.draw(st.integers(0, len(right))), data.draw(st.integers(0, 3))
        found = answer.parse(right[:at] + text + right[at + length :])
        assert found is None or (len(found) in (2, 4) and all(0 <= value < 1e5 for value in found))

    @given(st.data())
    def test_whatever_is_read_is_graded_with_finite_numbers(self, answer, data):
        """From tokens of the format in any order to the rewards."""
        parts = re.findall(r"\w+|\W", answer.write((3, 4, 50, 60), (80, 90), (84, 84)))
        numbers = [
            "0",
            "1",
            "999",
            "1000",
            "99999",
            "-1",
            "1e400",
            "NaN",
            "Infinity",
            "true",
            "null",
            "9" * 5000,
            "\u0664",
        ]
        mixed = st.lists(st.sampled_from([*parts, *numbers]), max_size=3).map("".join)
        text = "".join(part if data.draw(st.booleans()) or not part.isdigit() else data.draw(mixed) for part in parts)
        size, parsed = data.draw(sizes), answer.parse(text)
        place = None if parsed is None else answer.to_pixels(parsed, size, data.draw(sizes))
        metrics = grounding_metrics(place, (0.0, 0.0, float(size[0]), float(size[1])), size)
        assert all(math.isfinite(value) for value in metrics.values())
        for reward in (PointInBox(), Overlap()):
            assert 0 <= reward(text, {"metrics": metrics}) <= 1

    def test_white_space_around_an_answer_is_allowed_and_nothing_else(self, answer):
        text = answer.write((3, 4, 50, 60), (80, 90), (84, 84))
        parsed = answer.parse(text)
        assert parsed is not None
        assert answer.parse(f" \n{text}\n") == parsed
        for around in (f"{text}{text}", f"{text} {text}", f"{text}.", f"Click {text}", f"{text}\n(1, 2)"):
            assert answer.parse(around) is None

    def test_the_box_at_each_edge_of_the_screen_can_be_read(self, answer):
        edges = [(0, 0, 100, 50), (0, 0, 0.01, 0.01), (99.5, 49.5, 100, 50)]
        beyond = [(-0.9, -0.9, 100.9, 50.9), (99.96, 49.98, 100.9, 50.9)]
        for box in edges + beyond:
            parsed = answer.parse(answer.write(box, (100, 50), (112, 56)))
            assert parsed is not None
            x, y = answer.to_pixels(parsed, (100, 50), (112, 56))[-2:]
            assert x <= 100 + 1e-9
            assert y <= 50 + 1e-9

    def test_the_default_prompt_shows_the_format_and_ends_with_the_instruction(self, answer):
        asked = answer.prompt.format(instruction="Click {OK}")
        assert asked.endswith("Click {OK}")
        assert answer._spell(["x1", "y1", "x2", "y2"] if answer.box else ["x", "y"]) in asked

    def test_only_pixels_depend_on_what_the_processor_made(self, answer):
        texts = {answer.write((3, 4, 50, 60), (80, 90), model_size) for model_size in ((84, 84), (1000, 2000))}
        assert len(texts) == (2 if answer.absolute else 1)


@pytest.mark.parametrize(
    ("answer", "text", "parsed"),
    [
        (AbsolutePixels(), "(1024, 7)", (1024, 7)),
        (Normalized1000(), "(512,30)", (512, 30)),
        (Normalized1000(), "(0, 1000)", (0, 1000)),
        (Normalized1000(), "(1, 2, 3, 4)", (1, 2, 3, 4)),
        (BoxTags(), "<|box_start|>(576,12),(592,42)<|box_end|>", (576, 12, 592, 42)),
        (
            BoxTags(),
            "<|object_ref_start|>language switch<|object_ref_end|><|box_start|>(576,12),(592,42)<|box_end|>",
            (576, 12, 592, 42),
        ),
        (BoxTags(), "<|box_start|>(576,12)<|box_end|>", (576, 12)),
        (BoxTags("qwen"), "<ref>the button</ref><box>(1,2),(3,4)</box>", (1, 2, 3, 4)),
        (JSONAnswer(), '{"point_2d": [925, 618]}', (925, 618)),
        (JSONAnswer(), '```json\n[\n\t{"point_2d": [925, 618], "label": "point_1"}\n]\n```', (925, 618)),
        (JSONAnswer("pixels"), '{"label": "a", "bbox_2d": [135, 114, 1016, 672]}', (135, 114, 1016, 672)),
        (ToolCall(), CALL, (512, 30)),
        (PyAutoGUI(), "pyautogui.click(x=0.8102, y=0.9463)", (0.8102, 0.9463)),
        (PyAutoGUI(), "pyautogui.click(x=1, y=0)", (1, 0)),
        (PyAutoGUI("pixels"), "pyautogui.click(x=1424, y=264)", (1424, 264)),
    ],
)
def test_published_forms_are_understood(answer: AnswerFormat, text: str, parsed: tuple[float, ...]):
    assert answer.parse(text) == parsed


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (
            Normalized1000(),
            [
                "",
                "512, 30",
                "(512, 30",
                "(512)",
                "(512, 30, 600)",
                "(1, 2, 3, 4, 5)",
                "[512, 30]",
                "(0.5, 0.3)",
                "(512.0, 30.0)",
                "(-1, 30)",
                "(+1, 30)",
                "(1001, 30)",
                "(0512, 30)",
                "(nan, 30)",
                "(inf, 30)",
                "(1e2, 30)",
                "(٥, 30)",
                "(99999999999999999999, 3)",
                "(3, 4, 3, 8)",
                "(3, 4, 8, 4)",
                "(8, 9, 3, 4)",
                "(1, 2) (3, 4)",
            ],
        ),
        (AbsolutePixels(), ["(100000, 3)", "(-3, 4)", "(3.5, 4)", "(" + "9" * 5000 + ", 3)"]),
        (
            BoxTags(),
            [
                "(1,2),(3,4)",
                "<|box_start|>(1,2),(3,4)",
                "<box>(1,2),(3,4)</box>",
                "<|box_start|>1,2,3,4<|box_end|>",
                "<|box_start|>(3,4),(1,2)<|box_end|>",
                "<|box_start|>(1,2),(3,1001)<|box_end|>",
                "<|box_start|>(1,2),(3,4),(5,6)<|box_end|>",
                "<|object_ref_start|>a<|box_start|>(1,2),(3,4)<|box_end|>",
            ],
        ),
        (
            JSONAnswer(),
            [
                "[1, 2]",
                "{}",
                "[]",
                "null",
                "[" * 100_000,
                "[" * 500 + "]" * 500,
                '{"point_2d": [1, 2]',
                '{"point_2d": [1]}',
                '{"point_2d": [1, 2, 3]}',
                '{"point_2d": [1, 2, 3, 4]}',
                '{"bbox_2d": [1, 2]}',
                '{"point_2d": ["1", "2"]}',
                '{"point_2d": [true, false]}',
                '{"point_2d": [NaN, 2]}',
                '{"point_2d": [Infinity, 2]}',
                '{"point_2d": [0.5, 2]}',
                '{"point_2d": [1e2, 2]}',
                '{"point_2d": [-1, 2]}',
                '{"point_2d": [1, 1001]}',
                '{"point_2d": [' + "9" * 5000 + ", 2]}",
                '{"point_2d": "1, 2"}',
                '{"point_2d": [1, 2], "point_2d": [3, 4]}',
                '{"point_2d": [1, 2], "bbox_2d": [1, 2, 3, 4]}',
                '{"point_2d": [1, 2], "label": 3}',
                '{"point_2d": [1, 2], "why": "so"}',
                '{"label": "a"}',
                '[{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]',
                "{'point_2d': [1, 2]}",
                '```json\n{"point_2d": [1, 2]}',
                '```python\n{"point_2d": [1, 2]}\n```',
                '```json\n{"point_2d": [1, 2]}\n```\n```json\n{"point_2d": [1, 2]}\n```',
                "``````",
                "```",
            ],
        ),
        (
            ToolCall(),
            [
                CALL.replace("left_click", "type"),
                CALL.replace("computer_use", "mobile_use"),
                CALL.replace("[512, 30]", "[512, 30, 600, 40]"),
                CALL.replace("[512, 30]", "[512, 1030]"),
                CALL.replace("[512, 30]", "null"),
                CALL.replace('"coordinate"', '"text": "a", "coordinate"'),
                CALL.replace("<tool_call>", ""),
                "<tool_call>[]</tool_call>",
                "<tool_call></tool_call>",
                '<tool_call>{"name": "computer_use", "arguments": 3}</tool_call>',
            ],
        ),
        (
            PyAutoGUI(),
            [
                "pyautogui.click(0.5, 0.3)",
                "pyautogui.click(x=0.5)",
                "pyautogui.click(y=0.5, x=0.3)",
                "pyautogui.click(x=.5, y=0.3)",
                "pyautogui.click(x=0., y=0.3)",
                "pyautogui.click(x=1.5, y=0.3)",
                "pyautogui.click(x=512, y=30)",
                "pyautogui.click(x=-0.5, y=0.3)",
                "pyautogui.click(x=nan, y=0.3)",
                "pyautogui.doubleClick(x=0.5, y=0.3)",
                "pyautogui.click(x=0.5, y=0.3); pyautogui.click(x=0.5, y=0.3)",
                "import os",
            ],
        ),
        (PyAutoGUI("pixels"), ["pyautogui.click(x=0.5, y=0.3)", "pyautogui.click(x=100000, y=3)"]),
    ],
)
def test_malformed_answers_are_none(answer: AnswerFormat, texts: list[str]):
    assert [text for text in texts if answer.parse(text) is not None] == []


@pytest.mark.parametrize("size", [(80, 44), (1920, 1080), (3000, 4000)])
def test_pixels_are_those_of_the_image_that_the_model_sees(size: Size):
    rows, columns = smart_resize(size[1], size[0], 28, 256 * 28 * 28, 1280 * 28 * 28)
    box = tuple(round(share * length) for share, length in zip((0.3, 0.5, 0.4, 0.8), size * 2, strict=True))
    picture = np.zeros((size[1], size[0]), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = 255
    seen = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC)) > 127
    y, x = (indices.mean() + 0.5 for indices in seen.nonzero())
    parsed = AbsolutePixels().parse(AbsolutePixels().write(box, size, (columns, rows)))
    assert parsed == pytest.approx((x, y), abs=1)


def test_the_pil_processor_of_qwen_resizes_so():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 100_000})
    made = processor(images=[Image.new("RGB", (640, 300))], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert [made[1] * 14, made[2] * 14] == list(smart_resize(300, 640, 28, 3136, 100_000))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Where?", "no place for the {instruction}"),
        ('{"point_2d": [x, y]} {instruction}', "write other braces twice"),
        ("{instruction.x}", "is no template"),
        ("{instruction} {", "is no template"),
        ("{} {instruction}", "is no template"),
    ],
)
def test_a_prompt_that_is_no_template_is_refused(prompt: str, message: str):
    with pytest.raises(ValueError, match=r"JSONAnswer\.prompt") as error:
        JSONAnswer(prompt=prompt)
    assert message in str(error.value)


def test_a_prompt_of_ones_own_and_a_style_that_is_none():
    assert Normalized1000(prompt="{instruction}?").prompt == "{instruction}?"
    with pytest.raises(ValueError, match="qwen2, qwen"):
        BoxTags("internvl")  # type: ignore[arg-type]
