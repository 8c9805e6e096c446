"""Models in GGUF files, llama.cpp's format: their weights are unpacked when they are loaded, and plain from then on."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from torch import nn

SUFFIX = ".gguf"


def located(path: str, file: str | None) -> tuple[str, str | None]:
    """Returns the folder or hub name of a model, and the name of the GGUF file in it; None: it is not in one.

    Args:
        path: a folder, a hub name, or a GGUF file itself.
        file: the name of a GGUF file in the folder or on the hub, if given.

    Raises:
        ValueError: both name a file, or what ``file`` names is none of this kind.
    """
    if file is not None and not file.endswith(SUFFIX):
        raise ValueError(f"gguf_file={file}: the name of such a file ends with {SUFFIX}")
    if path.lower().endswith(SUFFIX) and not path.endswith(SUFFIX) and Path(path).is_file():
        raise ValueError(f"path: {path} is no GGUF file to transformers: rename it to end with {SUFFIX}")
    if not path.endswith(SUFFIX) or Path(path).is_dir():
        return path, file
    if file is not None:
        raise ValueError(f"gguf_file={file}: path is {path}, a GGUF file itself; leave one out")
    return str(Path(path).parent), Path(path).name


def check_header(path: Path) -> None:
    """Refuses a file whose header claims more than it holds; libraries would look for it.

    Raises:
        ValueError: it is no GGUF file, or claims more tensors or keys than its size has room for.
    """
    with path.open("rb") as opened:
        header = opened.read(24)
    if len(header) < 24 or header[:4] != b"GGUF":
        raise ValueError(
            f"path: {path} is no GGUF file: it begins with {header[:4]!r}, not with b'GGUF'; fetch it again"
        )
    # the version tells the order of bytes: its lower half is 0 in the other one
    order = "<" if struct.unpack_from("<H", header, 4)[0] else ">"
    size = path.stat().st_size
    for what, count, least in zip(
        ("tensors", "keys"), struct.unpack_from(f"{order}QQ", header, 8), (24, 13), strict=True
    ):
        if count * least > size:
            raise ValueError(
                f"path: {path} claims {count:,} {what}, more than its {size:,} bytes have room for: it is "
                "damaged; fetch it again"
            )


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Explains what is raised while a GGUF file is read.

    Raises:
        ModuleNotFoundError: the package that reads it is missing; the message names the extra.
        ValueError: it is damaged, or transformers does not know its architecture.
    """
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(f"path: {file} is read with the package gguf: pip install 'opd-lightning[gguf]'")
    try:
        yield
    except Exception as error:  # whichever the place where it breaks off brings
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        # transformers takes metadata that is no text for a configuration that is no JSON
        if isinstance(error, OSError | ImportError) and "valid JSON" not in message:
            raise
        if message.startswith("Cannot build a tokenizer"):
            raise ValueError(f"path: {file} holds no tokenizer; set student.tokenizer") from error
        if message.startswith("Unrecognized configuration class"):
            raise
        raise ValueError(
            f"path: {file} can't be read as a GGUF file ({message}); is it whole, and of a known architecture?"
        ) from error


def check_complete(file: str, missing: Iterable[str]) -> None:
    """Refuses a file without some of the model's weights, for which transformers would draw others.

    Raises:
        ValueError: weights are missing; the message names one.
    """
    if names := sorted(missing):
        raise ValueError(f"path: {file} lacks {len(names)} of the model's weights, such as {names[0]}")


def check_read(file: str, path: str, model: nn.Module) -> None:
    """Refuses a file of which transformers leaves something out, and would make another model.

    Args:
        file: its name, for messages.
        path: where it is.
        model: what was made of it.

    Raises:
        ValueError: it holds more weights than the model, or scales rotary positions and the model doesn't.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    surplus = sum(int(t.n_elements) for t in reader.tensors) - sum(p.numel() for p in model.parameters())
    if surplus > 0:
        names = {tensor.name for tensor in reader.tensors}
        such = "; rope_freqs.weight, which scales rotary positions, is one" if "rope_freqs.weight" in names else ""
        raise ValueError(f"path: {file} holds {surplus} numbers that transformers leaves out{such}")
    scaling = next((field for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")), None)
    kind = None if scaling is None else scaling.contents()
    rotary: Any = getattr(model.config, "rope_parameters", None) or {}
    # of one kind, or by kinds of layers
    kinds = {part.get("rope_type", "default") for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    if kind not in (None, "none") and kinds <= {"default"}:
        raise ValueError(f"path: {file} scales rotary positions ({kind}), which transformers leaves out")


def unpacked() -> dict[str, Any]:
    """Returns what transformers is told to unpack the weights: it may leave them packed where it knows a kernel."""
    kind = getattr(transformers, "GgufConfig", None)  # releases without it unpack always
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def forget_packing(model: nn.Module) -> None:
    """Removes what makes transformers, which refuses to save such a model, take unpacked weights for quantized ones."""
    config: Any = model.config
    for text in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("quantization_config", "_model_name_or_path"):  # the latter is the title that the file gives
            if hasattr(text, name):
                delattr(text, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
