"""TextDistillation: from raw prompts and chats to token ids."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Teacher
from tests.tiny import CHAT_TEMPLATE, act, chat_tokenizer, make_module, no_teacher, save_model, teacher_forced

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
USER = "<s><|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"


def shown(module, prompt, policy=None) -> str:
    """What a prompt becomes, special tokens and all."""
    batch = module.collate([{"prompt": prompt}, {"prompt": "a longer prompt than that, to be padded"}], policy)
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    return module.tokenizer().decode(ids)


@pytest.fixture(scope="session")
def other_template(tmp_path_factory):
    """The same tokens, another chat template."""
    tokenizer = chat_tokenizer("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    return save_model(tmp_path_factory.mktemp("other"), tokenizer=tokenizer, rows=108, seed=2)


def test_a_string_prompt_becomes_a_user_message(chat_student):
    assert shown(make_module(chat_student, {}, no_teacher()), "1+1=") == USER


def test_a_chat_is_rendered_whole_and_begins_once(chat_student):
    text = shown(make_module(chat_student, {}, no_teacher()), CHAT)
    assert text == USER.replace("<|im_start|>user", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert text.count("<s>") == 1


def test_raw_prompts_stay_as_they_are(chat_student):
    module = make_module(chat_student, {}, no_teacher(), raw_prompts=True)
    assert shown(module, "1+1=") == "<s>1+1="
    assert shown(module, CHAT).count("<s>") == 1, "a rendered chat holds its own beginning already"


def test_options_reach_the_template(chat_student):
    module = make_module(chat_student, {}, no_teacher(), chat_template_kwargs={"enable_thinking": False})
    assert shown(module, "1+1=") == USER + "<think></think>"


def test_without_a_template_strings_pass_and_chats_are_refused(tiny_student):
    module = make_module(tiny_student, {}, no_teacher())
    batch = module.collate([{"prompt": "1+1="}, {"prompt": "12+345="}])
    assert module.tokenizer().batch_decode(batch["input_ids"]) == ["<pad><pad><pad>1+1=", "12+345="]
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 4, [1] * 7]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long
    with pytest.raises(ValueError, match=r"the prompt is a chat but .* has no chat template; give string prompts"):
        module.collate([{"prompt": CHAT}])


def test_an_empty_prompt_is_refused(tiny_student, chat_student):
    assert make_module(tiny_student, {}, no_teacher()).refusal({"prompt": ""}) == "the prompt is empty"
    assert make_module(chat_student, {}, no_teacher()).refusal({"prompt": ""}) is None, "the template says something"


def test_a_teacher_reads_its_own_template_if_asked_to(chat_student, other_template):
    for own, text in ((True, "<s>[user] 1+1=\n"), (False, USER)):
        teacher = Teacher(Frozen(Pretrained(str(other_template))), own_template=own)
        module = make_module(chat_student, {"teacher": teacher})
        policy = module.policies["teacher"] if own else None
        assert shown(module, "1+1=", policy).removeprefix("<s>") == text.removeprefix("<s>")
        rolled = act(module, [{"prompt": "1+1="}, {"prompt": "a longer prompt"}])
        said, available = module.ask("teacher", rolled)
        plain = module.tokenizer()(text, add_special_tokens=False)["input_ids"]
        if own:
            plain = module.collate([{"prompt": "1+1="}], policy)["input_ids"][0].tolist()
        steps = int(rolled.mask[0].sum())
        ids = torch.cat([torch.tensor(plain), rolled.actions[0, :steps]])
        with torch.no_grad():
            whole = (
                module.policies["teacher"].model(input_ids=ids[None]).logits[0, -steps - 1 : -1, : module.vocabulary]
            )
        assert (said.head(said.hidden)[0, :steps] - whole).abs().max() < 1e-4
        assert available is None or bool(available.all())


def test_a_view_in_a_chat(chat_student):
    view = PromptView(
        [{"role": "system", "content": "It is {{ answer }}."}, {"role": "user", "content": "{{ prompt }}"}]
    )
    module = make_module(chat_student, {"teacher": Teacher(Frozen(Pretrained(str(chat_student))), view)})
    row = {"prompt": CHAT, "answer": "2"}
    rolled = act(module, [row])
    said, _ = module.ask("teacher", rolled)
    seen = view(row)
    assert seen is not None
    assert "It is 2." in shown(module, seen["prompt"])
    with torch.no_grad():
        expected = module.steps(module.policies["teacher"], rolled, [seen]).hidden
    assert torch.equal(said.hidden, expected)
    own = teacher_forced(module, "teacher", rolled)
    assert (own - rolled.behaviour_log_probs).abs().max() < 1e-4, "equal weights, without the view"


def test_prompts_of_a_chat_model_are_what_its_rollouts_continue(chat_student):
    module = make_module(chat_student, {}, no_teacher())
    rolled = act(module, [{"prompt": "1+1="}, {"prompt": CHAT}, {"prompt": "what is a sum?"}])
    assert (teacher_forced(module, "student", rolled) - rolled.behaviour_log_probs).abs().max() < 1e-4
    assert module.tokenizer().chat_template == CHAT_TEMPLATE
    _, texts = module.score(rolled)
    assert [row["prompt"] for row in texts] == ["1+1=", "1+1=", "what is a sum?"]
    assert not any("<|" in row["completion"] for row in texts), "stop tokens are no text"
