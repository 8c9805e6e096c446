from __future__ import annotations

import doctest
import json
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from opd_lightning.modalities.vision_language import quickstart as module
from opd_lightning.modalities.vision_language.boxes import problem_with_box
from opd_lightning.modalities.vision_language.quickstart import COLORS, is_held_out, scenes
from opd_lightning.modalities.vision_language.view import Compose, Crop, Resize


def content(rows: list[dict[str, Any]]) -> list[Any]:
    return [{**row, "image": row["image"].tobytes()} for row in rows]


def test_the_same_arguments_make_the_same_scenes() -> None:
    once = content(scenes(12, seed=3))
    assert once == content(scenes(12, seed=3))
    assert once[:5] == content(scenes(5, seed=3))
    assert len({row["image"] for row in once + content(scenes(12, seed=4)) + content(scenes(12, 3, True))}) == 36
    assert doctest.testmod(module).failed == 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    held_out=st.booleans(),
    size=st.integers(80, 160),
    digits=st.sampled_from([(1, 1), (2, 4), (4, 4)]),
)
def test_the_answer_follows_from_the_scene_graph(seed: int, held_out: bool, size: int, digits: tuple[int, int]) -> None:
    for row in scenes(6, seed, held_out, ["which", "where", "count", "sum"], size, digits=digits):
        drawn = json.loads(row["scene"])["digits"]
        assert row["image"].size == (size, size)
        assert row["completion"] == row["answer"]
        assert problem_with_box(row["box"], (size, size)) is None
        assert len({one["color"] for one in drawn}) == len(drawn)
        assert all(is_held_out(one["sample"]) == held_out for one in drawn)
        if row["category"] == "which":
            (asked,) = [one for one in drawn if f"the {one['color']} frame" in row["prompt"]]
            assert (str(asked["digit"]), asked["box"]) == (row["answer"], row["box"])
        elif row["category"] == "where":
            (asked,) = [one for one in drawn if row["prompt"] == f"Where is the {one['digit']}?"]
            x1, y1, x2, y2 = asked["box"]
            assert (y1 + y2 < size) == row["answer"].startswith("top")
            assert (x1 + x2 < size) == row["answer"].endswith("left")
            assert row["box"] == [0, 0, size, size]
        else:
            values = [one["digit"] for one in drawn]
            assert row["answer"] == str(len(values) if row["category"] == "count" else sum(values))
            assert len(values) == 2 or row["category"] == "count"
            for one in drawn:
                assert all(row["box"][i] <= one["box"][i] for i in (0, 1))
                assert all(row["box"][i] >= one["box"][i] for i in (2, 3))


def test_frames_do_not_overlap_and_have_their_color() -> None:
    for row in scenes(30, digits=(4, 4)):
        pixels = np.asarray(row["image"])
        covered = np.zeros(pixels.shape[:2], int)
        for one in json.loads(row["scene"])["digits"]:
            x1, y1, x2, y2 = one["box"]
            covered[y1:y2, x1:x2] += 1
            for y, x in ((y1, x1), (y2 - 1, x2 - 1), (y1 + 1, x2 - 2), (y2 - 2, x1 + 1)):
                assert tuple(pixels[y, x]) == COLORS[one["color"]]
        assert covered.max() == 1


def test_digits_are_the_handwritten_samples() -> None:
    data = load_digits()
    for row in scenes(20, kinds=["which"], digit=(16, 16), noise=0):
        inside = Compose([Crop(margin=0), Resize(22)])(row)["image"].crop((3, 3, 19, 19)).resize((8, 8), 5)  # type: ignore[index]
        for one in json.loads(row["scene"])["digits"]:
            assert data.target[one["sample"]] == one["digit"]
        (asked,) = [one for one in json.loads(row["scene"])["digits"] if one["box"] == row["box"]]
        shown, drawn = 255.0 - np.asarray(inside.convert("L")), data.images[asked["sample"]]
        assert np.corrcoef(shown.ravel(), drawn.ravel())[0, 1] > 0.95


def test_a_fifth_of_the_samples_is_held_out_of_every_digit() -> None:
    target = load_digits().target
    shares = [np.mean([is_held_out(i) for i in np.flatnonzero(target == value)]) for value in range(10)]
    assert 0.12 < min(shares) < max(shares) < 0.28


def test_frames_lie_in_cells_of_their_own() -> None:
    for row in scenes(50, size=96, digit=(20, 24), digits=(2, 4), cells=3, kinds=["which", "where"]):
        cells = []
        for one in json.loads(row["scene"])["digits"]:
            x1, y1, x2, y2 = one["box"]
            cells.append((x1 // 32, y1 // 32))
            assert ((x2 - 1) // 32, (y2 - 1) // 32) == cells[-1]
        assert len(set(cells)) == len(cells)


def test_kinds_are_drawn_as_often_as_they_are_named() -> None:
    found = Counter(row["category"] for row in scenes(600))
    assert found["which"] == pytest.approx(300, abs=40)
    assert all(found[kind] == pytest.approx(100, abs=30) for kind in ("where", "count", "sum"))
    assert {row["category"] for row in scenes(5, kinds=["sum"])} == {"sum"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["color"]}, r"kinds is \['color'\]; name some of which, where, count, sum"),
        ({"kinds": []}, r"kinds is \[\]"),
        ({"digits": (2, 5)}, r"digits is \(2, 5\); it must be a range within 1 and 4"),
        ({"digits": (3, 2)}, r"digits is \(3, 2\)"),
        ({"digit": (12, 40)}, r"digit is \(12, 40\); .* three frames of 46 pixels must fit into the scene's 112"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes(1, **arguments)


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    module._load.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "opd-lightning\[vision\]"'):
        module._load()
