"""Rows are known by what they hold."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from opd_lightning.fingerprint import first_difference, of_rows


def image(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 6), (shade, 0, 0))


def one(value) -> int:
    return int(of_rows([{"column": value}])[0])


VALUES = [
    None, True, 1, 1.5, "1", "", [], {}, [1, 2], [2, 1], {"a": 1}, b"1", "\ud83d", image(), image(3), float("nan"),
    torch.zeros(2), torch.zeros(1, 2), np.zeros(2), datetime.date(2026, 1, 2), [{"role": "user", "content": "x"}],
]  # fmt: skip


def test_other_values_have_other_fingerprints():
    found = [one(value) for value in VALUES]
    assert len(set(found)) == len(VALUES)
    assert [one(value) for value in VALUES] == found


def test_the_order_of_columns_does_not_count_and_that_of_rows_does():
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    assert torch.equal(of_rows(rows), of_rows([dict(reversed(row.items())) for row in rows]))
    assert torch.equal(of_rows(rows), of_rows(Dataset.from_list(rows)))
    assert torch.equal(of_rows(rows[::-1]), of_rows(rows).flip(0))
    assert of_rows(rows).dtype == torch.int32


@pytest.mark.parametrize("stored", ["bytes", "path", "text"])
def test_images_count_by_what_they_hold_wherever_they_are(stored, tmp_path):
    def rows(folder: str, shade: int) -> Dataset:
        (tmp_path / folder).mkdir(exist_ok=True)
        image(shade).save(tmp_path / folder / "a.png")
        content = (tmp_path / folder / "a.png").read_bytes()
        path = str(tmp_path / folder / "a.png")
        if stored == "text":
            return Dataset.from_list([{"image": path}])
        value = {"bytes": content, "path": None} if stored == "bytes" else {"bytes": None, "path": path}
        return Dataset.from_list([{"image": value}], features=Features({"image": ImageFeature()}))

    before = of_rows(rows("here", 1))
    assert torch.equal(before, of_rows(rows("there", 1)))
    assert not torch.equal(before, of_rows(rows("here", 2)))


def test_a_prompt_that_ends_as_a_file_is_text():
    assert one("what is in a.png") != one("what is in b.png")
    assert one("a\0.png") == one("a\0.png")


def test_selected_rows_are_those_that_were_selected():
    rows = Dataset.from_dict({"n": list(range(2500))}, features=Features({"n": Value("int64")}))
    everything = of_rows(rows)
    assert len(set(everything.tolist())) > 2490
    assert torch.equal(of_rows(rows.select([7, 2400, 3])), everything[[7, 2400, 3]])


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 4], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [], None),
    ],
)
def test_the_first_difference(mine, theirs, expected):
    assert first_difference(torch.tensor(mine), torch.tensor(theirs)) == expected
