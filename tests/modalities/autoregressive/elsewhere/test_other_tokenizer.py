"""A teacher of another tokenizer, over tokenizers of five families, against a dense float64 reference."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

from opd_lightning.methods.cross_tokenizer import ULD, HybridULD
from opd_lightning.modalities.autoregressive import Cached, OtherTokenizer, PromptView, Remote
from opd_lightning.modalities.autoregressive.elsewhere.alignment import Chunk
from opd_lightning.modalities.autoregressive.elsewhere.other_tokenizer import later, projected
from opd_lightning.modalities.autoregressive.elsewhere.score import Recorder
from opd_lightning.objective import LogRatio, Objective, PolicyGradient, ReverseKL, Support, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher
from opd_lightning.trajectory import Trajectories
from tests.families import NAMES, SENTENCES, family
from tests.modalities.autoregressive.elsewhere.servers import Imitation, answering
from tests.tiny import Rows, act, fit, log_softmax, make_module, make_trainer, save_model

PAIRS = [*product(NAMES, NAMES)]
CHATS = [{"prompt": [{"role": "user", "content": f"what is {i} + {i}?"}], "solution": str(2 * i)} for i in range(8)]
ANSWERS = ("the answer is 42", "naïve café 🙂", " 7 + 8", "日本語", "1234 + 5678 = 6912, and", "The  fox\n")


def barrier() -> Objective:
    """The objective of Breaking the Tokenizer Barrier."""
    return Objective([Term(PolicyGradient(LogRatio(against="behavior")))])


@pytest.fixture
def folder(saved):
    """A model of a family: always the same one."""
    return lambda name, seed=1: saved(tokenizer=family(name), seed=seed)


def module_of(student, teacher, objective=None, view=None, **settings):
    options = {name: settings.pop(name) for name in ("where", "own_template", "pairs") if name in settings}
    pairs = {"pairs": options.pop("pairs")} if "pairs" in options else {}
    weights = OtherTokenizer(Pretrained(str(teacher)), **pairs)
    return make_module(student, {"teacher": Teacher(weights, view, **options)}, objective or barrier(), **settings)


def wrote(module, texts=ANSWERS, stopped=True, rows=CHATS):
    """Trajectories of a student that wrote these texts, with drawn log-probs of acting."""
    tokenizer, eos = module.tokenizer(), module.eos[0]
    rows = [rows[i % len(rows)] for i in range(len(texts))]
    written = [module.renderer(module.policies["student"]).continuation("\n", text) + [eos] * stopped for text in texts]
    width = max(map(len, written))
    actions = torch.full((len(texts), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros(actions.shape, dtype=torch.bool)
    for place, ids in enumerate(written):
        actions[place, : len(ids)], mask[place, : len(ids)] = torch.tensor(ids), True
    drawn = -torch.rand(actions.shape, generator=torch.Generator().manual_seed(0)) * 3
    whole = torch.full((len(texts),), stopped)
    return Trajectories(module.collate(rows, module.policies["student"]), actions, mask, list(rows), whole, drawn)


def told(module, batch):
    teacher = module.teachers["teacher"]
    views = module.streams.seen("teacher", batch.examples, batch.student_view)
    return teacher.weights.say(teacher, module, batch, views)


def borders(tokenizer, ids):
    """The text behind each token, by decoding all up to it; what is split within a character has no border."""
    whole = tokenizer.decode(ids)
    texts = [tokenizer.decode(ids[:stop]) for stop in range(1, len(ids) + 1)]
    return whole, [len(text) if whole.startswith(text) and "\ufffd" not in text else None for text in texts]


def reference(module, batch):
    """log q of each step, in float64: chunks by where decoded texts agree, logits of the whole vocabulary."""
    policy = module.teachers["teacher"].weights.policy
    model, tokenizer, student = copy.deepcopy(policy.model).double(), policy.processor, module.tokenizer()
    values = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
    for row, example in enumerate(batch.examples):
        ids = batch.actions[row][batch.mask[row]].tolist()
        is_whole = ids[-1] in module.eos
        text, mine = borders(student, ids[:-1] if is_whole else ids)
        chat = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
        before = tokenizer("\n", add_special_tokens=False)["input_ids"]
        space = "" if "im_start" in chat or text.startswith(" ") else " "
        answer = tokenizer("\n" + space + text, add_special_tokens=False)["input_ids"][len(before) :]
        lengths = [len(tokenizer.decode(before + answer[: stop + 1])) - 1 for stop in range(len(answer))]
        whole = tokenizer.decode(before + answer)
        texts = [tokenizer.decode(before + answer[: stop + 1]) for stop in range(len(answer))]
        theirs = [
            n - len(space) if whole.startswith(t) and "\ufffd" not in t else None
            for n, t in zip(lengths, texts, strict=True)
        ]
        answer += [tokenizer.eos_token_id] * is_whole
        mine, theirs = mine + [len(text) + 1] * is_whole, theirs + [len(text) + 1] * is_whole
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, :, : len(tokenizer)]
        log_q = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]
        # a token of the template's space alone is context
        start, other = 0, sum(end is not None and end <= 0 for end in theirs[: len(answer) - is_whole])
        for cut in sorted(({*mine} & {*theirs}) - {None, 0}):
            stop, end = (len(side) - side[::-1].index(cut) for side in (mine, theirs))
            p = batch.behavior_log_probs[row, start:stop].double()
            values[row, start:stop] = log_q[other:end].sum() * p / p.sum()
            start, other = stop, end
    return values


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize(("student", "teacher"), [p for p in PAIRS if "word_piece" not in p and p[0] != p[1]])
def test_log_probs_are_those_of_a_dense_reference(folder, student, teacher, stopped):
    module = module_of(folder(student), folder(teacher, seed=2))
    texts = ANSWERS if "characters" not in (student, teacher) else [text for text in ANSWERS if text.isascii()]
    batch = wrote(module, texts, stopped)
    own, expected = told(module, batch), reference(module, batch)
    known = ~expected.isnan()
    assert known.sum() > 0.5 * batch.mask.sum()
    # a character is cut between its bytes by the module alone: those chunks are finer than the reference's
    cut = torch.tensor([text.isascii() for text in texts])[:, None] & known
    assert torch.allclose(own.log_probs.double()[cut], expected[cut], atol=2e-5)
    per_row = [torch.where(known, v, 0.0).sum(1) for v in (own.log_probs.double(), expected)]
    assert torch.allclose(*per_row, atol=1e-4), "what is split finer adds up to the same"


@pytest.mark.parametrize("is_student", [True, False])
def test_log_probs_beside_a_tokenizer_that_nobody_here_made(folder, saved, smollm2_folder, is_student):
    """SmolLM2's 49,152 tokens, with its own chat template."""
    real = saved(tokenizer=AutoTokenizer.from_pretrained(smollm2_folder), seed=4)
    module = module_of(real, folder("unigram", seed=2)) if is_student else module_of(folder("unigram"), real)
    texts = [text for text in ANSWERS if text.isascii()]
    batch = wrote(module, texts)
    own, expected = told(module, batch), reference(module, batch)
    known = ~expected.isnan()
    assert known.sum() > 0.5 * batch.mask.sum()
    assert torch.allclose(own.log_probs.double()[known], expected[known], atol=2e-5)


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if "word_piece" in pair])
def test_a_tokenizer_that_changes_what_it_reads(folder, student, teacher):
    module = module_of(folder(student), folder(teacher, seed=2))
    texts = ("the answer is 42", "again, and again.", "7 + 8")
    batch = wrote(module, texts)
    own = told(module, batch)
    moved = (own.log_probs - batch.behavior_log_probs)[batch.mask]
    assert own.paired[:, 0].all(), "the first tokens begin together"
    assert moved.abs().gt(1e-6).float().mean() > 0.9, "it judges what it knows"
    unknown = told(module, wrote(module, ["ﬁ Ω≈ç√"] if student != "word_piece" else ["42"]))
    assert unknown.log_probs.isfinite().all()


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_equal_tokenizers_teach_as_the_plain_teacher_does_bit_for_bit(folder, name, tmp_path):
    students = []
    for weights in (Frozen, OtherTokenizer):
        teacher = Teacher(weights(Pretrained(str(folder(name, 2)))))
        module = make_module(folder(name), {"teacher": teacher}, barrier(), rollout=Rollout(batch_size=4, horizon=6))
        fit(module, tmp_path, CHATS, steps=2)
        students.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    assert torch.equal(*students)


def test_pairs_are_not_rounded_in_half_precision(folder):
    """Under bf16-true new tensors are of that type unless they say otherwise; log-probs stay float32."""
    module = module_of(folder(NAMES[0]), folder(NAMES[1], seed=2))
    batch = wrote(module)
    expected = told(module, batch)
    torch.set_default_dtype(torch.bfloat16)
    try:
        own = told(module, batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(own.log_probs, expected.log_probs)
    assert torch.equal(own.rest, expected.rest)


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokenizers_give_the_plain_log_probs(folder, name):
    module = module_of(folder(name), folder(name, seed=2))
    plain = make_module(folder(name), folder(name, seed=2), barrier())
    batch = act(module, CHATS, horizon=12)
    expected = log_softmax(plain, "teacher", batch).gather(-1, batch.actions[..., None]).squeeze(-1)
    own = told(module, batch)
    assert torch.allclose(own.log_probs[batch.mask], expected[batch.mask], atol=1e-5)
    assert torch.equal(own.paired, batch.mask)
    assert not own.rest.any()


def test_log_probs_of_a_chunk_are_shared_out():
    cut = [Chunk(0, 2, 0, 1), Chunk(2, 3, 1, 3), Chunk(3, 5, 3, 4), Chunk(5, 7, 4, 5)]
    acted = torch.tensor([-1.0, -3.0, -0.5, 0.0, 0.0, torch.nan, torch.nan])
    said = torch.tensor([-2.0, -0.3, -0.4, -6.0, -8.0])
    steps, values = projected(cut, acted, said)
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    expected = [-0.5, -1.5, -0.7, -3.0, -3.0, -4.0, -4.0]  # L_T·p/L_S; one of one; in equal parts
    assert torch.allclose(values, torch.tensor(expected, dtype=torch.float64))
    rest = [[-3.0, 0.0], [0.0, -0.4], [0.0, 0.0]]
    assert torch.allclose(later(cut[:3], acted, said), torch.tensor(rest))
    assert later(cut[3:], acted, said)[0, 0].isnan(), "nobody knows it"


def test_advantages_of_a_chunk_add_up_to_the_difference(folder):
    module = module_of(folder("bpe"), folder("byte_level", seed=2))
    batch = wrote(module, ["the answer is 42"])
    advantage = torch.where(batch.mask, told(module, batch).log_probs - batch.behavior_log_probs, 0.0)
    plain = told(module, dataclass_with(batch, behavior_log_probs=torch.full(batch.mask.shape, -1.0)))
    total = torch.where(batch.mask, plain.log_probs, 0.0).sum()
    own = torch.where(batch.mask, batch.behavior_log_probs, 0.0).sum()
    assert torch.isclose(advantage.sum(), total - own, atol=1e-4), "however log-probs are shared out"


def dataclass_with(batch, **changes):
    changed = copy.copy(batch)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def test_the_ends_of_answers_are_compared(folder):
    """Stop tokens are others on both sides, and one side begins its prompts with a token that the other has not."""
    module = module_of(folder("byte_level"), folder("bpe", seed=2))
    batch = wrote(module, ["the answer is 42", ""])
    assert batch.actions[1, 0] == module.eos[0], "the second one says nothing"
    own, expected = told(module, batch), reference(module, batch)
    last = batch.mask.sum(1) - 1
    rows = torch.arange(2)
    assert torch.allclose(own.log_probs[rows, last].double(), expected[rows, last], atol=1e-5)
    assert own.paired[rows, last].all()


def test_an_unfinished_character_at_the_horizon_is_not_judged(folder):
    module = module_of(folder("characters"), folder("bpe", seed=2))
    batch = wrote(module, ["42 🙂"], stopped=False)
    cut = dataclass_with(batch, mask=batch.mask & (torch.arange(batch.mask.shape[1]) < 5))
    own = told(module, cut)
    moved = own.log_probs != batch.behavior_log_probs
    assert moved[0, :3].all()
    assert not moved[0, 3:].any(), "its first bytes, and what was not written"
    whole = told(module, batch)
    assert (whole.log_probs != batch.behavior_log_probs).all()


def test_what_a_context_has_no_room_for_is_not_judged(folder, saved):
    short = saved(tokenizer=family("characters"), seed=3, max_position_embeddings=80)
    module = module_of(folder("byte_level"), short)
    batch = wrote(module, [SENTENCES[0]])
    with pytest.warns(UserWarning, match="longer than its context of 80; what is beyond is not judged"):
        own = told(module, batch)
    moved = (own.log_probs != batch.behavior_log_probs)[0]
    count = int(moved.sum())
    assert 0 < count < len(moved)
    assert moved[:count].all()


def test_its_prompt_is_its_own_templates_with_its_view(folder):
    view = PromptView("{{ solution }}! {{ prompt }}")
    rows = [{"prompt": f"what is {i} + {i}?", "solution": str(2 * i)} for i in range(3)]
    module = module_of(folder("byte_level"), folder("bpe", seed=2), view=view)
    readings = dict(module.readings(rows[2]))
    assert "<|im_start|>user" in readings["student reads"]
    assert "[INST] 4! what is 2 + 2? [/INST]" in readings["teacher reads"]
    batch = wrote(module, ["42"], rows=rows[2:])
    chats = [{"prompt": [{"role": "user", "content": "4! what is 2 + 2?"}]}]
    expected = reference(module, dataclass_with(batch, examples=chats))
    assert torch.allclose(told(module, batch).log_probs.double()[batch.mask], expected[batch.mask], atol=1e-5)


def test_raw_prompts_keep_the_space_that_the_student_wrote(tmp_path):
    names = ("bpe", "byte_level")
    module = module_of(*(save_model(tmp_path / name, tokenizer=family(name, template=False)) for name in names))
    rows = [{"prompt": "what is 7 + 8 ="}]
    batch = wrote(module, [" 42"], rows=rows)
    weights = module.teachers["teacher"].weights
    ids = batch.actions[0][batch.mask[0]].tolist()
    written = weights._rewritten(module.teachers["teacher"], module, rows[0], rows[0], ids)
    assert module.tokenizer(weights.policy).decode(written.ids[:-1]) == " 42"


def test_it_trains_and_the_log_has_what_is_known(folder, tmp_path):
    teachers = {"teacher": Teacher(OtherTokenizer(Pretrained(str(folder("unigram", 2)))), where={"task": "even"})}
    module = make_module(folder("byte_level"), teachers, barrier())
    rows = [row | {"task": "even" if i % 2 else "odd"} for i, row in enumerate(CHATS)]
    before = [p.detach().clone() for p in module.student.parameters()]
    trainer = fit(module, tmp_path, rows, steps=2)
    assert trainer.callback_metrics["train/teacher/kl_sampled"] != 0
    assert not all(torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True))


def test_a_divergence_of_the_sampled_token_reads_it(folder, tmp_path):
    objective = Objective([Term(ReverseKL(support=Support("sampled")))])
    fit(module_of(folder("byte_level"), folder("bpe", 2), objective), tmp_path, CHATS)


def test_refusals(folder, tmp_path):
    student, other = folder("byte_level"), folder("bpe", 2)
    with pytest.raises(ValueError, match="make its weights OtherTokenizer instead of Frozen, which reads the text"):
        make_module(student, other).audit_rows()
    with pytest.raises(ValueError, match=r"needs the whole distribution of model\.teachers\.teacher"):
        module_of(student, other, Objective([Term(ReverseKL())]), load=False)
    with pytest.raises(ValueError, match="pairs is text or position, not 'bytes'"):
        OtherTokenizer(Pretrained("x"), pairs="bytes")
    acting = Rollout(behavior={"student": 0.5, "teacher": 0.5})
    with pytest.raises(ValueError, match="reads and writes other tokens than the student's, so it can't act"):
        fit(module_of(student, other, load=False, rollout=acting), tmp_path, CHATS)


def test_completions_that_nobody_acted_are_refused_by_name(folder, tmp_path):
    terms = [Term(PolicyGradient(LogRatio(), clip=None, ratio="none"))]
    given = Rollout(batch_size=4, behavior={"dataset": 1.0, "student": 0.0})
    rows = [row | {"completion": "42"} for row in CHATS]
    module = module_of(folder("byte_level"), folder("bpe", 2), Objective(terms), rollout=given, load=False)
    with pytest.raises(
        ValueError, match="PolicyGradient needs 'behavior': dataset completions have no behavior log-probs"
    ):
        fit(module, tmp_path, rows)


def test_an_answer_of_several_turns_is_refused(folder):
    module = module_of(folder("byte_level"), folder("bpe", 2))
    batch = wrote(module, ["the answer is 42"])
    batch.actions[0, 2] = module.eos[0]
    with pytest.raises(ValueError, match="OtherTokenizer reads answers of one turn"):
        told(module, batch)


# -- behind a URL -----------------------------------------------------------------------------------------------------


def served(student, teacher, url, objective=None, dialect="opd", pairs="text", load=True, **settings):
    remote = Remote(url, **{"dialect": dialect, "timeout": 20.0, "deadline": 20.0} | settings)
    weights = OtherTokenizer(Pretrained(str(teacher)), pairs, remote)
    return make_module(student, {"teacher": Teacher(weights)}, objective or barrier(), load=load)


@pytest.fixture
def without_weights(tmp_path):
    """A copy of a model folder that holds configuration and tokenizer alone."""

    def copied(path):
        return shutil.copytree(path, tmp_path / "outline", ignore=shutil.ignore_patterns("*.safetensors"))

    return copied


@pytest.mark.parametrize(("student", "teacher"), [("byte_level", "bpe"), ("unigram", "characters"), ("bpe", "bpe")])
def test_behind_a_url_it_tells_what_it_tells_here(folder, student, teacher, without_weights):
    here = module_of(folder(student), folder(teacher, seed=2))
    texts = ANSWERS if "characters" not in (student, teacher) else [text for text in ANSWERS if text.isascii()]
    batch, model = wrote(here, texts), folder(teacher, seed=2)
    expected, outline = told(here, batch), without_weights(model)
    with answering(make_module(model, model, load=False)) as server:
        alone = told(served(folder(student), outline, server.url), batch)
        whole = told(served(folder(student), outline, server.url, hidden=True), batch)
    assert torch.allclose(alone.log_probs, expected.log_probs, atol=1e-5)
    assert not hasattr(alone, "own"), "what is not told is not there"
    for name in ("log_probs", "rest"):
        assert torch.allclose(getattr(whole, name), getattr(expected, name), atol=1e-5)
    assert torch.equal(whole.paired, expected.paired)
    assert torch.equal(whole.matched, expected.matched)
    assert torch.allclose(whole.own.hidden[whole.paired], expected.own.hidden[expected.paired], atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "settings", "pairs"),
    [
        (barrier, {}, "text"),
        (barrier, {"dialect": "vllm"}, "text"),
        (lambda: Objective([Term(HybridULD())]), {"hidden": True}, "text"),
        (lambda: Objective([Term(ULD())]), {"hidden": True}, "position"),
    ],
)
def test_behind_a_url_it_teaches_as_it_does_here(folder, tmp_path, stand_in, objective, settings, pairs):
    student, teacher = folder("byte_level"), folder("bpe", seed=2)
    with answering(make_module(teacher, teacher, load=False)) as server:
        url = stand_in(Imitation(teacher)).url if settings.get("dialect") == "vllm" else server.url
        students = []
        for module in (
            module_of(student, teacher, objective(), pairs=pairs),
            served(student, teacher, url, objective(), pairs=pairs, **settings),
        ):
            fit(module, tmp_path, CHATS, steps=2)
            students.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    assert torch.allclose(*students, atol=1e-5)


def test_the_server_has_to_read_as_the_teachers_tokenizer_does(folder, stand_in):
    other = stand_in(Imitation(folder("unigram", 3)))
    with pytest.raises(ValueError, match=r"has another tokenizer than .*: .* has the ids"):
        served(folder("byte_level"), folder("bpe", 2), other.url, dialect="vllm")


@pytest.mark.parametrize("signal", [ULD, HybridULD])
def test_what_a_server_does_not_tell_of_another_vocabulary_is_refused(folder, signal):
    objective = Objective([Term(signal())])
    with pytest.raises(ValueError, match=r"tells log-probs of the text alone; `opd serve-teacher` tells hidden states"):
        served(folder("byte_level"), folder("bpe", 2), "http://localhost:1", objective, load=False)
    with pytest.raises(ValueError, match=r"server.top_k=4: likeliest ids of another vocabulary are read by nothing"):
        served(folder("byte_level"), folder("bpe", 2), "http://localhost:1", top_k=4)


def test_a_context_that_is_shorter_there_is_known_here(folder, stand_in):
    imitation = Imitation(folder("characters", 3))

    def short(path, body):
        code, answer = imitation(path, body)
        return (code, {"data": [{"id": "tiny", "max_model_len": 80}]}) if path == "/v1/models" else (code, answer)

    module = served(folder("byte_level"), folder("characters", 3), stand_in(short).url, dialect="vllm")
    batch = wrote(module, [SENTENCES[0]])
    with pytest.warns(UserWarning, match="longer than its context of 79; what is beyond is not judged"):
        told(module, batch)


def test_recorded_it_teaches_as_it_did_in_the_first_epoch(folder, tmp_path):
    """Log-probs are shared out by those of acting, which are known when answers are recorded."""
    student, teacher = folder("byte_level"), folder("bpe", seed=2)
    rows = [{"prompt": f"what is {i} + {i}?"} for i in range(16)]
    acting = {"batch_size": 16, "horizon": 8, "micro_batch_size": 8}
    lightning = [Term(PolicyGradient(LogRatio(clip=10.0), clip=None, ratio="none"))]

    def trained(weights, data, **more):
        rollout = Rollout(**acting | more)
        module = make_module(student, {"teacher": Teacher(weights)}, Objective(lightning), rollout=rollout, load=False)
        fit(module, tmp_path, data, steps=2)
        return torch.cat([p.detach().flatten() for p in module.student.parameters()])

    origin = OtherTokenizer(Pretrained(str(teacher)))
    module = make_module(
        student, {"teacher": Teacher(origin)}, Objective(lightning), rollout=Rollout(**acting), load=False
    )
    Recorder(tmp_path / "answers").record(module, Rows(rows), make_trainer(tmp_path))
    recorded = [
        json.loads(line) for line in (tmp_path / "answers" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    online = trained(OtherTokenizer(Pretrained(str(teacher))), rows)
    offline = trained(Cached(str(tmp_path / "answers")), recorded, behavior={"dataset": 1.0})
    assert torch.equal(online, offline)
