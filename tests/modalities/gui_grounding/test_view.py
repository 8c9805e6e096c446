from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opd_lightning.modalities.gui_grounding.formats import Normalized1000
from opd_lightning.modalities.gui_grounding.view import BoxOnly, CoordinatesAsText, CropZoom, Spotlight
from opd_lightning.modalities.vision_language.images import images_of
from tests.test_images import encoded

SIZE = (160, 90)
BOX = (60, 30, 90, 42)
GREEN = (0, 128, 0)
VIEWS = [Spotlight(), BoxOnly(), CropZoom(), CropZoom(magnify=False), CoordinatesAsText()]
IN_PLACE = [Spotlight(), BoxOnly(), CropZoom(magnify=False)]
each_view = pytest.mark.parametrize("view", VIEWS, ids=lambda v: type(v).__name__)


def screenshot(size=SIZE):
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8))


def example(**columns):
    return {"prompt": "Click OK.", "image": screenshot(), "box": list(BOX), "platform": "web", **columns}


def pixels(row):
    return np.asarray(images_of(row)[0]).astype(int)


def ring(box=BOX, width=5, size=SIZE):
    """Where the rectangle is."""
    x1, y1, x2, y2 = box
    outer, inner = (np.zeros(size[::-1], bool) for _ in range(2))
    outer[max(0, y1 - width) : y2 + width, max(0, x1 - width) : x2 + width] = True
    inner[y1:y2, x1:x2] = True
    return outer & ~inner


def gaussian(box, size, sigma):
    """exp(−d² / 2σ²) of each pixel's center, one by one."""
    x1, y1, x2, y2 = box
    alpha = np.empty(size[::-1])
    for y in range(size[1]):
        for x in range(size[0]):
            nearest = min(max(x + 0.5, x1), x2), min(max(y + 0.5, y1), y2)
            alpha[y, x] = math.exp(-(math.dist(nearest, (x + 0.5, y + 0.5)) ** 2) / (2 * sigma**2))
    return alpha


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@each_view
@pytest.mark.parametrize("orientation", STORED)
def test_boxes_stay_where_they_are_whichever_way_the_screenshot_is_stored(view, orientation):
    note, stored = Image.Exif(), screenshot()
    note[0x0112] = orientation
    if STORED[orientation] is not None:
        stored = stored.transpose(STORED[orientation])
    seen, plain = view(example(image=encoded(stored, exif=note))), view(example())
    assert seen["box"] == plain["box"]
    assert [image.tobytes() for image in images_of(seen)] == [image.tobytes() for image in images_of(plain)]


@each_view
def test_the_image_keeps_its_size_and_the_example_is_left_alone(view):
    row = example()
    before = copy.deepcopy(row)
    seen = view(row)
    assert images_of(seen)[0].size == SIZE
    assert seen["platform"] == "web"
    assert view.columns == ("box",)
    assert row.pop("image").tobytes() == before.pop("image").tobytes()
    assert row == before


@given(st.data())
def test_any_box_in_any_screenshot(data):
    width, height = size = data.draw(st.tuples(st.integers(4, 60), st.integers(4, 60)))
    x1, x2 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    if max(x1, x2, y1, y2) <= 1:
        return
    row = example(image=screenshot(size), box=[x1, y1, x2, y2])
    for view in VIEWS:
        assert images_of(view(row))[0].size == size
    for view in IN_PLACE:
        inside = np.s_[y1:y2, x1:x2]
        assert (pixels(view(row))[inside] == pixels(row)[inside]).all()


@pytest.mark.parametrize("view", IN_PLACE, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("box", [BOX, (0, 3, 12, 9), (150, 80, 160, 90)])
def test_a_rectangle_of_five_pixels_lies_just_outside_of_the_box(view, box):
    seen = pixels(view(example(box=list(box))))
    np.testing.assert_array_equal((seen == GREEN).all(-1), ring(box))


def test_box_only_changes_nothing_but_the_rectangle():
    row = example()
    assert (pixels(BoxOnly()(row)) == pixels(row))[~ring()].all()


@pytest.mark.parametrize(
    ("view", "box", "sigma"),
    [
        (Spotlight(), BOX, 45),
        (Spotlight(), (60, 30, 64, 33), math.sqrt(0.1) * 90),
        (Spotlight(), (20.3, 30.2, 39.7, 50), 1.5 * 19.8),
        (Spotlight(sigma=0.5, min_area=0), BOX, 15),
    ],
)
def test_pixels_fall_off_as_a_gaussian_of_their_distance_to_the_box(view, box, sigma):
    row = example(box=list(box))
    expected = pixels(row) * gaussian(box, SIZE, sigma)[..., None]
    outside = ~ring((math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])))
    assert np.abs(pixels(view(row)) - expected)[outside].max() <= 0.51


def test_the_far_corner_of_a_large_screen_is_dark():
    row = example(image=Image.new("RGB", (1600, 900), "white"), box=[20, 20, 60, 40])
    assert pixels(Spotlight()(row))[-1, -1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("box", [BOX, (0, 0, 8, 6), (120, 70, 160, 90), (0, 0, 160, 90), (10, 0, 12, 90)])
def test_a_crop_is_magnified_and_the_box_moves_along(box):
    image = Image.new("RGB", SIZE, "white")
    image.paste("blue", box)
    seen = CropZoom(min_area=0)(example(image=image, box=list(box)))
    blue = np.abs(pixels(seen) - (0, 0, 255)).sum(-1) < 60
    y, x = np.nonzero(blue)
    assert seen["box"] == pytest.approx([x.min(), y.min(), x.max() + 1, y.max() + 1], abs=1.5)
    scale = [(seen["box"][2 + i] - seen["box"][i]) / (box[2 + i] - box[i]) for i in (0, 1)]
    assert min(scale) >= 0.999
    assert scale[0] == pytest.approx(scale[1], rel=0.1)


def test_margin_and_least_area_of_a_crop():
    centered = (70, 40, 86, 49)  # a tenth of the screenshot on each axis
    shown = {margin: CropZoom(margin=margin, min_area=0)(example(box=list(centered))) for margin in (0, 0.5, 2)}
    for margin, seen in shown.items():
        width = seen["box"][2] - seen["box"][0]
        assert width == pytest.approx(SIZE[0] / (1 + 2 * margin), rel=0.02)
    seen = CropZoom(margin=0, min_area=0.25)(example(box=list(centered)))
    assert seen["box"][2] - seen["box"][0] == pytest.approx(32)


def test_a_crop_in_place_is_black_around_the_target():
    row = example(image=Image.new("RGB", SIZE, "white"))
    seen = CropZoom(magnify=False, margin=0.5)(row)
    lit = (pixels(seen) == 255).all(-1) | ring()
    y, x = np.nonzero(lit)
    lit[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    assert lit.sum() == (x.max() + 1 - x.min()) * (y.max() + 1 - y.min()) < SIZE[0] * SIZE[1] / 4
    assert (pixels(seen)[~lit] == 0).all()
    assert seen["box"] == list(BOX)


@pytest.mark.parametrize("view", [Spotlight(), BoxOnly(), CropZoom()], ids=lambda v: type(v).__name__)
def test_the_hint_follows_the_prompt(view):
    hint = "Hint: what you are looking for is inside the green rectangle."
    assert view(example())["prompt"] == f"Click OK.\n{hint}"
    system = {"role": "system", "content": "You click."}
    chat = [system, {"role": "user", "content": "Click OK."}]
    assert view(example(prompt=chat))["prompt"] == [system, {"role": "user", "content": f"Click OK.\n{hint}"}]
    parts = [{"type": "image"}, {"type": "text", "text": "Click OK."}]
    (told,) = view(example(prompt=[{"role": "user", "content": parts}]))["prompt"]
    assert told["content"] == [{"type": "image"}, {"type": "text", "text": f"Click OK.\n{hint}"}]


def test_color_and_hint_are_settable():
    seen = BoxOnly(color="red", width=2, hint="It is in the {color} one.")(example())
    assert seen["prompt"] == "Click OK.\nIt is in the red one."
    np.testing.assert_array_equal((pixels(seen) == (255, 0, 0)).all(-1), ring(width=2))
    assert BoxOnly(hint="")(example())["prompt"] == "Click OK."


def test_coordinates_as_text_tell_what_the_format_writes():
    seen = CoordinatesAsText(text="It is {x} and {y}.")(example())
    assert (pixels(seen) == pixels(example())).all()
    x, y = Normalized1000().parse(Normalized1000().write(BOX, SIZE, SIZE))
    assert seen["prompt"] == f"Click OK.\nIt is {x:.0f} and {y:.0f}."
    assert [getattr(view, "tells_the_answer", False) for view in VIEWS] == [False] * 4 + [True]


def test_only_the_first_of_several_images_is_changed():
    other = Image.new("RGB", (8, 8), "red")
    row = {**example(), "images": [screenshot(), other]}
    del row["image"]
    seen = Spotlight()(row)
    assert images_of(seen)[0].tobytes() != screenshot().tobytes()
    assert images_of(seen)[1].tobytes() == other.tobytes()


@each_view
def test_rows_without_a_box_have_no_view(view):
    assert view(example(box=None)) is None
    row = example()
    del row["box"]
    assert view(row) is None


@each_view
@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"box": [60, 30, 60, 42]}, "no area"),
        ({"box": [60, 30, 900, 42]}, "out of the image"),
        ({"box": [0.1, 0.1, 0.2, 0.3]}, "normalized"),
        ({"box": [60, 30, 40, 20]}, "width, height"),
        ({"box": "here"}, "four finite numbers"),
        ({"box": [60, 30, math.nan, 42]}, "four finite numbers"),
        ({"image": None}, "the row has none"),
    ],
)
def test_bad_rows_are_named(view, columns, reason):
    with pytest.raises(ValueError, match=reason):
        view(example(**columns))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoxOnly(color="greenish"), "greenish"),
        (lambda: Spotlight(width=0), r"Spotlight\.width is 0"),
        (lambda: BoxOnly(hint="in the {shade} one"), r"BoxOnly\.hint is no template with {color}"),
        (lambda: Spotlight(sigma=-1), "sigma and min_area"),
        (lambda: Spotlight(sigma=0, min_area=0), "not both 0"),
        (lambda: CropZoom(margin=-0.1), r"CropZoom\.margin is -0\.1"),
        (lambda: CropZoom(min_area=2), r"CropZoom\.min_area is 2"),
        (lambda: CoordinatesAsText(text="{z}"), "with {x} and {y}"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_real_screenshot():
    folder = Path(os.environ.get("OPD_DATA", "")) / "miniwob_grounding" / "images"
    if "OPD_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("OPD_DATA names no folder with miniwob_grounding")
    path = sorted(folder.glob("*.png"))[0]
    for view in VIEWS:
        assert images_of(view(example(image=str(path))))[0].size == Image.open(path).size
