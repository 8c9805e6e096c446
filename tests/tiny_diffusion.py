"""Tiny diffusers pipelines of real architectures, with tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_lightning.trajectory import Example

WORDS = ("a", "red", "blue", "square", "circle", "dot", "big", "small")


def tokenizer(limit: int = 16, chat: bool = False) -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "user", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    template = "user {{ messages[0]['content'] }} </s>" if chat else None
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=limit,
        chat_template=template,
    )


def _autoencoder(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip


def _clip(projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def stable_diffusion_3(width: int = 16) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=width // 2,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=width, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), _autoencoder(4),
        _clip(True), tokenizer(), _clip(True), tokenizer(), _t5(), tokenizer(),
    )  # fmt: skip


def flux(width: int = 16) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=width // 2,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(2, 2, width // 2 - 4),
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), _autoencoder(4),
        _clip(False), tokenizer(), _t5(), tokenizer(), transformer,
    )  # fmt: skip


def z_image(width: int = 16) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    text = Qwen3Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=2 * width, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, width - 8], axes_lens=[64, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), _autoencoder(4), Qwen3Model(text), tokenizer(32, chat=True),
        transformer,
    )  # fmt: skip


def anyflow(width: int = 16) -> Any:
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, AutoencoderKLWan, FlowMapEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=width // 2, in_channels=3, out_channels=3,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, image_dim=3, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=3, dim_mult=[1, 1], num_res_blocks=1, attn_scales=[], temperal_downsample=[False],
        scale_factor_spatial=2, scale_factor_temporal=4, latents_mean=[0.1] * 3, latents_std=[0.5] * 3,
    )  # fmt: skip
    text = UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return AnyFlowPipeline(
        tokenizer(), UMT5EncoderModel(text), transformer, vae, FlowMapEulerDiscreteScheduler(shift=2.0)
    )


PIPELINES = {"anyflow": anyflow, "flux": flux, "stable_diffusion_3": stable_diffusion_3, "z_image": z_image}


def save_pipeline(folder: Path, kind: str, seed: int = 0, width: int = 16) -> Path:
    """A pipeline with random weights; those that diffusers sets to zero are random, too."""
    torch.manual_seed(100)  # encoders are the same for all seeds
    pipe = PIPELINES[kind](width)
    torch.manual_seed(seed)
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(folder)
    return folder


def make_rows(count: int = 24, size: int = 16) -> list[Example]:
    """Prompts of mixed length, images, and the columns that the rows of other settings have."""
    rows = []
    for i in range(count):
        image = Image.new("RGB", (size, size), (10 * i % 256, 200, 255 - 7 * i % 256))
        prompt = " ".join(["a", *(["big"] * (i % 3)), WORDS[1 + i % 2], WORDS[3 + i % 3]])
        row = {"prompt": prompt, "image": image, "label": i % 2, "task": "odd" if i % 2 else "even"}
        rows.append({**row, "solution": "yes" if i % 5 else "", "completion": "", "answer": ""})
    return rows
