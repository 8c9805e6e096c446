"""Writing a setting's student for other programs, and reading it as they do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .policy import Policy
from .pretrained import Lora, Pretrained


class Portable:
    """Interface of settings for export (docs/export.md); the defaults are for models of transformers."""

    model_class: ClassVar[Any]
    library: ClassVar[str] = "transformers"
    """Name of the library in the model card, which loads exported students."""
    hub_task: ClassVar[str] = "text-generation"
    """The hub's word for what they do, in the model card."""
    exported_with: ClassVar[tuple[str, ...]] = ()
    """Arguments of the setting that its student needs to be built and written; plain values, no classes."""
    _student_spec: Pretrained

    def load_processor(self, spec: Pretrained) -> Any:
        """Loads the tokenizer or processor that converts examples to inputs; None: there is none."""
        return None

    def original_processor(self, spec: Pretrained) -> Any:
        """Loads the processor without the setting's changes, as exported students come with it."""
        return self.load_processor(spec)

    def stored_dtype(self, spec: Pretrained) -> torch.dtype | None:
        """Returns the dtype in which a base is stored; None where its folder does not say."""
        known = self._is_of_transformers and spec.packed is None  # a GGUF file has another one for each tensor
        return getattr(spec.config(), "dtype", None) if known else None

    @property
    def _is_of_transformers(self) -> bool:
        """True where its models are transformers', and not loaded in a way of its own."""
        kinds = getattr(self.model_class, "__mro__", (type(self.model_class),))
        return any(kind.__module__.startswith("transformers.") for kind in kinds)

    def check_portable(self) -> None:
        """Refuses settings whose students can't be written.

        Raises:
            ValueError: its models are loaded in a way of its own, and it does not say how they are written and read.
        """
        missing = [
            name for name in ("save_student", "read_student") if getattr(type(self), name) is getattr(Portable, name)
        ]
        if missing and not self._is_of_transformers and not hasattr(self.model_class, "save_pretrained"):
            raise ValueError(
                f"{type(self).__name__} needs {' and '.join(missing)} to export {self.model_class.__name__}, which is "
                "loaded in a way of its own: add the methods save_student(model, folder) and read_student(folder) "
                "(docs/export.md)"
            )

    def probe(self, policy: Policy) -> Tensor | None:
        """Evaluates a policy at a few fixed inputs (log-probs, …), without gradient; None: there are no such inputs."""
        return None

    def save_student(self, model: Any, folder: Path) -> None:
        """Writes a model with everything without which it would not act as it did here, or its adapter alone.

        Raises:
            ValueError: the setting must say how such a model is written.
        """
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"{type(self).__name__}: a {type(model).__name__} has no save_pretrained, so its setting must say how "
                "it is written and read: add the methods save_student(model, folder) and read_student(folder)"
            )
        model.save_pretrained(folder)
        processor = self.original_processor(self._student_spec)
        if processor is not None:
            processor.save_pretrained(folder)

    def read_student(self, folder: Path) -> Policy:
        """Reads the folder of `save_student` as other programs do."""
        spec = self._student_spec
        if (folder / "adapter_config.json").exists():
            adapter = Lora(adapter=str(folder))
            spec = dataclasses.replace(spec, lora=adapter, freeze=None, gradient_checkpointing=False)
            return Policy(spec.load(self.model_class, trained=True), self.load_processor(spec))
        model = self.model_class.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        here = dataclasses.replace(spec, path=str(folder), gguf_file=None, revision=None)
        return Policy(model.eval(), self.load_processor(here))
