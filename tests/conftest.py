"""Tiny models of real architectures, built from their configurations, with tokenizers made on the spot."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # of the processes that tests start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests import worlds  # noqa: E402
from tests.chatting import Chatting  # noqa: E402
from tests.servers import real  # noqa: E402
from tests.servers.real import RealServer  # noqa: E402
from tests.tiny import ARCHITECTURES, chat_tokenizer, save_model  # noqa: E402
from tests.tiny_diffusion import save_pipeline  # noqa: E402
from tests.tiny_vlm import save_vlm  # noqa: E402

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")
torch.set_num_threads(1)  # more only get in each other's way on models this small


LONGEST = ("test_configs.py", "test_ranks.py", "test_processes.py", "test_resume.py", "test_rollout.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[..., Path]:
    """`save_model` into a folder of its own; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def get(**settings: Any) -> Path:
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("model"), **settings)
        return made[key]

    return get


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def student(saved, architecture) -> Path:
    """A tiny student of every architecture in turn."""
    return saved(architecture=architecture)


@pytest.fixture(scope="session")
def teacher(saved, architecture) -> Path:
    """Another model of the same architecture: wider, with another number of head rows."""
    return saved(architecture=architecture, seed=2, hidden=48, rows=28)


@pytest.fixture(scope="session")
def make_world(saved, tmp_path_factory) -> Callable[[str], worlds.World]:
    """A world by the name of its setting, or of a text architecture."""
    folder = tmp_path_factory.mktemp("eyes")
    eyes = save_vlm(folder / "student"), save_vlm(folder / "teacher", seed=2, hidden=48, padding=9)
    painters: list[Path] = []

    def get(name: str) -> worlds.World:
        if name == "diffusion":
            if not painters:
                sizes = {"painter": (1, 16), "other": (2, 32)}
                painters.extend(save_pipeline(folder / n, "anyflow", *size) for n, size in sizes.items())
            return worlds.diffusion(*painters)
        if name in ("vision_language", "gui_grounding"):
            return getattr(worlds, name)(*eyes)
        settings = {} if name == "text" else {"architecture": name}
        return worlds.text(saved(**settings, seed=1), saved(**settings, seed=2, hidden=48, rows=28))

    return get


@pytest.fixture(scope="session", params=["text", "vision_language", "gui_grounding"])
def world(request, make_world) -> worlds.World:
    """Every setting in turn that writes tokens."""
    return make_world(request.param)


@pytest.fixture(scope="session", params=["text", "vision_language", "gui_grounding", "diffusion"])
def every_world(request, make_world) -> worlds.World:
    """Every setting in turn, those that write no tokens too."""
    return make_world(request.param)


@pytest.fixture(scope="session", params=[*sorted(ARCHITECTURES), "vision_language", "gui_grounding"])
def any_world(request, make_world) -> worlds.World:
    """Every text architecture in turn, and the other settings."""
    return make_world(request.param)


@pytest.fixture(scope="session")
def tiny_student(saved) -> Path:
    return saved(seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(saved) -> Path:
    return saved(seed=2, hidden=48, rows=28)


@pytest.fixture(scope="session")
def chat_student(tmp_path_factory) -> Path:
    """A model with a chat template, a beginning-of-sequence token, and two stop tokens as chat models have them."""
    tokenizer = chat_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
    folder = tmp_path_factory.mktemp("chat")
    return save_model(folder, tokenizer=tokenizer, rows=104, generation={"eos_token_id": ids})


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """40 small sums as JSONL, with the columns that views and rewards read."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b), "solution": f"{a}+{b}"}
        for a in range(8, 16)
        for b in (3, 14, 15, 92, 65)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, where `opd fetch smollm2` has put it."""
    path = Path(__file__).parents[1] / "models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("needs `opd fetch smollm2` in the clone")
    return path


@pytest.fixture(scope="session")
def smollm2_folder(smollm2) -> Path:
    """The same as a folder of transformers, which `make servers` unpacks."""
    folder = smollm2.parent / "unpacked"
    if not folder.exists():
        pytest.skip("needs `opd fetch smollm2 --unpack` in the clone")
    return folder


@pytest.fixture(scope="module")
def llama(smollm2) -> Iterator[RealServer]:
    """llama.cpp's server of SmolLM2, where `make servers` has installed it."""
    server = real.llama(smollm2)
    yield server
    server.stop()


@pytest.fixture
def chatting() -> Iterator[Callable[..., Chatting]]:
    """Chat endpoints, each of a function that answers."""
    made: list[Chatting] = []

    def make(answer: Callable[[dict[str, Any]], Any]) -> Chatting:
        made.append(Chatting(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.close()
