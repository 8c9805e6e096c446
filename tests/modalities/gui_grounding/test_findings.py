"""The unit of boxes, as far as it shows in several rows."""

from __future__ import annotations

from PIL import Image

from opd_lightning.modalities.gui_grounding.findings import boxes


def rows(size: tuple[int, int], *places: list[float]) -> list[dict]:
    return [{"prompt": "a", "image": Image.new("RGB", size), "box": box} for box in places]


def test_the_first_box_is_drawn(tmp_path):
    finding = boxes(rows((320, 200), [10, 20, 50, 60], [0, 0, 300, 100]), tmp_path / "check")
    assert finding.verdict == "good"
    picture = Image.open(tmp_path / "check" / "box.png")
    assert (picture.getpixel((10, 20)), picture.getpixel((30, 40))) == ((255, 0, 0), (0, 0, 0))


def test_thousandths_of_a_large_screen_are_doubted(tmp_path):
    finding = boxes(rows((2560, 1440), [10, 20, 900, 600], [700, 800, 990, 980]), tmp_path)
    assert finding.verdict == "doubtful"
    assert "no box reaches beyond 990: are they thousandths?" in finding.advice
    assert boxes(rows((2560, 1440), [10, 20, 1900, 600]), tmp_path).verdict == "good"
