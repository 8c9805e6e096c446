from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opd_lightning.modalities.vision_language.images import images_of
from opd_lightning.modalities.vision_language.readers import easy_vqa

QUESTIONS = [
    ["what shape is present?", "circle", 0],
    ["is there a red shape?", "no", 1],
    ["what color is it?", "teal", 1],
]


@pytest.fixture(params=["folder", "zip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for number, color in enumerate(("red", "teal")):
        file = tmp_path / "train" / "images" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), color).save(file)
    (tmp_path / "train" / "questions.json").write_text(json.dumps(QUESTIONS), encoding="utf-8")
    if request.param == "folder":
        return tmp_path
    packed = tmp_path / "packed"
    packed.mkdir()
    with zipfile.ZipFile(packed / "easy_vqa.zip", "w") as files:
        for file in (tmp_path / "train").rglob("*.*"):
            files.write(file, file.relative_to(tmp_path))
    return packed


def test_rows_hold_questions_and_images(folder: Path) -> None:
    rows = easy_vqa(str(folder))
    assert [(row["prompt"], row["answer"]) for row in rows] == [(q, a) for q, a, _ in QUESTIONS]
    assert [row["category"] for row in rows] == ["shape", "yes/no", "color"]
    assert [images_of(row)[0].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (0, 128, 128), (0, 128, 128)]
    some = [row["prompt"] for row in easy_vqa(str(folder), count=2, seed=1)]
    assert some == [row["prompt"] for row in easy_vqa(str(folder), count=2, seed=1)]
    assert len(set(some)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split is 'validation'; it must be 'train' or 'test'"),
        ({"count": 4}, "4 rows asked for, train has 3"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        easy_vqa(str(folder), **arguments)


def test_a_folder_without_the_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither easy_vqa\.zip nor train/questions\.json"):
        easy_vqa(str(tmp_path))


def test_on_the_real_files() -> None:
    data = os.environ.get("OPD_DATA")
    if not data:
        pytest.skip("OPD_DATA is not set")
    rows = easy_vqa(str(Path(data, "easy_vqa")), "test")
    assert len(rows) == 9673
    assert Counter(row["category"] for row in rows) == {"yes/no": 7136, "shape": 1257, "color": 1280}
    assert images_of(rows[0])[0].size == (64, 64)
