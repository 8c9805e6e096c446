import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning import data_source
from opd_lightning.data import STAND_IN, PromptData, Share, hold_out
from opd_lightning.data_source import is_local, same_rows
from opd_lightning.reward import ReasoningGymScore

CHAT = [{"role": "user", "content": "1+1="}]


def rows(count: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1), "id": i} for i in range(count)]


def mixed() -> list[dict[str, Any]]:
    return [{"prompt": "1"}, {"prompt": CHAT}]


def no_rows() -> str:
    return "nothing"


def as_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(3))


def write(path: Path, content: list[Any] | str | bytes) -> str:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def ready(stage: str = "fit", **settings: Any) -> PromptData:
    data = PromptData(**settings)
    data.setup(stage)
    return data


def attach(data: PromptData, needed: dict[str, str] | None = None, limit: int | None = None) -> PromptData:
    def refusal(example: dict[str, Any]) -> str | None:
        length = len(example["prompt"])
        return f"prompt has {length} tokens, the limit is {limit}" if limit and length > limit else None

    module = SimpleNamespace(
        required_columns=lambda: needed or {},
        prepare_for_rows=lambda: None,
        refusal=refusal,
        reads=frozenset({"tools"}),
    )
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    return data


# -- sources ------------------------------------------------------------------------------------------------------


def test_jsonl_json_parquet_and_folder_hold_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows(4))
    write(tmp_path / "b.json", json.dumps(rows(4)))
    write(tmp_path / "c.json", json.dumps({"version": 1, "examples": rows(4)}))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "1.jsonl", rows(4)[:2])
    write(folder / "2.jsonl", rows(4)[2:])
    write(folder / "LICENSE", "text")
    parquet = tmp_path / "d.parquet"
    datasets.Dataset.from_list(rows(4)).to_parquet(str(parquet))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json"), str(folder), str(parquet)]
    for source in [*sources, f"python:{__name__}.rows"]:
        options = {"count": 4} if source.startswith("python") else None
        assert list(ready(train=source, train_options=options).train) == rows(4)  # type: ignore[arg-type]
    found = ready(train=str(tmp_path / "c.json"), train_options={"field": "examples"})
    assert list(found.train) == rows(4)  # type: ignore[arg-type]


def test_a_function_may_return_a_dataset() -> None:
    assert list(ready(train=f"python:{__name__}.as_dataset").train) == rows(3)  # type: ignore[arg-type]


def test_messages_and_nested_columns_come_back_as_written(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "how many?"}]
    written = [
        {"prompt": [{"role": "system", "content": "s"}, *CHAT], "box": {"x": [1, 2.5]}, "tags": []},
        {"prompt": [{"role": "user", "content": parts}], "box": {"y": "far"}, "tags": ["a", 1]},
    ]
    assert list(ready(train=write(tmp_path / "a.jsonl", written)).train) == written  # type: ignore[arg-type]


def test_a_column_that_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    data = ready(train=write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "hint": "c"}]))
    assert list(data.train) == [{"prompt": "a", "hint": None}, {"prompt": "b", "hint": "c"}]  # type: ignore[arg-type]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"prompt": "a"}\r\n\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 4: prompt is empty"):
        ready(train=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', r"a\.jsonl, row 2: invalid JSON: Expecting value at column 12"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, row 2: invalid JSON: Expecting value at column 11"),
        ("a.jsonl", '{"prompt": "a"\r\n', r"a\.jsonl, row 1: invalid JSON: Expecting ',' delimiter at column 15"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl, row 1: invalid JSON: not UTF-8 at byte 13"),
        ("a.jsonl", '["a"]\n', r"a\.jsonl, row 1: not an object but a list: write one JSON object a row"),
        ("a.json", '[{"prompt": "a"}, null]', r"a\.json, row 2: not an object but null"),
        ("a.json", "[", r"data.train: .*a\.json is not valid JSON: Expecting value: line 1"),
        ("a.json", '{"x": [], "y": 1}', r"holds an object where a list of objects is needed; its keys are x, y"),
        ("a.json", "3", r"holds a number where a list .* Name the key .* in data.train_options.field"),
        ("a.json", "[]", r"data.train: '.*a\.json' has no rows"),
        ("a.jsonl", "", r"data.train: '.*a\.jsonl' has no rows"),
        ("a.csv", "prompt", r"can't read '.*a\.csv'; a file must be one of \.jsonl, \.json, \.parquet"),
        ("a.parquet", "text", r"data.train: can't read .*a\.parquet: "),
        ("a.jsonl", [{"prompt": "a"}, {"prompt": CHAT}], r"'prompt' is text in .*row 1, and a list in .*row 2; make"),
        (
            "a.jsonl",
            [{"prompt": "a", "n": 1}, {"prompt": "b", "n": "x"}],
            r"'n' is a number in .*, and text in .*row 2",
        ),
        ("a.jsonl", [{"prompt": "a", "n": 2**70}], r"can't store the column 'n': .*too large"),
        ("a.jsonl", [{"prompt": None}], r"a\.jsonl, row 1: prompt is missing or null"),
        ("a.jsonl", [{"prompt": "a"}, {"prompt": " \n"}], r"row 2: prompt is empty\. Correct the row, or leave"),
        ("a.jsonl", [{"prompt": []}], r"row 1: prompt is empty"),
        ("a.jsonl", [{"prompt": 3}], r"row 1: prompt is neither text nor a list of messages: 3"),
        ("a.jsonl", [{"prompt": ["hi"]}], r"row 1: message 1 of the prompt has no role"),
        ("a.jsonl", [{"prompt": [*CHAT, {"role": "user"}]}], r"row 1: message 2 of the prompt has no content"),
        ("a.jsonl", [{"question": "a", "x": 1}], r"no column 'prompt', which the rollout needs; it has question, x\."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        ready(train=path)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder '.*' holds no \.jsonl, \.json, \.parquet file"):
        ready(train=str(tmp_path))
    datasets.Dataset.from_list(rows(1)).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list([{"prompt": 1}]).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match="holds files of different columns"):
        ready(train=str(tmp_path))
    write(tmp_path / "c.jsonl", rows(1))
    with pytest.raises(ValueError, match="holds Parquet and JSON files; name one kind, or one file"):
        ready(train=str(tmp_path))


@pytest.mark.parametrize("source", ["no.jsonl", "./no", "/no/such", "a/b/c", "data/no.csv"])
def test_a_missing_file_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(ValueError, match=f"data.train: there is no file or folder '{source.removeprefix('./')}'"):
        ready(train=source)


def test_hub_names_are_not_taken_for_files() -> None:
    assert not any(map(is_local, ["gsm8k", "openai/gsm8k", "org/name-v1.5", "org/name.v2"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "python:rows"}, "data.train: 'rows' is not a dotted path"),
        ({"train": "python:no_such.rows"}, "'no_such.rows' can't be imported: No module named 'no_such'"),
        ({"train": f"python:{__name__}.no"}, "has no 'no'"),
        ({"train": f"python:{__name__}.CHAT"}, "is a list, not a callable"),
        (
            {"train": f"python:{__name__}.rows", "train_options": {"size": 3}},
            "rows does not take the arguments of data.train_options: got an unexpected keyword argument 'size'",
        ),
        ({"train": f"python:{__name__}.no_rows"}, "must return a list of dicts, one a row; it returned text"),
        ({"train": f"python:{__name__}.mixed"}, r"'prompt' is text in python:.*mixed, row 1, and a list in .*row 2"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**settings)


def test_options_that_a_file_ignores_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    with pytest.raises(ValueError, match=r"data.train_options: split mean nothing to these files"):
        ready(train=path, train_options={"split": "train"})
    path = write(tmp_path / "a.json", "{}")
    with pytest.raises(ValueError, match=r"split mean nothing to these files \(a \.json file takes 'field'"):
        ready(train=path, train_options={"split": "train"})
    with pytest.raises(ValueError, match=r"a\.json has no key 'rows' \(data.train_options.field\)"):
        ready(train=path, train_options={"field": "rows"})


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, **options: Any) -> Any:
        calls.append((path, options))
        if path == "private/name":
            raise FileNotFoundError("not found on the hub")
        train = datasets.Dataset.from_list(rows(3), split="train")
        return train if "split" in options else datasets.DatasetDict(train=train, test=train)

    monkeypatch.setattr(data_source, "load_dataset", load)
    options = {"name": "main", "split": "train"}
    PromptData(train="org/name", train_options=options, validation=0.5).prepare_data()
    assert calls == [("org/name", {"name": "main", "split": "train"})]
    with pytest.raises(ValueError, match=r"'org/name' has the splits train, test; name one: data.train_options.split"):
        ready(train="org/name")
    with pytest.raises(ValueError, match=r"is no file or folder here, and the hub .* not found on the hub"):
        ready(train="private/name")
    for option in ("trust_remote_code", "streaming"):
        with pytest.raises(ValueError, match=f"data.train_options: {option} is not supported"):
            ready(train="org/name", train_options={option: True})
    attached = attach(PromptData(train="org/name", train_options={"split": "train"}), limit=1)
    with pytest.raises(ValueError, match=r"org/name\[train\], row 1: prompt has 4 tokens"):
        attached.setup("fit")


def test_reasoning_gym_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'data.train: reasoning_gym:chain_sum needs .*: pip install "opd-lightning\[tasks\]"'
    ):
        ready(train="reasoning_gym:chain_sum")


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    source = "reasoning_gym:chain_sum"
    options = {"size": 20, "min_digits": 4, "max_digits": 5}
    data = ready(train=source, validation=source, train_options=options, validation_options=options)
    assert data.train is not None
    assert data.train.column_names == ["prompt", "answer", "task", "metadata"]
    assert len(data.train) == 20
    assert not set(data.train["prompt"]) & set(data.validation["prompt"])  # type: ignore[index]
    score = ReasoningGymScore()
    for example in data.train:
        assert score(example["answer"], example) == 1
        assert score(example["answer"] + "1", example) < 1
    assert not score.failures
    same = ready(train=source, train_options=options)
    assert list(same.train) == list(data.train)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "task",
    [
        "knights_knaves",
        "mini_sudoku",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("arc_agi", "rearc", "word_ladder")),
    ],
)
def test_reasoning_gym_scores_its_own_answers(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    data = ready(train=f"reasoning_gym:{task}", train_options={"size": 3})
    assert [ReasoningGymScore()(row["answer"], row) for row in data.train] == [1, 1, 1]  # type: ignore[union-attr]


def test_reasoning_gym_refusals_name_task_and_options() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"data.train: reasoning-gym refused the task 'no_such' with .*not registered"):
        ready(train="reasoning_gym:no_such")
    with pytest.raises(ValueError, match=r"refused the task 'chain_sum' with .*'sizes'"):
        ready(train="reasoning_gym:chain_sum", train_options={"sizes": 3})


# -- columns that look as if they mattered ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "unread"),
    [
        ({"chosen": "2", "rejected": "3", "id": 1}, "chosen, rejected"),
        ({"messages": CHAT, "tools": [{}]}, "messages"),
        ({"image": "a.png", "system": "be brief"}, "image"),
    ],
)
def test_columns_that_nothing_reads_are_said(tmp_path: Path, more: dict[str, Any], unread: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2", **more}] * 2)
    data = attach(PromptData(train=source), {"system": "a view"} if "system" in more else None)
    with pytest.warns(UserWarning, match=rf"data\.train has {unread}, which no part of this run names"):
        data.setup("fit")


# -- chats that hold their answer ---------------------------------------------------------------------------------

ANSWERED = [*CHAT, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("prompt", [ANSWERED, [*ANSWERED, *ANSWERED]], ids=["one turn", "two"])
def test_a_last_answer_is_dropped_or_becomes_the_completion(tmp_path: Path, prompt: list[dict[str, str]]) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": prompt}, {"messages": CHAT}, {"messages": ANSWERED}])
    read = {"train": source, "columns": {"prompt": "messages"}}
    assert ready(**read, last_answer="drop").train[:] == {"prompt": [prompt[:-1], CHAT, CHAT]}
    kept = ready(**read, last_answer="completion").train
    assert kept[:] == {"prompt": [prompt[:-1], CHAT, CHAT], "completion": [ANSWERED[1:], None, ANSWERED[1:]]}
    assert ready(**read).train[0] == {"prompt": prompt}


def test_answers_are_dropped_from_chats_that_hold_images(tmp_path: Path) -> None:
    part = {"type": "image", "image": {"bytes": b"pixels", "path": None}}
    chats = [[{"role": "user", "content": [part]}, {"role": "assistant", "content": []}]]
    path = str(tmp_path / "chats.parquet")
    datasets.Dataset.from_dict({"prompt": chats}).to_parquet(path)
    (message,) = ready(train=path, last_answer="drop").train[0]["prompt"]
    assert message["role"] == "user"
    assert message["content"][0]["image"]["bytes"] == b"pixels"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('[{"role": "user", "content": "1+1="}]', "prompt is a chat written as JSON"),
        ([{"role": "", "content": "a"}], "message 1 of the prompt has no role"),
        ([{"role": "usr", "content": "a"}], "message 1 of the prompt has the role 'usr'; did you mean 'user'?"),
        (
            [{"role": "Assistant", "content": "a"}],
            "message 1 of the prompt has the role 'Assistant'; did you mean 'assistant'?",
        ),
        ([{"role": "sytem", "content": "a"}], "message 1 of the prompt has the role 'sytem'; did you mean 'system'?"),
        (
            [{"role": "system", "content": " "}, {"role": "user", "content": ""}],
            "prompt is empty: none of its messages",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "\n"}]}], "prompt is empty: none of its messages"),
        ([{"role": "user", "content": "a", "tool_calls": "[]"}], "message 1 of the prompt: tool_calls is no list of"),
        (
            [{"role": "user", "content": "a", "tool_calls": ["add"]}],
            "message 1 of the prompt: tool_calls is no list of",
        ),
    ],
)
def test_chats_of_another_form_are_refused(tmp_path: Path, prompt: Any, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"row 1: {reason}"):
        ready(train=str(tmp_path / "rows.jsonl"))


def test_a_last_answer_does_not_replace_a_completion(tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", [{"prompt": ANSWERED, "completion": "3"}])
    with pytest.raises(ValueError, match="there is a column 'completion' already"):
        ready(train=source, last_answer="completion")
    with pytest.raises(ValueError, match=r"data\.last_answer is 'keep'"):
        PromptData(train=source, last_answer="keep")  # type: ignore[arg-type]


# -- columns ------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_copied_and_swapped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "1+1=", "a": "#2", "b": 3, "c": 4}])
    data = ready(train=path, columns={"prompt": "q", "answer": "a", "solution": "a", "b": "c", "c": "b"})
    assert list(data.train) == [{"prompt": "1+1=", "answer": "#2", "solution": "#2", "b": 4, "c": 3}]  # type: ignore[arg-type]


def test_one_column_may_keep_its_name_and_serve_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": "#2"}])
    data = ready(train=path, columns={"answer": "answer", "solution": "answer"})
    assert list(data.train) == [{"prompt": "1+1=", "answer": "#2", "solution": "#2"}]  # type: ignore[arg-type]


def test_wrong_column_mappings_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "question": "b"}])
    with pytest.raises(
        ValueError, match=r"maps 'prompt' to 'query', which data.train does not have; it has prompt, question"
    ):
        ready(train=path, columns={"prompt": "query"})
    with pytest.raises(ValueError, match=r"but data.train has a column 'prompt' already; keep it under another name"):
        ready(train=path, columns={"prompt": "question"})


def test_a_missing_column_names_who_needs_it(tmp_path: Path) -> None:
    data = attach(PromptData(train=write(tmp_path / "a.jsonl", rows())), {"solution": "model.teachers.wise"})
    with pytest.raises(
        ValueError,
        match=r"no column 'solution', which model.teachers.wise needs; it has prompt, answer, id\. data.columns",
    ):
        data.setup("fit")


@pytest.mark.parametrize("column", ["answer", "right"])
def test_a_column_that_a_note_writes_is_refused(tmp_path: Path, column: str) -> None:
    data = attach(PromptData(train=write(tmp_path / "a.jsonl", rows())))
    data.trainer.lightning_module.notes = {"hints": SimpleNamespace(writes=(column,))}  # type: ignore[union-attr, assignment]
    if column not in rows()[0]:
        data.setup("fit")
        return
    with pytest.raises(
        ValueError, match=r"notes.hints writes the column 'answer', .*columns: \{given_answer: answer\}"
    ):
        data.setup("fit")


def test_a_column_that_was_renamed_says_its_new_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "1+1"}])
    data = attach(PromptData(train=path, columns={"prompt": "question"}), {"question": "model.teachers.wise"})
    with pytest.raises(ValueError, match=r"wise needs: data\.columns has renamed it to prompt, so name prompt there$"):
        data.setup("fit")


def test_rows_that_are_trained_on_are_not_held_out(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    write(tmp_path / "b.jsonl", rows())
    ready(train=path, validation=str(tmp_path / "b.jsonl"))
    ready(train=path, validation=0.5)
    assert not [str(warning.message) for warning in recwarn if "held out" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"data\.train and data\.validation are the same rows \(.*: val/accuracy"):
        ready(train=path, validation=f"{tmp_path}/./a.jsonl")


def test_tasks_and_options_tell_sources_apart() -> None:
    assert same_rows("python:a.b", "python:a.b", {"count": 3}, {"count": 3})
    assert not same_rows("python:a.b", "python:a.b", {"count": 3}, {"count": 4})
    assert not same_rows("reasoning_gym:sums", "reasoning_gym:sums", {}, {})
    assert same_rows("reasoning_gym:sums", "reasoning_gym:sums", {"seed": 1}, {"seed": 1})


def test_an_answer_that_is_needed_must_be_there_and_a_hint_need_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1", "hint": "x"}, {"prompt": "b"}])
    attach(PromptData(train=path), {"hint": "model.teachers.wise"}).setup("fit")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: answer is missing or null"):
        attach(PromptData(train=path), {"answer": "model.reward"}).setup("fit")


# -- bad rows -----------------------------------------------------------------------------------------------------


def test_refused_rows_stop_the_run_by_default(tmp_path: Path) -> None:
    data = attach(PromptData(train=write(tmp_path / "a.jsonl", rows(12))), limit=4)
    with pytest.raises(ValueError, match=r"a\.jsonl, row 11: prompt has 5 tokens, the limit is 4\. Correct the row"):
        data.setup("fit")


def test_skipped_rows_are_counted_and_warned_about_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, rows(12))
    path.write_text(path.read_text(encoding="utf-8") + "{\n" + '{"prompt": ""}\n', encoding="utf-8")
    data = attach(PromptData(train=str(path), on_bad_row="skip"), limit=4)
    with pytest.warns(UserWarning, match="rows are skipped") as warned:
        data.setup("fit")
    kind = "prompt has N tokens, the limit is N"
    assert data.skipped == Counter({kind: 2, "invalid JSON": 1, "prompt is empty": 1})
    reading, checking = [str(w.message) for w in warned if "rows are skipped" in str(w.message)]
    assert reading.startswith("data.train: 1 rows are skipped: 1 × invalid JSON. The first is ")
    assert f"3 rows are skipped: 2 × {kind}, 1 × prompt is empty. The first is {path}, row 11: prompt has 5" in checking
    assert data.train["id"][:] == list(range(10))  # type: ignore[index]
    data.setup("fit")
    assert data.skipped.total() == 4


def test_nothing_left_after_skipping_is_an_error(tmp_path: Path) -> None:
    data = attach(PromptData(train=write(tmp_path / "a.jsonl", rows()), on_bad_row="skip"), limit=1)
    with (
        pytest.warns(UserWarning, match="10 rows are skipped"),
        pytest.raises(
            ValueError, match=r"data.train: no row is left; all 10 were skipped \(.*a\.jsonl, row 1: prompt has 4"
        ),
    ):
        data.setup("fit")


def test_rows_keep_their_location_after_a_split(tmp_path: Path) -> None:
    content = rows(50)
    content[23]["prompt"] = ""
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=r"a\.jsonl, row 24: prompt is empty"):
        ready(train=path, validation=0.5)


# -- splits -------------------------------------------------------------------------------------------------------


@given(rows=st.integers(2, 300), part=st.integers(1, 299) | st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_holding_out_is_a_partition_and_repeatable(rows: int, part: int | float, seed: int) -> None:
    count = round(part * rows) if isinstance(part, float) else part
    if not 0 < count < rows:
        with pytest.raises(
            ValueError, match=f"holds out {count} of the {rows} rows of data.train, and both parts need"
        ):
            hold_out(rows, part, seed)
        return
    kept, held_out = hold_out(rows, part, seed)
    assert sorted(kept + held_out) == list(range(rows))
    assert (len(held_out), kept, held_out) == (count, sorted(kept), sorted(held_out))
    assert hold_out(rows, part, seed) == (kept, held_out)


def test_the_seed_chooses_the_held_out_rows() -> None:
    assert hold_out(100, 0.5, seed=0) != hold_out(100, 0.5, seed=1)


@pytest.mark.parametrize(("part", "size"), [(3, 3), (0.2, 2)])
def test_validation_is_held_out_from_train_in_any_stage(tmp_path: Path, part: float, size: int) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    fitted = ready(train=path, validation=part)
    assert fitted.train is not None
    assert fitted.validation is not None
    assert len(fitted.validation) == size
    assert sorted([*fitted.train["id"], *fitted.validation["id"]]) == list(range(10))
    validated = ready("validate", train=path, validation=part)
    assert list(validated.validation) == list(fitted.validation)  # type: ignore[arg-type]
    assert list(ready("predict", train=path, validation=part).predict) == list(fitted.validation)  # type: ignore[arg-type]


def test_a_share_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    with pytest.raises(ValueError, match=r"data.validation is 0.01: that holds out 0 of the 10 rows of data.train"):
        ready(train=path, validation=0.01)
    with pytest.raises(ValueError, match=r"data.validation is 10: that holds out 10 of the 10 rows"):
        ready(train=path, validation=10)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "data.train is not set; name a file"),
        ("validate", "data.validation is not set"),
        ("test", "data.test is not set"),
        ("predict", "data.predict and data.validation are not set"),
        (TrainerFn.TESTING, r"^data\.test is not set"),  # as Lightning itself says it
        (TrainerFn.VALIDATING, r"^data\.validation is not set"),
    ],
)
def test_a_stage_without_its_source_says_so(stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(stage)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.1}, r"data.validation is 0.1, a part of data.train, but data.train is not set"),
        ({"train": "a", "validation": 1.0}, r"data.validation is 1.0; as a share .* must be between 0 and 1"),
        ({"train": "a", "validation": 0}, r"data.validation is 0; as a number of rows .* at least 1"),
        ({"train": "a", "validation": True}, r"data.validation is True; as a share"),
        (
            {"train": "a", "validation": 0.1, "validation_options": {"split": "test"}},
            "data.validation_options are set, but data.validation names no source that takes them",
        ),
        ({"test_options": {"split": "test"}}, "data.test_options are set, but data.test names no source"),
        ({"on_bad_row": "drop"}, "data.on_bad_row is 'drop'; it must be 'refuse' or 'skip'"),
        ({"validation_batch_size": 0}, "data.validation_batch_size is 0; it must be at least 1"),
    ],
)
def test_contradictory_settings_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptData(**settings)


def test_setup_is_idempotent_and_checks_again_for_another_module(tmp_path: Path) -> None:
    data = ready(train=write(tmp_path / "a.jsonl", rows()))
    first = data.train
    data.setup("fit")
    assert data.train is first
    attach(data, {"solution": "the teacher"})
    with pytest.raises(ValueError, match=r"no column 'solution'"):
        data.setup("fit")


def test_prediction_needs_prompts_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    data = attach(PromptData(predict=path), {"answer": "model.reward"})
    data.setup("predict")
    assert next(iter(data.predict_dataloader())) == [{"prompt": "a"}]


def test_a_setting_names_the_columns_that_it_acts_on(tmp_path: Path) -> None:
    """And judges their form: nothing in the core knows of text."""
    path = write(tmp_path / "a.jsonl", [{"start": 0.5, "prompt": 3}])
    data = attach(PromptData(train=path, predict=path), {"goal": "the view"})
    data.trainer.lightning_module.columns = ("start",)  # type: ignore[union-attr]
    data.trainer.lightning_module.refusal = lambda _: None  # type: ignore[union-attr]
    data.setup("predict")
    assert list(data.predict) == [{"start": 0.5, "prompt": 3}]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no column 'goal', which the view needs"):
        data.setup("fit")
    data.trainer.lightning_module.columns = ("place",)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no column 'place', which the rollout needs; it has start, prompt"):
        data.setup("fit")


# -- loaders ------------------------------------------------------------------------------------------------------


def test_validation_batches_are_lists_of_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    data = ready(train=path, validation=path, validation_batch_size=4)
    assert [len(batch) for batch in data.val_dataloader()] == [4, 4, 2]
    assert [row for batch in data.val_dataloader() for row in batch] == rows()
    data = ready("test", test=path)
    assert list(data.test_dataloader()) == [rows()]


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_every_rank_has_as_many_examples_as_the_others_and_each_counts_once(count):
    shares = [Share([{"prompt": str(i)} for i in range(count)], rank, ranks=2) for rank in range(2)]
    assert len(list(shares[0])) == len(list(shares[1])) == len(shares[0])
    counted = [example["prompt"] for share in shares for example in share if STAND_IN not in example]
    assert sorted(counted) == [str(i) for i in range(count)]


def test_no_validation_is_no_loader(tmp_path: Path) -> None:
    assert ready(train=write(tmp_path / "a.jsonl", rows())).val_dataloader() == []


@pytest.mark.parametrize(
    ("text", "value"), [("0.1", 0.1), ("100", 100), ("a.jsonl", "a.jsonl"), ("null", None), ("org/name", "org/name")]
)
@pytest.mark.parametrize("how", ["yaml", "flag"])
def test_validation_in_yaml_and_on_the_command_line(text: str, value: object, how: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptData, "data")
    path = f"{PromptData.__module__}.PromptData"
    if how == "yaml":
        config = parser.parse_string(f"data: {{class_path: {path}, init_args: {{train: a, validation: {text}}}}}")
    else:
        config = parser.parse_args([f"--data={path}", "--data.train=a", f"--data.validation={text}"])
    assert config.data.init_args.validation == value
    assert type(config.data.init_args.validation) is type(value)
    assert isinstance(parser.instantiate_classes(config).data, PromptData)


def test_gsm8k() -> None:
    folder = os.environ.get("OPD_DATA")
    if not folder:
        pytest.skip("OPD_DATA is not set")
    columns = {"prompt": "question", "answer": "answer", "solution": "answer"}
    data = ready(train=str(Path(folder, "gsm8k", "train.jsonl")), validation=0.1, columns=columns)
    assert data.train is not None
    assert data.train.column_names == ["answer", "prompt", "solution"]
    assert len(data.train) + len(data.validation) == 7473  # type: ignore[arg-type]
