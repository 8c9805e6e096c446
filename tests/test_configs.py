"""Every shipped configuration parses, and the ones that need nothing from outside run."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_lightning.catalog import Method, read_all
from opd_lightning.cli import OPDCLI, run
from opd_lightning.modalities.autoregressive.elsewhere.score import score

ROOT = Path(__file__).parent.parent / "configs"
TRAINERS = sorted(path.stem for path in (ROOT / "trainer").glob("*.yaml"))
SETTINGS = sorted(
    f"{setting}/{path.stem}"
    for setting in ("text", "vision_language", "gui_grounding", "diffusion", "recipes")
    for path in (ROOT / setting).glob("*.yaml")
)
# Settings that overlay another setting
OVERLAID = {"text/qwen3_qlora": ["text/qwen3_gsm8k"]} | {
    f"recipes/{path.stem}": ["recipes/form"] for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "form"
}
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


def methods(first: bool) -> list:
    """Each method with the first of the settings that its head names, or with each of the others."""
    pairs = [(m, s) for m in read_all() for s in m.settings if (s == m.settings[0]) == first]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs]


def recorded(setting: str, folder: Path) -> list[str]:
    """Records the quickstart's teacher; returns what a method that reads it is told in place of `FEW`."""
    score(["-c", f"opd:{setting}/quickstart.yaml", *SMALL, FEW[setting], f"--into={folder}"])
    return [f"--model.teachers.teacher.weights.path={folder}", f"--data.train={folder / 'rows.jsonl'}"]


def train(method: Method, setting: str, folder: Path) -> None:
    """Trains two optimizer steps on the setting's quickstart."""
    files = [part for name in method.stack(setting) for part in ("-c", f"opd:{name}.yaml")]
    few = recorded(setting, folder / "recorded") if "Cached" in method.parts else [FEW[setting]]
    run(["fit", *files, *SMALL, *few, f"--trainer.default_root_dir={folder}"])
    assert (folder / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(("method", "setting"), methods(first=True))
def test_methods_train(method, setting, tmp_path):
    train(method, setting, tmp_path)


@pytest.mark.parametrize(("method", "setting"), methods(first=False))
def test_methods_parse_in_their_other_settings(method, setting):
    parse(*method.stack(setting))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "setting"), methods(first=False))
def test_methods_train_in_their_other_settings(method, setting, tmp_path):
    train(method, setting, tmp_path)


@pytest.mark.parametrize("name", ["pretrain_teacher", "warm_start_student", "pretrain_long", "long"])
def test_configurations_with_models_that_ship_run(name, tmp_path):
    run(["fit", "-c", f"opd:text/{name}.yaml", *SMALL, FEW["text"], f"--trainer.default_root_dir={tmp_path}"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
