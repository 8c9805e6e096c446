"""The quickstart's task: right, deterministic, and never trained on what it is judged by."""

import pytest
from transformers import AutoTokenizer

from opd_lightning.modalities.text.quickstart import character_tokenizer, is_held_out, scratchpad, sums


def operands(rows: list[dict[str, str]]) -> set[tuple[int, ...]]:
    prompts = [row["prompt"].rpartition("?")[2] for row in rows]
    return {tuple(sorted(map(int, prompt.removesuffix("=").split("+")))) for prompt in prompts}


def test_the_steps_are_worked_from_the_right_with_carries():
    assert scratchpad(4821, 1937) == "1+7+0=08 2+3+0=05 8+9+0=17 4+1+1=06 #6758"
    assert scratchpad(99, 99) == "9+9+0=18 9+9+1=19 #198"


@pytest.mark.parametrize("digits", [2, 4, 7])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_row_is_a_right_sum(digits, held_out):
    rows = sums(200, digits=digits, seed=5, held_out=held_out)
    assert len({row["prompt"] for row in rows}) == 200
    for row in rows:
        first, second = row["prompt"].removesuffix("=").split("+")
        assert len(first) == len(second) == digits
        assert int(row["answer"]) == int(first) + int(second)
        assert row["completion"] == row["solution"] == scratchpad(int(first), int(second))
        assert row["solution"].rpartition("#")[2] == row["answer"]


def test_the_same_arguments_give_the_same_rows_and_another_seed_others():
    assert sums(50, seed=3) == sums(50, seed=3)
    assert len(operands(sums(500, seed=3)) & operands(sums(500, seed=4))) < 5


def test_no_held_out_problem_nor_its_mirror_image_is_a_training_problem():
    train = set().union(*(operands(sums(700, digits=2, seed=seed)) for seed in range(5)))
    held_out = set().union(*(operands(sums(100, digits=2, seed=seed, held_out=True)) for seed in range(5)))
    assert train
    assert held_out
    assert not train & held_out
    assert is_held_out(12, 34) == is_held_out(34, 12)


def test_a_fifth_of_all_problems_is_held_out():
    share = sum(is_held_out(a, b) for a in range(100, 1000, 7) for b in range(100, 1000, 7)) / 129**2
    assert share == pytest.approx(0.2, abs=0.01)


def test_hinted_prompts_begin_with_the_solution_and_change_nothing_else():
    plain, hinted = sums(300, seed=2), sums(300, seed=2, hinted=1.0)
    for a, b in zip(plain, hinted, strict=True):
        assert b == {**a, "prompt": f"{a['solution']}?{a['prompt']}"}
    shown = sum("?" in row["prompt"] for row in sums(1000, seed=2, hinted=0.7))
    assert shown == pytest.approx(700, abs=50)


def test_another_prompt_is_that_of_another_row():
    rows = sums(200, seed=2, hinted=0.5)
    prompts = {row["prompt"].rpartition("?")[2] for row in rows}
    assert {row["other_prompt"] for row in rows} == prompts
    assert all(row["other_prompt"] != row["prompt"].rpartition("?")[2] for row in rows)
    assert sums(1)[0]["other_prompt"] == "", "there is none"


def test_more_problems_than_there_are_is_refused():
    with pytest.raises(ValueError, match="811 different problems of 2 digits asked for, at most 810 can be drawn"):
        sums(811, digits=2)


def test_the_tokenizer_is_one_token_per_character_and_survives_saving(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = sums(1, hinted=1.0)[0]
    text = row["prompt"] + row["completion"]
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template is None


def test_the_tokenizer_refuses_what_is_not_in_its_alphabet():
    with pytest.raises(Exception, match="UNK"):
        character_tokenizer()("a")
