"""Checkpoints in slices: a folder by torch.distributed.checkpoint into which every rank writes what it holds.

Beside the slices lies ``rest.pt``, everything of a checkpoint but the tensors of weights and moments, written last.
Both forms hold the same; `opd convert` makes one of the other, and any number of ranks reads either.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .checkpoint_file import REST, AtomicIO, check_ours, is_slices
from .cli_errors import Parser
from .printable import printable
from .remote import is_url, refuse_url

WEIGHTS, MOMENTS = "state_dict", "optimizer_states"
OLD = ".old"
_KNOWN = {
    "torch": {"Size", "strided", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles the index of slices: nothing but torch's own descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index of tensors does")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads slices without running what a folder might hold; their tensors are loaded with ``weights_only``."""

    def read_metadata(self, *args: Any, **keywords: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


def write_slices(checkpoint: dict[str, Any], folder: Path, leads: bool, wait: Callable[[], object]) -> None:
    """Writes a checkpoint in slices; every rank calls it, with DTensors, or one alone with whole tensors.

    Args:
        checkpoint: as Lightning has it.
        folder: beside which it is written, and to which it is renamed once it is whole.
        leads: whether this rank writes what is not sliced.
        wait: waits for all ranks.

    Raises:
        OSError: it could not be written.
    """
    # 1. apart: tensors, and a rest that says where they belong
    flat: dict[str, Tensor] = {f"{WEIGHTS}.{name}": tensor for name, tensor in checkpoint[WEIGHTS].items()}
    rest = {key: value for key, value in checkpoint.items() if key not in (WEIGHTS, MOMENTS)}
    rest[WEIGHTS], rest[MOMENTS] = list(checkpoint[WEIGHTS]), []
    for number, optimizer in enumerate(checkpoint.get(MOMENTS, ())):
        small: dict[Any, dict[str, Any]] = {}
        for place, values in optimizer["state"].items():
            small[place] = {key: value for key, value in values.items() if not _is_large(value)}
            large = {key: value for key, value in values.items() if _is_large(value)}
            flat |= {f"{MOMENTS}.{number}.{place}.{key}": value for key, value in large.items()}
        rest[MOMENTS].append({**optimizer, "state": small})
    # 2. beside its place, the rest last
    part = folder.with_name(f"{folder.name}.part")
    if leads:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait()
    save(flat, storage_writer=FileSystemWriter(part), no_dist=not torch.distributed.is_initialized())
    if leads:
        AtomicIO().save_checkpoint(rest, part / REST)
        put_in_place(part, folder)
    wait()


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def put_in_place(part: Path, folder: Path) -> None:
    """Renames a folder over another one, which can't be done in one go: `restored` undoes the half of it."""
    old = folder.with_name(f"{folder.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    else:
        folder.unlink(missing_ok=True)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def restored(folder: Path) -> None:
    """Puts back a folder whose successor never came into its place."""
    old = folder.with_name(f"{folder.name}{OLD}")
    if old.is_dir() and not folder.exists():
        with suppress(FileNotFoundError):  # another rank has just done it
            old.rename(folder)


def read_slices(folder: Path, like: Callable[[str, torch.Size], Tensor | None] | None = None) -> dict[str, Any]:
    """Reads a checkpoint in slices.

    Args:
        folder: of `write_slices`.
        like: from ``state_dict.<name>`` or ``optimizer_states.<number>.<place>.<key>`` and the whole shape to what it
            shall be sliced like; every rank calls it then. Default, and where it says None: whole tensors.

    Raises:
        ValueError: the folder holds something else.
    """
    try:
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
        index = _Reader(folder).read_metadata().state_dict_metadata
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder} holds something else than tensors: {str(error).splitlines()[0]}") from None
    flat: dict[str, Tensor] = {}
    for key, stored in index.items():
        assert isinstance(stored, TensorStorageMetadata)
        target = None if like is None else like(key, stored.size)
        dtype = stored.properties.dtype
        flat[key] = (
            torch.empty(stored.size, dtype=dtype) if target is None else torch.empty_like(target.detach(), dtype=dtype)
        )
    load(flat, storage_reader=_Reader(folder), no_dist=like is None)
    rest[WEIGHTS] = {name: flat[f"{WEIGHTS}.{name}"] for name in rest[WEIGHTS]}
    for key in flat:
        if key.startswith(f"{MOMENTS}."):
            _, number, place, name = key.split(".", 3)
            rest[MOMENTS][int(number)]["state"].setdefault(int(place), {})[name] = flat[key]
    if not rest[MOMENTS]:
        del rest[MOMENTS]
    return dict(rest)


class CheckpointIO(AtomicIO):
    """Writes one file, and reads either form into whole tensors."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        if not is_url(path) and is_slices(path):
            return read_slices(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def convert(arguments: Sequence[str]) -> None:
    """Makes a checkpoint in one file of one in slices, or the other way round.

    ``opd convert CKPT NEW``
    """
    parser = Parser(prog="opd convert", description="Make one form of a checkpoint from the other.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a checkpoint of `opd fit`: a file, or a folder of slices")
    parser.add_argument("new", type=str, help="where to write the other form; must not exist")
    options = parser.parse_args(list(arguments))
    for key in ("checkpoint", "new"):
        refuse_url(key, options[key], "slices are files of many ranks")
    old, new = Path(options.checkpoint), Path(options.new)
    if new.exists():
        raise FileExistsError(f"{new} is there already; name another place")
    check_ours(old)
    if is_slices(old):
        AtomicIO().save_checkpoint(read_slices(old), new)
    else:
        checkpoint = torch.load(old, map_location="cpu", weights_only=True, mmap=True)
        write_slices(checkpoint, new, leads=True, wait=lambda: None)
    print(printable(f"wrote {new}, {'one file' if new.is_file() else 'a folder of slices'}"))
