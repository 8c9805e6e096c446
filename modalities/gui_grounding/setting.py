"""GUIGroundingDistillation: a screenshot and an instruction in, a click point or a box in text out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from ...chat import is_chat
from ...finding import Finding
from ...policy import Acting, Policy
from ...trajectory import Example, Trajectories
from ..autoregressive import PromptView
from ..vision_language import VisionLanguageDistillation
from ..vision_language.boxes import problem_with_box
from ..vision_language.images import images_of
from .findings import boxes
from .formats import AnswerFormat, Normalized1000
from .metrics import grounding_metrics
from .miniwob import MiniWoB
from .reward import PointInBox
from .weight import digit_places

Size = tuple[int, int]


class GUIGroundingDistillation(VisionLanguageDistillation):
    """On-policy distillation of models that click where an instruction says.

    Columns: ``prompt`` (the instruction; text is put into the format's own prompt, a chat is taken as it is), ``image``
    (the screenshot) and ``box`` (the target, [x1, y1, x2, y2] in pixels of the screenshot). Given completions
    (``rollout.behavior: {dataset: …}``) are written from the box, but for those that are several messages.

    Args:
        answer_format: how coordinates are asked for, written and read. Default: points from 0 to 1000.
        reward: default `PointInBox`: 1 for a click inside of the target; in an environment with rewards, its own.
        **kwargs: as in `VisionLanguageDistillation`.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "image", "box")
    provides: ClassVar[frozenset[str]] = VisionLanguageDistillation.provides | {"digits"}

    def __init__(self, answer_format: AnswerFormat | None = None, **kwargs: Any) -> None:
        environment = kwargs.get("environment")
        if kwargs.get("reward") is None and not (environment is not None and environment.rewards):
            kwargs["reward"] = PointInBox()
        self.answer_format = answer_format or Normalized1000()
        if isinstance(environment, MiniWoB):
            environment.adopt(self.answer_format)
        super().__init__(**kwargs)
        self._model_sizes: dict[Size, Size] = {}
        for name, teacher in self.teachers.items():
            in_words = isinstance(teacher.view, PromptView) and {"box", "completion"} & set(teacher.view.columns)
            if in_words or getattr(teacher.view, "tells_the_answer", False):
                rank_zero_warn(
                    f"model.teachers.{name}: its view tells the answer in words. Such a teacher is certain of it "
                    "whatever the screen shows, and self-distillation degrades to SFT (GUI-SD, 2605.00642: teacher "
                    "entropy .17 against .50 with a visual cue); use Spotlight or BoxOnly"
                )

    def required_columns(self) -> dict[str, str]:
        needed = super().required_columns()
        needed.pop("completion", None)
        return needed

    # -- coordinates --------------------------------------------------------------------------------------------

    def model_size(self, size: Size, policy: Policy) -> Size:
        """Computes the size to which the processor of ``policy``, the student, resizes an image of this size."""
        if size not in self._model_sizes:
            processor = policy.processor.image_processor
            inputs = processor(images=[Image.new("RGB", size)], return_tensors="pt")
            if "image_grid_thw" not in inputs:
                return size
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            self._model_sizes[size] = columns * processor.patch_size, rows * processor.patch_size
        return self._model_sizes[size]

    def written(self, example: Example, seen: Example, policy: Policy) -> str:
        """Writes the completion with the example's box in the image that ``policy``, the student, reads."""
        absolute = self.answer_format.absolute
        model_size = self.model_size(images_of(seen)[0].size, policy) if absolute else (1, 1)
        return self.answer_format.write(tuple(example["box"]), images_of(example)[0].size, model_size)

    def predicted(
        self, completion: str, example: Example, student_view: dict[str, Any] | None = None
    ) -> tuple[float, ...] | None:
        """Parses the point or box that a completion names, in pixels of the original screenshot; None: it is malformed.

        ``student_view``: its settings when the completion was written (`Trajectories`); None: those of now.
        """
        parsed = self.answer_format.parse(completion)
        if parsed is None:
            return None
        size = model_size = images_of(example)[0].size
        if self.answer_format.absolute:
            (student_example,) = self.shown([example], student_view)
            model_size = self.model_size(images_of(student_example)[0].size, self.policies["student"])
        return self.answer_format.to_pixels(parsed, size, model_size)

    # -- the methods of a setting -------------------------------------------------------------------------------

    def asked(self, example: Example) -> Example:
        prompt = example["prompt"]
        asked = self.answer_format.prompt.format(instruction=prompt) if isinstance(prompt, str) else prompt
        return {**example, "prompt": asked}

    def answered(self, example: Example, seen: Example, policy: Policy) -> Example:
        if is_chat(example.get("completion")):  # of several turns, which a box says nothing of
            return example
        return {**example, "completion": self.written(example, seen, policy)}

    def sample(self, policy: Policy, *args: Any, **kwargs: Any) -> Trajectories:
        return self._with_digits(super().sample(policy, *args, **kwargs), self.reads_as(policy))

    def sample_blended(self, *args: Any, **kwargs: Any) -> Trajectories:
        return self._with_digits(super().sample_blended(*args, **kwargs), self.policies["student"])

    def go_on(self, acting: Acting, *args: Any, **kwargs: Any) -> Trajectories:
        return self._with_digits(super().go_on(acting, *args, **kwargs), self.reads_as(acting.policy))

    def replay(self, policy: Policy, *args: Any, **kwargs: Any) -> Trajectories:
        return self._with_digits(super().replay(policy, *args, **kwargs), policy)

    def _with_digits(self, trajectories: Trajectories, reader: Policy) -> Trajectories:
        """Adds the channel ``digits``: how many digits of its number, from its own on, a token has before it."""
        tokenizer, digits = self.tokenizer(reader), torch.zeros(trajectories.mask.shape, dtype=torch.float32)
        for i, (row, own) in enumerate(zip(trajectories.actions, trajectories.mask, strict=True)):
            digits[i, own] = torch.tensor(digit_places(row[own].tolist(), tokenizer.decode)).float()
        trajectories.channels["digits"] = digits
        return trajectories

    def written_as(self, tokens: list[int]) -> str:
        # the tags around a box are special tokens too
        ends = {*self.eos, self.tokenizer().pad_token_id}
        return str(self.tokenizer().decode([token for token in tokens if token not in ends], skip_special_tokens=False))

    def parsed(self, completion: str, example: Example, student_view: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.environment is not None:  # the row's box is that of the first turn
            return {}
        box, prediction = tuple(example["box"]), self.predicted(completion, example, student_view)
        metrics = grounding_metrics(prediction, box, images_of(example)[0].size)
        return {"box": list(box), "prediction": prediction, "metrics": metrics}

    def rewards(self, trajectories: Trajectories) -> tuple[list[float | None] | None, list[dict[str, Any]]]:
        values, samples = super().rewards(trajectories)
        for sample in samples:
            if "turns" in sample and not self.answer_format.absolute:
                sample["clicks"] = [self._share(text) for text in sample["turns"]]
        return values, samples

    def _share(self, text: str) -> list[float] | None:
        """Parses a click, or the center of a box, as shares of width and height; None: it is malformed."""
        if (parsed := self.answer_format.parse(text)) is None:
            return None
        place = self.answer_format.to_pixels(parsed, (1, 1), (1, 1))
        return [(place[axis] + place[axis - 2]) / 2 for axis in (0, 1)]

    # -- checks -------------------------------------------------------------------------------------------------

    def findings(self, examples: list[Example], acted: Trajectories, folder: Path) -> Iterator[Finding]:
        yield from super().findings(examples, acted, folder)
        yield boxes(examples, folder)

    def _refusal(self, example: Example) -> str | None:
        images = images_of(example)
        if len(images) != 1:
            return f"GUI grounding needs one screenshot, the row has {len(images)} images"
        problem = problem_with_box(example["box"], images[0].size)
        if problem is not None:
            return problem
        if self.answer_format.absolute:
            (student_example,) = self.shown([example])
            student = self.policies["student"]
            student_size = self.model_size(images_of(student_example)[0].size, student)
            for name, teacher in self.teachers.items():
                view = teacher.look(example) if teacher.view is not None else None
                if view is not None and self.model_size(images_of(view)[0].size, student) != student_size:
                    return (
                        f"the view of model.teachers.{name} has another image size, so pixels mean other places there"
                    )
        return super()._refusal(example)
