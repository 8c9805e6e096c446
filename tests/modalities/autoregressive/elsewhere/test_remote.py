"""Teachers that a server answers for: what they teach, and every way in which a server may fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
import time
import urllib.request

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load, save

from opd_lightning.connection import Connection
from opd_lightning.modalities.autoregressive import OtherTokenizer, PromptView, Remote
from opd_lightning.modalities.autoregressive.elsewhere.handshake import same_weights
from opd_lightning.modalities.autoregressive.elsewhere.store import write_whole
from opd_lightning.objective import LogRatio, Objective, PolicyGradient, ReverseKL, Support, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.serving import HELD, check_reach
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Same, Teacher
from tests.modalities.autoregressive.elsewhere.servers import Imitation, Served, answering, post
from tests.processes import FORKS
from tests.raw import raw_server
from tests.tiny import Rows, act, chat_tokenizer, fit, make_module, make_rows, make_trainer, no_teacher

VIEW = PromptView("{{ solution }}?{{ prompt }}")
QUICK = {"timeout": 20.0, "deadline": 20.0}


def k1():
    return Objective([Term(PolicyGradient(LogRatio()))])


def top(k):
    return Objective([Term(ReverseKL(support=Support("teacher", k)))])


def whole():
    return Objective([Term(ReverseKL())])


def here(student, teacher, objective, view=None):
    return make_module(student, {"teacher": Teacher(Frozen(Pretrained(str(teacher))), view)}, objective)


def there(student, url, objective=None, view=None, load=True, **settings):
    teacher = Teacher(Remote(url, **QUICK | settings), view)
    return make_module(student, {"teacher": teacher}, objective or k1(), load=load)


def trained(module, root, **settings):
    fit(module, root, **settings)
    return torch.cat([parameter.detach().flatten() for parameter in module.student.parameters()])


# -- what they teach --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "settings"), [(whole, {"hidden": True}), (lambda: top(4), {"top_k": 4}), (k1, {})]
)
def test_the_served_teacher_teaches_two_clients_at_once_as_the_local_one(
    tiny_student, tiny_teacher, served, tmp_path, objective, settings
):
    expected = trained(here(tiny_student, tiny_teacher, objective(), VIEW), tmp_path / "here", steps=2)
    other = there(tiny_student, served.url, objective(), dialect="opd", **settings)
    rolled, over = act(other, make_rows(8)), threading.Event()

    def second():
        while not over.is_set():
            other.streams.query("teacher", rolled)

    thread = threading.Thread(target=second)
    thread.start()
    try:
        module = there(tiny_student, served.url, objective(), VIEW, dialect="opd", **settings)
        result = trained(module, tmp_path / "there", steps=2)
    finally:
        over.set()
        thread.join()
    assert torch.allclose(result, expected, atol=1e-5)
    assert module.elsewhere["teacher"]["ids"] == "equal in 1 texts"


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_servers_of_others_teach_as_the_local_teacher(
    tiny_student, tiny_teacher, imitation, stand_in, tmp_path, dialect, top_k
):
    objective = top(top_k) if top_k else k1()
    expected = trained(here(tiny_student, tiny_teacher, objective, VIEW), tmp_path / "here")
    module = there(tiny_student, stand_in(imitation).url, objective, VIEW, dialect=dialect, top_k=top_k)
    assert torch.allclose(trained(module, tmp_path / "there"), expected, atol=1e-5)


def test_what_the_student_makes_of_the_known_text_is_told_beside(tiny_student, tiny_teacher, imitation, stand_in):
    url = stand_in(imitation).url
    for student, is_same in ((tiny_teacher, True), (tiny_student, False)):
        told = there(student, url).elsewhere["teacher"]["log-prob of that text"]
        server, own = re.fullmatch(r"(\S+) nats a token, the student's (\S+)", told).groups()
        assert (server == own) == is_same


def test_two_teachers_on_one_server_share_its_connection(tiny_student, imitation, stand_in, tmp_path):
    server, settings = stand_in(imitation), {**QUICK, "at_once": 2}
    views = {"teacher": None, "other": VIEW}

    def both(**others):
        origins = {name: Remote(server.url, **settings) for name in views} | {
            name: Remote(server.url, **settings | change) for name, change in others.items()
        }
        teachers = {name: Teacher(origins[name], view) for name, view in views.items()}
        terms = [Term(PolicyGradient(LogRatio()), teacher=name, coefficient=0.5, name=name) for name in views]
        return make_module(tiny_student, teachers, Objective(terms))

    module = both()
    clients = {id(teacher.weights.client) for teacher in module.teachers.values()}
    assert len(clients) == 1
    fit(module, tmp_path)
    with pytest.raises(ValueError, match=r"teachers\.\w+ and model\.teachers\.\w+ ask .* one connection for both"):
        both(other={"at_once": 3})


def test_answers_that_are_kept_are_asked_for_once(tiny_student, imitation, stand_in, saved, tmp_path):
    server = stand_in(imitation)
    asked = []
    for name in ("one", "two"):
        trained(there(tiny_student, server.url, keep=str(tmp_path / "kept")), tmp_path / name)
        asked.append(server.asked.count("/v1/completions"))
    known = 5 + 1  # of the handshake, and before the generation batch
    assert asked[1] - asked[0] == known < asked[0]
    broken = sorted((tmp_path / "kept").glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:20])
    trained(there(tiny_student, server.url, keep=str(tmp_path / "kept")), tmp_path / "three")
    assert server.asked.count("/v1/completions") - asked[1] == known + 1 + 1, "what is broken is asked for again"
    other = stand_in(Imitation(saved(seed=9, hidden=48, rows=28)))
    with pytest.raises(ValueError, match="kept was filled by other weights"):
        there(tiny_student, other.url, keep=str(tmp_path / "kept"))


# -- what is refused before the first step ----------------------------------------------------------------------------


def test_a_cap_on_the_likeliest_ids_is_found_before_training(tiny_student, imitation, stand_in, tiny_teacher):
    capped = Imitation(tiny_teacher, cap=3)
    with pytest.raises(ValueError, match=r"greater than max allowed: 3.* Lower weights.top_k"):
        there(tiny_student, stand_in(capped).url, top(4), top_k=4)

    def silent(path, body):
        return imitation(path, {**body, "prompt_logprobs": 2} if path == "/v1/completions" else body)

    with pytest.raises(ValueError, match=r"told 2 ids where top_k=4|told 3 ids where top_k=4"):
        there(tiny_student, stand_in(silent).url, top(4), top_k=4)


def changed(imitation, path, change):
    """The imitation, with other answers to one path."""
    return lambda asked, body: change(*imitation(asked, body)) if asked == path else imitation(asked, body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda code, answer: (200, b"<html>busy</html>"), "something that is no JSON"),
        (lambda code, answer: (200, {"choices": [{"text": "four"}]}), r"without prompt_logprobs of \d+ tokens"),
        (lambda code, answer: (200, {"choices": []}), "without choices"),
        (
            lambda code, answer: (200, {"choices": [{"prompt_logprobs": None}]}),
            r"without prompt_logprobs of \d+ tokens",
        ),
        (
            lambda code, answer: (200, {"choices": [{"prompt_logprobs": answer["choices"][0]["prompt_logprobs"][1:]}]}),
            r"without prompt_logprobs of \d+ tokens \(it has \d+\)",
        ),
        (
            lambda code, answer: (200, json.loads(re_keyed(json.dumps(answer)))),
            "told no log-prob of the token",
        ),
        (lambda code, answer: (404, {"error": {"message": "Not Found"}}), "answered 404"),
    ],
)
def test_an_answer_that_lacks_something_is_an_error_and_not_a_zero(tiny_student, imitation, stand_in, change, words):
    server = stand_in(changed(imitation, "/v1/completions", change))
    with pytest.raises(ValueError, match=rf"model\.teachers\.teacher: .*{words}"):
        there(tiny_student, server.url)


def told(value):
    """An answer with another log-prob of each token, made of its own."""

    def change(code, answer):
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            for one in entry.values():
                one["logprob"] = value(one["logprob"])
        return code, answer

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -9999.0, 0.5, True])
def test_what_can_be_no_log_prob_is_an_error(tiny_student, imitation, stand_in, value):
    change = [lambda code, answer: (code, answer)]
    server = stand_in(changed(imitation, "/v1/completions", lambda *answer: change[0](*answer)))
    module = there(tiny_student, server.url)
    rolled = act(module, make_rows(2))
    change[0] = told(lambda own: value)
    words = r"model\.teachers\.teacher: .* of what the student wrote that can be none"
    with pytest.raises(ValueError, match=words):
        module.streams.query("teacher", rolled)
    with pytest.raises(ValueError, match=words):
        there(tiny_student, server.url)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.5])
def test_what_can_be_no_log_prob_is_an_error_of_our_own_server_too(tiny_student, tiny_teacher, monkeypatch, value):
    with answering(make_module(tiny_teacher, tiny_teacher, load=False)) as server:
        origins = Remote(server.url, dialect="opd", **QUICK), Remote(server.url, dialect="opd", hidden=True, **QUICK)
        plain = make_module(tiny_student, {"teacher": Teacher(origins[0])}, k1())
        other = OtherTokenizer(Pretrained(str(tiny_teacher)), server=origins[1])
        batch, modules = act(plain, make_rows(2)), [plain, make_module(tiny_student, {"teacher": Teacher(other)}, k1())]
        packed = server.scorer._packed

        def impossible(wish, asked):
            return [save(load(one) | {"log_probs": load(one)["log_probs"] * 0 + value}) for one in packed(wish, asked)]

        monkeypatch.setattr(server.scorer, "_packed", impossible)
        for module in modules:
            with pytest.raises(
                ValueError, match=r"model\.teachers\.teacher: .* of what the student wrote that can be none"
            ):
                module.streams.query("teacher", batch)


def test_a_server_that_finds_everything_certain_is_refused(tiny_student, imitation, stand_in):
    server = stand_in(changed(imitation, "/v1/completions", told(lambda own: 0.0)))
    with pytest.raises(ValueError, match=r"finds every token of .* certain \(0 nats\)"):
        there(tiny_student, server.url)


def re_keyed(answer: str) -> str:
    """The same with ids that nobody asked about."""
    for digit in range(10):
        answer = answer.replace(f'"{digit}": {{', f'"10{digit}": {{')
    return answer


def test_log_probs_of_other_tokens_are_refused(tiny_student, imitation, stand_in):
    def shifted(code, answer):
        told = answer["meta_info"]["input_token_logprobs"]
        answer["meta_info"]["input_token_logprobs"] = [[value, token + 1, None] for value, token, _ in told]
        return code, answer

    with pytest.raises(ValueError, match="of the tokens that it was asked about"):
        there(tiny_student, stand_in(changed(imitation, "/generate", shifted)).url, dialect="sglang")


def test_another_tokenizer_is_found_id_by_id(tiny_student, imitation, stand_in):
    server = stand_in(
        changed(imitation, "/tokenize", lambda code, answer: (200, {"tokens": [*answer["tokens"][:3], 9]}))
    )
    with pytest.raises(ValueError, match=r"another tokenizer than the student: .* differ from place 3 on"):
        there(tiny_student, server.url)


def test_a_server_that_contradicts_itself_is_refused(tiny_student, imitation, stand_in):
    noise = iter(range(1000))

    def noisy(code, answer):
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            for told in entry.values():
                told["logprob"] -= 0.1 * next(noise)
        return code, answer

    with pytest.raises(ValueError, match=r"scores the same text differently each time: .* more than"):
        there(tiny_student, stand_in(changed(imitation, "/v1/completions", noisy)).url)


# -- what happens on the way ------------------------------------------------------------------------------------------


def test_one_that_is_busy_is_asked_again(tiny_student, imitation, stand_in):
    failures = iter([503, 429])

    def busy(code, answer):
        return (failed, {"error": "busy"}) if (failed := next(failures, None)) else (code, answer)

    there(tiny_student, stand_in(changed(imitation, "/v1/completions", busy)).url)
    assert next(failures, None) is None


def test_one_that_hangs_is_waited_for_until_the_deadline(tiny_student, imitation, stand_in):
    def hang(code, answer):
        time.sleep(3)
        return code, answer

    server, start = stand_in(changed(imitation, "/v1/models", hang)), time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 1 s and \d+ tries, of up to 0.3 s each: .*timed out"):
        there(tiny_student, server.url, timeout=0.3, deadline=1.0)
    assert time.monotonic() - start < 3


def test_one_that_is_not_there_is_named(tiny_student, stand_in, imitation):
    server = stand_in(imitation)
    server.close()
    with pytest.raises(ConnectionError, match=rf"{server.url}/v1/models: .*refused"):
        there(tiny_student, server.url, deadline=0.5)


def test_a_run_waits_for_one_that_was_killed_and_is_started_again(tiny_student, tiny_teacher, saved, config, tmp_path):
    server = Served(config(tiny_teacher))
    port = server.url.rpartition(":")[2]
    try:
        module = there(tiny_student, server.url, dialect="opd", deadline=120.0)
        rolled = act(module, make_rows(4))
        before = module.streams.query("teacher", rolled).distribution.log_probs
        server.kill()
        thread = threading.Timer(0.2, lambda: again.append(Served(config(tiny_teacher), port=int(port))))
        again = []
        thread.start()
        after = module.streams.query("teacher", rolled).distribution.log_probs
        assert torch.allclose(after, before, atol=1e-5), "other questions may share a batch"
        thread.join()
        again[0].kill()
        server = Served(config(saved(seed=9, hidden=48, rows=28)), port=int(port))
        with pytest.raises(ValueError, match=r"answered 409: .*these are other weights than before"):
            module.streams.query("teacher", rolled)
    finally:
        server.kill()


def test_other_weights_are_noticed_where_the_server_does_not_say(tiny_student, imitation, stand_in, saved):
    answering = [imitation]
    module = there(tiny_student, stand_in(lambda path, body: answering[0](path, body)).url)
    rolled = act(module, make_rows(4))
    module.streams.ahead({"teacher"}, rolled)
    answering[0] = Imitation(saved(seed=9, hidden=48, rows=28))
    with pytest.raises(ValueError, match="was it restarted with other weights"):
        module.streams.ahead({"teacher"}, rolled)


def test_a_run_goes_on_with_the_weights_that_it_had_though_the_server_says_nothing_of_them(
    tiny_student, imitation, stand_in, saved, tmp_path
):
    answering = [imitation]
    url = stand_in(lambda path, body: answering[0](path, body)).url
    checkpoint = tmp_path / "last.ckpt"
    fit(there(tiny_student, url), tmp_path / "run").save_checkpoint(checkpoint)

    def go_on():
        module, trainer = there(tiny_student, url), make_trainer(tmp_path / "again", steps=2)
        trainer.fit(module, datamodule=Rows(make_rows()), ckpt_path=checkpoint, weights_only=True)
        return trainer

    assert go_on().global_step == 2
    answering[0] = Imitation(saved(seed=9, hidden=48, rows=28))
    with pytest.raises(ValueError, match="the checkpoint was trained with the weights unknown:"):
        go_on()


class Faulty:
    """Answers as another one does; after ``left`` questions with a fault."""

    def __init__(self, answer, fault=None):
        self.answer, self.fault, self.left, self.asked = answer, fault, math.inf, []

    def __call__(self, path, body):
        if path == "/v1/completions":
            self.asked.append(tuple(body["prompt"]))
            if len(self.asked) > self.left:
                return self.fault(path, body)
        return self.answer(path, body)


FAULTS = {
    "killed": (ConnectionError, "no answer within 4 s"),
    "hung": (ConnectionError, "no answer within 4 s and .* timed out"),
    "rubbish": (ValueError, "something that is no JSON"),
    "capped": (ValueError, "greater than max allowed"),
    "other weights": (ValueError, "was it restarted with other weights"),
    "another tokenizer": (ValueError, "was it restarted with other weights|is no token id|answered"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_that_a_server_ended_goes_on_bit_for_bit_with_the_answers_that_it_had(
    tiny_student, tiny_teacher, saved, stand_in, tmp_path, kind
):
    """In the middle of a generation batch; what it had is not asked for again, and what others said is not kept."""
    alone = Imitation(tiny_teacher, batch_tokens=1)  # so that an answer does not depend on what else is asked

    def run(url, name, steps, **settings):
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_last=True)
        trainer = make_trainer(tmp_path, steps, callbacks=[saving], enable_checkpointing=True)
        limits = {"timeout": 3.0, "deadline": 4.0} if kind in ("killed", "hung") else QUICK
        module = there(tiny_student, url, keep=str(tmp_path / f"kept-{name}"), at_once=2, **limits)
        trainer.fit(module, datamodule=Rows(make_rows()), **settings)
        return torch.cat([p.detach().flatten() for p in module.student.parameters()])

    def kept(name):
        return {path.name for path in (tmp_path / f"kept-{name}").glob("*.safetensors")}

    # 1. nothing happens
    healthy = Faulty(alone)
    expected = run(stand_in(healthy).url, "whole", 4)
    # 2. in the third generation batch of 8 something does
    others = {
        "other weights": {"seed": 9, "hidden": 48, "rows": 28},
        "another tokenizer": {"tokenizer": chat_tokenizer()},
    }
    other = Imitation(saved(**others[kind])) if kind in others else alone
    faulty = Faulty(alone)
    server = stand_in(faulty)

    def killed(path, body):
        server.close()
        raise ConnectionAbortedError

    faulty.fault = {
        "killed": killed,
        "hung": lambda path, body: time.sleep(5) or alone(path, body),
        "rubbish": lambda path, body: (200, b"<html>be right back</html>"),
        "capped": lambda path, body: alone(path, {**body, "prompt_logprobs": 21}),
    }.get(kind, other)
    faulty.left = 5 + 2 * (1 + 8 + 1) + 1 + 4
    error, words = FAULTS[kind]
    with pytest.raises(error, match=words):
        run(server.url, "cut", 4)
    assert kept("cut") < kept("whole")
    assert len(kept("cut")) >= 16
    # 3. it goes on with another one
    mended, had = Faulty(alone), len(kept("cut"))
    result = run(stand_in(mended).url, "cut", 4, ckpt_path=tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert torch.equal(result, expected)
    assert kept("cut") == kept("whole")
    known = mended.asked[0]
    assert sum(asked != known for asked in mended.asked) == len(kept("whole")) - had


@pytest.mark.parametrize(
    ("now", "before", "same"),
    [
        ("unknown:-1.5000,-2.0000", "unknown:-1.4996,-2.0004", True),
        ("unknown:-1.5000,-2.0000", "unknown:-1.5000,-2.1000", False),
        ("unknown:-1.5000", "unknown:-1.5000,-2.1000", False),
        ("unknown:-1.5000", "unknown", True),  # of a run that knew nothing yet
        ("unknown:-1.5000", "0123abcd", False),
        ("0123abcd", "0123abcd", True),
    ],
)
def test_fingerprints_of_weights_that_a_server_does_not_tell_apart(now, before, same):
    assert same_weights(now, before, 0.05) == same
    assert same_weights(before, now, 0.05) == same


def test_the_token_comes_from_the_environment(tiny_student, imitation, stand_in, monkeypatch):
    server = stand_in(imitation)
    monkeypatch.setenv("MY_TOKEN", "secret")
    module = there(tiny_student, server.url, token="MY_TOKEN")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in repr(vars(module.teachers["teacher"].weights))
    refusing = stand_in(lambda path, body: (401, {"error": "who are you?"}))
    with pytest.raises(ValueError, match="set the environment variable MY_TOKEN"):
        there(tiny_student, refusing.url, token="MY_TOKEN")


def test_an_answer_that_breaks_off_is_asked_for_again():
    half, whole = (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + content for content in (b"{", b"{}"))
    assert Connection(raw_server(half, whole), "NO_TOKEN", timeout=20.0, deadline=20.0).ask_json("/about") == {}


def test_the_token_goes_nowhere_else(stand_in, monkeypatch):
    other = stand_in(lambda path, body: (200, {}))
    monkeypatch.setenv("MY_TOKEN", "secret")
    url = raw_server(f"HTTP/1.1 302 Found\r\nLocation: {other.url}/about\r\nContent-Length: 0\r\n\r\n".encode())
    with pytest.raises(ValueError, match="answered 302"):
        Connection(url, "MY_TOKEN", timeout=20.0, deadline=20.0).ask("/about")
    assert not other.asked


def test_ranks_may_fill_the_same_folder_at_once(tmp_path, monkeypatch):
    replace = os.replace

    def another_rank_is_faster(partial, path):
        monkeypatch.setattr(os, "replace", replace)
        process = FORKS.Process(target=write_whole, args=(path, "[0.0]"))
        process.start()
        process.join()
        replace(partial, path)

    monkeypatch.setattr(os, "replace", another_rank_is_faster)
    write_whole(tmp_path / "known.json", "[0.0]")
    assert [path.name for path in tmp_path.iterdir()] == ["known.json"]


# -- what the server refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "have to hold something"),
        ({"prompt": [1, 10**6]}, "1000000 is no token id"),
        ({"prompt": [1] * 300}, "302 tokens are more than the context of 256"),
        ({"trained": [1, 0]}, "rising places"),
        ({"top_k": 101}, "this server tells up to"),
        ({"vocabulary": 10**6}, "this teacher knows"),
        ({"weights": "others"}, "other weights"),
        ({"actions": None}, "not iterable"),
    ],
)
def test_the_server_says_what_is_wrong(served, changes, words):
    about = json.loads(urllib.request.urlopen(f"{served.url}/about", timeout=20).read())
    body = {"prompt": [1, 2], "actions": [3, 4], "trained": [0, 1], "top_k": 0, "hidden": False}
    body |= {"weights": about["weights"], "vocabulary": about["vocabulary"]}
    assert post(served.url, "/score", body)[0] == 200
    code, text = post(served.url, "/score", body | changes)
    assert code in (400, 409)
    assert words in text.decode()


def test_the_server_bounds_requests_and_wants_its_token(tiny_teacher, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "secret")
    with answering(make_module(tiny_teacher, tiny_teacher), limit=100, waiting=1, top_k=5) as server:
        url, bearer = server.url, {"Authorization": "Bearer secret"}
        assert post(url, "/tokenize", {"prompt": "1+1"})[0] == 401
        assert post(url, "/tokenize", {"prompt": "1+1"}, **bearer)[0] == 200
        assert post(url, "/tokenize", {"prompt": "1" * 100}, **bearer)[0] == 413
        assert post(url, "/tokenize", b"[1]", **bearer)[0] == 400
        assert post(url, "/elsewhere", {}, **bearer)[0] == 404
        server.limit, question = 1000, {"prompt": [1], "actions": [2], "trained": [0], "top_k": 0, "hidden": False}
        question |= {"weights": server.about["weights"], "vocabulary": server.about["vocabulary"]}
        with server.room:  # as if another question waited
            assert post(url, "/score", question, **bearer)[0] == 503
        assert post(url, "/score", question, **bearer)[0] == 200


def test_bodies_that_are_in_memory_at_once_are_bounded(tiny_teacher):
    with answering(make_module(tiny_teacher, tiny_teacher, load=False), limit=1000) as server:

        def is_free():
            """What was answered is held no more, a moment later."""
            return any(server.hold(HELD * 1000) or time.sleep(0.05) for _ in range(100))

        assert post(server.url, "/tokenize", {"prompt": "1+1"})[0] == 200
        assert is_free()
        assert post(server.url, "/tokenize", {"prompt": "1+1"})[0] == 503
        server.hold(-HELD * 1000)
        assert post(server.url, "/tokenize", b"{")[0] == 400
        assert post(server.url, "/tokenize", {"prompt": "1+1"})[0] == 200
        assert is_free()


@pytest.mark.parametrize("name", ["frozen", "initial", "same", "other"])
def test_any_teacher_that_stands_still_is_served(tiny_student, tiny_teacher, saved, name):
    """By its name in the configuration of the run that asks."""
    frozen = Frozen(Pretrained(str(tiny_teacher)))
    teachers = {
        "frozen": Teacher(frozen),
        "initial": Teacher(Initial()),
        "same": Teacher(Same("frozen"), VIEW),
        "other": Teacher(OtherTokenizer(Pretrained(str(tiny_teacher)))),
        "live": Teacher(Live()),
        "average": Teacher(EMA()),
        "shared": Teacher(Same("average")),
    }
    student = Pretrained(str(tiny_student), lora=Lora(r=2), gradient_checkpointing=True)

    def module():
        return make_module(student, dict(teachers), no_teacher(), load=False)

    here = make_module(tiny_student, {"teacher": teachers[name]} if name == "initial" else tiny_teacher, k1())
    batch = act(here, make_rows(4))
    expected = here.streams.query("teacher", batch).distribution
    with answering(module(), name=name) as server:
        told = there(tiny_student, server.url, dialect="opd", hidden=True).streams.query("teacher", batch).distribution
    assert torch.allclose(told.hidden[batch.mask], expected.hidden[batch.mask], atol=1e-5)
    for moving in ("live", "average", "shared", "nobody"):
        with (
            pytest.raises(ValueError, match="what is served is a model that stands still"),
            answering(module(), name=moving),
        ):
            pass


def test_other_machines_are_not_let_in_without_a_token(monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    check_reach("127.0.0.1", "OPD_TEACHER_TOKEN")
    with pytest.raises(ValueError, match="set the environment variable OPD_TEACHER_TOKEN"):
        check_reach("0.0.0.0", "OPD_TEACHER_TOKEN")
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "secret")
    check_reach("0.0.0.0", "OPD_TEACHER_TOKEN")


def test_a_model_whose_head_is_another_one_is_not_served(tiny_teacher, monkeypatch):
    module = make_module(tiny_teacher, tiny_teacher)
    head = type(module).head
    monkeypatch.setattr(type(module), "head", lambda self, policy: dataclasses.replace(head(self, policy), scale=2.0))
    with pytest.raises(ValueError, match=r"its logits are not head\(hidden states\)"), answering(module):
        pass
