"""`opd`: overlays, messages, and what wins on resume."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml

from opd_lightning.__main__ import execute, main
from opd_lightning.cli import OPDCLI, resolve, run
from opd_lightning.shipped import shipped
from tests.test_resume import PLAIN, configuration


@pytest.fixture
def config(tmp_path, make_world):
    return configuration(tmp_path / "run", make_world("text"), PLAIN)


def printed(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit):
        execute([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_shipped_configurations_are_found_by_name():
    assert resolve("opd:text/quickstart.yaml").endswith("configs/text/quickstart.yaml")
    assert resolve("--config=opd:methods/gkd.yaml").startswith("--config=/")
    assert resolve("runs/mine.yaml") == "runs/mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"nothing of that name is shipped; did you mean opd:text/quickstart"):
        shipped("opd:text/quickstrat.yaml")
    with pytest.raises(FileNotFoundError, match=r"is shipped; did you mean opd:methods/text/opsd\.yaml\?$"):
        shipped("opd:methods/text/opsdd.yaml")
    with pytest.raises(FileNotFoundError, match=r"did you mean opd:methods/gui_grounding/gui_sd\.yaml\?"):
        shipped("opd:methods/gui_sd.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"nothing of that name is shipped\n  there are .*text/quickstart\.yaml"
    ):
        shipped("opd:zzz")


def test_overlays_replace_and_append(config, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "model:\n  init_args:\n    objective:\n      terms:\n"
        "        - signal: {class_path: JSD, init_args: {beta: 0.25}}\n"
        "          weights: [{class_path: Window, init_args: {start: 1}}]\n",
        encoding="utf-8",
    )
    more = tmp_path / "more.yaml"
    more.write_text(
        "model:\n  init_args:\n    objective:\n      terms+:\n"
        "        - signal: {class_path: CrossEntropy}\n          teacher: null\n",
        encoding="utf-8",
    )
    found = printed(capsys, "fit", "-c", str(config), "-c", str(overlay), "-c", str(more))
    terms = found["model"]["init_args"]["objective"]["terms"]
    assert [term["signal"]["class_path"].rpartition(".")[2] for term in terms] == ["JSD", "CrossEntropy"]
    assert terms[0]["signal"]["init_args"]["beta"] == 0.25
    assert found["model"]["init_args"]["rollout"]["batch_size"] == 8, "the base's other settings stay"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.rollout.horizen=3", "horizen"),
        ("--model.rollout.horizon=long", "horizon"),
        ("--model.rollout.horizon=0", "rollout.horizon must be >= 1, got 0"),
        ("--trainer.max_stepz=3", "max_stepz"),
    ],
)
def test_a_wrong_key_or_type_is_named(config, argument, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(["fit", "-c", str(config), argument])
    assert message in capsys.readouterr().err + str(caught.value)


def test_a_wrong_key_in_a_file_names_file_and_key(config, tmp_path, capsys):
    overlay = tmp_path / "typo.yaml"
    overlay.write_text("model:\n  init_args:\n    rollout: {horizen: 3}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(["fit", "-c", str(config), "-c", str(overlay)])
    error = capsys.readouterr().err
    assert "horizen" in error
    assert "typo.yaml" in error


def test_the_trainer_has_defaults_which_a_file_and_an_argument_replace(tmp_path, capsys):
    names = ("max_epochs", "check_val_every_n_epoch", "num_sanity_val_steps", "logger")
    shipped_one = ("fit", "-c", "opd:text/quickstart.yaml")
    trainer = printed(capsys, *shipped_one)["trainer"]
    assert [trainer[name] for name in names] == [-1, None, 0, None]
    (tmp_path / "mine.yaml").write_text(
        "trainer: {max_epochs: 3, num_sanity_val_steps: 1, logger: false}\n", encoding="utf-8"
    )
    trainer = printed(capsys, *shipped_one, "-c", str(tmp_path / "mine.yaml"), "--trainer.max_epochs=2")["trainer"]
    assert [trainer[name] for name in names] == [2, None, 1, False]


def test_metrics_are_written_below_the_folder_of_the_run_where_no_logger_is_named(config):
    for version in range(2):
        run(["fit", "-c", str(config), "--trainer.logger=null", f"--trainer.max_steps={version + 1}"])
        assert (config.parent / "logs" / f"version_{version}" / "metrics.csv").exists()
    saved = yaml.safe_load((config.parent / "config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["logger"] is None, "so that it follows another folder"


@pytest.mark.parametrize(
    ("arguments", "logger", "init_args"),
    [
        (["--trainer.logger.prefix=x"], "CSVLogger", {"save_dir": "runs/quickstart", "name": "logs", "prefix": "x"}),
        (["--trainer.logger.save_dir=x"], "CSVLogger", {"save_dir": "x", "name": "logs"}),
        (["--trainer.logger.name=x"], "CSVLogger", {"save_dir": "runs/quickstart", "name": "x"}),
        (
            ["--trainer.logger.version=7", "--trainer.default_root_dir=y"],
            "CSVLogger",
            {"save_dir": "y", "name": "logs", "version": 7},
        ),
        (
            ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=x"],
            "TensorBoardLogger",
            {"save_dir": "x", "name": "lightning_logs"},
        ),
    ],
)
def test_keys_of_the_logger_are_given_without_naming_it(capsys, arguments, logger, init_args):
    found = printed(capsys, "fit", "-c", "opd:text/quickstart.yaml", *arguments)["trainer"]["logger"]
    assert found["class_path"] == f"lightning.pytorch.loggers.{logger}"
    assert found["init_args"].items() >= init_args.items()


def test_a_run_without_an_end_is_refused(config):
    with pytest.raises(ValueError, match=r"nothing says when training ends; set max_steps, max_epochs or max_time"):
        run(["fit", "-c", str(config), "--trainer.max_steps=-1"])


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [([], 1), (["--trainer.val_check_interval=0.5"], 1), (["--trainer.val_check_interval=2"], None)],
)
def test_validations_count_steps_where_their_interval_is_a_number_of_steps(config, monkeypatch, arguments, epochs):
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    assert OPDCLI(["fit", "-c", str(config), *arguments]).trainer.check_val_every_n_epoch == epochs


def test_a_class_without_arguments_is_a_word(config, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "model:\n  init_args:\n    teachers: {teacher: {weights: EMA}}\n    objective:\n      terms:\n"
        "        - signal: ReverseKL\n          weights: [Entropy, Confidence]\n"
        "trainer:\n  callbacks: [Samples]\n",
        encoding="utf-8",
    )
    arguments = ("fit", "-c", str(config), "-c", str(overlay))
    found = printed(capsys, *arguments, "--model.teachers.teacher.weights.rate=0.5")
    (term,) = found["model"]["init_args"]["objective"]["terms"]
    assert term["signal"] == {
        "class_path": "opd_lightning.ReverseKL",
        "init_args": term["signal"]["init_args"],
    }
    assert [weight["class_path"] for weight in term["weights"]] == [
        "opd_lightning.objective.Entropy", "opd_lightning.objective.Confidence",
    ]  # fmt: skip
    weights = found["model"]["init_args"]["teachers"]["teacher"]["weights"]
    assert weights["class_path"] == "opd_lightning.EMA"
    assert weights["init_args"]["rate"] == 0.5
    assert found["trainer"]["callbacks"][0]["class_path"] == "opd_lightning.callbacks.Samples"
    again = tmp_path / "printed.yaml"
    again.write_text(yaml.safe_dump(found), encoding="utf-8")
    assert printed(capsys, "fit", "-c", str(again)) == found


def test_saved_configuration_reruns_the_experiment(config, tmp_path):
    run(["fit", "-c", str(config), "--trainer.max_steps=2"])
    first = torch.load(config.parent / "checkpoints" / "last.ckpt", weights_only=True)
    saved = config.parent / "config.yaml"
    run(["fit", "-c", str(saved), f"--trainer.default_root_dir={tmp_path / 'again'}"])
    second = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["global_step"] == 2
    for name, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][name], value), name


@pytest.mark.parametrize("which", ["last", "file"])
def test_the_command_line_wins_over_the_checkpoint(config, which):
    run(["fit", "-c", str(config), "--trainer.max_steps=1"])
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    path = "last" if which == "last" else str(checkpoint)
    run(
        [
            "fit",
            "-c",
            str(config),
            "--trainer.max_steps=2",
            "--model.rollout.horizon=5",
            "--checkpoint.may_change=[model.rollout]",
            f"--ckpt_path={path}",
        ]
    )
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    assert yaml.safe_load(state["opd_config"])["model"]["init_args"]["rollout"]["horizon"] == 5


def test_predict_writes_one_line_per_example_and_says_where(config, tiny_data, capsys):
    short = "--model.rollout.horizon=4"
    run(["predict", "-c", str(config), f"--data.predict={tiny_data}", short])
    path = config.parent / "predictions-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    given = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    assert f"wrote {len(lines)} predictions to {path}" in capsys.readouterr().out
    assert [line["index"] for line in lines] == list(range(len(given)))
    assert [line["location"] for line in lines[:2]] == [f"{tiny_data}, row 1", f"{tiny_data}, row 2"]
    for name in ("prompt", "answer"):
        assert [line[name] for line in lines] == [row[name] for row in given]
    assert "completion" in lines[0]


def test_an_evaluation_says_whose_student_it_asks_and_keeps_what_was_predicted_before(config, tiny_data, capsys):
    arguments = ["predict", "-c", str(config), f"--data.predict={tiny_data}", "--model.rollout.horizon=4"]
    with pytest.warns(UserWarning, match=r"without --ckpt_path the student is the configuration's, as yet untrained"):
        run(arguments)
    path = config.parent / "predictions-0.jsonl"
    path.write_text("before\n", encoding="utf-8")
    run(arguments)
    kept = config.parent / "predictions-0.earlier-1.jsonl"
    assert kept.read_text(encoding="utf-8") == "before\n"
    assert f"what an earlier run wrote to {path} is now in {kept.name}" in capsys.readouterr().out
    path.write_text("again\n", encoding="utf-8")
    run(arguments)
    assert kept.read_text(encoding="utf-8") == "before\n"
    assert (config.parent / "predictions-0.earlier-2.jsonl").read_text(encoding="utf-8") == "again\n"


@pytest.mark.parametrize(
    ("command", "what"), [("fit", "to go on from"), ("predict", "without it the student is as yet")]
)
def test_help_says_what_a_checkpoint_is_for(command, what, capsys):
    with pytest.raises(SystemExit):
        run([command, "--help"])
    assert what in next(line for line in capsys.readouterr().out.splitlines() if "--ckpt_path" in line)


def test_a_fit_says_where_its_checkpoint_is_and_a_misspelt_one_is_recognized(config, capsys):
    run(["fit", "-c", str(config), "--trainer.max_steps=1"])
    last = config.parent / "checkpoints" / "last.ckpt"
    assert f"the last checkpoint is {last}; `opd export {last} DIR` writes its model" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--ckpt_path=lats: there is no such file; did you mean last\?"):
        run(["fit", "-c", str(config), "--ckpt_path=lats"])
    with pytest.raises(ValueError, match=r"did you mean .*checkpoints/last\.ckpt\?"):
        run(["predict", "-c", str(config), "--ckpt_path=runs/lost.ckpt"])


def test_predictions_need_no_answer_and_show_the_system_turn(config, chat_student, tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": chat}) + "\n", encoding="utf-8")
    models = [f"--model.student.path={chat_student}", "--model.reward.class_path=ExactMatch"]
    models += [f"--model.teachers.teacher.weights.pretrained.path={chat_student}"]
    short = "--model.rollout.horizon=4"
    run(["predict", "-c", str(config), f"--data.predict={rows}", short, *models])
    line = json.loads((config.parent / "predictions-0.jsonl").read_text(encoding="utf-8"))
    assert "be brief" in line["prompt"]
    assert (line["index"], line["reward"]) == (0, None)


def test_validate_and_test_report_accuracy(config, tiny_data, capsys):
    rewarded = ["--model.reward.class_path=ExactMatch", "--trainer.limit_val_batches=2"]
    run(["validate", "-c", str(config), f"--data.validation={tiny_data}", *rewarded])
    assert "val/accuracy" in capsys.readouterr().out
    run(["test", "-c", str(config), f"--data.test={tiny_data}", *rewarded])
    assert "test/accuracy" in capsys.readouterr().out


def test_module_and_console_script_are_the_same_program():
    output = subprocess.run(
        [sys.executable, "-m", "opd_lightning", "--help"], capture_output=True, encoding="utf-8", check=True
    )
    assert "fit" in output.stdout
    assert "validate" in output.stdout


@pytest.mark.parametrize(("seeds", "same"), [((1, 1), True), ((1, 2), False)])
def test_seed_everything_decides_what_is_sampled(config, seeds, same, tmp_path):
    found = []
    for place, seed in enumerate(seeds):
        folder = tmp_path / str(place)
        run(["fit", "-c", str(config), "--trainer.max_steps=2", f"--seed_everything={seed}",
             f"--trainer.default_root_dir={folder}"])  # fmt: skip
        found.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) is same


def test_modules_in_the_working_folder_are_found(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "of_my_own.py").write_text(
        "from opd_lightning.reward import Reward\n\nclass Short(Reward):\n"
        "    def __call__(self, completion, example):\n        return -len(completion)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    found = printed(capsys, "fit", "-c", str(config), "--model.reward=of_my_own.Short")
    assert found["model"]["init_args"]["reward"] == {"class_path": "of_my_own.Short"}


def test_errors_of_construction_are_a_sentence_and_a_traceback_when_asked_for(config, monkeypatch, capsys):
    arguments = ["fit", "-c", str(config), "--model.rollout.temperature=-1"]
    monkeypatch.setattr(sys, "argv", ["opd", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "error: rollout.temperature must be >= 0" in error
    assert "what the command line says: --model.rollout.temperature=-1" in error
    assert "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["opd", *arguments, "--traceback"])
    with pytest.raises(ValueError, match=r"rollout\.temperature must be >= 0"):
        main()


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_start_that_failed_leaves_no_logs(command, tmp_path):
    data = ["--data.train=nowhere.jsonl", "--data.train_options=null", "--data.validation=0.5",
            "--data.validation_options=null", f"--trainer.default_root_dir={tmp_path}"]  # fmt: skip
    with pytest.raises(ValueError, match=r"no file or folder 'nowhere\.jsonl'"):
        run([command, "-c", "opd:text/quickstart.yaml", *data])
    assert not list(tmp_path.glob("logs*"))
