"""Processors of image-text-to-text models, also where torchvision is not installed.

Some families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, InternVL) bundle a video processor, which has no implementation
without torchvision; their processors are then built without it. They read images as ever, and no videos.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from ...pretrained import Pretrained
from ...shipped import shipped


def image_only(processor_class: Any) -> Any:
    """Derives the class without its video processor; saved files name the class itself, for any machine."""

    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        processor_class.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    # transformers reads the parts of a processor off this signature
    return type(processor_class.__name__, (processor_class,), {"__init__": __init__})


def processor_class_of(model_type: str) -> Any:
    """Selects the class that loads the processor of an architecture on this machine."""
    kind: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type) or "", None)
    if kind is None or is_torchvision_available():
        return AutoProcessor
    return image_only(kind) if "video_processor" in inspect.signature(kind.__init__).parameters else AutoProcessor


def load_processor(spec: Pretrained) -> Any:
    """Loads the processor of a checkpoint, unchanged.

    Raises:
        ValueError: the checkpoint has no processor that reads images.
    """
    path = shipped(spec.path)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    config = AutoConfig.from_pretrained(path, **options)
    processor = processor_class_of(config.model_type).from_pretrained(path, **options)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{spec.path}: its processor ({type(processor).__name__}) reads no images; for language models use "
            "TextDistillation"
        )
    return processor


def placeholders(processor: Any, config: Any) -> list[int]:
    """Lists the ids of placeholders of images, videos and sound, by their names in processor and configuration."""
    tokenizer, ids = processor.tokenizer, set()
    named = {**config.to_dict(), **vars(processor)}
    for name, value in named.items():
        if not any(kind in name for kind in ("image", "video", "vision", "audio")):
            continue
        if isinstance(value, int) and name.endswith(("token_id", "token_index")):
            ids.add(value)
        elif isinstance(value, str) and name.endswith(("_token", "_tag")):
            ids.add(tokenizer.get_vocab().get(value))
    # Idefics3 names the tiles of an image by tokens of their own
    ids |= {i for token, i in tokenizer.get_added_vocab().items() if token.startswith("<row_")}
    return sorted(i for i in ids if i is not None)
