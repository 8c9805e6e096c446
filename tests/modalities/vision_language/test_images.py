from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opd_lightning.data_source import LOCATION, tabulate
from opd_lightning.images import open_image
from opd_lightning.modalities.vision_language.images import images_of, with_images
from tests.test_images import encoded, same

RED = Image.new("RGB", (4, 3), "red")


PART = {"type": "text", "text": "what?"}


def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Look."}, {"role": "user", "content": list(parts)}]


def test_images_come_from_the_columns_before_the_parts(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(encoded())
    blue = Image.new("RGB", (1, 1), "blue")
    prompt = chat({"type": "image", "image": blue}, {"type": "image", "path": str(file)}, {"type": "image"}, PART)
    for example, sizes in (
        ({"prompt": "?"}, []),
        ({"prompt": "?", "image": None, "images": []}, []),
        ({"prompt": "?", "image": RED}, [(4, 3)]),
        ({"prompt": prompt, "images": [RED, blue, RED]}, [(4, 3), (1, 1), (4, 3)]),
        ({"prompt": prompt}, [(1, 1), (4, 3)]),
    ):
        assert [image.size for image in images_of(example)] == sizes


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "?", "images": [RED, 7]}, r"the wrong kind: int; .* \(image 2 of 2\)"),
        ({"prompt": "?", "images": "a.png"}, r"images is no list: str; a single image belongs into image"),
        ({"prompt": "?", "image": [RED]}, r"image is a list: of 1; several images belong into images"),
        ({"prompt": chat({"type": "image_url", "image_url": {"url": "a.png"}})}, r"write \{type: image, image: …\}"),
        ({"prompt": chat({"type": "image", "url": "https://x.org/a.png"})}, r"the image is a URL"),
    ],
)
def test_what_can_not_be_read_is_named(example: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images_of(example)


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "?", "image": RED},
        {"prompt": "?", "images": [RED, RED]},
        {"prompt": chat({"type": "image", "image": RED}, PART)},
        {"prompt": chat({"type": "image"}, PART, {"type": "image"}), "images": [RED, RED]},
        {"prompt": chat({"type": "image"}, PART), "image": RED, "images": None},
    ],
)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_replaced_images_are_found_again_and_the_chat_has_a_part_for_each(example: Any, count: int) -> None:
    before = copy.deepcopy(example)
    new = [Image.new("RGB", (i, 1)) for i in range(1, count + 1)]
    shown = with_images(example, new)
    assert images_of(shown) == new
    assert example == before
    assert ("image" in shown) == (count == 1 and "image" in example)
    if isinstance(example["prompt"], list):
        parts = shown["prompt"][1]["content"]
        assert [part for part in parts if part["type"] != "image"] == [PART]
        assert [part for part in parts if part["type"] == "image"] == [{"type": "image"}] * count
    else:
        assert shown["prompt"] == "?"


def test_images_survive_the_data_set(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(encoded())
    columns: dict[str, list[Any]] = {
        "image": [RED, RED, None],
        "images": [[RED, RED], [RED], None],
        "path": [str(file), None, str(file)],
        "raw": [encoded(), encoded(), None],
        "stored": [{"bytes": encoded(), "path": None}, {"bytes": None, "path": str(file)}, None],
        "box": [[0, 0, 2, 2], [0.5, 0, 2, 2], None],
    }
    rows = [{name: values[i] for name, values in columns.items()} for i in range(3)]
    dataset = tabulate([(f"row {i}", row) for i, row in enumerate(rows)], "data.train").remove_columns(LOCATION)
    for given, kept in zip(rows, dataset, strict=True):
        assert given["box"] == kept["box"]
        for name in ("image", "path", "raw", "stored"):
            assert (given[name] is None) == (kept[name] is None)
            assert given[name] is None or same(open_image(kept[name]), RED)
        found = images_of({"prompt": "?", "images": kept["images"]})
        assert len(found) == len(given["images"] or [])
        assert all(same(image, RED) for image in found)
