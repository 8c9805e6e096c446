"""VisionLanguageDistillation: models that read images and text, and write text.

Shape legend: B trajectories, P prompt width (left padded), T completion width (right padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from ...chat import is_chat
from ...distribution import Categorical, Distribution
from ...finding import Finding
from ...images import open_image
from ...picture import data_uri
from ...policy import Acting, Policy, evaluating
from ...pretrained import Pretrained
from ...rows import row_of
from ...sharding import is_sharded
from ...splits import rows_of
from ...teacher import Elsewhere
from ...trajectory import Example, Trajectories
from ..autoregressive import AutoregressiveDistillation
from ..autoregressive.elsewhere.question import answers
from ..autoregressive.memory import Plan
from ..autoregressive.models import bare
from ..autoregressive.observing import Given, Heard
from ..autoregressive.rendering import Renderer
from .gallery import pictures
from .images import images_of, with_images
from .memory import with_eyes
from .observing import OBSERVED, given_images, heard_images, image_ids, observed_images, seen_by
from .placing import mark_of, marks_of, placed_images
from .processor import load_processor, placeholders

CHECKED_EXAMPLES, CHECKED_STEPS = 4, 8
CHECK = "model.blank_check"
PROBE_PIXELS = 56

FILLED_IN = ("gemma3", "paligemma")
"""Architectures whose placeholders may lack a row of embeddings: they look up another one in its place."""


class VisionLanguageDistillation(AutoregressiveDistillation):
    """On-policy distillation of image-text-to-text models.

    Images come from the columns ``image`` or ``images`` (PIL, path, bytes), or from the image parts of a chat. Only
    token ids travel with the trajectories: pixels are made from the examples when a forward pass needs them.

    Args:
        max_image_pixels: examples with a larger image are refused or skipped; None: the processor shrinks them.
        blank_check: before the first step, make sure that every policy's log-probs change when its images are blanked.
        **kwargs: as in `AutoregressiveDistillation`.
    """

    model_class: ClassVar[Any] = AutoModelForImageTextToText
    hub_task: ClassVar[str] = "image-text-to-text"
    pictures = staticmethod(pictures)
    reads: ClassVar[frozenset[str]] = AutoregressiveDistillation.reads | {"image", "images"}
    observes: ClassVar[frozenset[str]] = frozenset({"image"})
    padding: ClassVar[dict[str, tuple[float, str]]] = dict.fromkeys(
        ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"), (0, "left")
    )

    def __init__(
        self,
        max_image_pixels: int | None = None,
        blank_check: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_image_pixels, self.blank_check = max_image_pixels, blank_check

    def original_processor(self, spec: Pretrained) -> Any:
        return load_processor(spec)

    def load_processor(self, spec: Pretrained) -> Any:
        processor = super().load_processor(spec)
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked: any id will do
        return processor

    @cached_property
    def _placeholders(self) -> list[int]:
        ids: set[int] = set()
        for policy in self.policies.values():
            ids |= set(placeholders(policy.processor, bare(policy.model).config))
        return sorted(i for i in ids if i < self.vocabulary)

    def suppressed(self) -> list[int]:
        return self._placeholders

    def filled_in(self, policy: Policy) -> list[int]:
        config = bare(policy.model).config
        return placeholders(policy.processor, config) if config.model_type in FILLED_IN else []

    @torch.no_grad()
    def probe(self, policy: Policy) -> Tensor:
        """Computes log-probs ``[n, V]`` behind drawn ids, and behind an image read by the policy's own processor."""
        of_ids = super().probe(policy)
        device, model = next(policy.model.parameters()).device, bare(policy.model)
        given: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.shown_inputs(policy).items()}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            given["logits_to_keep"] = 8  # an image may be thousands of tokens
        with evaluating(policy.model), policy.active():
            logits = model(**given).logits
        return torch.cat([of_ids, logits[..., : self.vocabulary].float().log_softmax(-1).flatten(0, 1).cpu()])

    def shown_inputs(self, policy: Policy) -> dict[str, Tensor]:
        """Computes all inputs of a policy that is shown a small image, by its own processor."""
        shades = torch.arange(PROBE_PIXELS**2, dtype=torch.float64).sin().add(1).mul(127).byte()
        image = Image.fromarray(shades.view(PROBE_PIXELS, PROBE_PIXELS).numpy()).convert("RGB")
        text = policy.processor.tokenizer.decode(range(min(8, self.vocabulary)), skip_special_tokens=True)
        return self._process([{"prompt": text, "image": image}], policy)

    # -- inputs -------------------------------------------------------------------------------------------------

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Tokenizes prompts: ``input_ids``, ``attention_mask`` and, if any, token types ``[B, P]``, left padded.

        Raises:
            ValueError: an image cannot be read, or as in `placed_images` and `Renderer.prompt`.
        """
        inputs = self._process(examples, policy)
        return {name: inputs[name] for name in self.padding if name in inputs}

    def media(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        inputs = self._process(examples, self.reads_as(policy))
        return {name: tensor for name, tensor in inputs.items() if name not in self.padding}

    def cache_key(self, example: Example) -> Hashable:
        return tuple((image.size, image.tobytes()) for image in [*images_of(example), *example.get(OBSERVED, ())])

    def _process(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Calls the processor on examples; `collate` and `media` of one batch share a call."""
        processor = policy.processor
        if "processed" in policy.cache:
            of, inputs = policy.cache["processed"]
            if len(of) == len(examples) and all(map(_same, of, examples)):
                return inputs
        renderer = self.renderer(policy)
        images = [[*(images_of(row) if "prompt" in row else ()), *row.get(OBSERVED, ())] for row in examples]
        # what was observed has its tokens elsewhere: here it is for its pixels alone
        texts = [
            (renderer.prompt(self.asked(row)) if "prompt" in row else "")
            + mark_of(processor) * len(row.get(OBSERVED, ()))
            for row in examples
        ]
        given: dict[str, Any] = {"images": images} if any(images) else {}
        # a rendered chat holds its own beginning-of-sequence token already
        processed = processor(
            text=texts, **given, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        inputs = {name: value for name, value in processed.items() if isinstance(value, Tensor)}
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self.padding_id)
        policy.cache["processed"] = examples, inputs
        return inputs

    def renderer(self, policy: Policy) -> Renderer:
        processor = policy.processor
        if processor.chat_template is None:
            raise ValueError(f"{processor.tokenizer.name_or_path} has no chat template to place images with")
        prepare = partial(placed_images, own=marks_of(processor))
        return Renderer(processor, self.chat_template_kwargs, prepare=prepare)

    def continued(self, prompts: dict[str, Tensor], trajectories: Trajectories, device: Any) -> dict[str, Tensor]:
        inputs = super().continued(prompts, trajectories, device)
        # behind the last trained step nothing is read, and no image is given for its tokens
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self.padding_id)
        behind = inputs["input_ids"][:, prompts["input_ids"].shape[1] :]
        types = {
            name: torch.cat([prompts[name], self.typed(name, behind).to(prompts[name].dtype)], 1)
            for name in ("mm_token_type_ids", "token_type_ids")
            if name in prompts
        }
        if "mm_token_type_ids" in types:
            del inputs["position_ids"]  # these models place image tokens in two dimensions, by their own rule
        return inputs | types

    # -- observations -------------------------------------------------------------------------------------------

    def heard(self, reader: Policy, example: Example, observation: str | list[Any], role: str) -> Heard:
        if not (parts := observed_images(observation)):
            return super().heard(reader, example, observation, role)
        return heard_images(self, reader, self.asked(example), observation, parts, role)

    def given(self, policy: Policy, row: Example) -> Given:
        completion = row["completion"]
        if not is_chat(completion) or not (parts := observed_images(completion)):
            return super().given(policy, row)
        return given_images(self, policy, row, parts)

    def observing(self, policy: Policy, example: Example, values: list[dict[str, Any]]) -> Example:
        if not values:
            return example
        teacher = self.teachers.get(policy.name)
        return example | {OBSERVED: seen_by(teacher.view if teacher is not None else None, values)}

    def typed(self, name: str, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(image_ids(self.policies["student"].processor), device=ids.device)).to(ids)

    def rewards(self, trajectories: Trajectories) -> tuple[list[float | None] | None, list[dict[str, Any]]]:
        values, samples = super().rewards(trajectories)
        for sample, observed in zip(samples, trajectories.visible or (), strict=False):
            sample["observed"] = [data_uri(open_image(value["image"])) for value in observed]
        return values, samples

    # -- the methods of a setting that see images ---------------------------------------------------------------

    def sample(self, policy: Policy, *args: Any, **kwargs: Any) -> Trajectories:
        _forget_places(policy)
        return super().sample(policy, *args, **kwargs)

    def go_on(self, acting: Acting, *args: Any, **kwargs: Any) -> Trajectories:
        _forget_places(acting.policy)
        return super().go_on(acting, *args, **kwargs)

    def distribution(
        self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None
    ) -> Categorical:
        categorical = super().distribution(policy, trajectories, view)
        if torch.is_grad_enabled() and policy.name == "student" and not self._sees(trajectories):
            # a batch without images must still reach every trained parameter
            idle = sum((p.sum() * 0.0 for p in self._vision_parameters(policy)), categorical.hidden.new_zeros(()))
            categorical.hidden = categorical.hidden + idle
            categorical.layers = {number: hidden + idle for number, hidden in categorical.layers.items()}
        return categorical

    def _sees(self, trajectories: Trajectories) -> bool:
        student_examples = self.shown(trajectories.examples, trajectories.student_view)
        return any(images_of(example) for example in student_examples)

    def _vision_parameters(self, policy: Policy) -> list[Tensor]:
        """Lists trained parameters outside of the language model."""
        model = bare(policy.model)
        reading = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
        return [p for p in model.parameters() if p.requires_grad and id(p) not in reading]

    # -- checks -------------------------------------------------------------------------------------------------

    def _refusal(self, example: Example) -> str | None:
        for image in images_of(example):
            if self.max_image_pixels is not None and image.width * image.height > self.max_image_pixels:
                return (
                    f"an image has {image.width} × {image.height} pixels, "
                    f"model.max_image_pixels is {self.max_image_pixels}"
                )
        return super()._refusal(example)

    def on_train_start(self) -> None:
        if self.blank_check:
            self.check_images()
        super().on_train_start()

    def check_images(self) -> None:
        """Refuses policies that do not read their images.

        Raises:
            ValueError: a policy says the same whether its images are there or blank.
        """
        rows = rows_of(self.trainer, "validation", CHECK) or rows_of(self.trainer, "train", CHECK) or []
        examples: list[Example] = [row_of(rows, i) for i in range(min(len(rows), CHECKED_EXAMPLES))]
        examples = [example for example in examples if images_of(example)]
        if not examples:
            return
        seeds = list(range(len(examples)))
        acted = self.act("student", examples, seeds).truncate(CHECKED_STEPS).to(self.device)
        gaps = self.image_gaps(acted) | self._gaps_elsewhere(acted)
        for name, gap in gaps.items():
            if not bool((gap.abs() > 1e-6).any()):
                raise ValueError(
                    f"{'model.student' if name == 'student' else f'model.teachers.{name}'}: its log-probs do not "
                    "change when the images are blanked, so it does not see them. Look at its processor, its chat "
                    "template and its view; model.blank_check: false trains all the same."
                )

    def findings(self, examples: list[Example], acted: Trajectories, folder: Path) -> Iterator[Finding]:
        yield from super().findings(examples, acted, folder)
        cut = acted.truncate(CHECKED_STEPS).to(self.device)
        gaps = self.image_gaps(cut) | self._gaps_elsewhere(cut)
        if not gaps:
            yield Finding("images", "doubtful", "none of the rows that were looked at has an image")
        for name, gap in gaps.items():
            text = f"{name}: blank images change log p of what was written by {float(gap.abs().mean()):.2g} nats a step"
            reads = bool((gap.abs() > 1e-6).any())
            advice = "" if reads else "it does not see them: look at its processor, its chat template and its view"
            yield Finding("images", "good" if reads else "bad", text, advice)

    def forecast(self, trainer: Any, device_bytes: float | None) -> Plan:
        return with_eyes(self, trainer, super().forecast(trainer, device_bytes))

    def inspect(self, trajectories: Trajectories) -> dict[str, Tensor]:
        return {f"image_gap/{name}": gap for name, gap in self.image_gaps(trajectories).items()}

    @torch.no_grad()
    def image_gaps(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Computes by policy the mean over steps of log p(y | images) − log p(y | blank images), ``[K]`` trajectories.

        Trajectories without images, and those for which a teacher has no view, are left out.
        """
        gaps = {}
        for name, policy in self.policies.items():
            examples, kept = self._seeing(name, trajectories)
            # other ranks may have some, and wait for this one where the weights are cut
            asked = kept if kept or not is_sharded(bare(policy.model)) else [0]
            if not asked:
                continue
            some = trajectories.select(torch.tensor(asked))
            views = [examples[i] or trajectories.examples[i] for i in asked]
            with evaluating(policy.model):
                seeing = self.distribution(policy, some, views)
                blank = self.distribution(policy, some, [blanked(view) for view in views])
            gaps[name] = self._gaps(seeing, blank, some)[: len(kept)]
        return gaps

    def _gaps(self, seeing: Distribution, blank: Distribution, trajectories: Trajectories) -> Tensor:
        """Computes the mean over steps ``[K]`` of what two distributions make of the actions, apart."""
        size = self.objective.chunk_size
        told = zip(answers(seeing, trajectories, size), answers(blank, trajectories, size), strict=True)
        return torch.stack([(one.log_probs - other.log_probs).mean() for one, other in told]).to(self.device)

    @torch.no_grad()
    def _gaps_elsewhere(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Computes the same of teachers that a server answers for; what was recorded knows of no blank images."""
        gaps = {}
        for name in self.elsewhere:
            teacher, (examples, kept) = self.teachers[name], self._seeing(name, trajectories)
            assert isinstance(teacher.weights, Elsewhere)
            if teacher.weights.recorded or not kept:
                continue
            some = trajectories.select(torch.tensor(kept))
            views = [view for view in (examples[i] for i in kept) if view is not None]
            seeing = teacher.weights.say(teacher, self, some, [*views]).to(self.device)
            blank = teacher.weights.say(teacher, self, some, [blanked(view) for view in views]).to(self.device)
            assert seeing is not None  # as what is lazy alone is
            assert blank is not None
            gaps[name] = self._gaps(seeing, blank, some)
        return gaps

    def _seeing(self, name: str, trajectories: Trajectories) -> tuple[list[Example | None], list[int]]:
        """Lists rows as a policy reads them, and the places of those that show it an image."""
        examples = self.streams.seen(name, trajectories.examples, trajectories.student_view)
        kept = [i for i, e in enumerate(examples) if e is not None and images_of(e) and trajectories.mask[i].any()]
        return examples, kept


def blanked(example: Example) -> Example:
    """Replaces every image by a gray one."""
    return with_images(example, [Image.new("RGB", image.size, (127, 127, 127)) for image in images_of(example)])


def _forget_places(policy: Policy) -> None:
    """Drops the places of an earlier batch's images, which prompts of text alone would take over."""
    for part in bare(policy.model).modules():
        if hasattr(part, "rope_deltas"):
            part.rope_deltas = None


def _same(one: Example, other: Example) -> bool:
    return one is other
