"""Families of diffusers pipelines: the inputs of each one's transformer, and the encoders and decoders around it.

A new family is one class. Shape legend: B rows; latents ``[B, ...]`` in the family's own layout.
"""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...images import open_image
from ...shipped import shipped
from .models import diffusers, pipeline_index

Condition = dict[str, Tensor]
"""One encoded prompt: the transformer's own inputs, without a batch dimension."""


class Family(ABC):
    """Family of pipelines: everything of one but its transformer. Nothing in it is trained.

    Args:
        pipe: a diffusers pipeline without its transformer.
        config: the transformer's configuration.
        size: height and width of images in pixels.
        max_sequence_length: tokens of a prompt.
        shift: of the noise levels, σ' = s·σ / (1 + (s−1)·σ); None: the scheduler's.
        cache: a folder for encoded prompts and images, by content; None: only in memory.

    Raises:
        ValueError: the pipeline's scheduler is not one of flow matching.
    """

    pipelines: ClassVar[tuple[str, ...]]
    jumps: ClassVar[bool] = False
    """True where the end of a step is an input of the transformer (flow maps)."""

    def __init__(
        self,
        pipe: Any,
        config: Any,
        size: tuple[int, int],
        max_sequence_length: int,
        shift: float | None = None,
        cache: str | None = None,
    ) -> None:
        self.pipe, self.config, self.size = pipe, config, size
        self.max_sequence_length, self.cache = max_sequence_length, Path(cache) if cache else None
        self._known: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.RLock()
        library = diffusers()
        kinds = library.FlowMatchEulerDiscreteScheduler, library.FlowMapEulerDiscreteScheduler
        if not isinstance(pipe.scheduler, kinds):
            raise ValueError(
                f"student.path: {type(pipe.scheduler).__name__} is no flow-matching scheduler; use a model that "
                f"predicts velocities ({', '.join(kind.__name__ for kind in kinds)})"
            )
        if shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(
                pipe.scheduler.config,
                shift=shift,
                **({"use_dynamic_shifting": False} if "base_shift" in pipe.scheduler.config else {}),
            )
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    def __deepcopy__(self, memo: Any) -> Family:
        return self  # text encoders are large; nothing here changes but the cache, behind a lock

    # -- the methods of a family ----------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, prompt: str) -> Condition:
        """Encodes a prompt for the transformer."""

    def _refer(self, prompt: str, reference: Tensor) -> Condition:
        """Encodes a prompt with ``reference [1, 3, H, W]`` in [−1, 1] by the model's own encoder.

        Returns:
            Inputs in addition to, or in place of, those of `_encode`.

        Raises:
            ValueError: it reads no images.
        """
        raise ValueError(f"a {type(self.pipe).__name__} sees no reference images")

    @abstractmethod
    def velocity(self, model: nn.Module, latent: Tensor, t: Tensor, r: Tensor, condition: dict[str, Any]) -> Tensor:
        """Predicts velocities ``[B, ...]`` at latents ``[B, ...]``, for steps from level t to r, ``[B]`` each."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        channels = self.config["in_channels"]
        return channels, self.size[0] // factor, self.size[1] // factor

    def levels(self, steps: int) -> Tensor:
        """Computes noise levels ``[steps + 1]`` from 1 to 0 by the pipeline's scheduler."""
        # set by hand: of a number of steps alone a shifted scheduler makes a last step that does next to nothing
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        dynamic = {"mu": self._mu()} if self.pipe.scheduler.config.use_dynamic_shifting else {}
        self.pipe.scheduler.set_timesteps(sigmas=sigmas, **dynamic)
        return self.pipe.scheduler.sigmas.clone()

    def _mu(self) -> float:
        config, tokens = self.pipe.scheduler.config, self.latent_shape[-2] * self.latent_shape[-1] // 4
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    def _to_latents(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        return (vae.encode(images).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def _to_images(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0), return_dict=False)[0]

    def stack(self, conditions: list[Condition]) -> dict[str, Any]:
        """Batches encoded prompts."""
        return {name: torch.stack([condition[name] for condition in conditions]) for name in conditions[0]}

    def batches(self, conditions: Sequence[Condition]) -> list[list[int]]:
        """Groups the rows that can share a forward pass."""
        groups: dict[Any, list[int]] = {}
        for row, condition in enumerate(conditions):
            groups.setdefault(tuple((name, tensor.shape) for name, tensor in condition.items()), []).append(row)
        return list(groups.values())

    # -- what all families share ----------------------------------------------------------------------------------

    def tokens(self, prompt: str) -> int:
        """Counts the tokens of a prompt, by the tokenizer with the longest context."""
        return len((getattr(self.pipe, "tokenizer_3", None) or self.pipe.tokenizer)(prompt)["input_ids"])

    @torch.no_grad()
    def conditions(self, prompts: list[str], references: list[Any]) -> list[Condition]:
        """Encodes prompts, with the reference image beside each where there is one (whatever `open_image` takes)."""
        # one at a time: an encoding must not depend on its neighbors, not by a rounding
        of_prompts = self._cached(
            [_key("prompt", self._name, prompt) for prompt in prompts],
            lambda rows: [self._encode(prompts[row]) for row in rows],
        )
        pairs = [
            (prompt, open_image(image)) for prompt, image in zip(prompts, references, strict=True) if image is not None
        ]
        of_references = iter(
            self._cached(
                [_key("reference", self._name, str(self.size), prompt, _content(image)) for prompt, image in pairs],
                lambda rows: [self._refer(pairs[row][0], self.pixels([pairs[row][1]])) for row in rows],
            )
        )
        return [
            encoded if image is None else encoded | next(of_references)
            for encoded, image in zip(of_prompts, references, strict=True)
        ]

    @torch.no_grad()
    def latents(self, images: list[Any]) -> Tensor:
        """Encodes images (whatever `open_image` takes), scaled to the pipeline's size, to latents ``[B, ...]``."""
        opened = [open_image(image) for image in images]

        def make(rows: list[int]) -> list[Condition]:
            # one at a time, as prompts are
            return [{"latent": self._to_latents(self.pixels([opened[row]]))[0]} for row in rows]

        keys = [_key("latent", self._name, str(self.size), _content(image)) for image in opened]
        return torch.stack([encoded["latent"] for encoded in self._cached(keys, make)])

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Decodes latents to images ``[B, 3, H, W]`` in [0, 1]."""
        vae = self.pipe.vae
        pixels = self._to_images(latents.to(vae.device, vae.dtype))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Converts images to pixels ``[B, 3, H, W]`` in [−1, 1], on the encoder's device."""
        height, width = self.size
        scaled = [
            image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
            for image in map(open_image, images)
        ]
        stacked = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        vae = self.pipe.vae
        return stacked.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1

    @cached_property
    def _name(self) -> str:
        """Key of the encoders' weights and settings, for a cache that outlives the process."""
        if self.cache is None:
            return ""
        encoders = [module for module in self.pipe.components.values() if isinstance(module, nn.Module)]
        weights = [float(p.double().abs().sum()) for encoder in encoders for p in encoder.parameters()]
        return f"{type(self).__name__} {self.max_sequence_length} {weights}"

    def _cached(self, keys: list[str], make: Any) -> list[dict[str, Tensor]]:
        with self._lock:
            for key in set(keys) - set(self._known):
                file = self.cache / f"{key}.safetensors" if self.cache else None
                if file is not None and file.exists():
                    self._known[key] = load_file(file)
            missing = {key: row for row, key in enumerate(keys) if key not in self._known}
            for start in range(0, len(missing), 64):
                batch = list(missing)[start : start + 64]
                for key, encoded in zip(batch, make([missing[key] for key in batch]), strict=True):
                    self._known[key] = {name: tensor.cpu().contiguous() for name, tensor in encoded.items()}
                    if self.cache is not None:
                        _keep(self._known[key], self.cache / f"{key}.safetensors")
            return [self._known[key] for key in keys]


class AnyFlow(Family):
    """AnyFlow (2605.13724): flow maps u(x, t, r), as diffusers has them; with one frame, images.

    Where the transformer has ``image_dim``, it reads reference images encoded by the autoencoder: a token per latent
    pixel.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("AnyFlowPipeline",)
    jumps: ClassVar[bool] = True

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor_spatial
        return self.config["in_channels"], 1, self.size[0] // factor, self.size[1] // factor

    def levels(self, steps: int) -> Tensor:
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.clone()

    def _encode(self, prompt: str) -> Condition:
        hidden, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": hidden[0]}

    def _refer(self, prompt: str, reference: Tensor) -> Condition:
        if self.config["image_dim"] is None:
            raise ValueError("this transformer sees no reference images: its image_dim is not set")
        return {"encoder_hidden_states_image": self._to_latents(reference).flatten(2)[0].T}

    def velocity(self, model: nn.Module, latent: Tensor, t: Tensor, r: Tensor, condition: dict[str, Any]) -> Tensor:
        levels = {"timestep": 1000 * t[:, None], "r_timestep": 1000 * r[:, None]}
        predicted = model(hidden_states=latent.transpose(1, 2), **levels, **condition, return_dict=False)[0]
        return predicted.transpose(1, 2)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return (x.view(1, -1, 1, 1, 1).to(latents.device, latents.dtype) for x in (mean, 1.0 / std))  # type: ignore[return-value]

    def _to_latents(self, images: Tensor) -> Tensor:
        latents = self.pipe.vae.encode(images.unsqueeze(2)).latent_dist.mode()
        mean, precision = self._statistics(latents)
        return (latents - mean) * precision

    def _to_images(self, latents: Tensor) -> Tensor:
        mean, precision = self._statistics(latents)
        return self.pipe.vae.decode(latents / precision + mean, return_dict=False)[0].squeeze(2)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)

    def _encode(self, prompt: str) -> Condition:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": hidden[0], "pooled_projections": pooled[0]}

    def velocity(self, model: nn.Module, latent: Tensor, t: Tensor, r: Tensor, condition: dict[str, Any]) -> Tensor:
        return model(hidden_states=latent, timestep=1000 * t, **condition, return_dict=False)[0]


class Flux(Family):
    """FLUX.1. Where guidance is an input of the transformer, it is the pipeline's default, 3.5."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = 2 * self.pipe.vae_scale_factor
        return self.config["in_channels"] // 4, 2 * (self.size[0] // factor), 2 * (self.size[1] // factor)

    def _encode(self, prompt: str) -> Condition:
        hidden, pooled, _ = self.pipe.encode_prompt(prompt, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": hidden[0], "pooled_projections": pooled[0]}

    def velocity(self, model: nn.Module, latent: Tensor, t: Tensor, r: Tensor, condition: dict[str, Any]) -> Tensor:
        batch, channels, height, width = latent.shape
        text = condition["encoder_hidden_states"]
        predicted = model(
            hidden_states=self.pipe._pack_latents(latent, batch, channels, height, width),
            timestep=1000 * t / 1000,  # as the pipeline does, rounding and all
            guidance=latent.new_full((batch,), 3.5) if self.config["guidance_embeds"] else None,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latent.device, latent.dtype),
            **condition,
            return_dict=False,
        )[0]
        # the pipeline's packing, undone
        cells = predicted.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(latent.shape)


class ZImage(Family):
    """Z-Image. Reference images need a text encoder that reads images, such as a Qwen3-VL in place of the Qwen3.

    After D-OPSD (2605.05204): image and prompt are one user turn, and the last hidden state but one is the condition.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)

    def _encode(self, prompt: str) -> Condition:
        hidden, _ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt": hidden[0]}

    def _refer(self, prompt: str, reference: Tensor) -> Condition:
        encoder, processor = self.pipe.text_encoder, getattr(self.pipe.tokenizer, "image_processor", None)
        if processor is None:
            raise ValueError(
                f"the text encoder {type(encoder).__name__} sees no images; put one that does, such as a Qwen3-VL with "
                "its processor, into the pipeline's folder as text_encoder and tokenizer"
            )
        image = Image.fromarray(((reference[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy())
        turn = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        inputs = self.pipe.tokenizer.apply_chat_template(
            turn, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(encoder.device)
        return {"prompt": encoder(**inputs, output_hidden_states=True).hidden_states[-2][0]}

    def stack(self, conditions: list[Condition]) -> dict[str, Any]:
        return {"prompt": [condition["prompt"] for condition in conditions]}

    def batches(self, conditions: Sequence[Condition]) -> list[list[int]]:
        return [list(range(len(conditions)))]  # its transformer takes prompts of any length

    def velocity(self, model: nn.Module, latent: Tensor, t: Tensor, r: Tensor, condition: dict[str, Any]) -> Tensor:
        dtype = next(model.parameters()).dtype
        images = list(latent.to(dtype).unsqueeze(2).unbind(0))
        # its time runs from noise, 0, to data, 1, and its velocity that way, too
        predicted = model(images, (1000 - 1000 * t) / 1000, condition["prompt"], return_dict=False)[0]
        return -torch.stack([v.float() for v in predicted]).squeeze(2)


FAMILIES: tuple[type[Family], ...] = (AnyFlow, StableDiffusion3, Flux, ZImage)


def load_family(path: str, config: Any, revision: str | None = None, **settings: Any) -> Family:
    """Loads the family of a pipeline's folder, without its transformer.

    Raises:
        ValueError: no family knows the pipeline, or its scheduler is not one of flow matching.
    """
    path = shipped(path)
    name = pipeline_index(path, revision)["_class_name"]
    kind = next((family for family in FAMILIES if name in family.pipelines), None)
    if kind is None:
        supported = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
        raise ValueError(f"student.path: {path} is a {name}; there are families for {supported}")
    pipe = diffusers().DiffusionPipeline.from_pretrained(path, transformer=None, revision=revision)
    pipe.set_progress_bar_config(disable=True)
    return kind(pipe, config, **settings)


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes all of a file or nothing, also where a process is killed or several write the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, partial)
    partial.replace(file)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _content(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
