"""PromptData: examples for training and validation, checked before the first step."""

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from .chat import from_messages, problem_with_form, without_answers
from .data_source import is_remote, read_source, same_rows
from .note import refuse_taken
from .progress import phase
from .rows import LOCATION, STAND_IN, BadRows, row_of
from .table import undecoded

Example = dict[str, Any]
Split = Literal["train", "validation", "test", "predict"]

# A task that makes its rows draws row i from seed + i: neighboring seeds would share nearly all rows.
_SEED_STRIDE = {"train": 0, "validation": 10**8, "test": 2 * 10**8, "predict": 3 * 10**8}
# A teacher's column may be empty in a row, which then has no view; these may not.
_NEVER_EMPTY = ("prompt", "answer", "completion")
# Columns of other trainers' data sets that hold inputs or targets
_MEANINGFUL = frozenset([
    "messages", "conversations", "conversation", "system", "system_prompt", "instruction", "tools", "functions",
    "documents", "chat_template_kwargs", "chosen", "rejected", "image", "images", "video", "videos", "audio", "audios",
])  # fmt: skip


class Share(Sequence[Example]):
    """Examples of one rank: every ``ranks``-th, and a stand-in where some ranks have one fewer.

    Ranks gather weights and buffers together in each forward pass: with fewer passes on one the others wait forever.
    """

    def __init__(self, examples: Sequence[Example], rank: int, ranks: int) -> None:
        self._examples, self._rank, self._ranks = examples, rank, ranks

    def __len__(self) -> int:
        return -(-len(self._examples) // self._ranks)

    def __getitem__(self, index: Any) -> Any:
        position = self._rank + index * self._ranks
        if position < len(self._examples):
            return row_of(self._examples, position)
        if index < len(self):
            stand_in = row_of(self._examples, 0)
            stand_in[STAND_IN] = True
            return stand_in
        raise IndexError(index)


class PromptData(LightningDataModule):
    """Prompts and their other columns, from files, tasks, functions or the hub.

    A source is one of
        a local .jsonl, .json or .parquet file, one that ships (``opd:assets/…``), or a folder of such files (of one
            split: hidden files and what `datasets` keeps beside them are left out);
        a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`;
        `reasoning_gym:TASK`, with the extra `tasks`; columns `prompt`, `answer`, `task`, `metadata`;
        `python:package.module.function`, which returns a list of dicts (where it has an argument `on_bad_row`, it is
            told what the one below says);
        the name of a Hugging Face data set, downloaded with `datasets.load_dataset`.

    Values come back as they were written; a row that holds what can't be stored, or a value of another kind than
    most of its column, is a bad row. So is one that anything raises an error about: its view, the chat template, ….

    After `setup` the splits are the attributes `train`, `validation`, `test` and `predict`, each a
    `datasets.Dataset` of examples, or None.

    Args:
        train: a source.
        validation: a source; or a share (a float in (0, 1)) or number of rows of `train`, drawn by `seed`
            and held out.
        test: a source.
        predict: a source; the validation examples if none is given.
        train_options: arguments for the source of `train`: those of the reasoning-gym task (size, seed, …), of
            the function, of `load_dataset` (name, split, revision, …); `field` for the key of a .json file
            that holds the rows; `split` for a folder of `DatasetDict.save_to_disk`. A reasoning-gym task gets a
            seed that differs between splits unless set here.
        validation_options, test_options, predict_options: the same for the other sources.
        columns: canonical column → the column of the sources that it is made from; templates, views and rewards know
            it by the canonical name alone, the old one is gone. One column may serve two.
        on_bad_row: "refuse" raises at the first row that can't be used, "skip" leaves such rows out, counts
            them in `skipped` and warns once.
            A column `messages` where there is no `prompt` is cut before the assistant's first message: prompt and
            `completion`.
        last_answer: what becomes of the last message of a chat in `prompt` where it is the assistant's: "refuse" such
            rows, "drop" the message, or make it the column "completion", for `rollout.behavior.dataset`.
        validation_batch_size: prompts per batch of validation, test and predict.
        seed: of the held-out rows and of tasks that make their rows. The order of training and all rollouts follow
            `seed_everything` where it was called, so that runs of different seeds share their held-out rows.

    Raises:
        ValueError: at construction for settings that contradict each other; in `setup` for a source that
            can't be read or is empty, a missing column, a bad row, a split with no rows.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: int | float | str | None = None,
        test: str | None = None,
        predict: str | None = None,
        train_options: dict[str, Any] | None = None,
        validation_options: dict[str, Any] | None = None,
        test_options: dict[str, Any] | None = None,
        predict_options: dict[str, Any] | None = None,
        columns: dict[str, str] | None = None,
        on_bad_row: Literal["refuse", "skip"] = "refuse",
        last_answer: Literal["refuse", "drop", "completion"] = "refuse",
        validation_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._sources: dict[Split, Any] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": predict,
        }
        self._options = {
            "train": train_options,
            "validation": validation_options,
            "test": test_options,
            "predict": predict_options,
        }
        self.columns, self.last_answer = columns or {}, last_answer
        self.on_bad_row: Literal["refuse", "skip", "tell"] = on_bad_row
        self.validation_batch_size, self.seed = validation_batch_size, seed
        self._check_settings()
        self.train: Dataset | None = None
        self.validation: Dataset | None = None
        self.test: Dataset | None = None
        self.predict: Dataset | None = None
        self._read: dict[Split, Dataset] = {}
        self._checked_for: dict[Split, object] = {}
        self._skipped: dict[str, BadRows] = {}

    def _check_settings(self) -> None:
        share = self._sources["validation"]
        if isinstance(share, bool) or (isinstance(share, float) and not 0 < share < 1):
            raise ValueError(f"data.validation is {share}; as a share of data.train it must be between 0 and 1")
        if isinstance(share, int) and share < 1:
            raise ValueError(f"data.validation is {share}; as a number of rows of data.train it must be at least 1")
        if self._is_held_out and self._sources["train"] is None:
            raise ValueError(f"data.validation is {share}, a part of data.train, but data.train is not set")
        for split, options in self._options.items():
            if options and not isinstance(self._sources[split], str):  # type: ignore[index]
                raise ValueError(f"data.{split}_options are set, but data.{split} names no source that takes them")
        if self.on_bad_row not in ("refuse", "skip"):
            raise ValueError(f"data.on_bad_row is {self.on_bad_row!r}; it must be 'refuse' or 'skip'")
        if self.last_answer not in ("refuse", "drop", "completion"):
            raise ValueError(f"data.last_answer is {self.last_answer!r}; it must be 'refuse', 'drop' or 'completion'")
        if self.validation_batch_size < 1:
            raise ValueError(f"data.validation_batch_size is {self.validation_batch_size}; it must be at least 1")

    @property
    def _is_held_out(self) -> bool:
        return isinstance(self._sources["validation"], int | float)

    @property
    def skipped(self) -> Counter[str]:
        """Number of rows that were left out, by kind of reason, over all splits read so far."""
        return sum((bad.kinds for bad in self._skipped.values()), Counter())

    def tell_bad_rows(self) -> None:
        """Leaves bad rows that a run would refuse out, without a word, so that all of them can be told at once."""
        if self.on_bad_row == "refuse":
            self.on_bad_row = "tell"

    @property
    def refused(self) -> list[BadRows]:
        """Bad rows that a run would refuse, where they were only to be told."""
        return [bad for bad in self._skipped.values() if bad.policy == "tell" and bad.kinds]

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads the sources of the hub, once per machine."""
        for split, source in self._sources.items():
            # Lightning calls this on one process of each machine; the others find it in the cache
            if isinstance(source, str) and is_remote(source):
                self._read_source(split)

    def setup(self, stage: str) -> None:
        """Reads and checks the splits of a stage, unless they were checked for the same module before."""
        stage = TrainerFn(stage).value
        if stage == "fit":
            self._provide("train")
            if self._sources["validation"] is not None:
                self._provide("validation")
                self._warn_of_trained_rows()
        elif stage == "predict" and self._sources["predict"] is None:
            self._provide("validation", "data.predict and data.validation are not set; name a source in one")
            self.predict = self.validation
        elif stage in ("validate", "test", "predict"):
            self._provide("validation" if stage == "validate" else stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))  # where Lightning leaves what seed_everything was given
        return module.rollout_loader(self.train, seed)

    def val_dataloader(self) -> Any:
        return self._loader(self.validation) if self.validation is not None else []

    def test_dataloader(self) -> Any:
        return self._loader(self.test)

    def predict_dataloader(self) -> Any:
        return self._loader(self.predict)

    def _loader(self, dataset: Dataset | None) -> "DataLoader[list[Example]]":
        assert dataset is not None, "setup comes before the dataloaders"
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        share: Any = Share(dataset, rank, ranks)
        # Lightning leaves a sampler of this kind alone; its own would repeat examples, and count them twice
        sampler: Any = DistributedSampler(share, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(share, batch_size=self.validation_batch_size, sampler=sampler, collate_fn=list)

    def _warn_of_trained_rows(self) -> None:
        """Warns where the rows that measure are those that are trained on."""
        train, validation = self._sources["train"], self._sources["validation"]
        options = [self._options[split] or {} for split in ("train", "validation")]
        if isinstance(validation, str) and same_rows(train, validation, *options):
            rank_zero_warn(
                f"data.train and data.validation are the same rows ({validation}): val/accuracy is measured on what is "
                "trained, and isn't held out. data.validation: 0.1 holds a tenth of data.train out"
            )

    # -- reading ----------------------------------------------------------------------------------------------------

    def _provide(self, split: Split, unset: str | None = None) -> None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        # a split fits a module, whose columns and views it was checked by
        if split in self._checked_for and self._checked_for[split] is module:
            return
        if self._sources[split] is None:
            raise ValueError(unset or f"data.{split} is not set; name a file, a task or a data set")
        setattr(self, split, self._check(split, self._rows(split), module))
        self._checked_for[split] = module

    def _rows(self, split: Split) -> Dataset:
        """Returns the rows of a split with their locations; each source is read once."""
        if split not in self._read:
            if not self._is_held_out or split not in ("train", "validation"):
                self._read[split] = self._read_source(split)
            else:
                rows = self._read_source("train")
                # read once: both splits are of the same rows, each of which is in one of them
                trained, held_out = hold_out(len(rows), self._sources["validation"], self.seed)
                self._read["train"], self._read["validation"] = rows.select(trained), rows.select(held_out)
        return self._read[split]

    def _read_source(self, split: Split) -> Dataset:
        key = f"data.{split}"
        bad = self._skipped[f"{split}, reading"] = BadRows(key, self.on_bad_row)
        options = self._options[split] or {}
        with phase(f"reading {key}"):
            rows = read_source(self._sources[split], options, key, self.seed + _SEED_STRIDE[split], bad)
        bad.warn()
        rows = from_messages(rename(undecoded(rows), self.columns, key))
        return rows if self.last_answer == "refuse" else without_answers(rows, keep=self.last_answer == "completion")

    # -- checking ---------------------------------------------------------------------------------------------------

    def _check(self, split: Split, rows: Dataset, module: Any) -> Dataset:
        """Selects the examples that can be used.

        Raises:
            ValueError: a missing column, a bad row unless such are skipped, or no row is left.
        """
        # 1. columns that policies, views and rewards of this run read
        needed = dict.fromkeys(getattr(module, "columns", ("prompt",)), "the rollout")
        if module is not None and split != "predict":
            needed |= module.required_columns()
        refusal = module.refusal if module is not None else lambda example: problem_with_form(example["prompt"])
        examples = rows.remove_columns(LOCATION)
        for column, reader in needed.items():
            if column not in examples.column_names:
                names = " and ".join(new for new, old in self.columns.items() if old == column)
                raise ValueError(
                    f"data.{split} has no column {column!r}, which {reader} needs"
                    + (
                        f": data.columns has renamed it to {names}, so name {names} there"
                        if names
                        else f"; it has {', '.join(examples.column_names)}. data.columns maps a column to another name"
                    )
                )
        if split == "train":
            refuse_taken(getattr(module, "notes", {}), examples.column_names, "data.train")
        if module is not None and split != "validation":
            say_unread(f"data.{split}", examples.column_names, {*needed, *getattr(module, "reads", ())})
        if module is not None:
            # raises what is wrong with models here, where no row is blamed for it
            module.prepare_for_rows()
        # 2. rows, one after the other
        bad = self._skipped[split] = BadRows(f"data.{split}", self.on_bad_row)
        locations, indices = rows[LOCATION][:], []
        with phase(f"checking rows of data.{split}", len(locations)) as at:
            for at.done, location in enumerate(locations):
                with bad.at(location):
                    example = examples[at.done]
                    reason = problem(example, needed) or refusal(example)
                    if reason is not None:
                        raise ValueError(reason)
                    indices.append(at.done)
        bad.warn()
        if not indices:
            raise ValueError(f"data.{split}: no row is left; all {len(rows)} were skipped ({bad.first})")
        usable = examples.select(indices) if len(indices) < len(examples) else examples
        usable.locations = [locations[index] for index in indices]  # for `row_of`
        return usable


def say_unread(key: str, columns: Sequence[str], read: set[str]) -> None:
    """Warns of columns that usually hold inputs or targets (``messages``, ``images``, …), and that nothing reads."""
    unread = [column for column in columns if column in _MEANINGFUL and column not in read]
    if unread:
        rank_zero_warn(
            f"{key} has {', '.join(unread)}, which no part of this run names: neither a policy is shown it nor is "
            "anything trained on it. What is meant for one is mapped with data.columns (to prompt, completion, …) or "
            "named in a view or a reward"
        )


def hold_out(rows: int, part: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Splits row numbers into those kept and those held out, each in order.

    Args:
        rows: how many rows there are.
        part: the number to hold out (int), or their share (float).
        seed: which rows; the same seed holds out the same.

    Raises:
        ValueError: one of the two would be empty.
    """
    count = round(part * rows) if isinstance(part, float) else part
    if not 0 < count < rows:
        raise ValueError(
            f"data.validation is {part}: that holds out {count} of the {rows} rows of data.train, "
            "and both parts need at least one"
        )
    # a generator of its own: the same rows are held out whatever was drawn before
    held_out = set(random.Random(seed).sample(range(rows), count))
    return [row for row in range(rows) if row not in held_out], sorted(held_out)


def rename(dataset: Dataset, columns: Mapping[str, str], key: str) -> Dataset:
    """Makes each canonical column from the one that it is mapped to; the mapped columns lose their old names.

    Raises:
        ValueError: a mapped column does not exist, or a canonical name is taken by another column.
    """
    present = [name for name in dataset.column_names if name != LOCATION]
    for canonical, name in columns.items():
        mapping = f"data.columns maps {canonical!r} to {name!r}"
        if name not in present:
            raise ValueError(f"{mapping}, which {key} does not have; it has {', '.join(present)}")
        if canonical in present and canonical not in columns.values():
            raise ValueError(
                f"{mapping}, but {key} has a column {canonical!r} already; keep it under another name "
                f"(data.columns.other_name: {canonical}) or map nothing to it"
            )
    if not columns:
        return dataset
    renamed = [dataset.select_columns(old).rename_column(old, new) for new, old in columns.items() if new != old]
    # a column may be mapped to itself to keep its old name beside the new one
    moved = {old for new, old in columns.items() if columns.get(old) != old}
    return concatenate_datasets([dataset.remove_columns(list(moved)), *renamed], axis=1)


def problem(example: Example, needed: Mapping[str, str]) -> str | None:
    """Names the first needed column that is empty in an example; None if there is none."""
    for column in _NEVER_EMPTY:
        value = example.get(column)
        if column in needed and (value is None or value == [] or (isinstance(value, str) and not value.strip())):
            return f"{column} is {'missing or null' if value is None else 'empty'}"
    return None
