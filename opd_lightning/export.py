"""`opd export CKPT DIR`: from a checkpoint to a folder that transformers or diffusers loads."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from peft import PeftModel
from torch import Tensor, nn

from .adapters import STUDENT, merged
from .checkpoint_file import check_whole, is_slices, newest_whole
from .cli_errors import Parser
from .jsonargparse_internals import import_object
from .likeness import TAUGHT_BY, TOLERANCE, distance, tolerance
from .model_card import model_card
from .module import OnPolicyDistillation
from .objective import Objective
from .pretrained import quantized_as
from .printable import printable
from .remote import copied, is_url, is_web
from .slices import CheckpointIO
from .statement import folder_of, metrics_of, statement_of

EXACT = 1e-4
"""Tolerance for sums in another order, in units of the spread."""

DType = Literal["auto", "float32", "bfloat16", "float16"]


def export(arguments: Sequence[str]) -> None:
    """Writes the student of a checkpoint as a Hugging Face folder.

    ``opd export CKPT DIR [--merge BOOL] [--dtype NAME] [--trust_remote_code BOOL]``
    """
    parser = Parser(prog="opd export", description="Write the student as a Hugging Face folder.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a checkpoint of `opd fit`, or a run's folder: its newest one")
    parser.add_argument("folder", type=str, help="where to write; must not exist or be empty")
    parser.add_argument("--merge", type=bool, default=True, help="fold LoRA into the base (false: adapter only)")
    parser.add_argument("--dtype", type=DType, default="auto", help="of the weights; auto: that of the base")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="run code that the checkpoint names: a setting of one's own, code that comes with its base",
    )
    options = parser.parse_args(list(arguments))
    write(options.checkpoint, options.folder, options.merge, options.dtype, options.trust_remote_code)


def write(
    checkpoint: str | Path,
    folder: str | Path,
    merge: bool = True,
    dtype: DType = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Writes the student, reads it as others do, and compares the two; a folder that differs is removed.

    Args:
        checkpoint: a file of `opd fit`, or the folder of a run, whose newest one is meant.
        folder: must not exist, or be empty.
        merge: fold adapters into the base; otherwise they are written alone.
        dtype: of the written weights; ``auto``: that of the base.
        trust_remote_code: run code that the checkpoint names.

    Raises:
        FileExistsError: the folder holds something already.
        ValueError: adapters can't be merged or written; the written model differs from the student.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; export into a new folder")
    # 1. the student alone, and what it says before and after training
    state = read(checkpoint)
    config = yaml.safe_load(state["opd_config"])
    module = student_alone(config["model"], trust_remote_code)
    module.check_portable()
    student = module.policies["student"]
    _check_mergeable(module, merge)
    # how far training moved it measures what the file may lose
    untrained = module.probe(student)
    restore(module, state)
    outputs, rough = module.probe(student), tolerance(student.model)
    # 2. written beside, read again, compared
    with beside(folder) as partial:
        model = _finished(module, merge, dtype)
        module.save_student(model, partial)
        rounded = not isinstance(model, PeftModel) and tolerance(model) > TOLERANCE[torch.float32]
        live = Live(outputs, untrained, max(rough, tolerance(model)), rounded)
        comparison = _compare(module, partial, live)
        statement = statement_of(folder_of(checkpoint), state["global_step"], metrics_of(config))
        card = model_card(config, statement, module.library, module.hub_task, state.get("changes", ()))
        (partial / "README.md").write_text(card, encoding="utf-8")
        if teachers := state.get("teachers"):
            (partial / TAUGHT_BY).write_text(json.dumps({"teachers": teachers}, indent=1), encoding="utf-8")
    print(printable(f"wrote {folder}: {comparison}"))


def read(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint: tensors, numbers and text; nothing else is unpickled.

    Raises:
        ValueError: it is a page's, holds anything else, was cut short, or was not written by ``opd fit``.
        FileNotFoundError: there is none.
    """
    if is_web(checkpoint):
        raise ValueError(f"{checkpoint}: checkpoints are read from files only; download it first")
    if is_url(checkpoint):
        check_whole(checkpoint)
        with copied(str(checkpoint)) as copy:
            return read(copy)
    path = Path(checkpoint)
    if path.is_dir() and not is_slices(path):
        inside = path / "checkpoints"
        newest = newest_whole(inside if inside.is_dir() else path)
        if newest is None:
            raise FileNotFoundError(f"{path} holds no checkpoint, and neither does {inside}")
        print(printable(f"{path}: its newest checkpoint is {newest.name}"))
        path = newest
    check_whole(path)
    try:
        state = CheckpointIO().load_checkpoint(path, "cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something else than tensors, numbers and text, which could run code; it is not loaded "
            f"({str(error).splitlines()[0]})"
        ) from None
    if not state.get("opd_config"):
        raise ValueError(f"{path}: no configuration inside; only checkpoints of `opd fit` can be exported")
    return dict(state)


class Nothing(Objective):
    """Objective of a module that is not trained."""

    def __init__(self) -> None:
        self.terms, self.chunk_mib, self.chunk_steps = [], 1, None


def student_alone(config: dict[str, Any], trust_remote_code: bool = False) -> OnPolicyDistillation:
    """Builds the setting of a configuration with its student alone: no teachers, reward, data or callbacks.

    Args:
        config: ``class_path`` and ``init_args``, as in ``model`` of a run.
        trust_remote_code: import what it names. Otherwise only classes of this package are.

    Raises:
        ValueError: the checkpoint names code to be run, and is not trusted.
        FileNotFoundError: the student's base is not where it was.
    """
    # 1. what may be imported
    path, arguments = config["class_path"], config["init_args"]
    ours = path.startswith("opd_lightning.")
    if not trust_remote_code and (not ours or arguments["student"].get("trust_remote_code")):
        code = "Python code that comes with its base" if ours else f"the setting {printable(path)}"
        raise ValueError(
            f"the checkpoint asks for {code} to be run; if you know who wrote it, export with --trust_remote_code=true"
        )
    setting: Any = import_object(path)
    if not (inspect.isclass(setting) and issubclass(setting, OnPolicyDistillation)):
        raise ValueError(f"the checkpoint was written by {printable(path)}, which is no setting")
    # 2. the arguments that it needs, plain values: a class path among them would be imported
    core = inspect.signature(OnPolicyDistillation.__init__).parameters.keys() - {"self", "student"}
    names = setting.exported_with if ours else arguments.keys() - core
    needed = {name: arguments[name] for name in {*names, "student"} if name in arguments}
    if ours and "class_path" in yaml.safe_dump(needed):
        raise ValueError("the checkpoint names classes where plain values belong; it is not exported")
    # 3. the setting with its student
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(setting, skip=set(core))
    built = parser.instantiate_classes(parser.parse_object(needed))
    module = setting(objective=Nothing(), **{name: built[name] for name in needed})
    try:
        module.configure_model()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the checkpoint needs the base that it was trained from, whose {error}") from None
    return module


def restore(module: OnPolicyDistillation, state: dict[str, Any]) -> None:
    """Loads the trained weights of a checkpoint.

    Raises:
        ValueError: the base is not the one that was trained.
    """
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)


def load_module(checkpoint: str | Path, trust_remote_code: bool = False) -> tuple[Any, dict[str, Any], int]:
    """Loads a checkpoint: the trained student in its setting, the configuration, and the optimizer steps done.

    Raises:
        ValueError: as in `read` and `student_alone`.
    """
    state = read(checkpoint)
    config = yaml.safe_load(state["opd_config"])
    module = student_alone(config["model"], trust_remote_code)
    restore(module, state)
    return module, config, state["global_step"]


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yields a new folder, which replaces ``folder`` if nothing is raised within, and is removed otherwise."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_mergeable(module: OnPolicyDistillation, merge: bool) -> None:
    spec, model = module._student_spec, module.policies["student"].model
    if not isinstance(model, PeftModel):
        if not merge:
            raise ValueError(
                "--merge=false writes the adapter alone, and this student has none (it was trained whole, without "
                "lora); leave it out to write the whole model"
            )
        return
    quantized = quantized_as(getattr(model.get_base_model().config, "quantization_config", None)) or spec.quantization
    if merge and quantized:
        raise ValueError(
            f"the base is quantized ({quantized}); to merge would round the adapter away. Export with --merge=false, "
            "and load the adapter on the base"
        )
    config: Any = model.peft_config[STUDENT]
    if merge and config.layer_replication:
        raise ValueError(
            "the adapter's layer_replication lets layers share their weights, which a merged model can't; export with "
            "--merge=false"
        )
    if not merge and spec.random_init:
        raise ValueError("the adapter's base was drawn (random_init), so nobody else has it; export with --merge=true")


def _finished(module: OnPolicyDistillation, merge: bool, dtype: str) -> Any:
    """Merges the student's adapter, if asked to, and casts its weights, as they are to be written."""
    spec, model = module._student_spec, module.policies["student"].model
    if isinstance(model, PeftModel) and not merge:
        if dtype != "auto":
            raise ValueError(f"dtype={dtype} means nothing to adapters without their base; leave it out, or merge them")
        return model
    named = dtype if dtype != "auto" else spec.dtype
    wanted = module.stored_dtype(spec) if named == "auto" else getattr(torch, named)
    if wanted == torch.float32:
        model.to(wanted)  # before anything is rounded
    try:
        model = merged(model) if isinstance(model, PeftModel) else model
    except RuntimeError as error:  # what peft says of a bias without a place, …
        raise ValueError(f"the adapter can't be merged: {error} Export with --merge=false") from error
    return model if wanted is None or not isinstance(model, nn.Module) else model.to(wanted)


class Live(NamedTuple):
    """Outputs of the student before it was written.

    Attributes:
        said, untrained: at the setting's probe, after and before training; None: the setting has none.
        rough: tolerance of dtype and quantization, in units of the spread.
        rounded: whether weights were rounded for that.
    """

    said: Tensor | None
    untrained: Tensor | None
    rough: float
    rounded: bool


def _compare(module: OnPolicyDistillation, folder: Path, live: Live) -> str:
    """Compares the written model with the trained student, whose memory it frees, and says so in words.

    Raises:
        ValueError: they differ by more than the tolerance.
    """
    if live.said is None or live.untrained is None:
        return f"not compared with the student, since {type(module).__name__} has no method probe"
    if not getattr(module.student, "is_quantized", False):
        module.student.to("meta")  # the memory of one model is enough
    apart = distance(module.probe(module.read_student(folder)), live.said)  # type: ignore[arg-type]
    moved = distance(live.untrained, live.said)
    exact = live.rough == TOLERANCE[torch.float32]
    allowed = max(EXACT, min(live.rough, moved / 10)) if exact else live.rough  # a lost adapter may be small
    if apart > allowed:
        raise ValueError(
            f"what was written differs from the trained student by {apart:.2g} of the spread of what it says, where "
            f"training changed {moved:.2g}, and {allowed:.2g} is allowed: nothing is exported. Try --merge=false, or "
            "--dtype=float32, which rounds nothing"
        )
    if not (live.rounded and apart and moved):
        return "loaded again, it says what the trained student says"
    return (
        "loaded again, it says what the trained student says, but for a difference of "
        f"{apart / moved:.1%} of what training changed, which was rounded away"
    )
