"""A resumed run does what its configuration says now, or is refused; its record says what was done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning.cli import run
from opd_lightning.export import write
from tests.processes import last
from tests.test_resume import PLAIN, configuration
from tests.tiny import save_model

OPTIMIZER = "--model.optimizer"
FLAT = ["--model.schedule.name=constant", "--model.schedule.warmup_steps=0"]
MAY = "--checkpoint.may_change=[model]"
LORA = "--model.student.lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def made(make_world, tmp_path_factory):
    """Runs of three steps, each made once."""
    found: dict[str, Path] = {}

    def get(*extra: str) -> Path:
        name = " ".join(extra)
        if name not in found:
            config = configuration(tmp_path_factory.mktemp("made"), make_world("text"), PLAIN)
            run(["fit", "-c", str(config), "--trainer.max_steps=3", *FLAT, *extra])
            found[name] = config
        return found[name]

    return get


@pytest.fixture
def resume(made, tmp_path):
    """Goes on to step 5, from a copy of a run."""

    def get(*changes: str, of: tuple[str, ...] = (), flat: bool = True, may: str = MAY) -> Path:
        shutil.copytree(made(*of).parent, tmp_path / "run")
        config = tmp_path / "run" / "run.yaml"
        where = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=5", "--ckpt_path=last"]
        run(["fit", "-c", str(config), *(FLAT if flat else []), *of, *where, may, *changes])
        return config

    return get


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([f"{OPTIMIZER}.lr=0.0001"], {"lr": 0.0001, "weight_decay": 0.01}),
        ([f"{OPTIMIZER}.weight_decay=0.3"], {"weight_decay": 0.3, "lr": 0.01}),
        ([f"{OPTIMIZER}.betas=[0.5, 0.7]"], {"betas": (0.5, 0.7)}),
        ([f"{OPTIMIZER}.eps=0.001", f"{OPTIMIZER}.amsgrad=false"], {"eps": 0.001}),
        (["--model.schedule.warmup_steps=50"], {"lr": 0.001}),  # after 5 of 50 steps
        (["--model.schedule.name=linear"], {"lr": 0.0}),  # after all 5
        (["--model.schedule.name=linear", f"{OPTIMIZER}.lr=1.0", "--trainer.max_steps=4"], {"lr": 0.0}),
    ],
)
def test_changes_of_the_optimizer_take_effect_and_moments_stay(change, expected, resume):
    state = last(resume(*change))
    optimizer = state["optimizer_states"][0]
    for name, value in expected.items():
        assert optimizer["param_groups"][0][name] == pytest.approx(value), name
    assert {float(of["step"]) for of in optimizer["state"].values()} == {state["global_step"]}


def test_the_next_step_is_the_first_with_the_new_rate(resume, made):
    """A rate of 0 from step 3 on moves nothing."""
    found = last(resume(f"{OPTIMIZER}.lr=0.0"))
    assert found["global_step"] == 5
    for name, value in last(made())["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


def test_the_record_says_what_was_done(resume, tmp_path, capsys):
    config = resume(f"{OPTIMIZER}.lr=0.0001", "--model.rollout.temperature=0.5")
    state = last(config)
    for says in (state["opd_config"], (config.parent / "config.yaml").read_text(encoding="utf-8")):
        settings = yaml.safe_load(says)["model"]["init_args"]
        assert settings["optimizer"]["init_args"]["lr"] == 0.0001
        assert settings["rollout"]["temperature"] == 0.5
    (change,) = state["changes"]
    assert change["step"] == 3
    assert ["model.init_args.optimizer.init_args.lr", "0.01", "0.0001"] in change["keys"]
    assert ["model.init_args.rollout.temperature", "1.0", "0.5"] in change["keys"]
    assert "# after optimizer step 3: model.init_args.rollout.temperature 0.5 (was 1.0)" in (
        config.parent / "config.yaml"
    ).read_text(encoding="utf-8")

    write(config.parent / "checkpoints" / "last.ckpt", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "after optimizer step 3: `model.init_args.optimizer.init_args.lr` 0.0001 (was 0.01)" in card


def test_a_resume_without_changes_records_none(resume):
    """But for how long it lasts, and where."""
    keys = {key for change in last(resume())["changes"] for key, _, _ in change["keys"]}
    assert keys == {"trainer.max_steps", "trainer.default_root_dir"}


def test_what_decides_what_is_trained_is_refused_unless_it_is_permitted(resume, tmp_path):
    other, worse = "--model.rollout.temperature=0.5", save_model(tmp_path / "worse", seed=78)
    teacher = f"--model.teachers.teacher.weights.init_args.pretrained.path={worse}"
    lines = r"rollout\.temperature: 1\.0 -> 0\.5\n.*teachers\.teacher: weights \w+ -> weights"
    with pytest.raises(ValueError, match=lines):
        resume(other, teacher, may="--checkpoint.may_change=[model.optimizer]")
    assert last(tmp_path / "run" / "run.yaml")["global_step"] == 3
    shutil.rmtree(tmp_path / "run")
    permitted = "--checkpoint.may_change=[model.rollout.temperature, model.teachers.teacher]"
    assert last(resume(other, teacher, may=permitted))["global_step"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--model.optimizer=torch.optim.SGD", f"{OPTIMIZER}.lr=0.1"],
            r"AdamW in the checkpoint .*SGD",
        ),
        (
            ["--model.optimizer=torch.optim.Adam", f"{OPTIMIZER}.lr=0.1"],
            r"optimizer was .*AdamW .*Adam",
        ),
        (
            ["--model.student.freeze=embed"],
            r"embed_tokens\.weight was trained in the checkpoint, and .*freeze",
        ),
        ([f"{OPTIMIZER}.amsgrad=true"], r"optimizer: amsgrad was False .* now True, and so it needs 'max_exp_avg_sq'"),
        (
            ["--model.student.random_init=true"],
            r"student\.random_init is now True: other weights than",
        ),
        ([LORA], r"model\.student\.lora was not set in the checkpoint and is now set"),
        (["--seed_everything=4"], r"seed_everything was 3 in the checkpoint and is now 4"),
        (["--model.rollout.batch_size=4"], r"8 prompts per generation"),
    ],
)
def test_what_could_not_take_effect_is_refused_and_nothing_is_touched(change, message, resume, tmp_path):
    with pytest.raises(ValueError, match=message):
        resume(*change)
    config = tmp_path / "run" / "run.yaml"
    assert last(config)["global_step"] == 3
    assert "max_steps: 3" in (config.parent / "config.yaml").read_text(encoding="utf-8")
    assert not (config.parent / "run.lock").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{r: 4, alpha: 16, target_modules: [q_proj, v_proj]}", r"lora\.alpha was 8 in the checkpoint and is now 16"),
        ("{r: 2, alpha: 8, target_modules: [q_proj, v_proj]}", r"lora\.r was 4 in the checkpoint and is now 2"),
        (
            "{r: 4, alpha: 8, target_modules: [q_proj]}",
            r"lora\.target_modules was \['q_proj', 'v_proj'\] ",
        ),
        ("{r: 4, alpha: 8, target_modules: all-linear}", r"lora\.target_modules was .*down_proj.*…, with"),
    ],
)
def test_another_adapter_is_refused(change, message, resume):
    with pytest.raises(ValueError, match=message):
        resume(f"--model.student.lora={change}", of=(LORA,))


def test_what_is_trained_is_known_by_name_and_not_by_number(resume):
    """Moments of one layer would be taken for those of another of the same shapes."""
    key = "--model.student.freeze=layers"
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ was trained in the checkpoint, and now it is the oth"):
        resume(f"{key}.1", of=(f"{key}.0",))


def test_a_run_without_its_adapter_is_refused(made, tmp_path):
    checkpoint = made(LORA).parent / "checkpoints" / "last.ckpt"
    where = [f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={checkpoint}"]
    with pytest.raises(ValueError, match=r"model\.student\.lora was trained in the checkpoint and is now not set"):
        run(["fit", "-c", str(made(LORA).parent / "run.yaml"), *where])


def test_dropout_of_an_adapter_takes_effect(resume):
    dropout = LORA.replace("r: 4", "dropout: 0.1, r: 4")
    keys = [key for change in last(resume(dropout, of=(LORA,)))["changes"] for key, _, _ in change["keys"]]
    assert "model.init_args.student.lora.dropout" in keys


def test_another_base_is_refused_and_one_that_moved_is_not(resume, tmp_path, make_world):
    other = save_model(tmp_path / "other", seed=77)
    with pytest.raises(ValueError, match=r"other holds other weights now than those"):
        resume(f"--model.student.path={other}", of=(LORA,))
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(make_world("text").student, tmp_path / "moved")
    assert last(resume(f"--model.student.path={tmp_path / 'moved'}", of=(LORA,)))["global_step"] == 5


def test_another_model_is_not_evaluated_with_the_weights_of_a_checkpoint(made, tmp_path):
    other = save_model(tmp_path / "other", hidden=48)
    checkpoint, rows = (made().parent / path for path in ("checkpoints/last.ckpt", "data/rows.jsonl"))
    changes = [f"--model.student.path={other}", f"--data.validation={rows}"]
    with pytest.raises(ValueError, match=r"other is another model now .*: student\.\S+ has the shape \[24, 32\] in"):
        run(["validate", "-c", str(made().parent / "run.yaml"), f"--ckpt_path={checkpoint}", *changes])


def test_a_checkpoint_of_weights_only_is_not_resumed(made, tmp_path):
    config = made()
    state = last(config)
    del state["optimizer_states"], state["lr_schedulers"]
    torch.save(state, tmp_path / "weights.ckpt")
    where = f"--trainer.default_root_dir={tmp_path / 'again'}"
    with pytest.raises(ValueError, match="holds weights only: it can be evaluated and exported, not resumed"):
        run(["fit", "-c", str(config), *FLAT, where, f"--ckpt_path={tmp_path / 'weights.ckpt'}"])


def test_a_constant_rate_is_warmed_up_where_that_is_asked_for(made):
    config = made("--model.schedule.warmup_steps=6")
    assert last(config)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.01 * 3 / 6)
