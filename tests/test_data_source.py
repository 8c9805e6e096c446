"""Files and folders are what they are: a path is no pattern, and a folder is no list of rows by itself."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_lightning.data import PromptData
from opd_lightning.data_source import is_local, read_source
from opd_lightning.rows import BadRows

ROWS = [{"prompt": "1+1="}] * 3


def ready(**settings: Any) -> PromptData:
    data = PromptData(**settings)
    data.setup("fit")
    return data


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with path.open("wb") as file:  # by itself `to_parquet` takes paths for URLs
            datasets.Dataset.from_list(rows).to_parquet(file)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# -- paths --------------------------------------------------------------------------------------------------------

NAMES = [
    "[v2]",
    "a*b",
    "what?",
    "100%41",
    "{a,b}",
    " sp ace ",
    "~x",
    "a::b",
    "ü é",
    "#1&2",
    "hf:x",
    "-x",
    "a\\b",
    "$HOME",
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(name: str, suffix: str, tmp_path: Path) -> None:
    """Neither as a file nor as a folder; what a pattern would match beside it is not read."""
    file = write(tmp_path / name / f"rows {name}{suffix}", ROWS)
    write(tmp_path / "avb" / f"rows avb{suffix}", [{"prompt": "another"}])
    for source in (file, file.parent):
        assert list(ready(train=str(source)).train) == ROWS  # type: ignore[arg-type]


def test_a_tilde_is_home_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "~no_such_user.jsonl", ROWS)
    for source in ("~/rows.jsonl", "~no_such_user.jsonl"):
        assert is_local(source)
        assert len(ready(train=source).train) == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.train: there is no file or folder '~no_such_user/rows\.jsonl'"):
        ready(train="~no_such_user/rows.jsonl")


def test_an_edited_parquet_file_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", ROWS)
    before = file.stat()
    assert len(ready(train=str(file)).train) == 3  # type: ignore[arg-type]
    write(file, [{"prompt": "2+2="}] * 3)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert ready(train=str(file)).train["prompt"][:] == ["2+2="] * 3  # type: ignore[index]


def test_text_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    """Arrow does not look at bytes until they are read."""
    offsets = pa.py_buffer(struct.pack("4i", 0, 1, 2, 3))
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"id": [1, 2, 3], "prompt": prompts}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet, row 2: can't read the column 'prompt': .*codec can't decode"):
        ready(train=str(tmp_path / "rows.parquet"))
    with pytest.warns(UserWarning, match=r"1 × can't read the column 'prompt'"):
        found = ready(train=str(tmp_path / "rows.parquet"), on_bad_row="skip").train
    assert found["id"][:] == [1, 3]  # type: ignore[index]


def test_a_column_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["1+1="], "counts": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"can't read .*rows\.parquet, column 'counts': Arrow type map"):
        ready(train=str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_that_may_not_be_read_is_named(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / f"rows{suffix}", ROWS)

    def denied(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=rf"data\.train: can't read .*rows{suffix}: .*Permission denied"):
        ready(train=str(file))


# -- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk", "disk [v2]", "100% disk"])
def test_a_folder_of_save_to_disk_is_read(name: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / name))
    assert list(ready(train=str(tmp_path / name)).train) == ROWS  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train_options: split means nothing to .*, which holds a single data set"):
        ready(train=str(tmp_path / name), train_options={"split": "train"})
    with pytest.raises(ValueError, match=r"train_options: field mean nothing to a folder of save_to_disk"):
        ready(train=str(tmp_path / name), train_options={"field": "rows"})


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["answer"]])
def test_saved_rows_are_values_whatever_they_were_formatted_as(
    form: str, columns: list[str] | None, tmp_path: Path
) -> None:
    rows = [{"prompt": "1+1=", "answer": 2, "steps": [1, 1]}, {"prompt": "1/3", "answer": 0, "steps": []}]
    made = datasets.Dataset.from_list(rows)
    made.set_format(form, columns=columns)
    made.save_to_disk(str(tmp_path / "disk"))
    assert list(ready(train=str(tmp_path / "disk")).train) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize("feature", [datasets.Audio(), datasets.Video(), datasets.Image()])
def test_media_that_nobody_reads_need_no_decoder(feature: Any, tmp_path: Path) -> None:
    kinds = datasets.Features({"prompt": datasets.Value("string"), "media": feature})
    broken = {"bytes": b"RIFF", "path": None}
    table = pa.table({"prompt": ["1+1="], "media": pa.array([broken], feature.pa_type)})
    info = datasets.DatasetInfo(features=kinds)
    datasets.Dataset(datasets.table.InMemoryTable(table), info=info).save_to_disk(str(tmp_path / "disk"))
    assert list(ready(train=str(tmp_path / "disk")).train) == [  # type: ignore[arg-type]
        {"prompt": "1+1=", "media": broken}
    ]


def test_of_several_splits_one_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path / "splits")
    splits = {"train": ROWS, "test": [{"prompt": "2+2="}] * 2}
    datasets.DatasetDict({n: datasets.Dataset.from_list(rows) for n, rows in splits.items()}).save_to_disk(folder)
    data = ready(
        train=folder, validation=folder, train_options={"split": "train"}, validation_options={"split": "test"}
    )
    assert (list(data.train), list(data.validation)) == tuple(splits.values())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has the splits train, test; name one: data\.train_options\.split"):
        ready(train=folder)
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, test: data\.train_options\.split"):
        ready(train=folder, train_options={"split": "dev"})
    assert len(ready(train=f"{folder}/train").train) == 3  # type: ignore[arg-type]


def test_a_bad_row_of_a_saved_folder_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([*ROWS, {"prompt": ""}]).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(ValueError, match=r"disk, row 4: prompt is empty"):
        ready(train=str(tmp_path / "disk"))


def test_a_folder_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "disk"))
    next((tmp_path / "disk").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"data\.train: can't read .*disk, a folder of save_to_disk: "):
        ready(train=str(tmp_path / "disk"))


def test_what_lies_beside_the_rows_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "._rows.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}', encoding="utf-8")
    assert len(ready(train=str(tmp_path)).train) == 3  # type: ignore[arg-type]


def test_rows_that_are_left_out_of_a_folder_are_said(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "more" / "rows.jsonl", ROWS)
    (tmp_path / "old.jsonl").mkdir()
    for name in ("README.md", "more.csv", "more.JSONL", "more.jsonl.gz"):
        (tmp_path / name).write_text("1", encoding="utf-8")
    with pytest.warns(
        UserWarning, match=r"rows\.jsonl are read; more, more\.JSONL, more\.csv, more\.jsonl\.gz are not"
    ):
        assert len(ready(train=str(tmp_path)).train) == 3  # type: ignore[arg-type]
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"data\.train: .* holds a link to a file that is not there: lost\.jsonl"):
        ready(train=str(tmp_path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("bad", ['{"prompt": "1", "prompt": "2"}', '{"prompt": "1", "more": {"a": 1, "a": 2}}'])
def test_a_key_that_occurs_twice_is_the_fault_of_its_row(name: str, bad: str, tmp_path: Path) -> None:
    rows = [json.dumps(ROWS[0]), bad, json.dumps(ROWS[0])]
    text = "\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]"
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}, row 2: .*the key '(prompt|a)' occurs twice"):
        ready(train=str(tmp_path / name))
    with pytest.warns(UserWarning, match=rf"1 rows are skipped: .*{name}, row 2"):
        assert len(ready(train=str(tmp_path / name), on_bad_row="skip").train) == 2  # type: ignore[arg-type]


def test_lines_in_another_encoding_are_not_half_read(tmp_path: Path) -> None:
    """UTF-16 has the byte of a line break within its own; what stands before the first would still be read."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-16")
    with pytest.raises(ValueError, match=r"no rows that can be used: .*row 1: invalid JSON: UTF-16; save the file"):
        ready(train=str(tmp_path / "rows.jsonl"), on_bad_row="skip")


def test_files_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write(tmp_path / name, ROWS)
    assert len(ready(train=str(tmp_path)).train) == 6  # type: ignore[arg-type]
    write(tmp_path / "test-00000-of-00001.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"holds files of several splits, test-00000.*Name one file"):
        ready(train=str(tmp_path))


def test_the_folder_that_holds_the_rows_is_named(tmp_path: Path) -> None:
    """Such as a clone of a repository of the hub."""
    write(tmp_path / "data" / "rows.parquet", ROWS)
    with pytest.raises(ValueError, match=r"holds no \.jsonl, \.json, \.parquet file; '.*data' does"):
        ready(train=str(tmp_path))


# -- functions ----------------------------------------------------------------------------------------------------


def fails() -> list[dict[str, Any]]:
    raise KeyError("question")


def some(on_bad_row: str = "refuse") -> list[dict[str, Any]]:
    return [{"prompt": on_bad_row}]


def mixed() -> list[Any]:
    return [*ROWS, "no row", None]


def test_what_a_function_raises_names_it() -> None:
    with pytest.raises(ValueError, match=r"data\.train: .*test_data_source\.fails: KeyError: 'question'"):
        ready(train=f"python:{__name__}.fails")


def test_a_function_is_told_what_becomes_of_bad_rows() -> None:
    settings = {"train": f"python:{__name__}.some", "on_bad_row": "skip"}
    assert ready(**settings).train["prompt"][:] == ["skip"]  # type: ignore[index]
    assert ready(**settings, train_options={"on_bad_row": "own"}).train["prompt"][:] == ["own"]  # type: ignore[index]


def transformed() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS).with_transform(lambda rows: {"prompt": ["2+2="] * len(rows["prompt"])})


def test_rows_that_are_made_when_they_are_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"transformed: what with_transform or set_transform makes .* use map"):
        ready(train=f"python:{__name__}.transformed")


def test_what_a_function_returns_beside_rows_is_a_bad_row() -> None:
    with pytest.raises(ValueError, match=r"mixed, row 4: not an object but text"):
        ready(train=f"python:{__name__}.mixed")
    assert len(ready(train=f"python:{__name__}.mixed", on_bad_row="skip").train) == 3  # type: ignore[arg-type]


def test_a_file_that_ships_is_named_as_configurations_are():
    bad = BadRows("data.train", "refuse")
    rows = read_source("opd:assets/facts/train.jsonl", {}, "data.train", 0, bad)
    assert {"prompt", "answer", "aliases", "kind"} < set(rows.column_names)
    with pytest.raises(ValueError, match=r"data\.train: opd:assets/facts/trian\.jsonl: nothing of that name"):
        read_source("opd:assets/facts/trian.jsonl", {}, "data.train", 0, bad)
