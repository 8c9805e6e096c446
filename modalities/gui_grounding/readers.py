"""GUI grounding benchmarks from local folders, as their authors publish them, and the screens of `opd render-gui`.

Each function is a data source (`python:opd_lightning.modalities.gui_grounding.readers.screenspot`, with its arguments
in the `…_options` of the split) and returns rows of

* `prompt`: the instruction,
* `image`: the absolute path of the screenshot,
* `box`: [x1, y1, x2, y2] in its pixels, whatever the file's convention,
* `platform`, `element_type` ("text" or "icon"), `application` and `group`, as far as the benchmark says them.

A row is bad that lacks a key, an instruction or its image, or whose box has no area, is out of the image or in another
convention. `on_bad_row` is "refuse", which raises a ValueError with the file and the row, or "skip", which leaves such
rows out and warns once with their number. In a configuration it is by default what `data.on_bad_row` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from ...data_source import json_lines
from ...images import open_image
from ...printable import printable, quoted
from ...rows import BadRows, reason_of
from ...rows import Row as LocatedRow
from ...shipped import shipped
from ...table import kind
from ..vision_language.boxes import problem_with_box

Row = dict[str, Any]
OnBadRow = Literal["refuse", "skip"]
Located = tuple[Path, int, Row]
"""A row as its file has it, with the file and its number there, from 1."""


def screenspot(folder: str, images: str = "screenspot_imgs", on_bad_row: OnBadRow = "refuse") -> list[Row]:
    """Reads ScreenSpot (2401.10935): `screenspot_mobile.json`, `screenspot_desktop.json`, `screenspot_web.json`.

    The platform is the file's; `application` is the row's `data_source` (ios, windows, shop, …). Boxes are
    [x, y, width, height] in pixels, as github.com/njucckevin/SeeClick, pretrain/screenspot_test.py, reads them.

    Args:
        folder: where the JSON files are; at least one of the three.
        images: the folder of the screenshots within `folder`.
        on_bad_row: "refuse" or "skip".

    Raises:
        FileNotFoundError: the folder, all of its annotations or its images are missing.
        ValueError: a file is no JSON list; a bad row where these are refused; no row is left.
    """
    return _screenspot(folder, "screenspot_{}.json", images, on_bad_row)


def screenspot_v2(folder: str, images: str = "screenspotv2_image", on_bad_row: OnBadRow = "refuse") -> list[Row]:
    """Reads ScreenSpot-v2 (arXiv 2410.23218): `screenspot_mobile_v2.json` and so on; otherwise as `screenspot`.

    The files are those of huggingface.co/datasets/OS-Copilot/ScreenSpot-v2.
    """
    return _screenspot(folder, "screenspot_{}_v2.json", images, on_bad_row)


def _screenspot(folder: str, pattern: str, images: str, on_bad_row: OnBadRow) -> list[Row]:
    root = _root(folder)
    platforms = {root / pattern.format(platform): platform for platform in ("mobile", "desktop", "web")}
    files = _present(root, platforms)
    pictures = _pictures(root, images)

    def convert(file: Path, row: Row) -> Row:
        return {
            "prompt": row["instruction"],
            "image": pictures / row["img_filename"],
            "box": _from_width_and_height(row["bbox"]),
            "platform": platforms[file],
            "element_type": row["data_type"],
            "application": row["data_source"],
        }

    bad = _bad(root, on_bad_row)
    return _rows(_json_rows(files, bad), convert, bad)


def screenspot_pro(
    folder: str,
    images: str = "images",
    language: Literal["en", "cn"] = "en",
    on_bad_row: OnBadRow = "refuse",
) -> list[Row]:
    """Reads ScreenSpot-Pro (arXiv 2504.07981): `annotations/*.json`, one file an application, and `images/`.

    `group` is the field of work (Dev, Creative, CAD, Scientific, Office, OS) by which its table is printed, `platform`
    the operating system. Boxes are [x1, y1, x2, y2] in pixels of a picture of `img_size`, as
    github.com/likaixin2000/ScreenSpot-Pro-GUI-Grounding, eval_screenspot_pro.py, reads them.

    Args:
        folder: the folder that holds `annotations`.
        images: the folder of the screenshots within `folder`.
        language: which instruction: "en" or "cn" (its `instruction_cn`).
        on_bad_row: "refuse" or "skip"; a picture of another size than `img_size` is bad, too.

    Raises:
        FileNotFoundError, ValueError: as `screenspot`.
    """
    root = _root(folder)
    files = _present(root, sorted((root / "annotations").glob("*.json")) or [root / "annotations" / "*.json"])
    pictures = _pictures(root, images)

    def convert(file: Path, row: Row) -> Row:
        return {
            "prompt": row["instruction" if language == "en" else "instruction_cn"],
            "image": pictures / row["img_filename"],
            "box": row["bbox"],
            "platform": row["platform"],
            "element_type": row["ui_type"],
            "application": row["application"],
            "group": row["group"],
            "size": row["img_size"],
        }

    bad = _bad(root, on_bad_row)
    return _rows(_json_rows(files, bad), convert, bad)


def osworld_g(folder: str, images: str = "images", refined: bool = False, on_bad_row: OnBadRow = "refuse") -> list[Row]:
    """Reads OSWorld-G (arXiv 2505.13227): `OSWorld-G.json` or `OSWorld-G_refined.json`.

    Beside it are `images/` and `classification_result.json`.

    `group` lists the abilities of its table (text_matching, element_recognition, layout_understanding,
    fine_grained_manipulation) that a row counts for; a row may have several, or none. A box is [x, y, width, height];
    a polygon [x1, y1, x2, y2, …] is kept in the column `polygon` ([[x, y], …], None for boxes), and `box` is the
    rectangle around it. Rows of the type "refusal" ask for what is not on the screen: there is nothing to click, so
    they are left out, and the warning counts them. The layout is that of github.com/xlang-ai/OSWorld-G, `benchmark/`.

    Args:
        folder: where the JSON files are.
        images: the folder of the screenshots within `folder`.
        refined: whether the instructions are those that name what is seen (OSWorld-G-Refine).
        on_bad_row: "refuse" or "skip"; a picture of another size than `image_size` is bad, too.

    Raises:
        FileNotFoundError, ValueError: as `screenspot`.
    """
    # 1. the files of the benchmark
    root = _root(folder)
    file, classes = root / f"OSWorld-G{'_refined' if refined else ''}.json", root / "classification_result.json"
    _present(root, [file])
    _present(root, [classes])
    pictures = _pictures(root, images)
    groups, bad = _groups(classes), _bad(root, on_bad_row)

    def convert(file: Path, row: Row) -> Row:
        numbers = row["box_coordinates"]
        polygon = None
        if row["box_type"] == "polygon":
            polygon = [list(point) for point in zip(numbers[::2], numbers[1::2], strict=True)]
            box = [min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])]
        elif row["box_type"] == "bbox":
            box = _from_width_and_height(numbers)
        else:
            raise ValueError(f"box_type is {row['box_type']!r}, none of bbox, polygon, refusal")
        return {
            "prompt": row["instruction"],
            "image": pictures / row["image_path"],
            "box": box,
            "polygon": polygon,
            "platform": "desktop",
            "group": groups.get(row["id"], []),
            "size": row["image_size"],
        }

    # 2. its rows, but for those without a target
    located = list(_json_rows([file], bad))
    with_target = [(path, number, row) for path, number, row in located if row.get("box_type") != "refusal"]
    if len(with_target) < len(located):
        refusals = len(located) - len(with_target)
        rank_zero_warn(printable(f"{file}: {refusals} rows of the type 'refusal' have no target; left out"))
    return _rows(with_target, convert, bad)


def _groups(file: Path) -> dict[str, list[str]]:
    """Reads the abilities that a row counts for, by its id."""
    groups: dict[str, list[str]] = {}
    try:
        for group, members in _load(file)["classified"].items():
            for member in members:
                groups.setdefault(member["id"], []).append(group)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold the rows of each ability: {reason_of(error)}") from error
    return groups


def rendered(
    folder: str,
    pages: Sequence[str] | None = None,
    except_pages: Sequence[str] = (),
    seeds: str | None = None,
    kinds: Sequence[str] = ("task", "element"),
    on_bad_row: OnBadRow = "refuse",
) -> list[Row]:
    """Reads screens of `opd render-gui`: `annotations.jsonl` and the pictures that it names.

    The columns of the file are kept; `application` and `group` are the page. Rows come seed by seed, so that the first
    few show every page.

    Args:
        folder: what the command wrote; `opd:assets/gui_screens` for the screens that ship.
        pages: only these; default: all.
        except_pages: all but these.
        seeds: only those from the first to the last number of "0-19", both included, or one number; default: all.
        kinds: "task" (what the page asks for), "element" ('Click on "…"'), or both.
        on_bad_row: "refuse" or "skip".

    Raises:
        FileNotFoundError, ValueError: as `screenspot`; ValueError also for pages that are not there, and for seeds
            that are no range.
    """
    root = _root(shipped(folder))
    (file,) = _present(root, [root / "annotations.jsonl"])
    bad = _bad(root, on_bad_row)
    located = [(file, number, row) for number, row in json_lines(file, bad) if _is_object(file, number, row, bad)]
    pages_there = {str(row.get("page")) for _, _, row in located}
    if unknown := (set(pages or ()) | set(except_pages)) - pages_there:
        raise ValueError(f"{file} has no page {', '.join(sorted(unknown))}; it has {', '.join(sorted(pages_there))}")
    wanted = (pages_there if pages is None else set(pages)) - set(except_pages)
    first, last = _seed_range(seeds)
    chosen = []
    for path, number, row in located:
        with bad.at(f"{path}, row {number}"):
            seed = row.get("seed", 0)
            if not isinstance(seed, int):
                raise ValueError(f"its seed is no whole number: {quoted(seed)}")
            in_range = "seed" not in row or first <= seed <= last
            if str(row.get("page")) in wanted and row.get("kind") in kinds and in_range:
                chosen.append((path, number, row))
    chosen.sort(key=lambda item: item[2].get("seed", 0))

    def convert(file: Path, row: Row) -> Row:
        return {
            **row,
            "image": root / row["image"],
            "size": [row["width"], row["height"]],
            "application": row["page"],
            "group": row["page"],
        }

    return _rows(chosen, convert, bad)


def _seed_range(seeds: str | None) -> tuple[float, float]:
    if seeds is None:
        return 0, float("inf")
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", str(seeds))
    first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
    if last < first:
        raise ValueError(f"seeds: {seeds!r} is no range; write the first and the last, such as 0-19")
    return first, last


# -- reading and checking ---------------------------------------------------------------------------------------------


def _bad(root: Path, on_bad_row: OnBadRow) -> BadRows:
    if on_bad_row not in ("refuse", "skip"):
        raise ValueError(f"on_bad_row is 'refuse' or 'skip', not {on_bad_row!r}")
    return BadRows(str(root), on_bad_row)


def _rows(located: Iterable[Located], convert: Callable[[Path, Row], Row], bad: BadRows) -> list[Row]:
    rows: list[Row] = []
    sizes: dict[Path, tuple[int, int]] = {}
    for file, number, row in located:
        with bad.at(f"{file}, row {number}"):
            rows.append(LocatedRow(_checked(_converted(convert, file, row), sizes)))
            rows[-1].location = f"{file}, row {number}"  # type: ignore[attr-defined]
    bad.warn()
    if not rows:
        count = bad.kinds.total()
        raise ValueError("no row is left" + (f"; all {count} were skipped, the first is {bad.first}" if count else ""))
    return rows


def _converted(convert: Callable[[Path, Row], Row], file: Path, row: Row) -> Row:
    try:
        return convert(file, row)
    except KeyError as error:
        raise ValueError(f"there is no {error}") from error


def _checked(row: Row, sizes: dict[Path, tuple[int, int]]) -> Row:
    stated, path = row.pop("size", None), row["image"]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError("the instruction is empty")
    if path not in sizes:
        sizes[path] = _size(path)
    if stated is not None and tuple(stated) != sizes[path]:
        raise ValueError(f"{path} has {sizes[path]} pixels, its annotation says {tuple(stated)}")
    if problem := problem_with_box(row["box"], sizes[path]):
        raise ValueError(problem)
    return {**row, "image": str(path)}


def _size(path: Path) -> tuple[int, int]:
    """Reads width and height of the upright image, in whose pixels boxes are."""
    if not path.is_file():
        raise ValueError(f"there is no image {path}")
    try:
        return open_image(path).size
    except ValueError as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None


def _from_width_and_height(box: Any) -> Any:
    """Converts [x, y, width, height] to [x1, y1, x2, y2]; anything else is left to the check."""
    if not isinstance(box, list) or len(box) != 4:
        return box
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _root(folder: str) -> Path:
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    return root


def _present(root: Path, files: Iterable[Path]) -> list[Path]:
    expected = list(files)
    present = [file for file in expected if file.is_file()]
    if not present:
        names = ", ".join(str(file.relative_to(root)) for file in expected)
        raise FileNotFoundError(f"{root} holds no {names}: is it the folder that the benchmark comes in?")
    return present


def _pictures(root: Path, images: str) -> Path:
    if not (root / images).is_dir():
        raise FileNotFoundError(f"{root} holds no folder {images!r} of screenshots; name it in the option images")
    return root / images


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _json_rows(files: Iterable[Path], bad: BadRows) -> Iterator[Located]:
    for file in files:
        rows = _load(file)
        if not isinstance(rows, list):
            raise ValueError(f"{file} does not hold a list of objects, one an instruction")
        yield from ((file, n, row) for n, row in enumerate(rows, start=1) if _is_object(file, n, row, bad))


def _is_object(file: Path, number: int, row: Any, bad: BadRows) -> bool:
    if not isinstance(row, dict):
        bad(f"{file}, row {number}", f"not an object but {kind(row)}")
    return isinstance(row, dict)
