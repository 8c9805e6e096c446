from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from opd_lightning.data import PromptData
from opd_lightning.modalities.vision_language.data import ImageData, user_cache
from opd_lightning.modalities.vision_language.images import images_of

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for color in COLORS:
        (tmp_path / "pictures" / f"{color}.png").write_bytes(png(color))
    return tmp_path


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "?", **row}) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def seen(data: ImageData) -> list[list[str]]:
    """The colors of each training example's images."""
    data.prepare_data()
    data.setup("fit")
    assert data.train is not None
    names = {color: name for name, color in COLORS.items()}
    return [[names[image.getpixel((0, 0))] for image in images_of(row)] for row in data.train]


def chat(**part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "red.png"}]}]


def test_relative_paths_start_at_the_source_or_the_image_folder(folder: Path) -> None:
    rows = [{"image": f"{color}.png"} for color in COLORS]
    in_place = [{"image": f"pictures/{color}.png"} for color in COLORS]
    expected = [[color] for color in COLORS]
    assert seen(ImageData(jsonl(folder, *in_place))) == expected
    assert seen(ImageData(str(folder))) == expected
    assert seen(ImageData(jsonl(folder, *rows), image_folder=str(folder / "pictures"))) == expected
    absolute = [{"image": str(folder / row["image"])} for row in in_place]
    assert seen(ImageData(jsonl(folder, *absolute), image_folder=str(folder / "pictures"))) == expected


def test_paths_are_found_in_lists_objects_and_chats(folder: Path) -> None:
    assert seen(
        ImageData(
            jsonl(
                folder,
                {"prompt": chat(), "images": ["pictures/red.png", "pictures/blue.png"]},
                {"prompt": chat(path="pictures/red.png")},
                {"prompt": chat(image="pictures/lime.png"), "images": None},
                {"prompt": chat(url="pictures/blue.png"), "images": []},
                {"prompt": chat(), "images": [{"path": "pictures/lime.png"}]},
                {"prompt": [{"role": "user", "content": "red.png"}]},
            )
        )
    ) == [["red", "blue"], ["red"], ["lime"], ["blue"], ["lime"], []]


def test_other_columns_are_named(folder: Path) -> None:
    data = ImageData(
        jsonl(folder, {"crop": "pictures/red.png", "note": "pictures/red.png"}), image_columns=("image", "crop")
    )
    data.setup("fit")
    assert data.train is not None
    assert data.train[0] == {"prompt": "?", "crop": str(folder / "pictures/red.png"), "note": "pictures/red.png"}


def rows_of_images() -> list[dict[str, Any]]:
    return [{"prompt": "?", "image": Image.new("RGB", (2, 2), color), "images": None} for color in COLORS]


def test_images_of_a_function_and_a_parquet_file(folder: Path) -> None:
    assert seen(ImageData(f"python:{__name__}.rows_of_images", image_folder=str(folder))) == [[c] for c in COLORS]
    table = datasets.Dataset.from_dict(
        {"prompt": ["?", "?"], "images": [[png("red")], [png("lime"), png("blue")]]},
        features=datasets.Features({"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image())}),
    )
    table.to_parquet(str(folder / "rows.parquet"))
    assert seen(ImageData(str(folder / "rows.parquet"))) == [["red"], ["lime", "blue"]]


def test_a_broken_stored_image_does_not_stop_the_reading(folder: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"prompt": ["?", "?"], "image": [png("red"), png("red")[:50]]}, features)
    table.to_parquet(str(folder / "rows.parquet"))
    data = ImageData(str(folder / "rows.parquet"))
    data.setup("fit")
    assert data.train is not None
    with pytest.raises(ValueError, match="the image is broken: 50 bytes"):
        images_of(data.train[1])


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Serves /red.png and so on; `requests` are the paths asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests.append(self.path)  # type: ignore[attr-defined]
            name = self.path.strip("/").removesuffix(".png")
            known = name in COLORS or name == "text"
            self.send_response(200 if known else 404)
            self.end_headers()
            if known:
                self.wfile.write(b"no image" if name == "text" else png(name))

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def home(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_urls_are_fetched_once_when_allowed(folder: Path, server: Any, home: str) -> None:
    source = jsonl(
        folder,
        {"prompt": chat(), "image": f"{home}/red.png"},
        {"prompt": chat(), "image": "pictures/lime.png"},
        {"prompt": chat(), "image": f"{home}/red.png"},
        {"prompt": chat(url=f"{home}/blue.png"), "image": None},
    )
    for _ in range(2):
        data = ImageData(source, allow_urls=True, cache_folder=str(folder / "cache"))
        assert seen(data) == [["red"], ["lime"], ["red"], ["blue"]]
    assert sorted(server.requests) == ["/blue.png", "/red.png"]
    assert len(list((folder / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/gone.png", "the image can't be fetched: .*/gone.png: HTTP Error 404"),
        ("/text.png", "the image can't be fetched: .*: this is no image of a known format .*: 8 bytes"),
    ],
)
def test_what_can_not_be_fetched_is_a_bad_row(folder: Path, server: Any, home: str, path: str, reason: str) -> None:
    source = jsonl(folder, {"image": f"{home}/red.png"}, {"image": home + path})
    options: dict[str, Any] = {"allow_urls": True, "cache_folder": str(folder / "cache")}
    with pytest.raises(ValueError, match=rf"rows\.jsonl, row 2: {reason}"):
        ImageData(source, **options).setup("fit")
    data = ImageData(source, on_bad_row="skip", **options)
    with pytest.warns(UserWarning, match=r"data\.train: 1 rows are skipped: 1 × the image can't be fetched\."):
        data.setup("fit")
    assert data.train is not None
    assert len(data.train) == 1
    assert data.skipped == {"the image can't be fetched": 1}
    asked = len(server.requests)
    with pytest.warns(UserWarning, match="skipped"):
        assert seen(data) == [["red"]]
    assert server.requests[asked:] == [path], "only preparing the data tries again, and only what failed"
    with pytest.raises(ValueError, match=r"data\.train: no row is left; no image could be fetched \(.*row 1"):
        ImageData(jsonl(folder, {"image": home + path}), on_bad_row="skip", **options).setup("fit")


def test_without_permission_a_url_stays_and_is_refused_when_opened(folder: Path, server: Any, home: str) -> None:
    data = ImageData(jsonl(folder, {"image": f"{home}/red.png"}))
    with pytest.raises(ValueError, match=r"the image is a URL: .*allow_urls"):
        seen(data)
    assert not server.requests


def test_only_http_is_fetched(folder: Path) -> None:
    secret = (folder / "pictures" / "red.png").as_uri()
    with pytest.raises(ValueError, match=r"can't be fetched: file://.*: only http and https are fetched"):
        ImageData(jsonl(folder, {"image": secret}), allow_urls=True, cache_folder=str(folder)).setup("fit")


def test_held_out_rows_keep_their_images(folder: Path) -> None:
    data = ImageData(jsonl(folder, *({"image": f"pictures/{c}.png"} for c in COLORS)), validation=1)
    assert len(seen(data)) == 2
    assert data.validation is not None
    assert images_of(data.validation[0])[0].size == (2, 2)


def test_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.image_folder is 'no/such', which is no folder"):
        ImageData(image_folder="no/such")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert user_cache() == ImageData().cache_folder == folder / "opd-lightning" / "images"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptData, "data")
    made = parser.instantiate_classes(
        parser.parse_object(
            {
                "data": {
                    "class_path": "opd_lightning.modalities.vision_language.data.ImageData",
                    "init_args": {"train": "rows.jsonl", "allow_urls": True, "image_columns": ["image"]},
                }
            }
        )
    ).data
    assert (made.image_columns, made.allow_urls) == (("image",), True)
