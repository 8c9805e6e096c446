"""Teachers that see, behind a URL: images travel with a question, as the pixels that the student's processor makes."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from contextlib import closing

import pytest
import torch
from safetensors.torch import load, save

from opd_lightning.modalities.autoregressive import Remote
from opd_lightning.modalities.autoregressive.elsewhere.inputs import packed
from opd_lightning.modalities.autoregressive.elsewhere.question import answers, questions
from opd_lightning.modalities.vision_language import VisionLanguageDistillation
from opd_lightning.modalities.vision_language.view import Crop
from opd_lightning.objective import LogRatio, Objective, PolicyGradient, ReverseKL, Support, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Teacher
from tests.modalities.autoregressive.elsewhere.servers import Imitation, StandIn, answering, post
from tests.tiny import act, fit, make_module, save_model
from tests.tiny_vlm import save_vlm, vlm_rows, vlm_tokenizer

QUICK = {"timeout": 20.0, "deadline": 20.0}


def module_of(student, teacher, objective=None, view=None, **settings):
    origin = teacher if isinstance(teacher, Remote) else Frozen(Pretrained(str(teacher)))
    objective = objective or Objective([Term(PolicyGradient(LogRatio()))])
    settings = {"setting": VisionLanguageDistillation} | settings
    return make_module(student, {"teacher": Teacher(origin, view)}, objective, **settings)


def there(server, **settings):
    return Remote(server.url, **{"dialect": "opd"} | QUICK | settings)


def told(module, batch):
    stream = module.streams.query("teacher", batch)
    said = answers(stream.distribution, batch, module.objective.chunk_size)
    return torch.cat([answer.log_probs for answer in said])


@pytest.mark.parametrize("view", [None, Crop(size=32)])
def test_the_served_teacher_sees_what_the_local_one_sees(vlm_student, vlm_teacher, view):
    """Images of mixed sizes, none, one and two in a row, in one batch; log-probs, likeliest ids and hidden states."""
    here = module_of(vlm_student, vlm_teacher, view=view)
    batch = act(here, [row for row in vlm_rows(12) if view is None or row["images"]])
    expected = told(here, batch)
    whole = here.streams.query("teacher", batch).distribution
    with answering(module_of(vlm_student, vlm_teacher, load=False)) as server:
        remote = module_of(vlm_student, there(server, top_k=4), view=view)
        scored = remote.streams.query("teacher", batch).distribution
        assert torch.allclose(scored.log_probs[batch.mask], expected, atol=1e-5)
        exact = module_of(vlm_student, there(server, hidden=True), view=view)
        stated = exact.streams.query("teacher", batch).distribution
    assert torch.allclose(stated.hidden[batch.mask], whole.hidden[batch.mask], atol=1e-5)
    top = whole.head(whole.hidden[batch.mask]).log_softmax(-1).topk(4)
    assert torch.allclose(scored.top[batch.mask], top.values, atol=1e-5)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen")
    return save_vlm(made / "student"), save_vlm(made / "teacher", seed=2, hidden=48)


@pytest.fixture(scope="module")
def server(qwen):
    with answering(module_of(*qwen, load=False)) as running:
        yield running


SIGNALS = [
    (lambda: Objective([Term(ReverseKL())]), {"hidden": True}),
    (lambda: Objective([Term(ReverseKL(support=Support("teacher", 4)))]), {"top_k": 4}),
    (lambda: Objective([Term(PolicyGradient(LogRatio()))]), {}),
]


@pytest.mark.parametrize(("objective", "settings"), SIGNALS)
def test_it_teaches_as_the_local_one(qwen, server, tmp_path, objective, settings):
    students = []
    for origin in (qwen[1], there(server, **settings)):
        module = module_of(qwen[0], origin, objective(), Crop(size=32))
        fit(module, tmp_path, [row for row in vlm_rows(12) if row["images"]], steps=2)
        students.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    assert torch.allclose(*students, atol=1e-5)


def test_two_clients_with_images_and_without_share_batches(qwen, server):
    here, clients = module_of(*qwen), [module_of(qwen[0], there(server)) for _ in range(3)]
    batches = [act(here, vlm_rows(12)[start:]) for start in (0, 3, 7)]
    expected, said = [told(here, batch) for batch in batches], [None] * len(batches)

    def ask(place):
        said[place] = told(clients[place], batches[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(said, expected, strict=True))


# -- what never reaches a teacher -------------------------------------------------------------------------------------


def test_a_server_whose_teacher_sees_nothing_of_them_is_refused(qwen, server, monkeypatch, tmp_path):
    """Blank images are asked about, too, before the first step."""
    ask = server.scorer.ask

    def blind(question, wish):
        shown = {name: t * 0 if t.is_floating_point() else t for name, t in question.inputs.items()}
        return ask(dataclasses.replace(question, inputs=shown), wish)

    fit(module_of(qwen[0], there(server)), tmp_path / "sees", vlm_rows(8))
    monkeypatch.setattr(server.scorer, "ask", blind)
    with pytest.raises(ValueError, match=r"model\.teachers\.teacher: its log-probs do not change when the images are"):
        fit(module_of(qwen[0], there(server)), tmp_path / "blind", vlm_rows(8))
    fit(module_of(qwen[0], there(server), blank_check=False), tmp_path / "unasked", vlm_rows(8))


def test_a_server_that_reads_text_alone_says_so(qwen, tmp_path):
    text = save_model(tmp_path / "text", tokenizer=vlm_tokenizer())
    with answering(make_module(text, text, load=False)) as server:
        module = module_of(qwen[0], there(server))
        batch = act(module, vlm_rows(4))
        with pytest.raises(ValueError, match=rf"the teacher at {server.url} has no eyes: it reads text alone"):
            module.streams.query("teacher", batch)
        told(module, batch.select(torch.tensor([3])))  # which shows none


def test_a_server_of_another_processor_says_what_it_reads(qwen, tmp_path):
    other = save_vlm(tmp_path / "other", "llava")
    with answering(module_of(other, other, load=False)) as server:
        module = module_of(qwen[0], there(server))
        with pytest.raises(ValueError, match=r"shown mm_token_type_ids .*, and reads pixel_values \(float32 of 4 dim"):
            module.streams.query("teacher", act(module, vlm_rows(4)))


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_servers_whose_http_shows_no_images_beside_given_tokens_are_refused(qwen, tmp_path, dialect):
    words = "document no request that shows images beside given token ids and asks for log-probs of these"
    with closing(StandIn(Imitation(save_model(tmp_path / "text", tokenizer=vlm_tokenizer())))) as server:
        module = module_of(qwen[0], Remote(server.url, dialect=dialect, **QUICK))
        with pytest.raises(ValueError, match=words):
            fit(module, tmp_path, vlm_rows(8))


def test_a_question_that_is_too_large_is_found_before_it_is_sent(qwen):
    with answering(module_of(*qwen, load=False), limit=20_000) as server:
        module = module_of(qwen[0], there(server))
        batch = act(module, vlm_rows(4))
        with pytest.raises(ValueError, match=r"with its images has 0\.\d MiB, and .* takes up to 0.0: raise its --max"):
            module.streams.query("teacher", batch)


# -- what a client may send -------------------------------------------------------------------------------------------


@pytest.fixture
def asked(qwen, server):
    """A good question, as it is sent."""
    module = module_of(qwen[0], there(server))
    batch = act(module, vlm_rows(4)[2:3])  # two images
    (question,) = questions(module, batch, batch.examples, show=True)
    names = {name: getattr(question, name) for name in ("prompt", "actions", "trained")}
    about = {"weights": server.about["weights"], "vocabulary": module.vocabulary, "top_k": 0, "hidden": False}
    return question, {**names, **about, "inputs": packed(question.inputs)}


def with_pixels(change):
    def changed(inputs):
        return packed({**inputs, "pixel_values": change(inputs["pixel_values"])})

    return changed


def with_grid(change):
    def changed(inputs):
        return packed({**inputs, "image_grid_thw": change(inputs["image_grid_thw"])})

    return changed


HOSTILE = {
    "half": (lambda i: packed(i)[: len(packed(i)) // 2], "no file of safetensors in base64"),
    "letters": (lambda i: "ä" * 40, "no file of safetensors in base64"),
    "a list": (lambda i: [1, 2], "no file of safetensors in base64"),
    "a long header": (lambda i: base64.b64encode(b"\xff" * 64).decode(), "no file of safetensors in base64"),
    "other dtype": (with_pixels(lambda p: p.half()), "pixel_values (float16 of 2 dimensions)"),
    "whole numbers": (with_pixels(lambda p: p.long()), "pixel_values (int64 of 2 dimensions)"),
    "more dimensions": (with_pixels(lambda p: p[None]), "float32 of 3 dimensions"),
    "another width": (with_pixels(lambda p: p[:, :-1]), "can't read these inputs"),
    "no pixels": (with_pixels(lambda p: p[:0]), "pixel_values is empty"),
    "NaN": (with_pixels(lambda p: p * torch.nan), "pixel_values holds something that is no number"),
    "fewer patches": (with_pixels(lambda p: p[:-4]), "and there are"),
    "a grid without end": (with_grid(lambda g: g * 10**6), "and there are"),
    "a grid that comes round": (with_grid(lambda g: g.clone().fill_(2**62)), "and there are"),
    "a grid below 0": (with_grid(lambda g: -g), "and there are"),
    "an image too many": (
        lambda i: packed({k: v if k == "mm_token_type_ids" else torch.cat([v, v]) for k, v in i.items()}),
        "can't read these inputs",
    ),
    "an image too few": (
        lambda i: packed(
            i | {"image_grid_thw": i["image_grid_thw"][:1], "pixel_values": i["pixel_values"][: _first(i)]}
        ),
        "can't read these inputs",
    ),
    "types of another prompt": (
        lambda i: packed(i | {"mm_token_type_ids": i["mm_token_type_ids"][:, 1:]}),
        "mm_token_type_ids has the shape",
    ),
    "something else": (lambda i: packed(i | {"past_key_values": torch.zeros(1)}), "past_key_values"),
    "not all": (lambda i: packed({"pixel_values": i["pixel_values"]}), "is shown pixel_values"),
}


def _first(inputs):
    return int(inputs["image_grid_thw"][0].prod())


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_model_could_read_is_refused_and_harms_nobody(server, asked, name):
    question, body = asked
    change, words = HOSTILE[name]
    code, content = post(server.url, "/score", body | {"inputs": change(question.inputs)})
    assert code == 400, content
    assert words in content.decode()
    assert post(server.url, "/score", body)[0] == 200


def test_images_without_their_places_and_places_without_images_are_refused(server, asked):
    question, body = asked
    code, content = post(server.url, "/score", {k: v for k, v in body.items() if k != "inputs"})
    assert (code, b"there are places for images, and none came" in content) == (400, True)
    text, types = [i for i in body["prompt"] if i != 5], question.inputs["mm_token_type_ids"]
    cut = question.inputs | {"mm_token_type_ids": types[:, : len(text)] * 0}
    assert post(server.url, "/score", body | {"prompt": text, "inputs": packed(cut)})[0] == 400
    assert post(server.url, "/score", body)[0] == 200


def test_another_clients_question_is_not_harmed_by_one_in_its_batch(server, asked, monkeypatch):
    """Both wait for the same batch, which the bad one makes fail."""
    question, body = asked
    bad = body | {"inputs": with_pixels(lambda p: p[:, :-1])(question.inputs)}
    assert post(server.url, "/score", bad)[0] == 400
    monkeypatch.setattr(server.scorer, "_form", lambda question: ())  # so that they do
    free, packed_ = threading.Event(), server.scorer._packed

    def held(wish, asked):
        free.wait(20)
        return packed_(wish, asked)

    monkeypatch.setattr(server.scorer, "_packed", held)
    codes = {}
    threads = [
        threading.Thread(target=lambda n, b: codes.update({n: post(server.url, "/score", b)}), args=entry)
        for entry in (("held", body), ("good", body), ("bad", bad), ("other", body))
    ]
    for thread in threads:
        thread.start()
        thread.join(0.3)
    free.set()
    for thread in threads:
        thread.join()
    assert {name: code for name, (code, _) in codes.items()} == {"held": 200, "good": 200, "bad": 400, "other": 200}
    one, other = (load(codes[name][1])["log_probs"] for name in ("held", "good"))
    assert torch.allclose(one, other, atol=1e-5)


def test_images_cost_a_token_too(qwen, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "secret")
    with answering(module_of(*qwen, load=False)) as server:
        body = json.dumps({"inputs": base64.b64encode(save({"pixel_values": torch.zeros(1)})).decode()}).encode()
        for given in ({}, {"Authorization": "Bearer another"}, {"Authorization": "secret"}):
            assert post(server.url, "/score", body, **given)[0] == 401
        module = module_of(qwen[0], there(server))
        told(module, act(module, vlm_rows(2)))
