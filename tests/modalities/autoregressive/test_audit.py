"""The start-up audit: what it shows, what just works, and what it refuses (rules 4 and 7)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from opd_lightning.audit import audit
from opd_lightning.modalities.autoregressive import FirstOf, Peers, PromptView, Written
from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.modalities.vision_language import VisionLanguageDistillation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import View
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher
from tests.tiny import (
    CHAT_TEMPLATE,
    LongerIsBetter,
    act,
    chat_tokenizer,
    fit,
    make_module,
    make_rows,
    no_teacher,
    save_model,
    teacher_forced,
)
from tests.tiny_vlm import save_vlm, vlm_rows

SCALED = {
    "softcap": {"architecture": "gemma3", "final_logit_softcapping": 1.5},
    "gemma2": {"config_class": "Gemma2Config", "final_logit_softcapping": 2.0},
    "cohere": {"config_class": "CohereConfig", "logit_scale": 0.25},
    "granite": {"config_class": "GraniteConfig", "logits_scaling": 8.0},
    "bias": {"config_class": "PhiConfig"},
}


def table(module) -> dict[str, dict[str, str]]:
    return dict(module.audit_rows())


def test_rows_say_what_each_role_is(tiny_student, tiny_teacher):
    teachers = {
        "teacher": Teacher(Frozen(Pretrained(str(tiny_teacher))), PromptView("{{ solution }}"), max_prompt_length=40),
        "before": Teacher(Initial()),
    }
    spec = Pretrained(str(tiny_student), lora=Lora(r=3))
    module = make_module(spec, teachers, no_teacher(), rollout=Rollout(max_prompt_length=30))
    rows = table(module)
    assert rows["path"] == {"student": str(tiny_student), "teacher": str(tiny_teacher), "before": str(tiny_student)}
    assert rows["weights"] == {"student": "LoRA r=3", "teacher": "Frozen, view PromptView", "before": "Initial"}
    assert rows["dtype"]["teacher"] == "float32"
    assert rows["tokens known / head rows"] == {"student": "17 / 24", "teacher": "17 / 28", "before": "17 / 24"}
    assert rows["ids compared"]["teacher"] == "17"
    assert rows["prompt limit"] == {"student": "30", "teacher": "40", "before": "256"}
    assert rows["chat template"]["student"] == "none: prompts as they are"


def test_the_table_is_printed(tiny_student, tiny_teacher, capsys):
    audit(make_module(tiny_student, tiny_teacher), None)
    printed = capsys.readouterr().out
    assert "stop ids" in printed
    assert "teacher" in printed


def test_differing_stop_ids_and_templates_are_shown(chat_student, tmp_path):
    other = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    folder = save_model(tmp_path / "other", tokenizer=other, rows=104)
    settings = {"chat_template_kwargs": {"enable_thinking": False}}
    module = make_module(chat_student, folder, **settings)
    rows = table(module)
    assert rows["stop ids"] == {"student": "[3, 4]", "teacher": "[3] (differs: the student stops rollouts)"}
    mine, theirs = rows["chat template"]["student"], rows["chat template"]["teacher"]
    assert mine.endswith("used, {'enable_thinking': False}")
    assert theirs.endswith("not used (own_template: false)")
    assert mine[:8] != theirs[:8]
    own = Teacher(Frozen(Pretrained(str(folder))), own_template=True)
    assert table(make_module(chat_student, {"teacher": own}, **settings))["chat template"]["teacher"].endswith(
        "used, {'enable_thinking': False}"
    )


# -- the first row ----------------------------------------------------------------------------------------------------


class Picky(View):
    """Takes what a note writes, and nothing that stands for it."""

    columns = ("right",)

    def __call__(self, example):
        if example.get("right") == ["‹right›", "‹right›"]:
            raise TypeError("not a rollout")


def printed(module, rows, tmp_path, capsys) -> str:
    fit(module, tmp_path, rows)
    out = capsys.readouterr().out
    return " ".join(out[out.index("the first row") :].split())


def test_the_first_row_is_shown_as_everybody_reads_it(chat_student, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    teachers = {
        "told": Teacher(Initial(), PromptView("It is {{ answer }}. {{ prompt }}")),
        "plain": Teacher(Initial()),
        "other": Teacher(Initial(), where={"task": "odd"}),
    }
    terms = Objective([Term(ReverseKL(), teacher=name) for name in teachers])
    half = Rollout(batch_size=8, horizon=10, behavior={"student": 0.5, "dataset": 0.5})
    module = make_module(chat_student, teachers, terms, rollout=half)
    chat = [{"role": "system", "content": "[bold]Brief"}, {"role": "user", "content": "1+1="}]
    row = {"prompt": chat, "completion": "2", "answer": "2", "task": "even"}
    table = printed(module, [row] * 16, tmp_path, capsys)
    turns = r"<s><|im_start|>system\n[bold]Brief<|im_end|>\n<|im_start|>user\n"
    assert rf"student reads │ '{turns}1+1=<|im_end|>\n<|im_start|>assistant\n', 45 tokens" in table
    assert "given, trained │ '2<|im_end|>', 2 tokens = [24, 3]" in table
    assert "rollouts │ trained up to and including '<|im_end|>' = 3 or '<|end|>' = 4, at most 10 tokens" in table
    assert rf"told reads │ '{turns}It is 2. 1+1=<|im_end|>" in table
    assert "plain reads │ the same" in table
    assert "other reads │ nothing of this row" in table


def test_views_of_notes_are_shown_before_there_are_any(chat_student, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    views = [PromptView("{{ right[1] }}{{ reflection }}? {{ prompt }}"), Picky()]
    teachers = {"told": Teacher(Live(), FirstOf([*views, PromptView("It is {{ answer }}. {{ prompt }}")]))}
    written = Written(PromptView("{{ written }}{{ prompt }}"), horizon=3)
    module = make_module(
        chat_student, teachers, Objective([Term(ReverseKL(), teacher="told")]), reward=LongerIsBetter(),
        notes={"peers": Peers(right=2, own=True), "written": written},
    )  # fmt: skip
    table = printed(module, [{"prompt": "1+1=", "answer": "2"}] * 16, tmp_path, capsys)
    asked = r"<s><|im_start|>user\n{}1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert f"told reads │ '{asked.format('‹right›‹reflection›? ')}'" in table
    assert "told, or else │ what notes will say of a rollout" in table
    assert f"told, or else │ '{asked.format('It is 2. ')}'" in table


def test_nothing_of_the_first_row_is_lost_on_a_narrow_terminal(chat_student, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = printed(make_module(chat_student, {}, no_teacher()), [{"prompt": "xz" * 30}] * 16, tmp_path, capsys)
    assert "…" not in table
    assert table.count("z") == 30


def test_the_first_row_shows_an_image_s_tokens_once(tmp_path, capsys):
    module = make_module(save_vlm(tmp_path / "vlm"), {}, no_teacher(), VisionLanguageDistillation, blank_check=False)
    table = printed(module, vlm_rows(8), tmp_path, capsys)
    assert "<|vision_start|><|image_pad|>×" in table


# -- ids ----------------------------------------------------------------------------------------------------------


def test_an_id_without_a_row_is_named_with_its_reader(chat_student, tmp_path):
    """A special token that was added to the tokenizer and not to the model, of the student or of the teacher."""
    tokenizer = chat_tokenizer(CHAT_TEMPLATE.replace("<|im_start|>", "<turn>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|end|>", "<turn>"]})
    large = save_model(tmp_path / "large", tokenizer=tokenizer, rows=104)
    small = save_model(tmp_path / "small", tokenizer=tokenizer, rows=104)
    cut = AutoModelForCausalLM.from_pretrained(small)
    cut.resize_token_embeddings(len(tokenizer) - 1)
    cut.save_pretrained(small)
    last = len(tokenizer) - 1
    for student, teacher, who in ((small, large, "model.student"), (large, small, "model.teachers.teacher")):
        module = make_module(student, teacher)
        reason = f"the prompt holds '<turn>' (id {last}), and {who} has embeddings for ids below {last} only"
        assert module.refusal({"prompt": "1+1="}) == reason
    given = make_module(small, {}, no_teacher(), raw_prompts=True, rollout=Rollout(behavior={"dataset": 1.0}))
    reason = given.refusal({"prompt": "1+1=", "completion": "2<turn>"})
    assert reason == f"the completion holds '<turn>' (id {last}), which no student could write"


def test_a_stop_token_without_a_row_stops_nothing(tmp_path):
    tokenizer = chat_tokenizer(None)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    folder = save_model(tmp_path, tokenizer=tokenizer, rows=104, eos_token_id=None)
    cut = AutoModelForCausalLM.from_pretrained(folder)
    cut.resize_token_embeddings(len(tokenizer) - 1)
    cut.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"no stop token with a row in its head and its embeddings \(of \[\d+\]\)"):
        table(make_module(folder, {}, no_teacher()))


def test_a_prompt_that_ends_with_a_stop_token_is_refused(tmp_path):
    closed = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    folder = save_model(tmp_path, tokenizer=chat_tokenizer(closed), rows=104)
    reason = "the prompt of model.student ends with the stop token '<|im_end|>', behind which a model writes nothing"
    assert make_module(folder, {}, no_teacher(), raw_prompts=True).refusal({"prompt": "1+1=<|im_end|>"}) == reason
    assert make_module(folder, {}, no_teacher()).refusal({"prompt": "1+1="}) is None, "as its template has it"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_thought": False}, r"model\.chat_template_kwargs: the chat template of .* reads no 'enable_thought'"),
        ({"add_generation_prompt": False}, "add_generation_prompt is set by the setting itself"),
    ],
)
def test_options_that_the_template_does_not_read_are_refused(chat_student, tiny_student, options, reason):
    with pytest.raises(ValueError, match=reason):
        table(make_module(chat_student, {}, no_teacher(), chat_template_kwargs=options))
    with pytest.raises(ValueError, match=r"has no chat template that reads|is set by the setting itself"):
        table(make_module(tiny_student, {}, no_teacher(), chat_template_kwargs=options))


# -- vocabularies (rule 4) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(17, 40), (40, 17), (24, 28)])
def test_heads_padded_differently_just_work(saved, rows):
    module = make_module(saved(rows=rows[0]), saved(rows=rows[1], seed=2))
    assert module.vocabulary == 17
    table(module)
    rolled = act(module, make_rows(4))
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    with torch.no_grad():
        loss, averages = module.objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    assert float(loss) > 0
    assert averages.compute()["loss/ReverseKL"] > 0


def test_another_tokenizer_is_refused_naming_id_and_readings(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world.teacher, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    plus = min(vocabulary["+"], vocabulary["="])
    vocabulary["+"], vocabulary["="] = vocabulary["="], vocabulary["+"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"model\.teachers\.teacher: .*reads id {plus} as '=', the student's .* as '\+'"
    ):
        table(world.module(folder))


def test_a_tokenizer_with_a_gap_keeps_its_last_ids(tmp_path):
    """An id may be above the number of tokens; it is an action like any other."""
    tokenizer = character_tokenizer()
    path = tmp_path / "tokenizer"
    tokenizer.save_pretrained(path)
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["?"] = 20
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    folder = save_model(tmp_path / "model", tokenizer=type(tokenizer).from_pretrained(path))
    module = make_module(folder, {}, no_teacher())
    assert module.vocabulary == 21
    rolled = act(module, [{"prompt": "1+1=?"}])
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4


def test_no_stop_token_is_refused(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    folder = save_model(tmp_path / "model", tokenizer=tokenizer)
    path = folder / "generation_config.json"
    path.write_text("{}", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="has no stop token, so no rollout could end by itself"):
        table(make_module(folder, {}, no_teacher()))


def test_the_checkpoint_alone_may_name_the_stop_token(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    folder = save_model(tmp_path / "model", tokenizer=tokenizer, generation={"eos_token_id": [1]})
    module = make_module(folder, {}, no_teacher(), rollout=Rollout(behavior={"dataset": 1.0}))
    table(module)
    assert module.eos == [1]
    assert module.act("dataset", [{"prompt": "1", "completion": "2"}], [0]).actions.tolist() == [[4, 1]]


# -- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
def test_scale_cap_and_bias_of_the_architecture_are_honored(saved, tmp_path, name):
    folder = saved(**SCALED[name])
    module = make_module(folder, {"teacher": Teacher(Frozen(Pretrained(str(folder))))})
    if name == "bias":
        with torch.no_grad():
            module.student.lm_head.bias.normal_()
    table(module)
    rolled = act(module, make_rows(8))
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4
    head = module.head(module.policies["student"])
    assert head.scale != 1 or head.softcap is not None or head.module.bias is not None


def test_a_head_that_does_something_else_is_refused(world, monkeypatch):
    module = world.module()
    model = type(module.student)
    plain = model.forward

    def scaled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(ValueError, match=r"\(student\): its logits are not head\(hidden states\).*not supported yet"):
        table(module)


def test_dropout_does_not_fool_the_check_of_the_head(saved):
    folder = saved(attention_dropout=0.5)
    module = make_module(Pretrained(str(folder), lora=Lora(r=2, dropout=0.5)), {"teacher": Teacher(EMA())})
    for name, parameter in module.student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert module.student.training
    table(module)
    assert module.student.training
