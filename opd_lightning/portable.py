"""How a setting's student is written for other programs, and read as they read it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .policy import Policy
from .pretrained import Lora, Pretrained


class Portable:
    """What a setting may say of its models, for export (docs/export.md); the defaults are those of transformers."""

    model_class: ClassVar[Any]
    library: ClassVar[str] = "transformers"
    """Which one loads exported students."""
    exported_with: ClassVar[tuple[str, ...]] = ()
    """The setting's own arguments without which its student can't be built and written; no classes."""
    _student_spec: Pretrained

    def load_processor(self, spec: Pretrained) -> Any:
        """What turns examples into inputs (a tokenizer, a processor)."""
        return None

    def original_processor(self, spec: Pretrained) -> Any:
        """The same before anything was set in it: it is what an exported student comes with."""
        return self.load_processor(spec)

    def stored_dtype(self, spec: Pretrained) -> torch.dtype | None:
        """What the weights of a base are stored in; None where its folder does not say."""
        return getattr(spec.config(), "dtype", None) if self._is_of_transformers else None

    @property
    def _is_of_transformers(self) -> bool:
        """Whether its models are transformers', and not loaded in a way of its own."""
        kinds = getattr(self.model_class, "__mro__", (type(self.model_class),))
        return any(kind.__module__.startswith("transformers.") for kind in kinds)

    def check_portable(self) -> None:
        """
        Raises:
            ValueError: its models are loaded in a way of its own, and it does not say how they are written and read.
        """
        own = [
            name for name in ("save_student", "read_student") if getattr(type(self), name) is getattr(Portable, name)
        ]
        if own and not self._is_of_transformers and not hasattr(self.model_class, "save_pretrained"):
            raise ValueError(
                f"{type(self).__name__} needs {' and '.join(own)} to export {self.model_class.__name__}, which is "
                "loaded in a way of its own: add the methods save_student(model, folder) and read_student(folder) "
                "(docs/export.md)"
            )

    def probe(self, policy: Policy) -> Tensor | None:
        """What a policy says to a few fixed inputs (log-probs, …), without gradient; None: it can't be asked."""
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
        """What `save_student` wrote, as other programs read it."""
        spec = self._student_spec
        if (folder / "adapter_config.json").exists():
            adapter = Lora(adapter=str(folder))
            spec = dataclasses.replace(spec, lora=adapter, freeze=None, gradient_checkpointing=False)
            return Policy(spec.load(self.model_class, trained=True), self.load_processor(spec))
        model = self.model_class.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        return Policy(model.eval(), self.load_processor(dataclasses.replace(spec, path=str(folder), revision=None)))
