"""Students that see: rollout, replay and teachers agree on pixels, image tokens and positions, view by view."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.vision_language import VisionLanguageDistillation
from opd_lightning.modalities.vision_language.images import with_images
from opd_lightning.modalities.vision_language.setting import blanked, placed_images
from opd_lightning.modalities.vision_language.view import Crop, Downscale
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import Original, View
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher
from tests.tiny import LongerIsBetter, act, fit, log_softmax, make_module, no_teacher, teacher_forced
from tests.tiny_vlm import picture, save_vlm, vlm_rows


def make(student, teacher=None, objective=None, **settings):
    if teacher is None and objective is None:
        objective = no_teacher()
    return make_module(student, teacher, objective, setting=VisionLanguageDistillation, **settings)


def test_a_replayed_rollout_reproduces_its_log_probs(vlm_student):
    """Mixed image sizes and counts, and rows without images, in one batch."""
    module = make(vlm_student)
    rolled = act(module, vlm_rows(12))
    difference = teacher_forced(module, "student", rolled) - rolled.behavior_log_probs
    assert difference[rolled.mask].abs().max() < 1e-4


def test_a_row_says_the_same_alone_and_in_company(vlm_student):
    module = make(vlm_student)
    rows = vlm_rows(8)
    together = act(module, rows)
    for i in (3, 0, 2):  # without images, with one, with two
        alone = module.act("student", [rows[i]], [1000 * i])
        steps = int(alone.mask.sum())
        assert torch.equal(alone.actions[0, :steps], together.actions[i, :steps])
        assert (alone.behavior_log_probs[0] - together.behavior_log_probs[i])[: alone.mask.shape[1]].abs().max() < 1e-4


def test_log_probs_are_those_of_the_plain_model(vlm_student, vlm):
    """One row without padding, through transformers' own forward pass."""
    module = make(vlm_student)
    rolled = act(module, vlm_rows(1))
    model, processor = module.policies["student"].model, module.policies["student"].processor
    example = rolled.examples[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["prompt"]}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=example["images"], text=[text], return_tensors="pt")
    steps = int(rolled.mask.sum())
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            more = (
                rolled.actions[:, :steps] if name == "input_ids" else torch.full((1, steps), int("attention" in name))
            )
            inputs[name] = torch.cat([inputs[name], more], 1)
    with torch.no_grad():
        plain = model(**inputs).logits[:, -steps - 1 : -1, : module.vocabulary].clone()
    plain[..., module.suppressed()] = -torch.inf
    ours = log_softmax(module, "student", rolled)[:, :steps]
    keep = torch.ones(module.vocabulary, dtype=torch.bool)
    keep[module.suppressed()] = False
    assert (ours - plain.log_softmax(-1))[..., keep].abs().max() < 1e-4


@pytest.mark.parametrize("view", [Crop(size=32), Crop(keep_original=True), PromptView("{{ answer }}! {{ prompt }}")])
def test_a_view_has_its_own_images_and_the_same_actions(vlm_student, vlm_teacher, view):
    module = make(vlm_student, {"teacher": Teacher(Frozen(Pretrained(str(vlm_teacher))), view=view)})
    rows = [row for row in vlm_rows(8) if row["images"]]
    rolled = act(module, rows)
    stream = module.streams.query("teacher", rolled)
    assert bool(stream.available.all())
    said = stream.distribution.head(stream.distribution.hidden).log_softmax(-1)
    for i, row in enumerate(rows):
        seen = view(row)
        alone = rolled.select(torch.tensor([i]))
        again = log_softmax(module, "teacher", alone, [seen])
        steps = int(alone.mask.sum())
        assert (said[i, :steps] - again[0, :steps]).abs().max() < 1e-4
    assert not torch.allclose(said, log_softmax(module, "teacher", rolled), atol=1e-2), "the view changes nothing?"


def test_no_placeholder_can_be_sampled(vlm_student, vlm):
    module = make(vlm_student, rollout=Rollout(batch_size=8, horizon=40, temperature=5.0))
    names = {
        "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
        "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>"],
        "llava": ["<image>"],
    }
    names["qwen3_vl"] = names["qwen2_5_vl"]
    ids = module.tokenizer().convert_tokens_to_ids(names[vlm])
    assert set(ids) <= set(module.suppressed())
    rolled = act(module, vlm_rows(12) * 4)
    assert not torch.isin(rolled.actions[rolled.mask], torch.tensor(ids)).any()


def test_text_only_batches_reach_every_parameter(vlm_student, tmp_path):
    rows = [row for row in vlm_rows(32) if not row["images"]]
    module = make(vlm_student, objective=no_teacher(), rollout=Rollout(batch_size=4, horizon=8))
    fit(module, tmp_path, rows, steps=2)


def test_log_probs_change_when_images_are_blanked(vlm_student, vlm_teacher):
    module = make(vlm_student, vlm_teacher)
    gaps = module.image_gaps(act(module, vlm_rows(8)))
    assert set(gaps) == {"student", "teacher"}
    assert all(len(gap) == 6 and (gap.abs() > 1e-3).all() for gap in gaps.values())
    trajectories = act(module, [blanked(row) for row in vlm_rows(8)])
    assert all((gap == 0).all() for gap in module.image_gaps(trajectories).values())


class Unseen(View):
    """Takes the images away, as a template without an image part would."""

    def __call__(self, example):
        return blanked(example)


def test_a_policy_that_does_not_see_is_refused_before_the_first_step(vlm_student, vlm_teacher, tmp_path):
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(vlm_teacher))), view=Unseen())}
    rows = [row for row in vlm_rows(24) if row["images"]]
    with pytest.raises(ValueError, match=r"model\.teachers\.teacher: its log-probs do not change when the images"):
        fit(make(vlm_student, teachers), tmp_path, rows)
    fit(make(vlm_student, teachers, blank_check=False), tmp_path, rows)


def test_validation_reports_what_the_images_are_worth(vlm_student, vlm_teacher, tmp_path):
    rows = vlm_rows(24)
    module = make(vlm_student, vlm_teacher, reward=LongerIsBetter(), evaluation=Evaluation(before=False, by=["task"]))
    trainer = fit(module, tmp_path, rows, validation=rows[:8], steps=1, num_sanity_val_steps=0)
    trainer.validate(module, verbose=False, dataloaders=None, datamodule=trainer.datamodule)
    found = trainer.callback_metrics
    assert found["val/image_gap/student"] != 0
    assert found["val/image_gap/teacher"] != 0
    mean = (found["val/accuracy/even"] + found["val/accuracy/odd"]) / 2
    assert float(mean) == pytest.approx(float(found["val/accuracy"]))


# -- student views ----------------------------------------------------------------------------------------------


def test_a_student_view_is_what_student_and_viewless_teachers_see(vlm_student, vlm_teacher):
    small = Downscale(16)
    frozen = Frozen(Pretrained(str(vlm_teacher)))
    rows = [row for row in vlm_rows(8) if row["images"]]
    plain = make(vlm_student, {"teacher": Teacher(frozen)})
    hidden = make(vlm_student, {"teacher": Teacher(frozen)}, student_view=small)
    shown = make(vlm_student, {"teacher": Teacher(frozen, view=Original())}, student_view=small)
    rolled = act(hidden, rows)
    assert rolled.examples == rows
    by_hand = act(plain, [small(row) for row in rows])
    assert torch.equal(rolled.actions, by_hand.actions)
    in_full = {name: log_softmax(plain, name, rolled, rows) for name in ("student", "teacher")}
    small_rows = [small(row) for row in rows]
    degraded = {name: log_softmax(plain, name, rolled, small_rows) for name in ("student", "teacher")}
    assert not torch.allclose(in_full["teacher"], degraded["teacher"], atol=1e-2)
    assert torch.equal(log_softmax(hidden, "student", rolled), degraded["student"])
    for module, expected in ((hidden, degraded), (shown, in_full)):
        said = module.streams.query("teacher", rolled).distribution
        assert (said.head(said.hidden).log_softmax(-1) - expected["teacher"]).abs().max() < 1e-5


# -- self-teachers, adapters, quantization ----------------------------------------------------------------------


@pytest.mark.parametrize("weights", [Initial, Live, EMA])
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_the_student_itself_with_the_same_images_is_at_no_distance(vlm_student, weights, lora):
    """Vision-OPD's test idea: crop = full image and equal weights ⇒ loss 0."""
    student = copy.copy(vlm_student)
    student.lora = lora
    module = make(student, {"teacher": Teacher(weights(), view=Original())}, Objective([Term(ReverseKL())]))
    rolled = act(module, vlm_rows(8))
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    with torch.no_grad():
        loss, _ = module.objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    assert abs(float(loss)) < 1e-6


EYES = {"qwen2_5_vl": "visual", "qwen3_vl": "visual", "idefics3": "vision_model|connector", "llava": "vision_tower"}


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_frozen_eyes_stay_as_they_are_and_get_no_adapter(folders, vlm, lora, tmp_path):
    module = make(Pretrained(str(folders[0]), lora=lora, freeze=EYES[vlm]), folders[1])
    before = {name: p.clone() for name, p in module.student.named_parameters()}
    fit(module, tmp_path, vlm_rows(24))
    changed = {name for name, p in module.student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    seeing = tuple(EYES[vlm].split("|"))
    assert not any(part in name for part in seeing for name in changed)
    assert lora is None or not any(part in name and "lora" in name for part in seeing for name in before)


def test_a_pattern_that_freezes_nothing_is_refused(folders):
    with pytest.raises(ValueError, match=r"student\.freeze: no parameter's name has 'eyes'"):
        make(Pretrained(str(folders[0]), freeze="eyes"))


def test_a_four_bit_teacher_sees_and_teaches(tmp_path):
    pytest.importorskip("bitsandbytes")
    student = save_vlm(tmp_path / "student", hidden=64, eyes=64)
    teacher = Teacher(Frozen(Pretrained(str(student), quantization="4bit")), view=Crop())
    module = make(Pretrained(str(student), lora=Lora(r=2), freeze="visual"), {"teacher": teacher})
    fit(module, tmp_path / "run", [row for row in vlm_rows(24) if row["images"]])


# -- prompts ----------------------------------------------------------------------------------------------------


def test_padding_needs_no_row_of_its_own(tmp_path, vlm):
    folder = save_vlm(tmp_path, vlm, padding=0)
    whole = make(folder)
    processor = whole.load_processor(Pretrained(str(folder)))
    processor.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    processor.save_pretrained(folder)
    module = make(folder)
    assert module.tokenizer().pad_token_id == whole.student.get_input_embeddings().weight.shape[0]
    rows = vlm_rows(4)
    assert torch.equal(act(module, rows).actions, act(whole, rows).actions)


def kinds(message) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_images_come_first_unless_the_chat_places_them():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    assert kinds(placed_images(chat, {"images": ["x", "y"]})[1]) == ["image", "image", "text"]
    own = [{"role": "user", "content": [{"type": "text", "text": "Is"}, {"type": "image", "image": "x.png"}]}]
    assert kinds(placed_images(own, {"prompt": own})[0]) == ["text", "image"]
    with pytest.raises(ValueError, match=r"the prompt has 1 image parts .*, the row has 2 images"):
        placed_images(own, {"images": ["x", "y"]})


@pytest.mark.parametrize("marker", ["<image>", "<|vision_start|><|image_pad|><|vision_end|>"])
def test_a_marker_in_the_text_is_the_place_of_an_image(vlm_student, marker):
    """As in LLaVA's data sets; the reader is shown what it would be shown for image parts."""
    module = make(vlm_student)
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " left of "}]
    parts += [{"type": "image"}, {"type": "text", "text": "?"}]
    images = [picture(1), picture(2, 64, 24)]
    chat = [{"role": "user", "content": parts}]
    written = f"Is {marker} left of {marker}?"
    for prompt in (written, [{"role": "user", "content": written}]):
        row = {"prompt": prompt, "images": images}
        assert module.refusal(row) is None
        by_hand = module.collate([{**row, "prompt": chat}], module.policies["student"])["input_ids"]
        assert torch.equal(module.collate([row], module.policies["student"])["input_ids"], by_hand)
        parts = [{"type": "text", "text": "no"}]
        for said in ("no", [{"role": "assistant", "content": "no"}], [{"role": "assistant", "content": parts}]):
            given = module.act("dataset", [{**row, "completion": said}], [0])
            assert module.tokenizer().decode(given.actions[0]) == "no<|im_end|>"
    view = PromptView("{{ answer }}! {{ prompt }}")
    seen = view({"prompt": written, "images": images, "answer": "no"})
    assert module.refusal(seen) is None, "a view keeps the places"


def test_views_that_add_and_remove_images_keep_the_markers_in_step(vlm_student):
    module = make(vlm_student)
    row = {"prompt": "<image>\nWhat is it?", "image": picture(0), "box": [4, 4, 20, 20]}
    seen = Crop(size=32, keep_original=True)(row)
    assert seen["prompt"] == "<image><image>\nWhat is it?"
    assert module.refusal(seen) is None
    assert with_images(seen, [picture(0)])["prompt"] == row["prompt"]
    chat = [{"role": "user", "content": [{"type": "text", "text": "<image> or "}, {"type": "image"}]}]
    three = with_images({"prompt": chat}, [picture(0)] * 3)["prompt"]
    assert kinds(three[0]) == ["text", "image", "image"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": ["nowhere.png"]}, "nowhere.png"),
        ({"images": [b"no image"]}, "no image of a known format"),
        ({"images": ["https://example.org/x.png"]}, "https://example.org/x.png"),
        ({"images": [picture(1, 64, 64)] * 200}, "exceed the context of 512"),
        ({"images": [Image.new("RGB", (400, 300))]}, "an image has 400 × 300 pixels, model.max_image_pixels is 10000"),
        ({"box": [30, 4, 20, 20]}, r"the box"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}] * 3}]}, "the prompt has 3 image parts"),
        ({"prompt": "<image> and <image>"}, "has 2 image parts or markers such as <image>, the row has 1 images"),
        ({"prompt": "<image>", "images": []}, "has 1 image parts or markers such as <image>, the row has 0 images"),
        ({"prompt": "<video>\nWhat?"}, "videos are not read"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "neither text nor an image"),
        ({"prompt": [{"role": "user", "content": [{"type": "img", "path": "a.png"}]}]}, "neither text nor an image"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path_factory, change, reason):
    folder = save_vlm(tmp_path_factory.mktemp("refuse"))
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(folder))), view=Crop())}
    module = make(folder, teachers, max_image_pixels=10_000)
    row = vlm_rows(1)[0]
    assert module.refusal(row) is None
    found = module.refusal(row | change)
    assert found is not None
    assert reason in found
