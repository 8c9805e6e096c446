"""Values come back as they were written, whatever else their column holds."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.data import PromptData
from opd_lightning.reward import ExactMatch
from opd_lightning.rows import LOCATION, BadRows
from opd_lightning.table import tabulate


def stored(*values: Any, policy: str = "refuse") -> list[Any]:
    """The values as a column gives them back."""
    rows = [(f"row {n}", {"prompt": "a", "x": value}) for n, value in enumerate(values, 1)]
    return list(tabulate(rows, "data.train", BadRows("data.train", policy)).remove_columns(LOCATION)["x"])


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    data = PromptData(train=str(path), **settings)
    data.setup("fit")
    assert data.train is not None
    return list(data.train)


def same(one: Any, other: Any) -> bool:
    """Equal, with equal types all the way down: 1, 1.0 and true are different."""
    return type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize(
    "values",
    [
        [2, 0.5, 3],
        [True, 0, 1.0],
        [0.1234567890123456789, None, 1e-300, -0.0, 1e22],
        [2**63 - 1, -(2**63), 0.5],
        ["5", "null", "[1]", '"x"', "NaN"],
        [[1, 2.0, "5", None], []],
        [[0.1234567890123456789], [1e-12]],
        [{"a": None}, {"b": 2**70}],
        [{"b": 1, "a": 2}, {}],
        [[{"role": "user", "content": "a"}], [{"role": "tool", "content": None, "tool_calls": [{"x": 1.0}]}]],
        ["2024-01-01", "1e5", "True"],
        [None, None],
        [datetime.date(2024, 1, 1), None],
        [datetime.datetime(2024, 1, 1, 12, 30, 0, 5), datetime.datetime(1, 1, 1)],
        [Decimal("1.10"), Decimal("2.25")],
        [b"\x00\xff", b""],
        ["ü\u2028\u0000", "\U0001f600"],
    ],
    ids=repr,
)
def test_values_are_what_was_written(values: list[Any]) -> None:
    found = stored(*values)
    assert all(map(same, found, values)), found


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text("abc"), _json), min_size=1, max_size=4))
def test_any_objects_come_back(objects: list[dict[str, Any]]) -> None:
    assert repr(stored(*objects)) == repr(objects)


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.none(), min_size=1))
def test_any_numbers_come_back(numbers: list[Any]) -> None:
    assert all(map(same, stored(*numbers), numbers))


def test_answers_are_scored_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": 2}, {"prompt": "1/2=", "answer": 0.5}, {"prompt": "1+2=", "answer": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("rows.jsonl", "rows.json"):
        found = read(tmp_path / name)
        scores = [ExactMatch()(written, row) for written, row in zip(["2", "0.5", "3"], found, strict=True)]
        assert scores == [1.0, 1.0, 1.0]


def test_parquet_keeps_dates_and_loses_the_nulls_that_it_added(tmp_path: Path) -> None:
    """Arrow gives the arguments of every call the names of all others."""
    calls = [{"name": "add", "arguments": {"x": 1}}, {"name": "say", "arguments": {"text": "a", "loud": None}}]
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "calls", "tool_calls": [c]}] for c in calls
    ]
    chats = [[*chat, {"role": "tool", "content": "2"}] for chat in chats]
    when = [datetime.date(2024, 1, day) for day in (1, 2)]
    datasets.Dataset.from_dict({"prompt": chats, "when": when}).to_parquet(str(tmp_path / "rows.parquet"))
    found = read(tmp_path / "rows.parquet")
    assert [row["when"] for row in found] == when
    assert [row["prompt"][1]["tool_calls"][0]["arguments"] for row in found] == [{"x": 1}, {"text": "a"}]
    assert found[0]["prompt"] == chats[0]
    large = pa.table({"prompt": pa.array(chats)})
    large = large.cast(pa.schema([("prompt", pa.large_list(large.schema.field("prompt").type.value_type))]))
    pq.write_table(large, tmp_path / "of polars.parquet")
    assert [row["prompt"] for row in read(tmp_path / "of polars.parquet")] == [row["prompt"] for row in found]


def test_numbers_beside_times_are_refused_where_arrow_would_change_them() -> None:
    day = datetime.date(2024, 1, 1)
    rows = [("row 1", {"x": [{"a": 1, "day": day}]}), ("row 2", {"x": [{"a": 2}]})]
    assert tabulate(rows, "data.train")["x"][:] == [[{"a": 1, "day": day}], [{"a": 2, "day": None}]]
    with pytest.raises(ValueError, match="can't store the column 'x': numbers beside what JSON lacks"):
        tabulate([*rows, ("row 3", {"x": [{"a": 0.5}]})], "data.train")


def test_messages_with_times_are_read(tmp_path: Path) -> None:
    """As those of WildChat; what JSON lacks is text."""
    chat = [{"role": "user", "content": "a", "timestamp": datetime.datetime(2023, 4, 9), "toxic": None}]
    datasets.Dataset.from_dict({"prompt": [chat]}).to_parquet(str(tmp_path / "rows.parquet"))
    (found,) = read(tmp_path / "rows.parquet")
    assert found["prompt"] == [{"role": "user", "content": "a", "timestamp": "2023-04-09 00:00:00"}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2**63, "can't store the column 'x': too large a number for 64 bits; write it as text"),
        ("a\ud800", "can't store the column 'x': half a character"),
        ([{"a\udfff": 1}], "can't store the column 'x': half a character"),
        ({1: 2}, "can't store the column 'x': a key that is no text: 1"),
        ("text", "'x' is a number in row 1, and text in row 4; make it the same everywhere"),
        ([1], "'x' is a number in row 1, and a list in row 4"),
        ({}, "'x' is a number in row 1, and an object in row 4"),
        (datetime.date(2024, 1, 1), "'x' is a number in row 1, and a date in row 4"),
    ],
    ids=repr,
)
def test_what_can_not_be_stored_beside_the_others_is_a_bad_row(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="row 4") as raised:
        stored(1, 2, 3, value, 5)
    assert reason in str(raised.value)
    assert stored(1, 2, 3, value, 5, policy="skip") == [1, 2, 3, 5]


def test_what_arrow_can_not_hold_is_a_bad_row() -> None:
    """Some is found only when the column is made."""
    with pytest.raises(ValueError, match=r"row 1: can't store the column 'x': a set, which has no order"):
        stored({1}, {2})
    with pytest.raises(ValueError, match=r"row 2: can't store the column 'x': a complex: "):
        stored(None, 1j)
    mixed = [datetime.datetime(2024, 1, 1), datetime.datetime(9999, 1, 1), None]
    assert stored(*mixed) == mixed


def test_the_kind_of_most_rows_is_the_columns(tmp_path: Path) -> None:
    """Of one cell of another type the row is left out, not the file."""
    rows = [{"prompt": "a", "id": i} for i in range(9)]
    rows.insert(0, {"prompt": [{"role": "user", "content": "a"}], "id": 9})
    rows.insert(4, {"prompt": "a", "id": "10"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1: .*'prompt' is text in .*row 2, and a list in .*row 1; make"):
        read(tmp_path / "rows.jsonl")
    with pytest.warns(UserWarning, match=r"2 rows are skipped: 2 × the column is of two kinds"):
        assert [row["id"] for row in read(tmp_path / "rows.jsonl", on_bad_row="skip")] == list(range(9))
