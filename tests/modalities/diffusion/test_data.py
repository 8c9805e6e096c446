"""Digits and folders of images, and what is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from opd_lightning.data import PromptData
from opd_lightning.modalities.diffusion.data import image_folder
from opd_lightning.modalities.diffusion.quickstart import NAMES, caption, digits
from opd_lightning.rows import row_of


def test_digits_are_sklearns_in_two_parts_that_share_nothing():
    train, held_out = digits(), digits(held_out=True)
    assert (len(train), len(held_out)) == (1437, 360)
    assert set(train["label"]) == set(range(10))
    assert train[3]["prompt"] == f"a handwritten {NAMES[train[3]['label']]}" == caption(train[3]["label"])
    first = {row["image"].tobytes() for row in train}
    assert not first & {row["image"].tobytes() for row in held_out}
    assert all(reference is None for reference in train["reference"])


def test_inversion_and_references_are_drawn_by_the_seed():
    rows = digits(inverted=0.5, referenced=0.4, limit=400)
    plain = digits(limit=400)
    told = [row["reference"] is not None for row in rows]
    assert 0.3 < np.mean(told) < 0.5
    for row, base, has in zip(rows, plain, told, strict=True):
        flipped = not np.array_equal(np.asarray(row["image"]), np.asarray(base["image"]))
        if flipped:
            assert has, "what captions do not say is shown by a reference"
            assert np.array_equal(np.asarray(row["image"]), 255 - np.asarray(base["image"]))
        if has:
            assert (np.asarray(row["reference"]).mean() > 127) == flipped, "the same colors"
            assert row["reference"] != row["image"], "another digit"
    assert digits(inverted=1.0, limit=5)[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    assert digits(inverted=0.5, limit=50, seed=1)["prompt"] == digits(inverted=0.5, limit=50, seed=1)["prompt"]
    assert len(digits(limit=3, repeat=2)) == 6


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_with_captions(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    write(tmp_path, [{"file_name": "a.png", "text": "a red square", "label": 3}])
    (row,) = image_folder(str(tmp_path))
    assert (row["prompt"], row["label"]) == ("a red square", 3)
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)


BAD_LINES = {
    '{"file_name": ': "invalid JSON",
    "[1]": "not an object but a list",
    "null": "not an object but null",
    '{"file_name": 5, "prompt": "a"}': "file_name is a number; it must be text",
    '{"file_name": "a.png", "prompt": ["a"]}': "prompt is a list; it must be text",
    '{"file_name": "a.png", "prompt": "a\\ud83d"}': "half a character",
    '{"file_name": "a.png", "prompt": "a", "label": "x"}': "'label' is a number in .*row 1, and text in .*row 2",
    '{"file_name": "../", "prompt": "a"}': "there is no image",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_of_a_folder_is_named_or_skipped_as_in_any_table(line, tmp_path):
    """Also where the configuration says so for all sources."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = '{"file_name": "a.png", "prompt": "a", "label": 1}'
    (tmp_path / "metadata.jsonl").write_text("\n".join([good, line, "", good]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, row 2: .*{BAD_LINES[line]}"):
        image_folder(str(tmp_path))
    source, options = f"python:{image_folder.__module__}.image_folder", {"folder": str(tmp_path)}
    data = PromptData(train=source, train_options=options, on_bad_row="skip")
    data.setup("fit")
    assert len(data.train) == 2
    assert row_of(data.train, 1).location.endswith("metadata.jsonl, row 4")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 2: "):
        PromptData(train=source, train_options=options).setup("fit")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png"}], r"metadata\.jsonl, row 1: it needs file_name and prompt"),
        ([{"file_name": "b.png", "prompt": "x"}], r"row 1: there is no image .*b\.png"),
        (None, "there is no metadata.jsonl, whose rows say file_name and prompt"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_with_its_row(rows, message, tmp_path):
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        image_folder(str(tmp_path))
