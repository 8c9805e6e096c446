"""Teachers that were recorded: `opd score`, and runs that read what it wrote."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pyarrow import parquet

from opd_lightning.blend import Blend
from opd_lightning.callbacks import HiddenSimilarity
from opd_lightning.modalities.autoregressive import Cached, PromptView
from opd_lightning.modalities.autoregressive.elsewhere import score as module_of_score
from opd_lightning.modalities.autoregressive.elsewhere.score import Recorder
from opd_lightning.modalities.autoregressive.elsewhere.store import part, parts, write_part
from opd_lightning.note import Note
from opd_lightning.objective import HiddenMatch, LogRatio, Objective, PolicyGradient, ReverseKL, Support, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher
from tests.test_elsewhere import Oracle
from tests.tiny import Rows, act, chat_tokenizer, fit, make_module, make_rows, make_trainer

VIEW = PromptView("{{ solution }}?{{ prompt }}")
ROWS = 24
ACTING = {"batch_size": ROWS, "horizon": 10, "micro_batch_size": 8}


def lightning() -> Objective:
    """The objective of Lightning OPD."""
    return Objective([Term(PolicyGradient(LogRatio(clip=10.0), clip=None, ratio="none"))])


def online(student, teacher, objective=None, view=None, **acting):
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(teacher))), view)}
    rollout = Rollout(**ACTING | acting)
    return make_module(student, teachers, objective or lightning(), rollout=rollout, load=False)


def record(module, folder, root, rows=None, **options):
    Recorder(folder, **options).record(module, Rows(make_rows(ROWS) if rows is None else rows), make_trainer(root))
    return folder


def offline(student, folder, objective=None, view=None, load=False, **acting):
    rollout = Rollout(**ACTING | {"behavior": {"dataset": 1.0}} | acting)
    teachers = {"teacher": Teacher(Cached(str(folder)), view)}
    return make_module(student, teachers, objective or lightning(), rollout=rollout, load=load)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(module, root, rows=None, steps=3):
    fit(module, root, make_rows(ROWS) if rows is None else rows, steps=steps)
    return [parameter.detach().clone() for parameter in module.student.parameters()]


def equal(mine, theirs):
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def folder(tiny_student, tiny_teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    return record(online(tiny_student, tiny_teacher), root / "answers", root)


def test_lightning_opd_is_the_online_run_bit_for_bit_in_its_first_epoch(tiny_student, tiny_teacher, folder, tmp_path):
    here = trained(online(tiny_student, tiny_teacher), tmp_path / "online")
    there = trained(offline(tiny_student, folder), tmp_path / "offline", rows_of(folder))
    assert equal(here, there)
    assert not equal(here, make_module(tiny_student, tiny_teacher).student.parameters())


def test_a_stale_log_prob_changes_its_own_token_alone(tiny_student, folder, tmp_path):
    """The test idea of Lightning OPD's sheet."""
    stale = shutil.copytree(folder, tmp_path / "stale")
    (recorded,) = parts(stale)
    columns = parquet.read_table(recorded).to_pydict()
    columns["teacher.log_probs"][0][2] -= 1.0
    write_part(recorded, columns)
    (row,) = [row for row in rows_of(folder) if row["completion_ids"] == columns["teacher.actions"][0]][:1]
    told = []
    for path in (folder, stale):
        module = offline(tiny_student, path, load=True)
        batch = act(module, [row], "dataset")
        told.append(module.streams.query("teacher", batch).distribution.log_probs[batch.mask])
    assert torch.equal((told[0] - told[1]).nonzero().flatten(), torch.tensor([2]))
    assert float(told[0][2] - told[1][2]) == pytest.approx(1.0)


def test_a_view_and_given_completions_and_parts(tiny_student, tiny_teacher, tmp_path):
    acting = {"behavior": {"dataset": 1.0}, "batch_size": 8}
    made = record(
        online(tiny_student, tiny_teacher, view=VIEW, **acting), tmp_path / "answers", tmp_path, make_rows(20)
    )
    assert [path.name for path in parts(made)] == [f"part-0000{i}.parquet" for i in range(3)], "the rest is the third"
    assert all("completion_ids" not in row for row in rows_of(made)), "given completions stay as they are"
    here = trained(online(tiny_student, tiny_teacher, view=VIEW, **acting), tmp_path / "online", make_rows(20))
    there = trained(offline(tiny_student, made, view=VIEW, batch_size=8), tmp_path / "offline", make_rows(20))
    assert equal(here, there)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (lambda: Objective([Term(ReverseKL(support=Support("teacher", 4)))]), {"top_k": 4}),
        (lambda: Objective([Term(ReverseKL())]), {"hidden": True}),
    ],
)
def test_what_else_is_told_teaches_as_the_teacher_would(tiny_student, tiny_teacher, tmp_path, objective, options):
    made = record(online(tiny_student, tiny_teacher, objective()), tmp_path / "answers", tmp_path, **options)
    here = trained(online(tiny_student, tiny_teacher, objective()), tmp_path / "online")
    there = trained(offline(tiny_student, made, objective()), tmp_path / "offline", rows_of(made))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(here, there, strict=True))


def test_what_was_killed_goes_on(tiny_student, tiny_teacher, tmp_path, monkeypatch):
    acting = {"batch_size": 8}
    whole = record(online(tiny_student, tiny_teacher, **acting), tmp_path / "whole", tmp_path)
    write, folder = module_of_score.write_part, tmp_path / "killed"

    def killed(path, columns):
        if path.stem.endswith("1"):
            path.with_suffix(".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, columns)

    monkeypatch.setattr(module_of_score, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        record(online(tiny_student, tiny_teacher, **acting), folder, tmp_path)
    with pytest.raises(ValueError, match="is not complete; run the same `opd score` again"):
        offline(tiny_student, folder, load=True)
    asked = []
    monkeypatch.setattr(module_of_score, "write_part", lambda path, columns: asked.append(path) or write(path, columns))
    record(online(tiny_student, tiny_teacher, **acting), folder, tmp_path)
    assert asked == [part(folder, 1), part(folder, 2)], "the first was there"
    assert all(part(folder, i).read_bytes() == part(whole, i).read_bytes() for i in range(3))
    assert rows_of(folder) == rows_of(whole)


class Counted(Note):
    """How many generation batches there were before this one."""

    writes, remembers = ("batches",), ("before",)

    def __init__(self):
        self.before = 0

    def __call__(self, module, trajectories):
        self.before += 1
        return trajectories.noted({"batches": [str(self.before)] * len(trajectories)})


def test_what_was_killed_goes_on_with_what_its_notes_remember(tiny_student, tiny_teacher, tmp_path, monkeypatch):
    def recorded(folder):
        teachers = {"teacher": Teacher(Frozen(Pretrained(str(tiny_teacher))), PromptView("{{ batches }}?{{ prompt }}"))}
        rollout = Rollout(**ACTING | {"batch_size": 8})
        module = make_module(
            tiny_student, teachers, lightning(), rollout=rollout, notes={"counted": Counted()}, load=False
        )
        return record(module, folder, tmp_path)

    whole, killed, write = recorded(tmp_path / "whole"), tmp_path / "killed", module_of_score.write_part
    for number in (0, 2):  # before a part, whose memory is there already

        def interrupted(path, columns, number=number):
            if path == part(killed, number):
                raise KeyboardInterrupt
            write(path, columns)

        monkeypatch.setattr(module_of_score, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorded(killed)
    monkeypatch.setattr(module_of_score, "write_part", write)
    assert len(parts(killed)) == 2
    recorded(killed)
    assert all(part(killed, i).read_bytes() == part(whole, i).read_bytes() for i in range(3))
    for memory in killed.glob("memory-*.pt"):
        memory.unlink()
    part(killed, 2).unlink()
    with pytest.raises(ValueError, match=r"model\.notes\.counted remembers .*part 1 was written is not there"):
        recorded(killed)


def test_a_folder_of_something_else_is_refused_with_all_that_differs(
    tiny_student, tiny_teacher, saved, folder, tmp_path
):
    other = online(tiny_student, saved(seed=7), view=VIEW, temperature=0.5)
    with pytest.raises(ValueError, match=r"rollouts was .*teacher's view was none, and is PromptView.*weights was"):
        record(other, folder, tmp_path)
    with pytest.raises(ValueError, match="rows was"):
        record(online(tiny_student, tiny_teacher), folder, tmp_path, make_rows(ROWS)[::-1])


def test_a_command_that_is_refused_leaves_what_was_recorded_as_it_was(tiny_student, tiny_teacher, saved, tmp_path):
    made = record(online(tiny_student, tiny_teacher), tmp_path / "answers", tmp_path, hidden=True)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(ValueError, match="teacher's weights was"):
        record(online(tiny_student, saved(seed=7)), made, tmp_path, hidden=True)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before, "the head of the recorded states, too"


def test_a_run_that_reads_rows_otherwise_is_refused(tiny_student, saved, folder):
    with pytest.raises(ValueError, match=r"model\.teachers\.teacher: .* recorded otherwise .*: view was none, and is"):
        offline(tiny_student, folder, view=VIEW, load=True)
    chat = saved(tokenizer=chat_tokenizer(), rows=110)
    with pytest.raises(ValueError, match=r"tokenizer was \w+ \(\d+ tokens\), and is .*; template was none, and is"):
        offline(chat, folder, load=True)


def test_what_was_not_recorded_is_an_error(tiny_student, folder, tmp_path):
    rows = rows_of(folder)
    changed = [{**row, "prompt": "9" + row["prompt"]} for row in rows]
    with pytest.raises(ValueError, match="its prompt, as this teacher reads it, is not among those"):
        trained(offline(tiny_student, folder), tmp_path, changed)
    other = [
        {name: value for name, value in row.items() if name != "completion_ids"} | {"completion": "99"} for row in rows
    ]
    with pytest.raises(ValueError, match="none of the recorded completions of its prompt begins with it"):
        trained(offline(tiny_student, folder), tmp_path, other)


def test_a_shorter_horizon_reads_the_beginning(tiny_student, tiny_teacher, folder, tmp_path):
    rows, acting = rows_of(folder), {"behavior": {"dataset": 1.0}, "horizon": 3}
    here = trained(online(tiny_student, tiny_teacher, **acting), tmp_path / "online", rows)
    there = trained(offline(tiny_student, folder, horizon=3), tmp_path / "offline", rows)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(here, there, strict=True))


def test_ids_of_another_tokenizer_are_refused(tiny_student, folder, tmp_path):
    rows = [{**row, "completion": row["completion"] + "0"} for row in rows_of(folder)]
    with pytest.raises(ValueError, match="were written with another tokenizer"):
        trained(offline(tiny_student, folder), tmp_path, rows)


def test_what_is_too_large_for_the_disk_is_not_begun(tiny_student, tiny_teacher, tmp_path, monkeypatch, capsys):
    free = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(module_of_score.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=r"has room for 0\.0 MiB"):
        record(online(tiny_student, tiny_teacher), tmp_path / "answers", tmp_path, hidden=True)
    steps, per_step = ROWS * ACTING["horizon"], 4 + 48 * 4
    assert f"{per_step} bytes for each of {steps} steps" in capsys.readouterr().out
    assert not parts(tmp_path / "answers")


def test_a_student_that_another_teacher_taught_is_refused(tiny_student, folder, tmp_path):
    student = shutil.copytree(tiny_student, tmp_path / "student")
    own = json.loads((folder / "about.json").read_text(encoding="utf-8"))["teachers"]["teacher"]["weights"].split()[0]
    for teacher, answer in ((own, "yes"), ("0123456789abcdef", "no")):
        (student / "opd.json").write_text(json.dumps({"teachers": {"teacher": teacher}}), encoding="utf-8")
        if answer == "no":
            with pytest.raises(ValueError, match="was taught by others before"):
                offline(student, folder, load=True)
            weights = Cached(str(folder), consistent=False)
        else:
            weights = Cached(str(folder))
        module = make_module(student, {"teacher": Teacher(weights)}, lightning())
        assert module.elsewhere["teacher"]["taught the student before"] == answer


def test_nothing_recorded_is_said_at_once(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="opd score"):
        Cached(str(tmp_path))
    with pytest.raises(ValueError, match="no answers of 'big', but of"):
        Cached(str(folder), "big")


def test_layers_are_with_the_teacher_alone(tiny_student, tiny_teacher, tmp_path):
    made = record(online(tiny_student, tiny_teacher), tmp_path / "answers", tmp_path, hidden=True)
    with pytest.raises(ValueError, match=r"HiddenMatch reads hidden states of layers, and model\.teachers\.teacher"):
        offline(tiny_student, made, Objective([Term(HiddenMatch())]))
    with pytest.raises(ValueError, match=r"HiddenSimilarity\.teacher: model\.teachers\.teacher has no model"):
        HiddenSimilarity().check(offline(tiny_student, made))


def test_more_ids_than_a_teacher_tells_are_not_recorded(tiny_student, tiny_teacher, tmp_path):
    teachers = {"teacher": Teacher(Oracle(tiny_teacher, 2))}
    module = make_module(tiny_student, teachers, lightning(), rollout=Rollout(**ACTING), load=False)
    with pytest.raises(ValueError, match=r"--top_k=4: model\.teachers\.teacher itself tells 2"):
        record(module, tmp_path / "answers", tmp_path, top_k=4)


def test_more_ids_than_there_are_are_not_recorded(tiny_student, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match=r"--top_k=500: there are \d+ ids"):
        record(online(tiny_student, tiny_teacher), tmp_path / "answers", tmp_path, top_k=500)
    assert not parts(tmp_path / "answers")


def test_another_blend_acts_otherwise(tiny_student, tiny_teacher, tmp_path):
    def blended(share):
        return online(tiny_student, tiny_teacher, behavior={"blend": 1.0}, blend=Blend({"teacher": share}))

    made = record(blended(0.5), tmp_path / "answers", tmp_path)
    with pytest.raises(ValueError, match="rollouts was"):
        record(blended(0.9), made, tmp_path)


def test_the_teachers_own_template_is_another_one(tiny_student, folder):
    teachers = {"teacher": Teacher(Cached(str(folder)), own_template=True)}
    rollout = Rollout(**ACTING | {"behavior": {"dataset": 1.0}})
    with pytest.raises(ValueError, match="template was none, and is none, its own"):
        make_module(tiny_student, teachers, lightning(), rollout=rollout)


def test_a_teacher_that_did_not_say_what_it_is_proves_nothing(tiny_student, folder, tmp_path):
    student = shutil.copytree(tiny_student, tmp_path / "student")
    (student / "opd.json").write_text(json.dumps({"teachers": {"teacher": "unknown"}}), encoding="utf-8")
    module = make_module(student, {"teacher": Teacher(Cached(str(folder)))}, lightning())
    assert module.elsewhere["teacher"]["taught the student before"] == "not known"
