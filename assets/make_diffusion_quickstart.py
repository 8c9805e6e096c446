"""Makes what the diffusion quickstart needs: ``make assets-diffusion``, about half an hour on 2 cores.

A network that tells digits apart (for Frechet distances), a tiny autoencoder, and a flow-matching teacher in diffusers'
AnyFlow architecture, trained with the project's own commands; then the few-step student of the quickstart itself,
where D-OPSD starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, AutoencoderKLWan, FlowMapEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from opd_lightning.modalities.diffusion.quality import DigitFeatures
from opd_lightning.modalities.diffusion.quickstart import NAMES, digits

HERE = Path(__file__).parent / "diffusion_quickstart"
START = Path("runs/pretrain_diffusion/start")


def pixels(**options: Any) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 16, 16]`` in [0, 1], and their labels."""
    rows = digits(**options)
    images = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.tensor(rows["label"])


def train(module: nn.Module, loss: Any, steps: int, count: int, lr: float, batch: int = 128) -> None:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        value = loss(torch.randint(count, (batch,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"{type(module).__name__} {step}: {value.item():.4f}", flush=True)


def make_features() -> None:
    images, labels = pixels()
    features = DigitFeatures(path=None).requires_grad_(True)

    def loss(rows: Tensor) -> Tensor:
        seen = images[rows].clone()
        flipped = torch.rand(len(rows)) < 0.5
        seen[flipped] = 1 - seen[flipped]
        moved = torch.roll(seen, tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        return nn.functional.cross_entropy(
            features.head(features.raw(moved + 0.05 * torch.randn_like(moved))), labels[rows]
        )

    train(features, loss, 1500, len(images), 2e-3)
    features.spread.copy_(features.raw(images).detach().std(0).clamp(min=1))
    held, wanted = pixels(held_out=True)
    print(f"digits told apart: {(features.classify(held) == wanted).float().mean():.3f} of the held-out ones")
    save_file(features.state_dict(), HERE / "features.safetensors")


def make_autoencoder() -> Any:
    sizes = {"base_dim": 8, "z_dim": 3, "dim_mult": [1, 1], "num_res_blocks": 1, "attn_scales": []}
    down = {"temperal_downsample": [False], "scale_factor_spatial": 2, "scale_factor_temporal": 4}
    vae: Any = AutoencoderKLWan(**sizes, **down, latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    images, _ = pixels()
    images = torch.cat([images, 1 - images]).unsqueeze(2) * 2 - 1

    def loss(rows: Tensor) -> Tensor:
        found = vae.encode(images[rows]).latent_dist
        error = (vae.decode(found.mean + 0.05 * torch.randn_like(found.mean)).sample - images[rows]).square().mean()
        return error + 1e-4 * found.mean.square().mean()

    train(vae, loss, 600, len(images), 5e-3, batch=32)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    return vae.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "a", "handwritten", *NAMES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def make_start() -> None:
    """A pipeline whose transformer knows nothing yet."""
    tokenizer = make_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    transformer = AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=24, in_channels=3, out_channels=3, text_dim=32,
        freq_dim=64, ffn_dim=192, num_layers=3, image_dim=3, rope_max_seq_len=32,
    )  # fmt: skip
    pipe: Any = AnyFlowPipeline(
        tokenizer, UMT5EncoderModel(text), transformer, make_autoencoder(), FlowMapEulerDiscreteScheduler()
    )
    pipe.save_pretrained(START)


def opd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *arguments], check=True)


def pretrain() -> None:
    opd("fit", "-c", "opd:diffusion/pretrain_teacher.yaml")
    shutil.rmtree(HERE / "teacher", ignore_errors=True)
    opd("export", "runs/pretrain_diffusion/checkpoints/last.ckpt", str(HERE / "teacher"))


def few_step() -> None:
    """The quickstart's own student, where D-OPSD starts."""
    run = Path("runs/diffusion_quickstart")
    shutil.rmtree(run, ignore_errors=True)
    opd("fit", "-c", "opd:diffusion/quickstart.yaml")
    shutil.rmtree(HERE / "few_step", ignore_errors=True)
    opd("export", str(run / "checkpoints" / "last.ckpt"), str(HERE / "few_step"))


if __name__ == "__main__":
    torch.manual_seed(0)
    HERE.mkdir(exist_ok=True)
    shutil.rmtree("runs/pretrain_diffusion", ignore_errors=True)
    make_features()
    make_start()
    pretrain()
    few_step()
    print(json.dumps({path.name: path.stat().st_size for path in HERE.rglob("*.safetensors")}, indent=1))
