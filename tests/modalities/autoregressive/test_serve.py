"""A student behind an endpoint, asked by OpenAI's own client and by requests that it would not send."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from opd_lightning.modalities.autoregressive.serve import TOKEN, StudentServer, load, name_of, serve
from opd_lightning.modalities.autoregressive.stream import Completion
from tests.exported import exportable
from tests.tiny import chat_tokenizer, save_model

CHAT = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, with an adapter that moved."""
    folder = tmp_path_factory.mktemp("served")
    base = save_model(folder / "base", rows=0, tokenizer=chat_tokenizer())
    exportable(folder / "my-run" / "checkpoints" / "last.ckpt", base, lora={"r": 4, "alpha": 8})
    return folder / "my-run"


@pytest.fixture(scope="module")
def module(trained):
    return load(str(trained), "cpu")


@pytest.fixture
def server(module):
    with Serving(module) as one:
        yield one


class Serving:
    """A server in a thread."""

    def __init__(self, module, limit: int = 2**16, waiting: int = 8) -> None:
        self.server = StudentServer(("127.0.0.1", 0), module, "my-run", limit, waiting)

    def __enter__(self) -> StudentServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.server

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as one:
        yield one


def ask(server, path: str, body=None, headers=(), raw: bytes | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    content = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request("GET" if content is None else "POST", path, content, dict(headers))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def greedy(module, ids: list[int], count: int) -> list[int]:
    model = module.policies["student"].model
    new = model.generate(
        input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=count, eos_token_id=module.eos, pad_token_id=0
    )
    return new[0, len(ids) :].tolist()


def test_the_greedy_answer_is_that_of_generate(client, module):
    ids = module.prompt_ids({"prompt": CHAT}, module.policies["student"]).tolist()
    answer = client.chat.completions.create(model="my-run", messages=CHAT, temperature=0, max_tokens=12)
    wanted = greedy(module, ids, 12)
    assert answer.choices[0].message.content == module.written_as(wanted)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(wanted)
    assert answer.usage.total_tokens == len(ids) + len(wanted)
    assert answer.choices[0].finish_reason == ("stop" if wanted[-1] in module.eos else "length")
    text = client.completions.create(model="my-run", prompt="<s>2+2=", temperature=0, max_tokens=5)
    as_ids = client.completions.create(
        model="my-run", prompt=module.tokenizer()("2+2=")["input_ids"], temperature=0, max_tokens=5
    )
    assert text.choices[0].text == as_ids.choices[0].text
    assert as_ids.choices[0].text == module.written_as(greedy(module, module.tokenizer()("2+2=")["input_ids"], 5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", [None, ["a", "Q7"]])
def test_pieces_make_the_whole(client, temperature, stop):
    asked = {"model": "my-run", "messages": CHAT, "temperature": temperature, "max_tokens": 24, "seed": 3, "n": 3}
    asked |= {"stop": stop} if stop else {}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, reasons = [""] * 3, [None] * 3
    for piece in pieces[:-1]:
        (choice,) = piece.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = reasons[choice.index] or choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert pieces[-1].usage == whole.usage
    assert all(one not in text for one in stop or () for text in texts)
    if temperature:
        assert len(set(texts)) > 1, "each completion has draws of its own"


def test_completions_of_several_prompts_and_in_pieces(client):
    asked = {"model": "my-run", "prompt": ["1+1=", "12345+1="], "n": 2, "max_tokens": 6, "seed": 1}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for piece in client.completions.create(**asked, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_a_seed_decides_and_company_does_not(client):
    def write(seed: int) -> str:
        answer = client.chat.completions.create(model="my-run", messages=CHAT, max_tokens=30, seed=seed)
        return answer.choices[0].message.content

    alone = [write(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == alone
    assert len(set(alone)) > 1


def test_two_clients_advance_side_by_side(client):
    """A long answer does not keep a short one waiting."""
    asked = {"model": "my-run", "messages": CHAT, "seed": 5, "temperature": 2.0}
    long = client.chat.completions.create(**asked, max_tokens=200, n=2, stream=True)
    next(iter(long))
    short = client.chat.completions.create(**asked, max_tokens=3)
    assert short.usage.completion_tokens <= 3
    assert len(list(long)) > 10


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert model.id == client.models.retrieve("my-run").id == "my-run"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "hot", "temperature is 'hot'; it is a number from 0 to 2"),
        ("temperature", -1, "number from 0 to 2"),
        ("top_p", 0, "top_p is 0"),
        ("max_tokens", 0, "max_tokens is 0; it is a whole number of 1 or more"),
        ("max_tokens", 10_000, "more than the context of 256"),
        ("n", 99, "up to 16 are served at once"),
        ("stop", [""], "stop is a text, or up to"),
        ("stream", "yes", "stream is true or false"),
        ("logprobs", True, "logprobs is not served here"),
        ("tools", [{"type": "function"}], "tools is not served here"),
        ("response_format", {"type": "json_object"}, "response_format is not served here"),
        ("max_token", 5, "'max_token' is no field that is known here"),
        ("messages", [], "messages is empty"),
        ("messages", [{"role": "user"}], "message 1 of the messages has no content"),
        ("messages", [*CHAT, {"role": "assistant", "content": "4"}], "last message is the assistant's"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "this model reads text alone"),
        ("messages", None, "messages is missing"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, field, value, words):
    body = {"model": "my-run", "messages": CHAT, "max_tokens": 3} | {field: value}
    status, answer = ask(server, "/v1/chat/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] in (field, None)


def test_what_asks_for_nothing_is_no_error(server):
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logprobs": False,
        "tools": [],
        "user": "me",
        "seed": None,
    }
    body = {"model": "my-run", "messages": CHAT, "max_tokens": 3} | neutral
    assert ask(server, "/v1/chat/completions", body)[0] == 200


def test_errors_are_those_of_the_client(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here; 'my-run' is served"):
        client.chat.completions.create(model="gpt", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match=r"999 is no token id"):
        client.completions.create(model="my-run", prompt=[999])
    with pytest.raises(openai.BadRequestError, match=r"Missing \[UNK\] token"):
        client.chat.completions.create(model="my-run", messages=[{"role": "user", "content": "é"}])
    with pytest.raises(openai.BadRequestError, match=r"more than the context of 256"):
        client.completions.create(model="my-run", prompt="1" * 300)


def test_what_is_no_request_is_refused(server):
    for raw, status in ((b"{", 400), (b"[]", 400), (b"[" * 10_000, 400), (b" " * (2**16 + 1), 413)):
        code, answer = ask(server, "/v1/chat/completions", raw=raw)
        assert code == status
        assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert ask(server, "/v1/embeddings", {})[0] == ask(server, "/", None)[0] == 404


def test_a_token_is_asked_for(module, monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret")
    with Serving(module) as server:
        body = {"messages": CHAT, "max_tokens": 2}
        assert ask(server, "/v1/models")[0] == ask(server, "/v1/chat/completions", body)[0] == 401
        assert ask(server, "/v1/chat/completions", body, {"Authorization": "Bearer s3cret"})[0] == 200
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ValueError, match=f"set the environment variable {TOKEN}"):
        serve(["nowhere", "--host=0.0.0.0"])


def test_too_many_at_once_are_told_to_come_again(module):
    with Serving(module, waiting=1) as server, server.room:
        status, answer = ask(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2})
    assert (status, answer["error"]["type"]) == (503, "server_error")


def test_whoever_goes_away_is_not_written_for(server, monkeypatch):
    written = []
    add = Completion.add
    monkeypatch.setattr(Completion, "add", lambda self, token: (written.append(token), add(self, token)))
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    body = {"messages": CHAT, "max_tokens": 200, "temperature": 2, "n": 8, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    response.read(10)
    response.close()
    connection.close()
    assert ask(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2})[0] == 200
    assert len(written) < 8 * 200


def test_an_exported_folder_is_served(trained, module, tmp_path):
    from opd_lightning.export import write

    write(trained, tmp_path / "student")
    exported = load(str(tmp_path / "student"), "cpu")
    body = {"messages": CHAT, "max_tokens": 8, "temperature": 0}
    answers = []
    for one in (module, exported):
        with Serving(one) as server:
            answers.append(ask(server, "/v1/chat/completions", body)[1]["choices"])
    assert answers[0] == answers[1]


def test_a_model_that_sees_reads_images(tmp_path, make_world):
    world = make_world("vision_language")
    setting = "opd_lightning.modalities.vision_language.VisionLanguageDistillation"
    checkpoint = exportable(tmp_path / "last.ckpt", world.student, setting, freeze=world.freeze)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "1+1="}]
    with Serving(load(str(checkpoint), "cpu")) as server:
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        status, answer = ask(server, "/v1/chat/completions", body)
        # as lmms-eval 0.7.3 asks
        settings = {"model": answer["model"], "temperature": 0, "top_p": 1, "seed": 0, "n": 1}
        assert ask(server, "/v1/chat/completions", {**body, **settings})[0] == 200
        body["messages"][0]["content"][0]["image_url"]["url"] = "http://127.0.0.1/x.png"
        refused = ask(server, "/v1/chat/completions", body)
    assert status == 200, answer
    assert refused[0] == 400
    assert "nothing is fetched from elsewhere" in refused[1]["error"]["message"]


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load(str(tmp_path))
    assert name_of(str(tmp_path / "mine")) == "mine"


def test_stops_and_halves_of_characters_are_held_back():
    texts = {1: "a", 2: "ab", 3: "ab\ufffd", 4: "abé", 5: "abéS", 6: "abéST", 7: "abéSTO"}
    completion = Completion(lambda ids: texts[len(ids)], frozenset({0}), ("STOP",))
    pieces = []
    for _ in range(7):
        completion.add(9)
        pieces.append(completion.take())
    assert pieces == ["a", "b", "", "é", "", "", ""]
    texts[8] = "abéSTOPx"
    completion.add(9)
    assert (completion.take(), completion.text, completion.reason) == ("", "abé", "stop")
