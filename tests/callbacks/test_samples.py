"""Rollouts to look at: what is shown of them, where it goes, and that looking changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from opd_lightning.callbacks import Curriculum, EarlyStopRollout, FirstSteps, FreshnessControl, Linear, Samples
from opd_lightning.callbacks.samples import render
from opd_lightning.modalities.autoregressive import Peers, PromptView
from opd_lightning.objective import JSD, ForwardKL
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, fit, make_module, make_rows


def shown(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_say_what_was_done_and_how_the_teacher_finds_each_step(world, tmp_path):
    seen = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            seen.append(batch.trajectories)
            return super().training_step(batch, batch_idx)

    module = world.module(setting=Watching, reward=LongerIsBetter())
    samples = Samples(every=2, count=3, signal=ForwardKL(), console=False)
    others = [EarlyStopRollout(FirstSteps(6)), Curriculum({"rollout.temperature": Linear(1, 0.5, 4)})]
    world.fit(module, tmp_path, steps=3, callbacks=[*others, samples])
    rows = shown(tmp_path)
    assert [row["step"] for row in rows] == [0, 0, 0, 2, 2, 2]
    for row, i in zip(rows, [0, 1, 2] * 2, strict=True):
        batch = seen[row["step"]]
        assert row["length"] == int(batch.length[i]) == len(row["steps"]) == len(row["signals"])
        assert row["reward"] == float(batch.reward[i])
        assert (row["source"], row["lag"], row["weight"]) == ("student", 0, 1)
        assert row["signal"] == pytest.approx(sum(row["signals"]) / row["length"])
        assert min(row["signals"]) >= 0
        assert row["completion"] in "".join(row["steps"])


def test_the_teacher_says_what_it_makes_of_each_step(make_world, tmp_path):
    world = make_world("text")
    likelihood = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            teacher = self.streams.query("teacher", batch.trajectories).distribution
            logits = teacher.head.project(teacher.hidden).double()
            suppressed = teacher.head.suppressed
            if suppressed is not None:
                logits[..., suppressed] = -torch.inf
            likelihood.append((batch.trajectories, logits.log_softmax(-1).detach()))
            return super().training_step(batch, batch_idx)

    module = world.module(setting=Watching)
    world.fit(module, tmp_path, steps=1, callbacks=[Samples(count=2, console=False, likeliest=3)])
    trajectories, log_probs = likelihood[0]
    for i, row in enumerate(shown(tmp_path)):
        steps = trajectories.mask[i].nonzero().squeeze(-1)
        assert len(row["teacher_log_probs"]) == len(row["likeliest"]) == len(steps)
        for t, said, best in zip(steps, row["teacher_log_probs"], row["likeliest"], strict=True):
            here = log_probs[i, t]
            assert said == pytest.approx(float(here[trajectories.actions[i, t]]), abs=1e-3)
            assert [value for _, value in best] == pytest.approx(here.topk(3).values.tolist(), abs=1e-3)
            assert [text for text, _ in best] == [module.tokenizer().decode([k]) for k in here.topk(3).indices]


@pytest.mark.parametrize("samples", [{"likeliest": 0}, {"teacher": None}])
def test_what_is_not_asked_for_is_not_written(make_world, tmp_path, samples):
    world = make_world("text")
    module = world.alone() if "teacher" in samples else world.module()
    world.fit(module, tmp_path, steps=1, callbacks=[Samples(count=1, console=False, **samples)])
    assert (shown(tmp_path)[0]["teacher_log_probs"], shown(tmp_path)[0]["likeliest"]) == (None, None)


def test_what_each_policy_read_and_what_notes_say_is_kept_whole(tiny_student, tmp_path):
    teacher = Teacher(Live(), PromptView("{{ solution }}{{ right[0] }}" + "12" * 60 + "{{ prompt }}"))
    module = make_module(
        tiny_student, {"teacher": teacher}, notes={"peers": Peers(own=True, threshold=0.0)}, reward=LongerIsBetter(),
        rollout=Rollout(batch_size=4, horizon=6),
    )  # fmt: skip
    rows = [row for row in make_rows(24) if row["solution"]]
    fit(module, tmp_path, rows, steps=1, callbacks=[Samples(count=2, console=False)])
    for row in shown(tmp_path):
        assert row["notes"]["right"] == [row["completion"].strip()]
        assert "12" * 60 in row["read"]["teacher reads"]
        assert row["prompt"] in row["read"]["student reads"]


def test_stale_and_weighted_trajectories_say_so(tmp_path):
    module = toy.make_module(rollout=Rollout(batch_size=8, max_staleness=1, horizon=6))
    toy.fit(module, tmp_path, [FreshnessControl(), Samples(every=1, count=1, console=False)], steps=4)
    rows = shown(tmp_path)
    assert [row["version"] + row["lag"] for row in rows] == [0, 1, 2, 3]
    assert [row["lag"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["weight"] > rows[1]["weight"] > 0
    assert rows[0]["steps"] is None, "steps in the plane can't be read"
    assert rows[0]["reward"] is None


def test_the_console_shades_steps_by_the_signal(make_world, tmp_path, capsys):
    world = make_world("text")
    world.fit(world.module(), tmp_path, callbacks=[Samples(count=2)])
    assert "optimizer step 0: ReverseKL" in capsys.readouterr().out
    row = {"prompt": "1+1=", "completion": "23", "reward": 0.5, "length": 2, "signal": 0.5}
    row |= {"steps": ["2", "3"], "signals": [0.0, 1.0]}
    console = Console(force_terminal=True, color_system="truecolor", record=True, width=80, file=io.StringIO())
    console.print(render([row], "now"))
    page = console.export_html()
    assert "background-color: #ffffff" in page
    assert "background-color: #ff0000" in page


class Tables(CSVLogger):
    """As Weights & Biases takes them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[Any] = []

    def log_table(self, key, columns, data, step) -> None:
        self.seen.append((key, columns, data, step))


class Texts(CSVLogger):
    """As TensorBoard (`add_text`) or MLflow (`log_text`) takes them."""

    run_id = "run"

    def __init__(self, folder: Path, method: str) -> None:
        super().__init__(folder)
        self.seen: list[Any] = []
        takes = {method: lambda *said: self.seen.append(said)}
        self._stub = SimpleNamespace(**takes, log_metrics=lambda *_: None, save=lambda: None)

    @property
    def experiment(self) -> Any:
        return self._stub


def test_loggers_get_what_they_take(tmp_path):
    board, flow, tables = Texts(tmp_path, "add_text"), Texts(tmp_path, "log_text"), Tables(tmp_path)
    loggers = [board, flow, tables, CSVLogger(tmp_path)]
    rows = [{**row, "prompt": f"a|b {i}"} for i, row in enumerate(toy.make_rows())]
    toy.fit(toy.make_module(), tmp_path, [Samples(every=1, count=2, console=False)], steps=1, rows=rows, logger=loggers)
    ((tag, text, step),) = board.seen
    assert (tag, step) == ("rollouts", 0)
    assert text.startswith("| prompt | completion | reward | length | signal |\n| --- |")
    assert "a\\|b" in text
    assert len(text.splitlines()) == 4
    assert flow.seen == [("run", text, "rollouts/step-0.md")]
    ((key, columns, data, step),) = tables.seen
    assert (key, len(columns), len(data), step) == ("rollouts", 5, 2, 0)


def test_looking_changes_nothing_and_a_resumed_run_does_not_repeat_itself(tmp_path):
    def make():
        rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=6)
        grows = Curriculum({"rollout.horizon": Linear(3, 9, 6)})
        return toy.make_module(rollout=rollout), [grows, Samples(every=2, count=6, console=False)]

    toy.assert_resumes(make, tmp_path)
    module, (grows, _) = make()
    toy.fit(module, tmp_path / "plain", [grows], steps=6)
    again, callbacks = make()
    whole = tmp_path / "whole"
    unbroken = shown(whole)
    for name, weight in module.state_dict().items():
        assert torch.equal(torch.load(whole / "step-6.ckpt", weights_only=True)["state_dict"][name], weight)
    with (whole / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "pro')
    toy.fit(again, whole, callbacks, steps=6, checkpoint=whole / "step-3.ckpt")
    assert shown(whole) == unbroken
    assert [row["step"] for row in unbroken] == [0] * 4 + [2] * 4 + [4] * 4, "no more than a micro-batch has"


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every=0 and count=4 must be >= 1"):
        Samples(every=0)
    with pytest.raises(ValueError, match=r"likeliest=-1 >= 0"):
        Samples(likeliest=-1)
    with pytest.raises(ValueError, match=r"ForwardKL needs a teacher; name one"):
        Samples(signal=ForwardKL(), teacher=None)
    with pytest.raises(ValueError, match=r"Samples\.teacher: no 'expert' in model\.teachers, which has \['teacher'\]"):
        toy.fit(toy.make_module(), tmp_path, [Samples(teacher="expert")])
    with pytest.raises(ValueError, match=r"JSD needs a vocabulary, which this setting lacks"):
        toy.fit(toy.make_module(), tmp_path, [Samples(signal=JSD())])


def test_without_a_teacher_it_shows_what_the_student_found_unlikely(make_world, tmp_path):
    world = make_world("text")
    world.fit(world.alone(), tmp_path, callbacks=[Samples(teacher=None, console=False)])
    assert all(value >= 0 for row in shown(tmp_path) for value in row["signals"])
