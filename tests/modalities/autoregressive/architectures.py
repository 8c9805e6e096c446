"""Every causal language model of transformers, built tiny and put to the start of a run: what works, how, and what is
refused. `test_architectures` compares it with docs/architectures.md; as a script it writes that page."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import opd_lightning
from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from tests import tiny

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
TIME_LIMIT = 120.0
TOLERANCE = 2e-3
ROWS = [{"prompt": p} for p in ("1+1=", "12+3+4+5=", "1=", "123+45=", "7+8+9=", "9+1=")]

# By what the attribute of a configuration is called
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("encoder_hidden_size", "attention_hidden_size", "lru_width", "embedding_size", "model_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_kv_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "num_linear_heads", "index_n_heads", "gqa_groups"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "dff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_intermediate_size", "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "num_expert_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "key_length", "d_kv"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_window_size"), 6),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("vocab_size_per_layer_input", "image_size"), 32),
    "hidden_size_per_layer_input": 8,
    "num_codebooks": 2,
    "patch_size": 16,
    "mamba_d_ssm": 64,
    "mamba_intermediate": 64,
    "num_memory_blocks": 2,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "pool_size": 4,
}
# What is not found by its name
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 2, "attn_layer_offset": 1},
    "ctrl": {"dff": 64},
    "xlnet": {"d_inner": 64},
    "xlm": {"n_words": 24, "emb_dim": 32},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "big_bird": {"attention_type": "original_full", "is_decoder": True},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "nemotron": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "longcat_flash": {
        "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "num_key_value_heads": 2, "head_dim": 8}
       for kind in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    **{kind: {"is_decoder": True} for kind in (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
        "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl",
    )},
}  # fmt: skip


@dataclass
class Found:
    """What came of one architecture.

    Attributes:
        kind: ``model_type``.
        model: its class.
        verdict: ``works`` (with the default engine, rows together), ``works with generate`` (or with rows apart),
            ``refused``, ``not built``; ``wrong`` and ``unreadable`` are faults of this project.
        why: how it works, or the reason.
    """

    kind: str
    model: str
    verdict: str
    why: str = ""


def build(kind: str, folder: Path) -> tuple[str, list[str]]:
    """Saves a tiny model with random weights that are far from uniform.

    Returns:
        The name of its class, and of the parameters that its logits of a text do not depend on.
    """
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = shrunk(CONFIG_MAPPING[kind], OWN.get(kind, {}), len(tokenizer) + 7)
    text = config.get_text_config()
    for one in (config, text):
        one.pad_token_id, one.bos_token_id, one.eos_token_id = tokenizer.pad_token_id, 2, tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in model.parameters())
    if size > 2e7:
        raise RuntimeError(f"not small: {size:,} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = tokenizer.pad_token_id, 2
    said = model.eval()(input_ids=torch.arange(20)[None] % 17, use_cache=False).logits
    said.float().log_softmax(-1)[..., 0].sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    model.save_pretrained(folder)
    return type(model).__name__, idle


def shrunk(config_class: Any, own: dict[str, Any], vocabulary: int) -> Any:
    """A configuration of small numbers."""
    default = config_class()
    values: dict[str, Any] = {}
    heads = getattr(default, "num_attention_heads", None)
    for name in vars(default):
        value = vars(default)[name]
        if isinstance(value, int) and not isinstance(value, bool) and name in SIZES:
            alike = name == "num_key_value_heads" and value == heads  # MLA knows no groups
            values[name] = SIZES["num_attention_heads"] if alike else SIZES[name]
        elif name == "vocab_size" and isinstance(value, int):
            values[name] = vocabulary
    for name in getattr(default, "sub_configs", {}):
        made = getattr(default, name, None)
        if made is not None and hasattr(made, "to_dict"):
            values[name] = shrunk(type(made), {}, vocabulary)
    if isinstance(vars(default).get("layer_types"), list) and len(set(default.layer_types)) > 1:
        kinds = sorted(set(default.layer_types))
        values["layer_types"] = (kinds * 4)[: values.get("num_hidden_layers", 4)]
    return config_class(**values | own)


def put_to_the_start(kind: str, folder: Path) -> Found:
    """Builds it, starts a run of one step, and compares with plain transformers, a row at a time."""
    try:
        with quiet():
            name, idle = build(kind, folder / "model")
    except Exception as error:
        return Found(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "not built", one_line(error))
    try:
        with quiet():
            freeze = "^({})$".format("|".join(map(re.escape, idle))) if idle else None
            student, rollout = Pretrained(str(folder / "model"), freeze=freeze), Rollout(batch_size=4, horizon=12)
            module = tiny.make_module(student, {}, tiny.no_teacher(), rollout=rollout)
            tiny.fit(module, folder, ROWS)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = str(Path(opd_lightning.__file__).parent) in last or "modalities" in last
        readable = ours and isinstance(error, ValueError | RuntimeError) and "model" in str(error)
        text = one_line(error, str(folder / "model"))
        return Found(kind, name, "refused" if readable else "unreadable", text)
    with quiet():
        apart = from_plain(module)
    written = dict(module.audit_rows())["rollouts by"]["student"]
    works = "works" if written == "DecodeLoop" else "works with generate"
    if idle:
        written += f"; student.freeze for what a text does not reach, such as `{idle[0]}`"
    if not apart <= TOLERANCE:
        return Found(kind, name, "wrong", f"{apart:.2g} nats from plain transformers ({written})")
    return Found(kind, name, works, written)


@torch.no_grad()
def from_plain(module: Any) -> float:
    """How far rollout and replay are from the log-probs of transformers' forward pass over each row alone."""
    module.student.eval()
    acted = tiny.act(module, ROWS, seed=3)
    replayed = tiny.teacher_forced(module, "student", acted)
    worst = 0.0
    for i, row in enumerate(ROWS):
        prompt = module.tokenizer()(row["prompt"])["input_ids"]
        actions = acted.actions[i][acted.mask[i]]
        ids = torch.cat([torch.tensor(prompt), actions])
        logits = module.student(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        plain = logits[:, : module.vocabulary].float().log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
        for said in (acted.behavior_log_probs[i], replayed[i]):
            worst = max(worst, float((said[acted.mask[i]] - plain).abs().max()))
    return worst


def one_line(error: BaseException, folder: str = "") -> str:
    """The message, cut at a word, without the folder, whose length is another every time."""
    text = str(error).replace(folder, "…") if folder else str(error)
    return f"{type(error).__name__}: {shorten(text, 300, placeholder=' …')}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _child(kind: str, folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    answer.send(asdict(put_to_the_start(kind, Path(folder))))


def in_a_process(kind: str) -> Found:
    """`put_to_the_start` in a process that has imported everything, with a limit on its time."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    folder = tempfile.mkdtemp()
    process = context.Process(target=_child, args=(kind, folder, theirs))
    process.start()
    theirs.close()
    try:
        if mine.poll(TIME_LIMIT):
            return Found(**mine.recv())
        return Found(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "not built", f"no answer in {TIME_LIMIT:g} s")
    except EOFError:
        return Found(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "unreadable", "the process died")
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def kinds() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def page(found: list[Found]) -> str:
    """docs/architectures.md."""
    count = {verdict: sum(one.verdict == verdict for one in found) for verdict in ("works", "works with generate")}
    refused, missing = ([one for one in found if one.verdict == v] for v in ("refused", "not built"))
    built = len(found) - len(missing)
    lines = [
        "# Architectures",
        "",
        f"Every causal language model of transformers {transformers.__version__} that can be built tiny from its "
        f"configuration ({built} of {len(found)}), with random weights, as a student of `TextDistillation`: a run of "
        "one step was started, and its rollouts and their replay were compared with transformers' own forward pass "
        f"over each row alone. {count['works']} work with the default engine, {count['works with generate']} with "
        f"transformers' `generate` or with rows apart, {len(refused)} are refused at the start; none trained on other "
        "log-probs than were sampled. Written by `tests/modalities/autoregressive/architectures.py`, which a slow test "
        "repeats. Faults that show only in long rows (sparse attention beyond its reach) can't be seen this way.",
        "",
        "## Works",
        "",
        ", ".join(f"`{one.kind}`" for one in found if one.verdict == "works") + ".",
        "",
        "## Works with `generate`, or with rows apart",
        "",
        "Slower than the default engine, with the same tokens; a warning at the start says so. Rows that can't bear "
        "padding are written in groups of equal length, and where rows influence each other even so one at a time.",
        "",
        "| `model_type` | how |",
        "|---|---|",
        *(f"| `{one.kind}` | {_cell(one.why)} |" for one in found if one.verdict == "works with generate"),
        "",
        "## Refused",
        "",
        "| `model_type` | why |",
        "|---|---|",
        *(f"| `{one.kind}` | {_cell(one.why)} |" for one in refused),
        "",
        "## Not tried",
        "",
        "A tiny one could not be built from the configuration alone; what is found out at the start of a run decides.",
        "",
        ", ".join(f"`{one.kind}`" for one in missing) + ".",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(names: list[str]) -> list[Found]:
    """Tries the named ones (none: all), one after the other."""
    found = []
    for kind in names or kinds():
        found.append(in_a_process(kind))
        print(json.dumps(asdict(found[-1])), flush=True)
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    everything = main(sys.argv[1:])
    if not sys.argv[1:]:
        PAGE.write_text(page(everything), encoding="utf-8")
