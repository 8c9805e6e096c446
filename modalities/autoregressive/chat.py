"""`opd chat RUN`: student and teachers of a run answer the same prompts, beside each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ...cli_errors import Parser
from ...export import read, restore
from ...module import OnPolicyDistillation
from ...policy import Acting
from ...printable import cell, printable, quoted
from ...report import read_config
from ...retention import BEFORE
from ...rollout_settings import Rollout
from ...rows import row_of
from ...teacher import Elsewhere, Initial, Teacher, enter
from ...trajectory import Example
from .models import context_length
from .serve import load
from .stream import Completion, acting_on, begun, stream

COMMANDS = "/row N: a held-out row, with its columns; /reset: a new conversation; /quit"


def chat(arguments: Sequence[str]) -> None:
    """Lets student and teachers of a run answer the same prompts, beside each other.

    ``opd chat RUN [--teacher NAME] [--alone] [--before] [--columns.NAME VALUE] [--image FILE] …``
    """
    # 1. what is asked for
    parser = Parser(
        prog="opd chat", description="Let student and teachers answer, beside each other.", allow_abbrev=False
    )
    parser.add_argument(
        "run", type=str, help="a run's folder; of a checkpoint or an exported folder the student answers alone"
    )
    parser.add_argument("--teacher", type=str, default=None, help="the only entry of model.teachers that answers")
    parser.add_argument("--alone", action="store_true", help="no teacher is loaded")
    parser.add_argument("--before", action="store_true", help="the student before training answers, too")
    parser.add_argument(
        "--columns", type=dict[str, str], default={}, help="what views show, such as --columns.solution '…'"
    )
    parser.add_argument("--image", type=str, default=None, help="an image that every conversation begins with")
    parser.add_argument("--temperature", type=float, default=None, help="default: that of validation, mostly 0, greedy")
    parser.add_argument("--max_tokens", type=int, default=None, help="of an answer (default: the run's horizon)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--device", type=str, default="auto", help="such as cpu, cuda:0 (default: a GPU where there is one)"
    )
    options = parser.parse_args(list(arguments))
    # 2. who answers
    if (Path(options.run) / "config.yaml").is_file():
        module, config = loaded(options.run, options.teacher, options.alone, options.before, options.device)
    else:
        if options.teacher or options.before:
            raise ValueError(
                f"{options.run} is no folder of a run, which names its teachers; the student is there alone"
            )
        module, config = load(options.run, options.device), {}
    own = {name: getattr(options, name) for name in ("temperature", "max_tokens") if getattr(options, name) is not None}
    rollout = module.evaluation.applied_to(module.rollout, own.pop("max_tokens", None))
    columns: Example = dict(options.columns) | ({"image": options.image} if options.image else {})
    if options.image and "image" not in module.reads:
        raise ValueError(f"--image: {type(module).__name__} reads no images")
    # 3. the conversation
    Conversation(module, replace(rollout, **own), options.seed, columns, config).run()


def loaded(run: str, teacher: str | None, alone: bool, before: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """Builds what a run was configured with, and loads its newest checkpoint.

    Args:
        run: its folder.
        teacher: the only entry of ``model.teachers`` that is loaded; None: all.
        alone: none is loaded.
        before: the student before training is one more.
        device: where they compute; ``auto``: a GPU where there is one.

    Returns:
        The setting and the configuration.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: there is no such teacher, it has no model here, or nobody writes text.
    """
    # 1. the setting, without weights
    config, state = read_config(Path(run)), read(run)
    parser = ArgumentParser()
    parser.add_subclass_arguments(OnPolicyDistillation, "model")
    module: Any = parser.instantiate_classes(parser.parse_object({"model": config["model"]})).model
    if "categorical" not in module.provides:
        raise ValueError(f"{run}: {type(module).__name__} trains no model that writes text")
    # 2. its teachers
    teachers: dict[str, Teacher] = module.teachers
    if teacher is not None and teacher not in teachers:
        raise ValueError(f"--teacher={teacher}: model.teachers has {sorted(teachers) or 'none'}")
    chosen = [] if alone else [name for name in teachers if name != BEFORE] if teacher is None else [teacher]
    for name in list(chosen):
        weights = teachers[name].weights
        if isinstance(weights, Elsewhere):
            print(printable(f"{name} does not answer: it {weights.refusal}"), flush=True)
            chosen.remove(name)
    needed = {*chosen, *(teachers[name].weights.base for name in chosen)}
    for name in teachers.keys() - needed:
        del teachers[name]
    if before:
        teachers[BEFORE] = Teacher(Initial())
    enter(teachers)
    # 3. weights
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    module.configure_model()
    restore(module, state)
    module.to(where).eval()
    module.streams.place(where)
    print(printable(f"{run}: the student after {state['global_step']} optimizer steps"), flush=True)
    return module, config


@dataclass
class Conversation:
    """Conversation of a person with the policies of a setting, each of which remembers its own answers.

    Attributes:
        module: the setting, with its models.
        rollout: how they answer.
        seed: of what is drawn; equal for all who answer.
        columns: of every row, for views.
        config: of the run, whose data `/row` reads; empty without.
        turns: of each policy, as messages.
    """

    module: Any
    rollout: Rollout
    seed: int
    columns: Example
    config: dict[str, Any] = field(default_factory=dict)
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    _rows: Any = None

    @property
    def speakers(self) -> list[str]:
        """Who answers: the student, then who else was loaded."""
        return [name for name in self.module.policies if name == "student" or name in self.module.teachers]

    @property
    def has_turns(self) -> bool:
        """Tells whether prompts are messages of a conversation, and not texts that are continued."""
        return not self.module.renderer(self.module.policies["student"]).is_raw("")

    def run(self) -> None:
        """Answers lines of the standard input until it ends."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            print(printable(f"{', '.join(self.speakers)}. {COMMANDS}"))
        for line in lines(is_terminal):
            try:
                if not self.takes(line):
                    return
            except KeyboardInterrupt:
                print("(stopped)")
            except ValueError as error:  # a prompt that nobody can read; there may be others
                print(printable(f"error: {error}"), file=sys.stderr, flush=True)

    def takes(self, line: str) -> bool:
        """Answers a line, which may be a command; False where it was the last.

        Raises:
            ValueError: it can't be answered, with the reason.
        """
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self.turns.clear()
        elif command == "/row":
            self.turns.clear()
            row = self.row(rest)
            print(printable(f"> {row['prompt'] if isinstance(row['prompt'], str) else quoted(row['prompt'], 400)}"))
            self.answer({name: {**self.columns, **row} for name in self.speakers})
        elif command.startswith("/") and command[1:].isalpha():
            raise ValueError(f"{command} is no command; there are {COMMANDS}")
        elif line.strip():
            self.answer({name: self.continued(name, line) for name in self.speakers})
        return True

    def continued(self, who: str, line: str) -> Example:
        """Builds the row of a line behind what was said before."""
        history = self.turns.get(who)
        # the first is a text, as rows of a data set are
        return {**self.columns, "prompt": [*history, {"role": "user", "content": line}] if history else line}

    def row(self, number: str) -> Example:
        """Reads a held-out row of the run, by its number from 0 on.

        Raises:
            ValueError: there is none.
        """
        if not number.strip().isdecimal() or not self.config:
            raise ValueError("/row N: a number from 0 on, of the held-out rows of a run's folder")
        if self._rows is None:
            parser = ArgumentParser()
            parser.add_subclass_arguments(L.LightningDataModule, "data")
            data = parser.instantiate_classes(parser.parse_object({"data": self.config["data"]})).data
            data.setup("validate")
            self._rows = data.validation or ()
        if int(number) >= len(self._rows):
            raise ValueError(f"/row {number.strip()}: there are {len(self._rows)} held-out rows, from 0 on")
        return dict(row_of(self._rows, int(number)))

    def answer(self, rows: dict[str, Example]) -> None:
        """Prints what each policy answers to its row, as it is written; then it is part of what was said."""
        # 1. what each reads: refused before anybody has answered
        acting, titles = {}, {}
        for who, row in rows.items():
            acting[who], note = self.acting(who, row)
            titles[who] = f"{who}{note}"
        # 2. their answers
        answers: dict[str, list[Completion]] = {who: begun(self.module, acting[who].policy, 1) for who in acting}
        with Page(titles, answers) as page:
            for who, one in acting.items():
                page.current = who
                room = context_length(one.policy) - one.prompts["input_ids"].shape[1]
                rollout = replace(self.rollout, horizon=min(self.rollout.horizon, room))
                stream(self.module, one, rollout, [self.seed], hear=page.show, completions=answers[who])
        for who, row in rows.items() if self.has_turns else ():
            messages = (
                row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
            )
            self.turns[who] = [*messages, {"role": "assistant", "content": answers[who][0].text}]

    def acting(self, who: str, row: Example) -> tuple[Acting, str]:
        """Shows a row to a policy as in training; returns what it then reads, and what is to be said of that.

        Raises:
            ValueError: it can't read it, with the reason.
        """
        module, (own,), note = self.module, self.module.shown([row]), ""
        policy = reader = module.policies[who]
        if who != "student":
            teacher = module.teachers[who]
            reader = policy if teacher.own_template else module.policies["student"]
            missing = [name for name in (teacher.view.columns if teacher.view else ()) if row.get(name) is None]
            (view,) = [None] if missing else teacher.seen([row], [own])
            if view is None:
                columns = f", which reads {', '.join(missing)}: --columns.{missing[0]} '…', or /row" if missing else ""
                note = f" (without its view{columns})" if teacher.view else ""
            own = own if view is None else view
        acting, context = acting_on(module, policy, reader, own), context_length(policy)
        if (length := acting.prompts["input_ids"].shape[1]) >= context:
            raise ValueError(
                f"{who}: {length} tokens leave no room in its context of {context}; /reset begins a new conversation"
            )
        return acting, note


class Page:
    """Answers as they are written: columns on a terminal, one after the other elsewhere.

    Args:
        titles: of who answers, in order.
        answers: theirs.
    """

    def __init__(self, titles: dict[str, str], answers: dict[str, list[Completion]]) -> None:
        self.titles, self.answers, self.current = titles, answers, ""
        self.console = Console()
        self._live = Live(console=self.console, get_renderable=self._table, auto_refresh=False)

    def __enter__(self) -> Page:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.console.is_terminal:
            self.show()
            self._live.stop()
            return
        for who, title in self.titles.items():
            print(printable(f"{title}: {self.answers[who][0].text}"), flush=True)

    def show(self) -> None:
        """Shows what there is."""
        if self.console.is_terminal:
            self._live.refresh()

    def _table(self) -> Table:
        table = Table(expand=True, show_lines=False)
        for title in self.titles.values():
            table.add_column(cell(title), ratio=1, overflow="fold")
        table.add_row(*(cell(self.answers[who][0].text) for who in self.titles))
        return table


def lines(is_terminal: bool) -> Iterator[str]:
    """Reads lines of the standard input, from a terminal with what is behind an arrow key."""
    if not is_terminal:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  # `input` then edits lines

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
