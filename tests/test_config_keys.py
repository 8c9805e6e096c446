"""Keys of configurations: who refused one, what it accepts instead, and where it is; mappings of parts by name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_lightning.cli import understood
from opd_lightning.shipped import shipped

BASE = ("fit", "-c", "opd:text/quickstart.yaml")
SETTINGS = ("text/quickstart", "text/qwen3_gsm8k", "vision_language/quickstart", "gui_grounding/quickstart",
            "diffusion/quickstart")  # fmt: skip


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        understood(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def refused(tmp_path, capsys):
    """The message about a file that is laid over the quickstart."""

    def refuse(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return refusal(capsys, *BASE, "-c", str(tmp_path / "c.yaml"))

    return refuse


def within(inner: str) -> str:
    return f"model:\n  init_args:\n    {inner}\n"


TERMS = "objective: {{terms: [{{signal: {}}}]}}"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (within("rolout: {}"), ["TextDistillation has no 'rolout'; did you mean rollout?", "on_nonfinite", "line 3"]),
        (within("rollout: {horizen: 3}"), ["rollout.horizen: Rollout has no", "did you mean horizon?", "line 3"]),
        (within("teachers: {teacher: {vew: x}}"), ["teachers.teacher.vew: Teacher has no 'vew'; did you mean view?"]),
        (within("teachers: {teacher: {weights: {init_args: {pretained: {}}}}}"), ["Frozen has no", "pretrained?"]),
        (within("teachers+: {big: {weights: Live}}"), ["only lists are appended to with +", "merged by name"]),
        (within("optimizer: {init_args: {learning_rate: 1}}"), ["AdamW has no 'learning_rate'", "accepts lr, betas"]),
        (within(TERMS.format("{class_path: ReversKL}")), ["terms[0].signal.class_path", "did you mean ReverseKL?"]),
        (within(TERMS.format("{class_path: JSD, init_args: {bta: 1}}")), ["JSD has no 'bta'", "line 3"]),
        (within(TERMS.format("{class_path: JSD, beta: 1}")), ["beta belongs into", "terms[0].signal.init_args"]),
        (within(TERMS.format("{init_args: {beta: 1}}")), ["names no class: add class_path", "JSD"]),
        (within(TERMS.format("[JSD]")), ["terms[0].signal: a list where the keys of Signal belong"]),
        (within(TERMS.format("Window")), ["there is no Signal 'Window'"]),
        (within(TERMS.format("opd_lightning.objective.Window")), ["opd_lightning.objective.Window is no Signal"]),
        (within("objective: {terms+: {signal: JSD}}"), ["keys where a list belongs"]),
        (within("rollout: [1]"), ["a list where the keys of Rollout belong", "batch_size"]),
        (within("teachers: {teacher: Frozen}"), ["'Frozen' where the keys of Teacher belong"]),
        (within("rollout: {horizon: null}"), ["rollout.horizon: null where int belongs", "line 3"]),
        (within("teachers: {teacher: {weights: null}}"), ["weights: null where TeacherWeights belongs"]),
        ("trainer: {max_steps: null}\n", ["trainer.max_steps: null where int belongs"]),
        (within("foo: {}"), ["TextDistillation has no 'foo'"]),
        (within("rollout: {temperature: nan}"), ["rollout.temperature: nan is no number"]),
        (within("rollout: {behavior: {student: Infinity}}"), ["behavior.student: Infinity is no number"]),
        (
            within("reward: {class_path: math.sqrt}"),
            ["math.sqrt is a function; give the path alone, or", '"function": "math.sqrt"'],
        ),
        (within("reward: no.such.thing"), ["no.such.thing can't be imported: ModuleNotFoundError"]),
        (within("reward: {init_args: {afterr: x}}"), ["ExactMatch has no 'afterr'; did you mean after?"]),
        ("model: {rollout: {horizon: 3}}\n", ["rollout belongs into model.init_args"]),
        ("model: {class_path: VisionDistillation}\n", ["there is no OnPolicyDistillation 'VisionDistillation'"]),
        ("model: {class_path: opd_lightning.module.OnPolicyDistillation}\n", ["is what others are kinds of"]),
        ("data: {init_args: {trian: x}}\n", ["PromptData has no 'trian'; did you mean train?"]),
        ("trainer: {max_stepz: 3}\n", ["trainer.max_stepz: Trainer has no", "did you mean max_steps?"]),
        ("trainer:\n  callbacks:\n    - class_path: Colapse\n", ["callbacks[0].class_path: there is no Callback"]),
        ("trainer:\n  callbacks+:\n    - class_path: Samples\n      init_args: {evry: 1}\n", ["mean every?", "line 4"]),
        ("checkpoint: {every: 3}\n", ["Checkpoint has no 'every'", "every_n_train_steps"]),
        ("modell: 3\n", ["opd fit has no such key; did you mean model?"]),
    ],
)  # fmt: skip
def test_a_wrong_name_is_answered_by_who_refused_it(refused, text, messages):
    error = refused(text)
    assert "c.yaml, line " in error
    for message in messages:
        assert message in error, error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train: a.jsonl, seed: 3}\n",
            r"data: add class_path: PromptData or ImageData.*, and put train and seed under its",
        ),
        (
            "model: {student: {path: x}}\n",
            r"model: add class_path: .*TextDistillation.*, and put student under its init_args",
        ),
    ],
)
def test_arguments_without_a_class_are_told_which_takes_them(capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    error = refusal(capsys, "fit", "-c", str(tmp_path / "c.yaml"))
    assert re.search(message, error), error
    assert "c.yaml, line 1" in error


def test_an_overlay_alone_is_told_what_it_is_laid_over(capsys):
    error = refusal(capsys, "fit", "-c", "opd:methods/text/opsd.yaml")
    assert "model: this file is an overlay; put what it is laid over before it: -c opd:text/quickstart.yaml\n" in error
    assert "opsd.yaml, line" in error


def test_where_a_suggestion_is_near_the_rest_is_not_listed(capsys):
    assert refusal(capsys, *BASE, "--data=PromtData").splitlines()[0].endswith("did you mean PromptData?")
    assert "there are" not in refusal(capsys, *BASE, "--data=PromtData")


@pytest.mark.parametrize(
    ("base", "text", "message"),
    [
        ("text", within(TERMS.format("ReverseKL, normaliser: steps")), "'normaliser'; did you mean normalizer?"),
        ("text", within("rollout: {behaviour: {student: 1.0}}"), "'behaviour'; did you mean behavior?"),
        ("text", within("optimiser: {class_path: torch.optim.SGD}"), "'optimiser'; did you mean optimizer?"),
        (
            "text",
            within(TERMS.format("{class_path: JSD, init_args: {support: {k: 20, remainder: renormalise}}}")),
            "'renormalise'; did you mean renormalize?",
        ),
        (
            "text",
            within(TERMS.format("{class_path: PolicyGradient, init_args: {advantage: ADVANTAGE}}")).replace(
                "ADVANTAGE", "{class_path: LogRatio, init_args: {length_normalised: true}}"
            ),
            "'length_normalised'; did you mean length_normalized?",
        ),
        (
            "gui_grounding",
            within("student_view: {class_path: Spotlight, init_args: {colour: red}}"),
            "'colour'; did you mean color?",
        ),
        (
            "text",
            "trainer: {callbacks: [{class_path: EarlyStopRollout, init_args: {policy: ChangePoint}}]}\n",
            "'policy'; it is called rule now",
        ),
        (
            "text",
            "trainer: {callbacks: [{class_path: TeacherSync, init_args: {policy: Never}}]}\n",
            "'policy'; it is called rule now",
        ),
        ("diffusion", within("answers: {teacher: Velocity}"), "'answers'; it is called velocity_targets now"),
        ("gui_grounding", within("answer: Normalized1000"), "'answer'; it is called answer_format now"),
    ],
)
def test_a_key_of_before_the_words_were_settled_is_answered_by_the_new_one(capsys, tmp_path, base, text, message):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    error = refusal(capsys, "fit", "-c", f"opd:{base}/quickstart.yaml", "-c", str(tmp_path / "c.yaml"))
    assert message in error, error
    assert "c.yaml, line " in error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.init_args.rollout.horizen=3", "Rollout has no 'horizen'"),
        ("--model.rollout.horizen=3", "Rollout has no 'horizen'"),
        ("--model.init_args.teachers.teacher.weights.init_args.pretrained.pth=x", "Pretrained has no 'pth'"),
        ("--model.init_args.rollout={horizen: 3}", "Rollout has no 'horizen'"),
        ("--trainer.logger.init_args.savedir=x", "CSVLogger has no 'savedir'"),
        ("--model.init_args.rollout.temperature=nan", "nan is no number"),
        ("--data=PromtData", "did you mean PromptData?"),
        ("--modl.init_args.foo=1", "did you mean model?"),
        ("--model.rollout.horizon=many", "rollout.horizon: expected a whole number, got 'many'"),
        ("--model.rollout.horizon=1.5", "rollout.horizon: expected a whole number, got 1.5"),
        ("--model.rollout.horizon.x=3", "rollout.horizon: it has no keys (x): expected a whole number"),
        ("--data.on_bad_row=skipp", "on_bad_row: expected one of refuse, skip, got 'skipp'; did you mean skip?"),
        ("--model.schedule.name=linaer", "constant, linear, cosine, got 'linaer'; did you mean linear?"),
        ("--model.optimizer.lr=abc", "lr: expected a number, got 'abc'"),
        ("--model.optimizer.betas=[a, b]", "betas[0]: expected a number, got 'a'"),
        ("--model.optimizer.betas=abc", "betas: 'abc' where a list belongs"),
        ("--trainer.enable_progress_bar=maybe", "expected true or false or null, got 'maybe'"),
        ("--trainer.gradient_clip_val=big", "expected a number or null, got 'big'"),
        ("--model.optimizer=torch.optim.AdamX", "did you mean torch.optim.Adam?"),
        ("--model.optimizer=torch.optm.AdamW", "did you mean torch.optim.AdamW?"),
        ("--model.optimizer=AdamW", "AdamW is the name of several: torch.optim.AdamW, "),
    ],
)
def test_the_command_line_is_read_as_strictly(capsys, argument, message):
    error = refusal(capsys, *BASE, argument)
    assert message in error
    assert argument in error, "where it is"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "--trainer.logger=CSVLogger",
            "--trainer.logger.save_dr=x",
            "CSVLogger has no 'save_dr'; did you mean save_dir?",
        ),
        ("--trainer.callbacks+=CollapseAlarm", "--trainer.callbacks.patienc=3", "did you mean patience?"),
        ("--trainer.callbacks+=CollapseAlarm", "--trainer.callbacks.action=stopp", "got 'stopp'; did you mean stop?"),
        ("--trainer.callbacks+=CollapseAlarm", "--trainer.callbacks.patience=many", "a whole number, got 'many'"),
    ],
)
def test_keys_of_a_part_that_another_argument_names_are_read_as_strictly(capsys, first, second, message):
    error = refusal(capsys, *BASE, first, second)
    assert message in error
    assert error.rstrip().endswith(f"in what the command line says: {second}")


def test_a_class_of_ones_own_that_lacks_methods_is_told_which(tmp_path, monkeypatch, capsys):
    (tmp_path / "half_made.py").write_text(
        "from opd_lightning.module import OnPolicyDistillation\nfrom opd_lightning.reward import Reward\n\n"
        "class Reach(OnPolicyDistillation):\n    pass\n\nclass Silent(Reward):\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    setting = refusal(capsys, "fit", "--model=half_made.Reach")
    assert "half_made.Reach can't be built: it lacks what every OnPolicyDistillation has: " in setting
    assert "distribution" in setting
    assert "half_made.Silent can't be built: it lacks what every Reward has: __call__" in refusal(
        capsys, *BASE, "--model.reward=half_made.Silent"
    )


def laid_over(tmp_path: Path, *texts: str, base: str = "opd:text/quickstart.yaml") -> dict[str, Any]:
    """What the last file becomes."""
    files = []
    for place, text in enumerate(texts):
        (tmp_path / f"{place}.yaml").write_text(text, encoding="utf-8")
        files += ["-c", str(tmp_path / f"{place}.yaml")]
    return json.loads(understood(["fit", "-c", base, *files])[-1])


def test_teachers_are_merged_by_name(tmp_path):
    big = within('teachers: {big: {weights: {class_path: Live}, where: {task: math, kind: "1"}}}')
    teachers = laid_over(tmp_path, big)["model"]["init_args"]["teachers"]
    assert list(teachers) == ["teacher", "big"]
    assert teachers["teacher"]["weights"]["init_args"] == {"pretrained": {"path": "opd:assets/quickstart/teacher"}}
    changed = within("teachers: {big: {max_prompt_length: 7}}")
    teachers = laid_over(tmp_path, big, changed)["model"]["init_args"]["teachers"]
    assert teachers["big"] == {"weights": {"class_path": "Live"}, "where": {"task": "math", "kind": "1"},
                               "max_prompt_length": 7}  # fmt: skip
    assert list(laid_over(tmp_path, big, within("teachers: {big: null}"))["model"]["init_args"]["teachers"]) == [
        "teacher"
    ]
    back = within("teachers: {other: {weights: {class_path: Live}}}")
    teachers = laid_over(tmp_path, big, within("teachers: {big: null}"), back)["model"]["init_args"]["teachers"]
    assert list(teachers) == ["teacher", "other"], "what was removed stays away"
    shares = within("rollout: {behavior: {dataset: 1.0}}")
    assert laid_over(tmp_path, shares)["model"]["init_args"]["rollout"]["behavior"] == {"dataset": 1.0}


def test_null_removes_only_what_is_there(refused):
    assert "teachers.techer: null removes nothing, there are ['teacher']" in refused(within("teachers: {techer: null}"))


def test_stable_opd_keeps_the_teacher_of_what_it_is_laid_over(tmp_path):
    mine = within("teachers: {teacher: {weights: {class_path: Frozen, init_args: {pretrained: {path: mine}}}}}")
    (tmp_path / "mine.yaml").write_text(mine, encoding="utf-8")
    files = ["-c", str(tmp_path / "mine.yaml"), "-c", "opd:methods/stable_opd.yaml"]
    teachers = json.loads(understood([*BASE, *files])[-1])["model"]["init_args"]["teachers"]
    assert list(teachers) == ["teacher", "initial"]
    assert teachers["teacher"]["weights"]["init_args"]["pretrained"] == {"path": "mine"}


def places(values: Any, keys: tuple = ()) -> Iterator[tuple]:
    """Where a configuration names something whose keys we know: above lists and options anything may stand."""
    if isinstance(values, dict) and not str(keys[-1:]).endswith(("_options',)", "behavior',)", "columns',)")):
        for key, value in values.items():
            yield (*keys, key)
            yield from places(value, (*keys, key))
    elif isinstance(values, list):
        for place, value in enumerate(values):
            yield from places(value, (*keys, place))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_key_of_a_shipped_configuration_is_missed_when_it_is_misspelt(tmp_path, capsys, name):
    whole = yaml.safe_load(Path(shipped(f"opd:{name}.yaml")).read_text(encoding="utf-8"))
    for keys in places(whole):
        broken = copy.deepcopy(whole)
        holder = broken
        for key in keys[:-1]:
            holder = holder[key]
        if keys[-2:-1] in (("teachers",), ("velocity_targets",), ("chat_template_kwargs",)):  # a name, which may be any
            continue
        holder[f"{keys[-1]}q"] = holder.pop(keys[-1])
        path = tmp_path / "broken.yaml"
        path.write_text(yaml.safe_dump(broken), encoding="utf-8")
        error = refusal(capsys, "fit", "-c", str(path))
        assert f"{keys[-1]}q" in error, (keys, error)
        assert "broken.yaml, line " in error, (keys, error)
