from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.vision_language.boxes import problem_with_box
from opd_lightning.modalities.vision_language.images import images_of
from opd_lightning.modalities.vision_language.view import (
    Blur,
    ColumnImages,
    Compose,
    Crop,
    Cue,
    Downscale,
    HighResolution,
    MaskRegion,
    Mixture,
    Resize,
)
from opd_lightning.policy import Original, View

RNG = np.random.default_rng(0)
BOX = [10, 4, 30, 12]
VIEWS: list[View] = [
    Crop(),
    Crop(size=50, keep_original=True),
    Resize(100),
    Downscale(20),
    HighResolution(),
    ColumnImages("other"),
    Cue(image_column="other"),
    Blur(2),
    MaskRegion(),
    Compose([Downscale(30), Crop(margin=0), Cue()]),
]


def picture(width: int = 40, height: int = 20) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def example(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Which?", "image": picture(), "box": BOX, "answer": "7", "cue": "Look left.", **columns}


def shown(view: View, row: dict[str, Any]) -> dict[str, Any]:
    found = view(row)
    assert found is not None
    return found


def pixels(image: Image.Image) -> Any:
    return np.asarray(image)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_a_view_leaves_the_example_alone_and_names_the_columns_it_reads(view: View) -> None:
    row = example(image_full=picture(80, 40), other=picture(5, 5))
    before = copy.deepcopy(row)
    found = shown(view, row)
    assert row == before
    assert found["answer"] == "7"
    assert set(found) <= set(row) | {"images"}
    bare = {name: row[name] for name in ("prompt", "image", *view.columns)}
    assert [image.tobytes() for image in images_of(shown(view, bare))] == [i.tobytes() for i in images_of(found)]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_a_chat_keeps_one_part_per_image(view: View) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    found = shown(view, example(prompt=chat, image_full=picture(80, 40), other=picture(5, 5)))
    kinds = [part["type"] for part in found["prompt"][0]["content"]]
    assert kinds.count("image") == len(images_of(found))
    assert kinds.count("text") == (2 if found["prompt"][0]["content"][-1].get("text", "").endswith("left.") else 1)


def test_a_crop_holds_the_pixels_of_the_box() -> None:
    row = example()
    (crop,) = images_of(shown(Crop(margin=0), row))
    assert (pixels(crop) == pixels(row["image"])[4:12, 10:30]).all()


def test_the_margin_is_a_share_of_the_box_and_ends_at_the_edge() -> None:
    row = example()
    found = shown(Crop(margin=0.25), row)
    assert (pixels(found["image"]) == pixels(row["image"])[2:14, 5:35]).all()
    assert found["box"] == [5, 2, 25, 10]
    assert images_of(shown(Crop(margin=9), row))[0].size == (40, 20)


def test_a_crop_of_the_whole_image_is_the_plain_view() -> None:
    row = example(box=[0, 0, 40, 20])
    (crop,) = images_of(shown(Crop(), row))
    assert (pixels(crop) == pixels(row["image"])).all()


def test_a_crop_is_enlarged_with_its_aspect_and_follows_the_original() -> None:
    row = example(image=None, images=[picture(), picture(3, 3)])
    first, crop, other = images_of(shown(Crop(margin=0, size=100, keep_original=True), row))
    assert (first, other) == tuple(row["images"])
    assert crop.size == (100, 40)
    assert "image" not in shown(Crop(keep_original=True), example())


def test_no_box_no_view() -> None:
    for view in (Crop(), MaskRegion(), Compose([Downscale(8), Crop()])):
        assert view(example(box=None)) is None
        assert view({"prompt": "?", "image": picture()}) is None


@pytest.mark.parametrize("view", [Crop(), MaskRegion(), Downscale(10)])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"box": [10, 4, 10, 12]}, "the box has no area"),
        ({"box": [0.1, 0.1, 0.5, 0.5]}, "the box looks normalized"),
        ({"box": [10, 4, 90, 12]}, "the box is out of the image"),
        ({"image": None}, "needs an image: the row has none"),
        ({"image": "no.png"}, "there is no image file: no.png"),
    ],
)
def test_a_row_that_can_not_be_shown_says_why(view: View, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view(example(**columns))


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    longest=st.integers(1, 90),
    down=st.booleans(),
    data=st.data(),
)
def test_resizing_keeps_the_aspect_and_moves_the_box(
    size: tuple[int, int], longest: int, down: bool, data: st.DataObject
) -> None:
    row = {"prompt": "?", "image": Image.new("RGB", size), "box": None}
    view = (Downscale if down else Resize)(longest)
    (image,) = images_of(shown(view, row))
    if down and max(size) <= longest:
        assert image.size == size
    else:
        assert max(image.size) == longest
        assert all(abs(now - was * longest / max(size)) <= max(0.5, 1 - was * longest / max(size)) for now, was in zip(
            image.size, size, strict=True
        ))  # fmt: skip
    box = [0, 0, *(data.draw(st.integers(2, max(2, side))) for side in size)]
    if problem_with_box(box, size) is None:
        _, _, x2, y2 = shown(view, {**row, "box": box})["box"]
        assert x2 == pytest.approx(min(box[2], size[0]) * image.width / size[0])
        assert y2 == pytest.approx(min(box[3], size[1]) * image.height / size[1])


def test_cropping_after_resizing_is_resizing_after_cropping() -> None:
    smooth = picture(4, 2).resize((400, 200), Image.Resampling.BICUBIC)
    row = example(image=smooth, box=[100, 40, 300, 120])
    one = shown(Compose([Resize(200), Crop(margin=0)]), row)
    other = shown(Compose([Crop(margin=0), Resize(100)]), row)
    assert one["image"].size == other["image"].size == (100, 40)
    assert np.abs(pixels(one["image"]).astype(int) - pixels(other["image"])).max() < 8
    assert one["box"] == other["box"] == [0, 0, 100, 40]


def test_downscaling_loses_detail_for_good() -> None:
    row = example()
    there_and_back = shown(Compose([Downscale(10), Resize(40)]), row)["image"]
    assert there_and_back.size == (40, 20)
    assert pixels(there_and_back).std() < pixels(row["image"]).std() / 2


def test_high_resolution_is_the_same_picture_with_its_box() -> None:
    full = picture(121, 59)
    found = shown(HighResolution(), example(image_full=full))
    assert images_of(found) == [full]
    assert found["box"] == pytest.approx([10 * 121 / 40, 4 * 59 / 20, 30 * 121 / 40, 12 * 59 / 20])
    assert HighResolution()(example(image_full=None)) is None
    with pytest.raises(ValueError, match="image_full is not the same picture as the first image: 80 × 80 pixels"):
        HighResolution()(example(image_full=picture(80, 80)))


def test_images_of_another_column_come_instead() -> None:
    crops = [picture(5, 5), picture(6, 6)]
    assert images_of(shown(ColumnImages("crops"), example(crops=crops))) == crops
    found = shown(ColumnImages("crops"), example(crops=crops[0]))
    assert images_of(found) == crops[:1]
    assert found["box"] is None
    assert ColumnImages("crops")(example(crops=None)) is ColumnImages("crops")(example(crops=[])) is None


@pytest.mark.parametrize("cue", ["", None])
def test_an_empty_cue_is_the_plain_view(cue: str | None) -> None:
    row = example(cue=cue, evidence=None)
    assert Cue(image_column="evidence")(row) == row
    answered = PromptView("{{ prompt }} ({{ answer }})")
    assert Compose([answered, Cue()])(row) == answered(row)


def test_a_cue_follows_the_question() -> None:
    row = example(evidence=picture(3, 3))
    found = shown(Cue(image_column="evidence"), row)
    assert found["prompt"] == "Which?\n\nLook left."
    assert images_of(found) == [row["image"], row["evidence"]]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    assert shown(Cue(), example(prompt=chat))["prompt"] == [
        chat[0],
        {"role": "user", "content": "Which?\n\nLook left."},
    ]
    assert Cue(None, "evidence").columns == ("evidence",)


def test_the_gold_answer_in_the_prompt_leaves_the_images() -> None:
    row = example()
    found = shown(PromptView("{{ prompt }} The answer is {{ answer }}."), row)
    assert found == {**row, "prompt": "Which? The answer is 7."}


def test_a_masked_region_is_grey_and_the_rest_is_not() -> None:
    row = example()
    masked = pixels(shown(MaskRegion(), row)["image"])
    assert (masked[4:12, 10:30] == 127).all()
    outside = np.ones((20, 40), bool)
    outside[4:12, 10:30] = False
    assert (masked[outside] == pixels(row["image"])[outside]).all()


def test_blurring_keeps_the_mean_and_lowers_the_contrast() -> None:
    row = example(image=picture(200, 200), box=None)
    blurred = pixels(shown(Blur(3), row)["image"]).astype(float)
    sharp = pixels(row["image"]).astype(float)
    assert blurred.shape == sharp.shape
    assert abs(blurred.mean() - sharp.mean()) < 2
    # white noise under a Gaussian of standard deviation r keeps 1 / (2 √π r) of its contrast
    assert blurred.std() / sharp.std() == pytest.approx(1 / (2 * np.pi**0.5 * 3), rel=0.15)


def test_a_chain_reads_what_its_views_read() -> None:
    assert Compose([Crop(), MaskRegion(), Cue("hint")]).columns == ("box", "hint")


def test_views_are_named_in_yaml() -> None:
    def named(name: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"opd_lightning.modalities.vision_language.view.{name}", "init_args": arguments}

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--view", type=View)
    views = [named("Crop", size=64, keep_original=True), named("Cue", column="hint"), named("MaskRegion")]
    made = parser.instantiate_classes(parser.parse_object({"view": named("Compose", views=views)})).view
    assert [type(view) for view in made.views] == [Crop, Cue, MaskRegion]
    assert made.columns == ("box", "hint")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Crop(margin=-1), r"Crop\.margin is -1; it is a share"),
        (lambda: Crop(size=0), r"Crop\.size is 0 pixels"),
        (lambda: Resize(0), r"Resize\.longest is 0 pixels"),
        (lambda: Downscale(0), r"Downscale\.longest is 0 pixels"),
        (lambda: Blur(0), r"Blur\.radius is 0 pixels"),
        (lambda: Cue(None), r"Cue needs a column or an image_column"),
        (lambda: Compose([]), r"Compose\.views is empty"),
        (lambda: MaskRegion("grayish"), "unknown color specifier: 'grayish'"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_either_shows_a_fixed_share_of_the_examples_differently():
    view = Mixture(Downscale(8), Original(), share=0.3)
    rows = [{"prompt": str(i), "image": Image.new("RGB", (16, 16)), "box": [0, 0, i % 7 + 1, 4]} for i in range(400)]
    small = [view(row)["image"].width == 8 for row in rows]
    assert 80 < sum(small) < 160
    assert small == [Mixture(Downscale(8), share=0.3)(dict(row))["image"].width == 8 for row in rows]
    assert Mixture(Crop(), MaskRegion()).columns == ("box",)
    with pytest.raises(ValueError, match=r"Mixture\.share is 1\.5"):
        Mixture(Crop(), share=1.5)
