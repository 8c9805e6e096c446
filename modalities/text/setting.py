"""TextDistillation: language models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...policy import Policy
from ...trajectory import Example
from ..autoregressive import AutoregressiveDistillation
from ..autoregressive.models import bare
from ..autoregressive.rendering import Renderer


class TextDistillation(AutoregressiveDistillation):
    """On-policy distillation of causal language models.

    Args:
        raw_prompts: feed string prompts as they are, even where the tokenizer has a chat template.
        **kwargs: as in `AutoregressiveDistillation`.
    """

    model_class: ClassVar[Any] = AutoModelForCausalLM
    padding: ClassVar[dict[str, tuple[float, str]]] = {
        "input_ids": (0, "left"),
        "attention_mask": (0, "left"),
    }

    def __init__(self, raw_prompts: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.raw_prompts = raw_prompts

    def renderer(self, policy: Policy) -> Renderer:
        return Renderer(self.tokenizer(policy), self.chat_template_kwargs, self.raw_prompts)

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Tokenizes prompts: ``input_ids`` and ``attention_mask`` ``[B, P]``, left padded.

        Raises:
            ValueError: as in `Renderer.prompt`.
        """
        renderer = self.renderer(policy)
        rows = [renderer.prompt_ids(self.asked(example)) for example in examples]
        width = max(map(len, rows))
        missing = [width - len(row) for row in rows]
        ids = [[self.padding_id] * gap + row for gap, row in zip(missing, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(missing, rows, strict=True)]
        return {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}

    def audit_rows(self) -> list[tuple[str, dict[str, str]]]:
        if blind := self._never_read():
            parts = "|".join(sorted({name.removeprefix("model.").split(".")[0] for name in blind}))
            raise ValueError(
                f"model.student reads more than text, and no text reaches {len(blind)} of its trained parameters, such "
                f"as {blind[0]}: set student.freeze to '{parts}', or use VisionLanguageDistillation"
            )
        return super().audit_rows()

    def _never_read(self) -> list[str]:
        """Names of trained parameters that see images or sound."""
        model = bare(self.policies["student"].model)
        if not any(hasattr(model.config, f"{sense}_config") for sense in ("vision", "audio")):
            return []
        read = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
        known = {id(p) for part in read for p in part.parameters()}
        return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
