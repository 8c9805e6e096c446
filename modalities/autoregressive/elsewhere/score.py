"""`opd score`: asks the teachers of a configuration before training, and writes down what they tell."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pyarrow import parquet

from ....audit import audit
from ....cli import OPDCLI
from ....note import memories, remember
from ....printable import printable
from ....retention import BEFORE
from ....rollout import RolloutLoader
from ....rows import row_of
from ....teacher import Elsewhere
from ....trajectory import Trajectories
from .identity import READ, differences, mark, mark_of, reading, weights
from .question import answers, questions
from .store import ABOUT, FORMAT, columns_of, packed_head, part, parts, read_about, write_part, write_whole

HELP = """usage: opd score --into FOLDER [--top_k K] [--hidden] -c FILE [-c FILE …] [--key=value …]

Ask the teachers of a configuration about the completions of its first epoch, and write down what they tell.

Who acts is the configuration's rollout.behavior: given completions (dataset), or rollouts that the student makes.
Files and keys are those of `opd fit`. The same command again goes on where it was killed.

  --into FOLDER   part-….parquet (answers), rows.jsonl (rows with the rollouts), about.json (what they depend on)
  --top_k K       also the K likeliest ids of each step (default: 0, the log-prob of the action alone)
  --hidden        also the hidden states and the teacher's head, for losses over the full vocabulary
"""


class ScoreCLI(OPDCLI):
    """The configuration of a run, which is not trained.

    Args:
        into: folder of the answers.
        top_k: likeliest ids of each step to write down.
        hidden: write hidden states down.
        arguments: those of `opd fit`.
    """

    def __init__(self, into: Path, top_k: int, hidden: bool, arguments: Sequence[str]) -> None:
        self._recorder = Recorder(into, top_k, hidden)
        super().__init__(["fit", *arguments])

    def _run_subcommand(self, subcommand: str) -> None:
        self._recorder.record(self.model, self.datamodule, self.trainer)


def score(arguments: Sequence[str]) -> None:
    """Asks the teachers of a configuration before training, and writes down what they tell."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return
    parser = argparse.ArgumentParser(prog="opd score", allow_abbrev=False)
    parser.add_argument("--into", type=str, required=True)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--hidden", action="store_true")
    options, rest = parser.parse_known_args(list(arguments))
    ScoreCLI(Path(options.into), options.top_k, options.hidden, rest)


class Recorder:
    """Writes down what the teachers of a run tell of the completions of its first epoch.

    Args:
        folder: where to.
        top_k: likeliest ids of each step.
        hidden: hidden states, too.

    Raises:
        ValueError: top_k below 0.
    """

    def __init__(self, folder: Path, top_k: int = 0, hidden: bool = False) -> None:
        if top_k < 0:
            raise ValueError(f"--top_k must be >= 0, got {top_k}")
        self.folder, self.top_k, self.hidden = folder, top_k, hidden

    @torch.no_grad()
    def record(self, module: Any, data: L.LightningDataModule, trainer: L.Trainer) -> None:
        """Asks, and writes a part for each generation batch; parts that are there are kept.

        Raises:
            ValueError: no teachers; several ranks; the folder's parts depend on something else; the disk is too small.
        """
        # 1. the run as it is before its first step, without the teacher of `evaluation.retention`
        module.teachers.pop(BEFORE, None)
        loader = begun(module, data, trainer)
        if trainer.world_size > 1 or not module.teachers:
            raise ValueError(
                f"opd score asks the teachers of one process; there are {len(module.teachers)} teachers and "
                f"{trainer.world_size} processes"
            )
        # 2. what the answers depend on, compared with what is there
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self._about(module, loader)
        if (self.folder / ABOUT).exists():
            then = read_about(self.folder)
            for name, own in about["teachers"].items():  # a server's answers are a little apart each time
                origin, before = module.teachers[name].weights, then["teachers"].get(name, {}).get("weights", "")
                if isinstance(origin, Elsewhere) and origin.same(mark_of(own["weights"]), mark_of(before)):
                    own["weights"] = before
            check_same(self.folder, then, about)
        done = {int(path.stem.removeprefix("part-")) for path in parts(self.folder)}
        self._check_room(module, loader)
        for name in module.teachers if self.hidden else ():  # not before: parts that are there need the head of theirs
            write_whole(self.folder / f"{name}.safetensors", packed_head(module.head(module.policies[name]))[0])
        write_whole(self.folder / ABOUT, json.dumps(about, indent=1))
        # 3. part by part, with what notes remember behind each, then the rows that go with them
        self._remember(module, done)
        for number, trajectories in loader.first_epoch(done):
            columns = self._columns(module, trajectories, loader)
            self._keep_memory(module, number)  # before its part: one without the other is made again
            write_part(part(self.folder, number), columns)
        write_rows(self.folder, loader.dataset)
        write_whole(self.folder / ABOUT, json.dumps(about | {"complete": True}, indent=1))
        print(printable(f"{self.folder} holds {len(parts(self.folder))} parts; {len(done)} were there before"))

    def _memory(self, number: int) -> Path:
        return self.folder / f"memory-{number:05d}.pt"

    def _remember(self, module: Any, done: set[int]) -> None:
        """Restores what notes remembered behind the last part that is there.

        Raises:
            ValueError: nobody knows it.
        """
        if not done or not any(memories(module.notes).values()):
            return
        memory = self._memory(max(done))
        if done != {*range(len(done))} or not memory.exists():
            names = ", ".join(name for name, kept in memories(module.notes).items() if kept)
            raise ValueError(
                f"{self.folder}: model.notes.{names} remembers what came before, and what it remembered when part "
                f"{max(done)} was written is not there ({memory.name}). Record into another folder"
            )
        remember(module.notes, torch.load(memory, weights_only=True))

    def _keep_memory(self, module: Any, number: int) -> None:
        """Writes down what notes remember behind a part; what they remembered two parts before goes."""
        if any(memories(module.notes).values()):
            partial = self._memory(number).with_suffix(".partial")
            torch.save(memories(module.notes), partial)
            os.replace(partial, self._memory(number))
            self._memory(number - 2).unlink(missing_ok=True)

    def _about(self, module: Any, loader: RolloutLoader) -> dict[str, Any]:
        """Describes all that the answers depend on."""
        rollout = module.rollout
        acting = [rollout.behavior, rollout.members, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p]
        acting += [rollout.batch_size, rollout.group_size, loader.size]
        acting += [] if rollout.blend is None else [vars(rollout.blend)]
        acting += [weights(module, name) for name in sorted(rollout.policies & {*module.teachers})]
        return {
            "format": FORMAT,
            "complete": False,
            "teachers": {name: self._teacher(module, name) for name in module.teachers},
            "student": module.streams.base,
            "rollouts": mark(acting),
            "horizon": rollout.horizon,
            "seed": loader.seed,
            "rows": mark(loader.fingerprints.tolist()),
        }

    def _teacher(self, module: Any, name: str) -> dict[str, Any]:
        told = module.teachers[name].weights.top_k
        if told is not None and self.top_k > told:
            raise ValueError(f"--top_k={self.top_k}: model.teachers.{name} itself tells {told} of the likeliest ids")
        if self.top_k > module.vocabulary:
            raise ValueError(f"--top_k={self.top_k}: there are {module.vocabulary} ids")
        own = {**reading(module, module.teachers[name]), "weights": weights(module, name), "top_k": self.top_k}
        if not self.hidden:
            return own
        if name not in module.policies:
            raise ValueError(f"--hidden: model.teachers.{name} is elsewhere, and its hidden states are, too")
        return own | {"hidden": packed_head(module.head(module.policies[name]))[1]}

    def _check_room(self, module: Any, loader: RolloutLoader) -> None:
        """Says how much will be written at most, and refuses what the disk has no room for."""
        weights = [module.head(p).module.weight for name, p in module.policies.items() if name in module.teachers]
        per_step = 4 + 8 * self.top_k + (max(w.shape[1] * w.element_size() for w in weights) if self.hidden else 0)
        steps = len(loader.dataset) * module.rollout.group_size * module.rollout.horizon
        size, free = steps * per_step * len(module.teachers), shutil.disk_usage(self.folder).free
        text = f"at most {size / 2**20:,.1f} MiB, {per_step:,} bytes for each of {steps:,} steps and each teacher"
        print(printable(f"{self.folder}: {text}"))
        if size > free:
            raise ValueError(f"{self.folder} has room for {free / 2**20:,.1f} MiB, and this takes {text}")

    def _columns(self, module: Any, trajectories: Trajectories, loader: RolloutLoader) -> dict[str, list[Any]]:
        """Asks every teacher about a generation batch, in the micro-batches in which it would be trained."""
        if module.notes:  # views may show them
            trajectories = loader.actor.judged(trajectories)
        written = [row[kept].tolist() for row, kept in zip(trajectories.actions, trajectories.mask, strict=True)]
        columns: dict[str, list[Any]] = {
            "row": trajectories.row.tolist(),
            "source": [trajectories.sources[i] for i in trajectories.source.tolist()],
            "completion": module.completions(trajectories),
            "completion_ids": written,
        }
        for name in module.teachers:
            asked, told = [], []
            size, dtype = module.objective.chunk_size, self._dtype(module, name)
            for piece in trajectories.split(loader.size):
                moved = piece.to(loader.reader.device)
                with loader.trainer.precision_plugin.forward_context():
                    distribution = module.streams.query(name, moved).distribution
                    told += answers(distribution, moved, size, self.top_k, dtype)
                views = module.streams.seen(name, piece.examples, piece.student_view)
                asked += questions(module, piece, views)
            columns |= columns_of(name, asked, told)
        return columns

    def _dtype(self, module: Any, name: str) -> torch.dtype | None:
        return module.head(module.policies[name]).module.weight.dtype if self.hidden else None


def begun(module: Any, data: L.LightningDataModule, trainer: L.Trainer) -> RolloutLoader:
    """Loads models and rows as a fit does, and returns the training dataloader."""
    module.rollout.max_staleness = 0  # nobody trains meanwhile
    trainer.strategy.setup_environment()
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]  # as a fit sets it
    data.prepare_data()
    data.setup("fit")
    module.configure_model()
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    module.streams.place(trainer.strategy.root_device)
    audit(module, trainer)
    loader = data.train_dataloader()
    assert isinstance(loader, RolloutLoader)
    return loader


def check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on in a folder whose parts depend on something else.

    Raises:
        ValueError: with all that differs.
    """
    different = differences(then, now, ("student", "rollouts", "horizon", "seed", "rows"))
    for name in sorted({*then["teachers"], *now["teachers"]}):
        present, past = now["teachers"].get(name, {}), then["teachers"].get(name, {})
        different += [f"{name}'s {text}" for text in differences(past, present, (*READ, "weights", "top_k", "hidden"))]
    if different:
        raise ValueError(
            f"{folder} was recorded otherwise: {'; '.join(different)}. Go on with what it was, or name another folder"
        )


def write_rows(folder: Path, dataset: Any) -> None:
    """Writes the rows with the completions that were recorded, in the order of the rows, for `data.train`.

    Left out where rows hold what JSON can't, such as images: then the data set itself is trained.
    """
    recorded: list[dict[str, Any]] = []
    for file in parts(folder):
        recorded += parquet.read_table(file, columns=["row", "source", "completion", "completion_ids"]).to_pylist()
    lines = []
    for rollout in sorted(recorded, key=lambda rollout: rollout["row"]):  # stable: members of a group stay in order
        row = dict(row_of(dataset, rollout["row"]))
        if rollout["source"] != "dataset":
            row |= {name: rollout[name] for name in ("completion", "completion_ids")}
        try:
            lines.append(json.dumps(row, ensure_ascii=False))
        except TypeError:
            print(printable(f"{folder}: no rows.jsonl, since rows hold more than text and numbers"))
            return
    write_whole(folder / "rows.jsonl", "".join(f"{line}\n" for line in lines))
