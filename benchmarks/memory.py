"""Runs whose memory is computed: Qwen3 in its sizes, and the models of the other benchmarks.

The arithmetic is the package's, `opd_lightning/modalities/autoregressive/memory.py`, as `opd check` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from transformers import Qwen3Config

from opd_lightning.forecast import peak as largest
from opd_lightning.modalities.autoregressive.memory import Plan, Shape

VOCABULARY, CONTEXT = 151_936, 40_960
RANK = 32  # the default of Lora.r
# hidden, intermediate, layers, heads, key heads, size of a head, tied head: pytorch/torchtune,
# torchtune/models/qwen3/_model_builders.py; the size of a head as others quote the config.json of 0.6B, 4B, 14B and
# 32B. They sum to the published 0.6, 1.7, 4.0, 8.2, 14.8 and 32.8 B weights. The last two are the other benchmarks'
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, True),
    "4B": (2560, 9728, 36, 32, 8, 128, True),
    "8B": (4096, 12288, 36, 32, 8, 128, False),
    "14B": (5120, 17408, 40, 40, 8, 128, False),
    "32B": (5120, 25600, 64, 64, 8, 128, False),
    "student": (256, 768, 4, 4, 2, 64, True),
    "teacher": (384, 1152, 6, 6, 3, 64, True),
}


def config_of(name: str) -> Qwen3Config:
    hidden, inner, layers, heads, keys, size, tied = SHAPES[name]
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=size, tie_word_embeddings=tied,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip


@cache
def shape(name: str) -> Shape:
    return Shape.of(config_of(name))


@dataclass(frozen=True)
class Run:
    """One configuration; ``teacher`` None is the student with its adapter switched off."""

    student: str
    lora: bool
    teacher: str | None
    bits: int = 16  # of a LoRA student's base; what is trained is float32
    teacher_bits: int = 16
    adam: int = 32
    rows: int = 8
    micro: int = 1
    checkpointing: bool = True
    mixed: bool = True  # trainer.precision: bf16-mixed, otherwise 32-true
    cpu: bool = False

    @property
    def name(self) -> str:
        how = f"LoRA{f' on {self.bits} bit' * (self.bits < 16)}" if self.lora else f"full, AdamW {self.adam} bit"
        teacher = "itself" if self.teacher is None else f"{self.teacher}, {self.teacher_bits} bit"
        return f"{self.student} {how} | {teacher}"

    def plan(self, prompt: int, completion: int) -> Plan:
        return Plan(
            student=shape(self.student), teacher=None if self.teacher is None else shape(self.teacher),
            prompt=prompt, completion=completion, lora=RANK if self.lora else 0, bits=self.bits,
            teacher_bits=self.teacher_bits, adam=self.adam, rows=self.rows, micro=self.micro,
            checkpointing=self.checkpointing, mixed=self.mixed, cpu=self.cpu,
        )  # fmt: skip


def peak(run: Run, prompt: int, completion: int) -> tuple[float, str, str]:
    """Bytes, the phase, and its largest term."""
    return largest(run.plan(prompt, completion).phases())
