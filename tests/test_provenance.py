"""What a run writes down of its files, its own choices, its libraries and its machine."""

from __future__ import annotations

import json
import socket

from opd_lightning.cli import understood
from opd_lightning.cli_errors import Parser
from opd_lightning.provenance import provenance, write_provenance


def written(*arguments: str, folder) -> dict:
    understood(["fit", *arguments])
    write_provenance(Parser.checked, folder, devices=2)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_what_differs_from_the_shipped_files_is_told(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "trainer: {max_steps: 200, log_every_n_steps: 1}\n"
        "model:\n  init_args:\n    rollout: {horizon: 7}\n    objective: {terms: [{signal: JSD}]}\n",
        encoding="utf-8",
    )
    arguments = ["-c", "opd:text/quickstart.yaml", "-c", str(own), "--model.rollout.batch_size=8"]
    told = written(*arguments, "--trainer.default_root_dir=there", folder=tmp_path)
    assert told["files"] == ["opd:text/quickstart.yaml", str(own)]
    assert sorted(told["changes"]) == [
        ["model.objective.terms.0.signal", "ReverseKL", "JSD"],
        ["model.rollout.batch_size", "64", "8"],
        ["model.rollout.horizon", "56", "7"],
        ["trainer.default_root_dir", "runs/quickstart", "there"],
        ["trainer.log_every_n_steps", "5", "1"],
    ]
    assert told["versions"].keys() >= {"opd-lightning", "torch", "Python"}
    assert told["hardware"]["devices of the run"] == "2"
    assert socket.gethostname() not in json.dumps(told["hardware"])


def test_a_run_as_it_ships_changes_nothing_and_one_of_own_files_has_nothing_to_compare(tmp_path):
    assert written("-c", "opd:text/quickstart.yaml", folder=tmp_path)["changes"] == []
    own = tmp_path / "mine.yaml"
    own.write_text("trainer: {max_steps: 1}\n", encoding="utf-8")
    assert written("-c", str(own), folder=tmp_path) == {
        **provenance([], devices=2),
        "files": [str(own)],
    }
