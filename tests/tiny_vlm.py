"""Tiny vision-language models of real architectures, built from their configurations, with their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_lightning.modalities.vision_language.processor import image_only

SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLACEHOLDER = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>", "llava": "<image>"}
PLACEHOLDER["qwen3_vl"] = PLACEHOLDER["qwen2_5_vl"]
VLMS = ("qwen2_5_vl", "qwen3_vl", "idefics3", "llava")


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII one by one."""
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIALS, *letters])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=[t for t in SPECIALS if t not in ("<pad>", "<|im_end|>")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_vlm(
    folder: Path, architecture: str = "qwen3_vl", seed: int = 1, hidden: int = 32, eyes: int = 32, padding: int = 5
) -> Path:
    """A model folder: random weights far from uniform, and a processor.

    ``eyes`` is the hidden size of its vision, ``padding`` the number of head rows that stand for no token.
    """
    torch.manual_seed(seed)
    tokenizer = vlm_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    text = {
        "vocab_size": len(tokenizer) + padding,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 16,  # Qwen2.5-VL reads no head_dim
        "num_key_value_heads": max(1, hidden // 32),
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "pad_token_id": ids["<pad>"],
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
    }
    template = TEMPLATE.replace("IMAGE", PLACEHOLDER[architecture])
    config, processor = globals()[f"_{architecture}"](tokenizer, template, text, ids)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = eyes, 2 * eyes
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }


def _qwen3_vl(tokenizer: Any, template: str, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.15,
    }
    config = transformers.Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, **_qwen(ids)
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    return config, image_only(transformers.Qwen3VLProcessor)(images, tokenizer, chat_template=template)


def _qwen2_5_vl(tokenizer: Any, template: str, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text["hidden_size"],
        "initializer_range": 0.15,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, **_qwen(ids)
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    return config, image_only(transformers.Qwen2_5_VLProcessor)(images, tokenizer, chat_template=template)


def _idefics3(tokenizer: Any, template: str, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "initializer_range": 0.15}  # fmt: skip
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **text},
        vision_config=vision,
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    return config, transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _llava(tokenizer: Any, template: str, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config={"model_type": "qwen3", **text},
        vision_config=vision,
        image_token_id=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return config, processor


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise, so that no two are alike."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def vlm_rows(count: int = 12) -> list[dict[str, Any]]:
    """Questions about no, one or several images of mixed sizes, with the columns that views and rewards read."""
    sizes = [(40, 32), (64, 24), (24, 56)]
    rows = []
    for i in range(count):
        images = [picture(10 * i + k, *sizes[(i + k) % 3]) for k in range((1, 1, 2, 0)[i % 4])]
        rows.append(
            {
                "prompt": f"What is {i}{'?' * (i % 3)}",
                "images": images,
                "box": [4, 4, 20, 20],
                "answer": str(i),
                "completion": f"it is {i}",
                "solution": f"{i}" if i % 5 else "",
                "task": "even" if i % 2 == 0 else "odd",
            }
        )
    return rows


def gui_rows(count: int = 8) -> list[dict[str, Any]]:
    """Instructions for screenshots of three sizes, with the columns that views and rewards read."""
    sizes = [(64, 48), (48, 64), (100, 60)]
    return [
        {
            "prompt": f"Click on {i}{'!' * (i % 3)}",
            "image": picture(i, *sizes[i % 3]),
            "box": [4.0 + i % 16, 6.0, 20.0 + i % 16, 21.5],
            "platform": ("web", "mobile")[i % 2],
            "element_type": ("text", "icon")[i % 3 == 0],
            "answer": str(i),
            "completion": f"it is {i}",
            "solution": f"{i}" if i % 5 else "",
            "task": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]
