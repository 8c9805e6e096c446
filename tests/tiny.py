"""Tiny models of real architectures, built from their configurations, and small runs of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout import RolloutLoader
from opd_lightning.rollout_settings import Rollout
from opd_lightning.streams import Streams
from opd_lightning.teacher import Frozen, Teacher
from opd_lightning.trajectory import Trajectories

# configuration class, and what makes an architecture what it is; untied and tied heads, global and sliding attention
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
}

CHAT_SPECIALS = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Printable ASCII one by one, a beginning-of-sequence token, and a ChatML template with a thinking switch."""
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*CHAT_SPECIALS, *letters])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def save_model(
    folder: Path,
    architecture: str = "qwen3",
    seed: int = 1,
    hidden: int = 32,
    rows: int = 24,
    tokenizer: PreTrainedTokenizerFast | None = None,
    generation: dict[str, Any] | None = None,
    config_class: str | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A model folder: random weights that are far from uniform, a tokenizer, and more head rows than tokens.

    ``generation`` are settings for its generation_config.json, ``settings`` further ones for its configuration.
    """
    torch.manual_seed(seed)
    tokenizer = tokenizer or character_tokenizer()
    tokenizer.save_pretrained(folder)
    name, own = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class or name)(
        **{
            "vocab_size": max(rows, len(tokenizer)),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **({} if config_class else own),
            **settings,
        }
    )
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    if generation is not None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | generation), encoding="utf-8")
    return folder


class LongerIsBetter:
    """A reward that needs no model to be any good: 1 for at least ``length`` characters."""

    columns = ("answer",)

    def __init__(self, length: int = 3) -> None:
        self.length = length

    def __call__(self, completion: str, example: dict[str, Any]) -> float:
        size = len(completion) if isinstance(completion, str) else completion.width
        return float(size >= self.length)


def make_rows(count: int = 24) -> list[dict[str, Any]]:
    """Prompts of mixed length, with the columns that views, rewards and replay read."""
    return [
        {
            "prompt": f"{'1' * (i % 4)}{i}+{i}=",
            "answer": str(2 * i),
            "solution": f"{i}+{i}={2 * i} #" if i % 5 else "",
            "completion": f"{2 * i}",
            "task": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]


def reverse_kl(**settings: Any) -> Objective:
    return Objective([Term(ReverseKL(), **settings)])


def no_teacher() -> Objective:
    return Objective([Term(CrossEntropy(), teacher=None)])


def sgd(lr: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def make_module(
    student: Path | Pretrained,
    teacher: Path | dict[str, Teacher] | None = None,
    objective: Objective | None = None,
    setting: type[OnPolicyDistillation] = TextDistillation,
    load: bool = True,
    **settings: Any,
) -> Any:
    """A module with its models loaded; ``teacher`` is a folder (one frozen teacher) or all teachers by name."""
    if isinstance(teacher, Path):
        teacher = {"teacher": Teacher(Frozen(Pretrained(str(teacher))))}
    module = setting(
        student=student if isinstance(student, Pretrained) else Pretrained(str(student)),
        objective=objective or reverse_kl(),
        teachers=teacher,
        rollout=settings.pop("rollout", None) or Rollout(batch_size=8, horizon=10),
        evaluation=settings.pop("evaluation", None) or Evaluation(before=False),
        optimizer=settings.pop("optimizer", None) or sgd(),
        **settings,
    )
    if load:
        module.configure_model()
    return module


class Rows(L.LightningDataModule):
    """Rows from memory."""

    def __init__(self, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]] = (), seed: int = 0):
        super().__init__()
        self.train, self.validation, self.seed, self.validation_batch_size = train, validation, seed, 4

    def train_dataloader(self) -> RolloutLoader:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return module.rollout_loader(self.train, self.seed)

    def val_dataloader(self) -> Any:
        return DataLoader(list(self.validation), batch_size=4, collate_fn=list) if self.validation else []

    test_dataloader = predict_dataloader = val_dataloader


def make_trainer(folder: Path, steps: int = 1, **settings: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, **(quiet | settings))


def attach(module: Any, folder: Path, **settings: Any) -> Any:
    """The module with a trainer that never runs, for a `RolloutLoader`."""
    module.trainer = make_trainer(folder, **settings)
    return module


def fit(module: Any, folder: Path, rows: Sequence[dict[str, Any]] | None = None, **settings: Any) -> L.Trainer:
    """Trains for ``steps`` optimizer steps (default 1)."""
    validation = settings.pop("validation", ())
    trainer = make_trainer(folder, **settings)
    trainer.fit(module, datamodule=Rows(make_rows() if rows is None else rows, validation))
    return trainer


def watch_queries(monkeypatch: Any, told: Callable[[str, Trajectories], Any]) -> None:
    """Calls ``told`` with the teacher and the batch of each query, also of the comparison before the first step."""
    query = Streams.query

    def watched(self: Streams, name: str, batch: Trajectories, *view: Any) -> Any:
        told(name, batch)
        return query(self, name, batch, *view)

    monkeypatch.setattr(Streams, "query", watched)


@torch.no_grad()
def log_softmax(module: Any, name: str, trajectories: Trajectories, view: list[Any] | None = None) -> Tensor:
    """``[B, T, V]`` the teacher-forced log-probabilities of one of the module's policies at temperature 1."""
    said = module.distribution(module.policies[name], trajectories, view)
    return said.head(said.hidden).log_softmax(-1)


def teacher_forced(module: Any, name: str, trajectories: Trajectories, view: list[Any] | None = None) -> Tensor:
    """``[B, T]`` of the taken actions, 0 where nothing is trained."""
    log_probs = log_softmax(module, name, trajectories, view)
    return log_probs.gather(-1, trajectories.actions[..., None]).squeeze(-1).masked_fill(~trajectories.mask, 0.0)


def act(module: Any, examples: list[dict[str, Any]], who: str = "student", seed: int = 0, **settings: Any) -> Any:
    """Trajectories of one policy, one seed per example."""
    rollout = dataclasses.replace(module.rollout, **settings)
    return module.act(who, examples, [seed + 1000 * i for i in range(len(examples))], rollout)
