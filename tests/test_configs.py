"""Every shipped configuration parses, and the ones that need nothing from outside run."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_lightning.cli import OPDCLI, run

ROOT = Path(__file__).parent.parent / "configs"
# a method in a setting's folder overlays the quickstart of that setting, the others text's
OVERLAID_EMA = ("teacher_ema", "teacher_hard_sync", "teacher_frozen")
OVER = {f"overlays/{name}": ["-c", "opd:methods/text/sdft.yaml"] for name in OVERLAID_EMA}
METHODS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("methods", "overlays")
    for path in (ROOT / folder).rglob("*.yaml")
)
TRAINERS = sorted(path.stem for path in (ROOT / "trainer").glob("*.yaml"))
SETTINGS = sorted(
    f"{setting}/{path.stem}"
    for setting in ("text", "vision_language", "gui_grounding", "diffusion")
    for path in (ROOT / setting).glob("*.yaml")
)
# Settings that overlay another setting
OVERLAID = {"text/qwen3_qlora": ["text/qwen3_gsm8k"]}
SMALL = [
    "--trainer.max_steps=2",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--model.evaluation.before=false",
    "--model.rollout.batch_size=4",
]
FEW = {
    "text": "--data.train_options.count=64",
    "vision_language": "--data.train_options.count=64",
    "gui_grounding": "--data.train_options.pages=[click-color]",
    "diffusion": "--data.train_options.limit=32",
}


def parse(*names: str) -> None:
    """Parses without loading a model."""
    arguments = [part for name in names for part in ("-c", f"opd:{name}.yaml")]
    with pytest.raises(SystemExit) as caught:
        OPDCLI(["fit", *arguments, "--print_config"])
    assert caught.value.code == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_parse(name):
    parse(*OVERLAID.get(name, []), name)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_overlays_parse(name):
    parse("text/quickstart", f"trainer/{name}")


@pytest.mark.parametrize("name", METHODS)
def test_method_overlays_run_on_the_quickstart(name, tmp_path):
    setting = name.split("/")[1] if name.count("/") == 2 else "text"
    run(["fit", "-c", f"opd:{setting}/quickstart.yaml", *OVER.get(name, []), "-c", f"opd:{name}.yaml",
         *SMALL, FEW[setting], f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["pretrain_teacher", "warm_start_student"])
def test_supervised_configurations_run(name, tmp_path):
    run(["fit", "-c", f"opd:text/{name}.yaml", *SMALL, FEW["text"], f"--trainer.default_root_dir={tmp_path}"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
