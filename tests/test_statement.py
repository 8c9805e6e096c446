"""What a run measured stands in the card of its student; what it did not measure does, too."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

from opd_lightning.export import write
from opd_lightning.statement import AREAS, KNOWN, OTHERS, TASK, Statement, folder_of, statement_of
from tests.exported import exportable

COLUMNS = (
    "accuracy teacher/accuracy retention/kl retention/perplexity lm_eval/closed/acc in_form retention/accuracy pass@4 "
    "teacher/length"
)
LOG = f"""epoch,step,{",".join(f"val/{column}" for column in COLUMNS.split())}
,0,0.25,1.0,0.0,12.5,0.5,0.0,0.5,0.75,1.0
0,2,0.75,,0.25,13.5,0.375,1.0,0.25,0.875,
0,3,1.0,,9.0,99.0,0.0,1.0,0.0,1.0,
"""


@pytest.fixture
def run(tmp_path, make_world):
    """A run's folder with a checkpoint after 3 optimizer steps, and a log that goes on."""
    folder = tmp_path / "run"
    exportable(folder / "checkpoints" / "last.ckpt", make_world("text").student)
    logs = folder / "logs" / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text(LOG, encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0}), encoding="utf-8")
    return folder


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[1] if line[1] != "not measured" else line[0]: line[2:] for line in lines}


def test_the_card_tells_what_was_measured_and_what_was_not(run, tmp_path):
    write(run, tmp_path / "student")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    table = rows(card.content)
    assert table["measure"] == ["before", "after", "teacher"]
    assert table["accuracy"] == ["25.0%", "75.0%", "100.0%"]
    assert table["pass@4"] == ["75.0%", "87.5%", "not measured"]
    assert table["retention/accuracy"] == ["50.0%", "25.0%", "not measured"]
    assert table["retention/perplexity"] == ["12.50", "13.50", "not measured"]
    assert table["retention/kl"] == ["0.000", "0.250", "not measured"]
    assert table["lm_eval/closed/acc"] == ["0.500", "0.375", "not measured"]
    assert {*AREAS} <= table.keys()
    assert "Measured after optimizer step 3 of 3." in card.content
    assert "99" not in "".join(map(str, table.values())), "what was measured later is of another student"
    values = {result.metric_name: result for result in card.data.eval_results}
    assert values["accuracy"].metric_value == 0.75
    assert values["lm_eval/closed/acc"].dataset_name == "closed"
    assert values["retention/kl"].dataset_type == "prompts-of-another-kind"
    assert {result.task_type for result in values.values()} == {"text-generation"}


def test_without_a_log_nothing_was_measured(run, tmp_path):
    write(run / "checkpoints" / "last.ckpt", tmp_path / "with")
    card = (tmp_path / "with" / "README.md").read_text(encoding="utf-8")
    assert "| the task, held-out prompts | accuracy | 25.0%" in card
    (run / "logs" / "version_0" / "metrics.csv").unlink()
    write(run, tmp_path / "without")
    card = ModelCard.load(tmp_path / "without" / "README.md")
    assert card.data.eval_results is None
    assert "Nothing was measured after training." in card.content
    assert {TASK, OTHERS, KNOWN, *AREAS} <= rows(card.content).keys()


def test_metrics_of_the_run_are_in_it_unless_their_names_could_be_anything(run):
    measured = statement_of(run, 3, ["in_form", "s3cret key: 4711"]).measures
    names = [one.name for one in measured]
    assert "in_form" in names
    assert len(names) == 7
    text = (run / "logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8")
    (run / "logs" / "version_0" / "metrics.csv").write_text(text.replace("closed", "/home/alice"), encoding="utf-8")
    assert "alice" not in statement_of(run, 3, []).markdown()


def test_measured_on_the_way_is_said(run):
    assert statement_of(run, 7, []).last == 4
    assert "after optimizer step 4 of 7" in statement_of(run, 7, []).markdown()
    assert statement_of(None, 7, []) == Statement(7, 0, [])


def test_the_folder_of_a_checkpoint_is_found(run, tmp_path):
    assert folder_of(run) == folder_of(run / "checkpoints" / "last.ckpt") == run
    assert folder_of(tmp_path / "elsewhere" / "last.ckpt") is None
