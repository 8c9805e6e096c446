"""`opd fit|validate|test|predict`: a LightningCLI over settings, objectives and callbacks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import set_dumper, set_loader
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn

from . import data, objective, policy, reward, teacher  # noqa: F401  (so that short class names resolve)
from .changes import told
from .checkpoint import Checkpoint
from .checkpoint_file import check_named, check_ours
from .cli_errors import Parser
from .cli_help import print_help
from .config_file import ConfigError, Source, Text, dump, leaves, load, overlaid
from .config_keys import Checker, Exactly
from .entry_points import import_parts
from .folder import check_folder
from .front import front, keys_of, meanings, resolve  # noqa: F401  (resolve: for scripts)
from .jsonargparse_internals import get_loader_exceptions
from .module import OnPolicyDistillation
from .predictions import PredictionWriter
from .printable import printable
from .progress import phase
from .provenance import write_provenance
from .quiet import hush
from .remote import is_url, is_web, refuse_url
from .sharding import FSDP2  # noqa: F401  (registers --trainer.strategy=fsdp2)
from .step_progress import StepProgress

set_loader("yaml", load, get_loader_exceptions("yaml"))
set_dumper("yaml", dump)


DEFAULTS = {"max_epochs": -1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
"""Trainer defaults: prompts are drawn without end, so steps count, not epochs; ``evaluation.before`` comes first."""
ROOT = "configuration, logs, samples and the lock are written there; checkpoint.dirpath may be elsewhere"
LOGS = "logs"
"""Folder of the default CSVLogger: it writes ``logs/version_…/metrics.csv`` below ``trainer.default_root_dir``."""


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration beside the checkpoints, and into each of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False, "overwrite": True})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, OnPolicyDistillation)
        pl_module.history.begin(self.parser.dump(self.config, skip_unset=False))
        saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
        pl_module.history.may_change = [key for callback in saved for key in callback.may_change]

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Skips Lightning's own writing: a resume may still be refused, and then the record would be wrong."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        if trainer.is_global_zero:
            text = "".join(f"# {line}\n" for line in told(pl_module.history.changes)) + pl_module.history.config_yaml
            folder = check_folder(trainer.default_root_dir)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
            write_provenance(Parser.checked, folder, trainer.world_size)


class OPDCLI(LightningCLI):
    """LightningCLI in subclass mode: the setting and the data are named by class in YAML.

    Args:
        args: those after `opd`.
        callbacks: further ones, of the command that runs it.

    Raises:
        SystemExit: with code 2, a message about key, file and line printed: the configuration can't be meant.
    """

    def __init__(self, args: Sequence[str], callbacks: Sequence[L.Callback] = ()) -> None:
        arguments = understood(args)
        self._command = arguments[0] if arguments else ""
        try:
            with phase("preparing"):
                super().__init__(
                    OnPolicyDistillation,
                    L.LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    save_config_callback=SaveConfig,
                    seed_everything_default=0,
                    trainer_defaults={**DEFAULTS, "callbacks": [PredictionWriter(), *callbacks]},
                    parser_class=Parser,
                    args=arguments,
                )
        finally:
            remove_empty_logs(getattr(self, "trainer", None))

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lists the command that is run: a parser for each of the others would be built, and not asked."""
        commands = LightningCLI.subcommands()
        return {self._command: commands[self._command]} if self._command in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Makes the trainer with what its other settings decide: logger, progress, what validations count."""
        settings = self.config_init[self.subcommand].trainer
        refuse_url("trainer.default_root_dir", settings.default_root_dir, ROOT)
        if settings.logger is None:
            kwargs["logger"] = CSVLogger(settings.default_root_dir or os.getcwd(), name=LOGS)
        if isinstance(settings.val_check_interval, float | None):  # a share of an epoch, so epochs count
            kwargs["check_val_every_n_epoch"] = settings.check_val_every_n_epoch or 1
        given = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in given):
            self.trainer_defaults["callbacks"].append(StepProgress())
        trainer = super().instantiate_trainer(**kwargs)
        self.model.trainer = trainer
        self.model.check()  # who asks, acts and provides is known with the callbacks
        return trainer

    def before_fit(self) -> None:
        """Refuses runs without an end, and checkpoints or folders that can't be used, before anything is loaded."""
        trainer = self.trainer
        if trainer.max_steps == trainer.max_epochs == -1 and self.config.fit.trainer.max_time is None:
            raise ValueError("trainer: nothing says when training ends; set max_steps, max_epochs or max_time")
        check_folder(self.trainer.default_root_dir)
        self._check_checkpoint(self.config.fit.ckpt_path, trains=True)

    def before_validate(self) -> None:
        self._check_checkpoint(self.config.validate.ckpt_path)

    def before_test(self) -> None:
        self._check_checkpoint(self.config.test.ckpt_path)

    def before_predict(self) -> None:
        check_folder(self.trainer.default_root_dir)
        self._check_checkpoint(self.config.predict.ckpt_path)

    def _check_checkpoint(self, path: str | None, trains: bool = False) -> None:
        if path == "best":
            raise ValueError("--ckpt_path=best: only the run itself knows which is; name its file, or last")
        saved = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
        if path is None and not trains:
            name = self.model._student_spec.path
            rank_zero_warn(
                printable(f"without --ckpt_path the student is the configuration's, as yet untrained: {name}")
            )
        if path == "last":
            files = [file for callback in saved for file in callback._find_last_checkpoints(self.trainer)]
            if not trains and not files:
                raise ValueError(
                    f"--ckpt_path=last: there is no last.ckpt in {' or '.join(str(c.dirpath) for c in saved)}; without "
                    "--ckpt_path the student is evaluated as it is before training"
                )
            for file in files:
                check_ours(file)
        elif path is not None and path != "hpc" and not is_web(path):
            if not is_url(path):
                check_named(path, [Path(c.folder(self.trainer)) for c in saved if not is_url(c.folder(self.trainer))])
            check_ours(path)

    def _parse_ckpt_path(self) -> None:
        """Skips merging hyper-parameters of a checkpoint over the command line, which wins."""


def remove_empty_logs(trainer: L.Trainer | None) -> None:
    """Removes folders of loggers that wrote nothing: Lightning makes them before data and models are checked."""
    for logger in trainer.loggers if trainer is not None else []:
        if isinstance(logger, CSVLogger):
            for folder in (logger.log_dir, logger.root_dir):
                with suppress(OSError):  # it holds something, or was not made
                    os.rmdir(folder)


def kinds_at_the_top(command: str) -> dict[str, Any]:
    """Lists the keys at the top of a configuration, with their types."""
    classes: dict[str, Any] = {"trainer": Exactly(L.Trainer), "checkpoint": Exactly(Checkpoint)}
    classes |= {"ckpt_path": str | None, "seed_everything": bool | int}
    classes |= {"model": OnPolicyDistillation, "data": L.LightningDataModule}
    return {key: classes.get(key, Any) for key in keys_of(command)}


def with_logger(sources: Sequence[Source]) -> list[Source]:
    """Puts the default logger before the sources where arguments set keys of a logger that nobody names."""
    trainers = [(source, source.values["trainer"]) for source in sources if "trainer" in source.values]
    given = {key: [(source, values[key]) for source, values in trainers if isinstance(values, dict) and key in values]
             for key in ("logger", "default_root_dir")}  # fmt: skip
    if not given["logger"] or not all(
        source.keys and isinstance(values, dict) and "class_path" not in values for source, values in given["logger"]
    ):
        return list(sources)
    folder = str(given["default_root_dir"][-1][1]) if given["default_root_dir"] else os.getcwd()
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": folder, "name": LOGS}}
    return [Source("the default logger", {"trainer": {"logger": logger}}), *sources]


def understood(arguments: Sequence[str]) -> list[str]:
    """Converts arguments for jsonargparse: every key checked, files and values in their places as JSON."""
    try:
        sources = with_logger(front(arguments))
        import_parts()
        kinds, together, passed = kinds_at_the_top(arguments[0]), dict[str, Any](), list[Any](arguments[:1])
        checked, follows = list[tuple[Source, Any]](), False
        for source in sources:
            values = Checker(source).settings(source.values, kinds, (), "opd", together)
            together = overlaid(together, values)
            checked.append((source, values))
            if any(isinstance(value, Text) for value in leaves(values)) or not values:
                passed += source.tokens  # of the last part in a list; or it asks something
            elif follows and source.keys and not str(source.keys[-1]).endswith("+"):
                passed[-1] = overlaid(passed[-1], values)  # one overlay for all arguments in a row
            else:
                passed += ["-c", values]
            follows = bool(source.keys) and isinstance(passed[-1], dict)
        print_help(sources, kinds, together, meanings(arguments[0]))
    except ConfigError as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        sys.exit(2)
    Parser.sources, Parser.checked = sources, checked
    written = [word if isinstance(word, str) else json.dumps(word) for word in passed]
    return [word for word in written if word != "--traceback"]


def run(arguments: Sequence[str]) -> None:
    """Trains or evaluates, by the arguments after `opd`."""
    hush()
    # TF32 on GPUs that have it, which the tolerance of `agreement` allows for
    torch.set_float32_matmul_precision("high")
    OPDCLI(arguments)
