"""TextDistillation: language models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...teacher import Policy
from ...trajectory import Example
from ..autoregressive import AutoregressiveDistillation


class TextDistillation(AutoregressiveDistillation):
    """On-policy distillation of causal language models.

    Args:
        chat_template_kwargs: passed to the chat template, such as ``{enable_thinking: false}``.
        raw_prompts: feed string prompts as they are, even where the tokenizer has a chat template.
        **kwargs: as in `OnPolicyDistillation`.
    """

    model_class: ClassVar[Any] = AutoModelForCausalLM
    padding: ClassVar[dict[str, tuple[float, str]]] = {
        "input_ids": (0, "left"),
        "attention_mask": (0, "left"),
    }

    def __init__(
        self, chat_template_kwargs: dict[str, Any] | None = None, raw_prompts: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.chat_template_kwargs, self.raw_prompts = chat_template_kwargs or {}, raw_prompts

    def collate(self, examples: list[Example], policy: Policy | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[B, P]``, left padded.

        Raises:
            ValueError: a chat, and no chat template to render it.
        """
        tokenizer = self.tokenizer(policy)
        rows = [self._tokens(example["prompt"], tokenizer) for example in examples]
        width = max(map(len, rows))
        missing = [width - len(row) for row in rows]
        ids = [[tokenizer.pad_token_id] * gap + row for gap, row in zip(missing, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(missing, rows, strict=True)]
        return {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}

    def _tokens(self, prompt: str | list[dict[str, Any]], tokenizer: Any) -> list[int]:
        if isinstance(prompt, str):
            if tokenizer.chat_template is None or self.raw_prompts:
                return list(tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        elif tokenizer.chat_template is None:
            raise ValueError(
                f"the prompt is a chat but {tokenizer.name_or_path} has no chat template; give string prompts"
            )
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        # a rendered chat holds its own beginning-of-sequence token already
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
