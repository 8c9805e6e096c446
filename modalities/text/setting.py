"""TextDistillation: language models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...teacher import Policy
from ...trajectory import Example
from ..autoregressive import AutoregressiveDistillation
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

    def renderer(self, policy: Policy | None = None) -> Renderer:
        return Renderer(self.tokenizer(policy), self.chat_template_kwargs, self.raw_prompts)

    def collate(self, examples: list[Example], policy: Policy | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[B, P]``, left padded.

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
