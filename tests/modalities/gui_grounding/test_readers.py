import json
from pathlib import Path

import pytest
from PIL import Image

from opd_lightning.data import PromptData
from opd_lightning.modalities.gui_grounding import readers

PACKAGE = "python:opd_lightning.modalities.gui_grounding.readers."


def picture(path: Path, size: tuple[int, int] = (200, 100)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write(path: Path, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def spot(name: str = "a.png", box: object = (10, 20, 30, 40), **other: object) -> dict[str, object]:
    return {
        "img_filename": name,
        "bbox": box,
        "instruction": "open the menu",
        "data_type": "icon",
        "data_source": "ios",
    } | other


@pytest.fixture
def screenspot(tmp_path: Path) -> Path:
    picture(tmp_path / "screenspot_imgs" / "a.png")
    write(tmp_path / "screenspot_mobile.json", [spot()])
    write(tmp_path / "screenspot_web.json", [spot(data_type="text", data_source="shop")])
    return tmp_path


def test_screenspot_takes_the_platform_from_the_file_and_the_box_as_width_and_height(screenspot: Path) -> None:
    mobile, web = readers.screenspot(str(screenspot))
    assert mobile == {
        "prompt": "open the menu",
        "image": str(screenspot / "screenspot_imgs" / "a.png"),
        "box": [10, 20, 40, 60],
        "platform": "mobile",
        "element_type": "icon",
        "application": "ios",
    }
    assert (web["platform"], web["element_type"], web["application"]) == ("web", "text", "shop")


def test_boxes_are_in_pixels_of_the_screenshot_as_it_is_shown(screenspot: Path) -> None:
    note = Image.Exif()
    note[0x0112] = 6  # stored as 200 × 100, shown as 100 × 200
    Image.new("RGB", (200, 100)).save(screenspot / "screenspot_imgs" / "a.png", exif=note)
    low = [10, 150, 30, 40]
    write(screenspot / "screenspot_mobile.json", [spot(box=low)])
    assert [row["box"] for row in readers.screenspot(str(screenspot))] == [[10, 150, 40, 190], [10, 20, 40, 60]]
    write(screenspot / "screenspot_mobile.json", [spot(box=[150, 10, 40, 30])])
    with pytest.raises(ValueError, match=r"row 1: the box is out of the image: .* in 100 × 200 pixels"):
        readers.screenspot(str(screenspot))


def test_screenspot_v2_differs_in_its_names_alone(tmp_path: Path) -> None:
    picture(tmp_path / "screenspotv2_image" / "a.png")
    write(tmp_path / "screenspot_desktop_v2.json", [spot()])
    (row,) = readers.screenspot_v2(str(tmp_path))
    assert (row["platform"], row["box"]) == ("desktop", [10, 20, 40, 60])


@pytest.fixture
def pro(tmp_path: Path) -> Path:
    picture(tmp_path / "images" / "vscode_macos" / "a.png")
    row = {
        "img_filename": "vscode_macos/a.png",
        "bbox": [10, 20, 30, 40],
        "img_size": [200, 100],
        "instruction": "run",
        "instruction_cn": "运行",
        "id": "vscode_macos_0",
        "application": "vscode",
        "platform": "macos",
        "ui_type": "text",
        "group": "Dev",
    }
    write(tmp_path / "annotations" / "vscode_macos.json", [row])
    return tmp_path


def test_screenspot_pro_has_corners_and_the_groups_of_its_table(pro: Path) -> None:
    (row,) = readers.screenspot_pro(str(pro))
    assert row["box"] == [10, 20, 30, 40]
    assert (row["platform"], row["element_type"], row["application"], row["group"]) == (
        "macos",
        "text",
        "vscode",
        "Dev",
    )
    assert readers.screenspot_pro(str(pro), language="cn")[0]["prompt"] == "运行"


def test_a_resized_picture_of_screenspot_pro_is_a_bad_row(pro: Path) -> None:
    picture(pro / "images" / "vscode_macos" / "a.png", (100, 50))
    with pytest.raises(ValueError, match=r"vscode_macos\.json, row 1: .*\(100, 50\) pixels.*\(200, 100\)"):
        readers.screenspot_pro(str(pro))


def osworld(number: int, kind: str, numbers: list[float]) -> dict[str, object]:
    return {
        "id": f"x-{number}",
        "image_path": "x.png",
        "image_size": [200, 100],
        "instruction": "open",
        "box_type": kind,
        "box_coordinates": numbers,
        "GUI_types": ["Button"],
    }


@pytest.fixture
def osworld_g(tmp_path: Path) -> Path:
    picture(tmp_path / "images" / "x.png")
    rows = [
        osworld(0, "bbox", [10.5, 20, 30, 40]),
        osworld(1, "polygon", [10, 20, 50, 25, 30, 60]),
        osworld(2, "refusal", [-1, -1, -1, -1]),
    ]
    write(tmp_path / "OSWorld-G.json", rows)
    write(tmp_path / "OSWorld-G_refined.json", [row | {"instruction": "click the cog"} for row in rows])
    classes = {"text_matching": [{"id": "x-0"}], "layout_understanding": [{"id": "x-0"}], "refusal": [{"id": "x-2"}]}
    write(tmp_path / "classification_result.json", {"classified": classes})
    return tmp_path


def test_osworld_g_has_boxes_polygons_several_groups_and_rows_without_a_target(osworld_g: Path) -> None:
    with pytest.warns(UserWarning, match="1 rows of the type 'refusal'"):
        box, polygon = readers.osworld_g(str(osworld_g))
    assert (box["box"], box["polygon"]) == ([10.5, 20, 40.5, 60], None)
    assert box["group"] == ["text_matching", "layout_understanding"]
    assert (polygon["box"], polygon["polygon"]) == ([10, 20, 50, 60], [[10, 20], [50, 25], [30, 60]])
    assert polygon["group"] == []
    with pytest.warns(UserWarning, match="refusal"):
        assert readers.osworld_g(str(osworld_g), refined=True)[0]["prompt"] == "click the cog"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"img_filename": "a.png", "bbox": [1, 2, 3, 4]}, "there is no 'instruction'"),
        (spot(instruction=" "), "the instruction is empty"),
        (spot("b.png"), "there is no image .*b.png"),
        (spot("broken.png"), "no image that can be read"),
        (spot(box=[10, 20, 0, 40]), "no area"),
        (spot(box=[10, 20, 300, 40]), "out of the image"),
        (spot(box=[0.1, 0.2, 0.3, 0.4]), "looks normalized"),
        (spot(box=[10, 20, 30]), "not four finite numbers"),
        (spot(box=["1", "2", "3", "4"]), "not four finite numbers"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(screenspot: Path, row: dict[str, object], reason: str) -> None:
    (screenspot / "screenspot_imgs" / "broken.png").write_text("no picture", encoding="utf-8")
    write(screenspot / "screenspot_desktop.json", [spot(), row])
    with pytest.raises(ValueError, match=rf"screenspot_desktop\.json, row 2: .*{reason}"):
        readers.screenspot(str(screenspot))
    with pytest.warns(UserWarning, match=rf"1 rows are skipped.*row 2: .*{reason}"):
        assert len(readers.screenspot(str(screenspot), on_bad_row="skip")) == 3


def test_nothing_left_is_an_error_even_where_rows_may_be_skipped(screenspot: Path) -> None:
    for file in screenspot.glob("*.json"):
        write(file, [spot("b.png")])
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="all 2 were skipped"):
        readers.screenspot(str(screenspot), on_bad_row="skip")


def test_a_wrong_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        readers.screenspot(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"screenspot_mobile\.json, screenspot_desktop\.json"):
        readers.screenspot(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"annotations/\*\.json"):
        readers.screenspot_pro(str(tmp_path))
    write(tmp_path / "screenspot_web.json", [spot()])
    with pytest.raises(FileNotFoundError, match=r"'screenspot_imgs'.*option images"):
        readers.screenspot(str(tmp_path))
    picture(tmp_path / "screenspot_imgs" / "a.png")
    (tmp_path / "screenspot_web.json").write_text("[{]", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        readers.screenspot(str(tmp_path))


@pytest.fixture
def screens(tmp_path: Path) -> Path:
    picture(tmp_path / "images" / "a.png", (320, 320))
    rows = [
        {
            "image": "images/a.png",
            "width": 320,
            "height": 320,
            "prompt": "Click\u2028OK",
            "box": [10, 20, 30, 40],
            "platform": "web",
            "element_type": "text",
            "page": page,
            "kind": kind,
            "seed": seed,
            "tag": "button",
            "label": "OK",
        }
        for page in ("click-test", "click-link")
        for seed in range(4)
        for kind in ("task", "element")
    ]
    (tmp_path / "annotations.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return tmp_path


def test_rendered_screens_are_chosen_by_page_seed_and_kind(screens: Path) -> None:
    folder = str(screens)
    assert len(readers.rendered(folder)) == 16
    assert {row["page"] for row in readers.rendered(folder, pages=["click-link"])} == {"click-link"}
    assert {row["page"] for row in readers.rendered(folder, except_pages=["click-link"])} == {"click-test"}
    assert {row["seed"] for row in readers.rendered(folder, seeds="1-2")} == {1, 2}
    assert {row["seed"] for row in readers.rendered(folder, seeds="3")} == {3}
    assert {row["kind"] for row in readers.rendered(folder, kinds=["task"])} == {"task"}
    row = readers.rendered(folder)[0]
    assert row["image"] == str(screens / "images" / "a.png")
    assert (row["application"], row["group"], row["prompt"]) == ("click-test", "click-test", "Click\u2028OK")


def test_rendered_screens_that_are_not_there_are_refused(screens: Path) -> None:
    with pytest.raises(ValueError, match="no page click-tset; it has click-link, click-test"):
        readers.rendered(str(screens), pages=["click-tset"])
    with pytest.raises(ValueError, match="no page drag-box"):
        readers.rendered(str(screens), except_pages=["drag-box"])
    with pytest.raises(ValueError, match="no row is left"):
        readers.rendered(str(screens), seeds="7-9")
    for seeds in ("4-1", "a", "1-"):
        with pytest.raises(ValueError, match="write the first and the last"):
            readers.rendered(str(screens), seeds=seeds)


def test_a_reader_is_a_data_source(screens: Path) -> None:
    options = {"folder": str(screens), "seeds": "0-2"}
    data = PromptData(train=f"{PACKAGE}rendered", train_options=options)
    data.setup("fit")
    assert len(data.train) == 12
    assert data.train[0]["box"] == [10, 20, 30, 40]
