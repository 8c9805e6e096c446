"""Every shipped configuration parses, and the ones that need nothing from outside run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.catalog import Method, read_all
from opd_lightning.cli import OPDCLI, run, understood
from opd_lightning.modalities.autoregressive.elsewhere.score import score
from tests.chatting import Chatting
from tests.families import family
from tests.tiny import save_model

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
    "text": ["--data.train_options.count=64", "--data.validation_options.count=8"],
    "vision_language": ["--data.train_options.count=64", "--data.validation_options.count=8"],
    "gui_grounding": ["--data.train_options.pages=[click-color]", "--data.validation_options.pages=[click-test]"],
    "diffusion": ["--data.train_options.limit=32"],
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


def methods() -> list:
    """Each method with every setting that its head names; slow where others have trained all of its parts already."""
    cases, seen, everything = [], set(), read_all()
    for setting in ("text", "vision_language", "gui_grounding", "diffusion"):
        # those with the most parts first, which are the fewest that have all of them
        for method in sorted(everything, key=lambda method: -len(method.parts)):
            if setting in method.settings:
                new = setting == method.settings[0] and not seen.issuperset(method.parts)
                seen |= set(method.parts) if new else set()
                marks = [] if new else [pytest.mark.slow]
                cases.append(pytest.param(method, setting, id=f"{method.name}-{setting}", marks=marks))
    return cases


def recorded(setting: str, folder: Path) -> list[str]:
    """Records the quickstart's teacher; returns what a method that reads it is told in place of `FEW`."""
    score(["-c", f"opd:{setting}/quickstart.yaml", *SMALL, *FEW[setting], f"--into={folder}"])
    return [f"--model.teachers.teacher.weights.path={folder}", f"--data.train={folder / 'rows.jsonl'}"]


def other_tokenizer(setting: str, folder: Path) -> list[str]:
    """Builds a teacher of another tokenizer; returns what a method that asks it is told in place of `FEW`."""
    save_model(folder, tokenizer=family("byte_level", template=False))
    return [f"--model.teachers.teacher.weights.pretrained.path={folder}", *FEW[setting]]


def author(body: dict[str, Any]) -> str:
    """What a model behind a chat endpoint says where rubrics are written and graded."""
    form = json.dumps(body.get("response_format", ""))
    if "criteria" in form:
        return json.dumps({"criteria": [{"criterion": "It is right.", "weight": 1}] * 4})
    return json.dumps({"met": [True, False, True, False]}) if "met" in form else "42"


def behind_an_endpoint(setting: str, folder: Path) -> list[str]:
    """Starts a chat endpoint; returns what a method that asks it is told."""
    endpoint = "--model.reward.init_args.endpoint"
    return [f"{endpoint}.url={Chatting(author).url}", f"{endpoint}.keep={folder}", *FEW[setting]]


PREPARED = {"Cached": recorded, "OtherTokenizer": other_tokenizer, "Criteria": behind_an_endpoint}


def train(method: Method, setting: str, folder: Path) -> None:
    """Trains two optimizer steps on the setting's quickstart."""
    files = [part for name in method.stack(setting) for part in ("-c", f"opd:{name}.yaml")]
    prepared = [prepare(setting, folder / "teacher") for part, prepare in PREPARED.items() if part in method.parts]
    few = prepared[0] if prepared else FEW[setting]
    run(["fit", *files, *SMALL, *few, f"--trainer.default_root_dir={folder}"])
    assert (folder / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(("method", "setting"), methods())
def test_methods_train(method, setting, tmp_path):
    train(method, setting, tmp_path)


def test_keys_and_values_of_methods_are_meant_in_all_of_their_settings():
    for method in read_all():
        for setting in method.settings:
            understood(["fit", *(part for name in method.stack(setting) for part in ("-c", f"opd:{name}.yaml"))])


@pytest.mark.parametrize("name", ["pretrain_teacher", "warm_start_student", "pretrain_long", "long", "tools"])
def test_configurations_with_models_that_ship_run(name, tmp_path):
    run(["fit", "-c", f"opd:text/{name}.yaml", *SMALL, *FEW["text"], f"--trainer.default_root_dir={tmp_path}"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
