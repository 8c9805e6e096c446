import copy
import json
import os
import pickle
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from opd_lightning import reward
from opd_lightning.data_source import encode_metadata
from opd_lightning.reward import (
    CallableReward,
    ExactMatch,
    MathVerify,
    ReasoningGymScore,
    RegexMatch,
    RelaxedMatch,
    Reward,
)

words = st.text(st.characters(codec="utf-8", exclude_characters="#"), max_size=20)


@given(answer=words, working=words)
def test_exact_match_after_marker_ignores_what_comes_before(answer: str, working: str) -> None:
    verify = ExactMatch(after="####")
    assert verify(f"{working}#### {answer}", {"answer": answer}) == 1
    assert verify(f"{working}#### 1 #### {answer}\n", {"answer": f"{working}####{answer}"}) == 1
    assert verify(f"{working}{answer}", {"answer": answer}) == 0


@given(text=words)
def test_exact_match_is_reflexive_and_strips(text: str) -> None:
    assert ExactMatch(strip=False)(text, {"answer": text}) == 1
    assert ExactMatch()(f" {text}\n", {"answer": text}) == 1
    assert ExactMatch(strip=False)(f" {text}", {"answer": text}) == 0


def test_exact_match_case_and_numbers() -> None:
    assert ExactMatch()("Yes", {"answer": "yes"}) == 0
    assert ExactMatch(ignore_case=True)("Yes", {"answer": "yes"}) == 1
    assert ExactMatch()("18", {"answer": 18}) == 1


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("105", "100", 1),
        ("95.0", 100, 1),
        ("105.1", "100", 0),
        ("-96", "-100", 1),
        ("96", "-100", 0),
        ("1e2", "101", 1),
        ("12%", "0.12", 1),
        ("45%", "45", 0),
        ("0", "0", 1),
        ("0.0001", "0", 0),
        ("5", "0.0", 0),
        (" Yes\n", "yes", 1),
        ("no", "yes", 0),
        ("about 100", "100", 0),
        ("1,234", "1234", 0),
        ("inf", "100", 0),
        ("nan", "nan", 1),
    ],
)
def test_relaxed_match(completion: str, answer: object, expected: float) -> None:
    assert RelaxedMatch()(completion, {"answer": answer}) == expected


@given(answer=st.floats(-1e9, 1e9).filter(lambda x: abs(x) > 1e-9), off=st.floats(-0.2, 0.2))
def test_relaxed_match_looks_at_the_relative_difference(answer: float, off: float) -> None:
    tolerance = 0.1
    if abs(abs(off) - tolerance) > 1e-6:
        said = repr(answer * (1 + off))
        assert RelaxedMatch(tolerance)(said, {"answer": answer}) == (abs(off) < tolerance)


def test_relaxed_match_after_marker_and_wrong_settings() -> None:
    assert [RelaxedMatch(after="=")(text, {"answer": "1=10"}) for text in ("x = 10.2", "10", "10 = 9")] == [1, 0, 0]
    with pytest.raises(ValueError, match=r"RelaxedMatch.tolerance is -1; it must be at least 0"):
        RelaxedMatch(tolerance=-1)


def test_regex_match_takes_the_occurrence_and_group_asked_for() -> None:
    completion = "answer: 3, no, answer: 4"
    assert RegexMatch(r"answer: (\d)")(completion, {"answer": "4"}) == 1
    assert RegexMatch(r"answer: (\d)", which="first")(completion, {"answer": "3"}) == 1
    assert RegexMatch(r"answer: (?P<value>\d)", group="value")(completion, {"answer": "4"}) == 1
    assert RegexMatch(r"\d", group=0)(completion, {"answer": "4"}) == 1
    assert RegexMatch(r"x(\d)")(completion, {"answer": "4"}) == 0
    assert RegexMatch(r"answer: (?:(x)|\d)")(completion, {"answer": "4"}) == 0


def test_regex_match_refuses_what_can_never_match() -> None:
    with pytest.raises(ValueError, match=r"RegexMatch.pattern '\(' is not a regular expression: missing \)"):
        RegexMatch("(")
    with pytest.raises(ValueError, match=r"RegexMatch.group is 1, but the pattern '\\\\d' has these groups: 0 "):
        RegexMatch(r"\d")
    with pytest.raises(ValueError, match=r"group is 'b', but .* has these groups: 0, 1, a"):
        RegexMatch("(?P<a>x)", group="b")
    with pytest.raises(ValueError, match=r"RegexMatch.which is 'all'; it must be 'first' or 'last'"):
        RegexMatch("(x)", which="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", [ExactMatch(), RelaxedMatch(), RegexMatch("(x)"), MathVerify()])
def test_a_missing_answer_names_the_columns_there_are(verify: Reward) -> None:
    with pytest.raises(ValueError, match=r"needs the column 'answer'; this example has prompt, solution"):
        verify("x", {"prompt": "p", "solution": "s"})


@pytest.fixture(scope="module")
def math() -> MathVerify:
    return MathVerify(timeout=60)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so it is $\boxed{\frac12}$", "0.5", 1),
        ("The answer is 1,234.", "1234", 1),
        ("The answer is 18.", 18, 1),
        ("I would say 3", r"3\sqrt{2}", 0),
        (r"$3\sqrt2$", r"3\sqrt{2}", 1),
        (r"$\boxed{x+1}$", "$1+x$", 1),
        ("no idea", "7", 0),
        ("", "7", 0),
        ("broken \x00 \\frac{ $ \\boxed{", "7", 0),
    ],
)
def test_math_verify(math: MathVerify, completion: str, answer: object, expected: float) -> None:
    assert math(completion, {"answer": answer}) == expected
    assert not math.failures


def test_math_verify_after_marker() -> None:
    verify = MathVerify(timeout=60, after="####")
    example = {"answer": "4 + 3 = <<4+3=7>>7 $5 \n#### 7"}
    assert [verify(text, example) for text in ("5 #### 7", "7 #### 5", "7")] == [1, 0, 0]


def test_math_verify_works_off_the_main_thread(math: MathVerify) -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(math("7", {"answer": "7"})))
    thread.start()
    thread.join()
    assert scores == [1]


def test_math_verify_survives_a_late_and_a_dead_worker() -> None:
    verify = MathVerify(timeout=60)
    assert verify("7", {"answer": "7"}) == 1
    verify.timeout = 0.5
    assert verify(r"$\boxed{10^{10^{10}}}$", {"answer": "7"}) == 0
    assert sum(verify.failures.values()) == 1
    verify.timeout = 60
    assert verify("7", {"answer": "7"}) == 1
    assert verify._worker is not None
    verify._worker.kill()
    assert verify("7", {"answer": "7"}) == 0
    assert verify.failures["worker died"] >= 1
    assert verify("7", {"answer": "7"}) == 1


def test_math_verify_counts_an_answer_that_is_no_mathematics(math: MathVerify) -> None:
    verify = copy.deepcopy(math)
    assert verify("7", {"answer": "####\n####"}) == 0
    assert verify.failures == {"answer not understood": 1}


def test_math_verify_is_copied_and_pickled_without_its_process(math: MathVerify) -> None:
    math("7", {"answer": "7"})
    for twin in (copy.deepcopy(math), pickle.loads(pickle.dumps(math))):
        assert twin._worker is None
        assert twin("7", {"answer": "7"}) == 1


def test_math_verify_refuses_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"MathVerify.timeout is 0 s; it must be greater than 0"):
        MathVerify(timeout=0)
    monkeypatch.setattr(reward.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"MathVerify needs the package math-verify: pip install math-verify"):
        MathVerify()


def test_math_verify_on_gsm8k() -> None:
    folder = os.environ.get("OPD_DATA")
    if not folder:
        pytest.skip("OPD_DATA is not set")
    rows = [
        json.loads(line) for line in Path(folder, "gsm8k", "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    ]
    verify = MathVerify(timeout=60, after="####")
    right = [verify(f"It is #### ${row['answer'].split('####')[1].strip()}$", row) for row in rows]
    wrong = [verify(f"It is #### 1{row['answer'].split('####')[1].strip()}", row) for row in rows]
    assert (sum(right), sum(wrong)) == (200, 0)


def brevity(completion: str, example: dict[str, object]) -> float:
    return 1 / (1 + len(completion))


def test_callable_reward() -> None:
    score = CallableReward(f"{__name__}.brevity", columns=("answer",))
    assert score("abc", {}) == 0.25
    assert score.columns == ("answer",)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("brevity", r"CallableReward.function: 'brevity' is not a dotted path such as"),
        ("no_such_module.f", r"'no_such_module.f' can't be imported: No module named 'no_such_module'"),
        ("json.no_such", r"the module 'json' has no 'no_such'"),
        ("json.__name__", r"'json.__name__' is a str, not a callable"),
    ],
)
def test_callable_reward_refuses_what_is_no_function(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallableReward(path)


def test_rewards_are_named_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    for config in (
        {"class_path": "opd_lightning.reward.ExactMatch", "init_args": {"after": "="}},
        {"class_path": "opd_lightning.reward.RegexMatch", "init_args": {"pattern": "(x)"}},
        {"class_path": "opd_lightning.reward.RelaxedMatch", "init_args": {"tolerance": 0.01}},
        {"class_path": "opd_lightning.reward.MathVerify"},
        {
            "class_path": "opd_lightning.reward.CallableReward",
            "init_args": {"function": "json.dumps", "columns": ["answer"]},
        },
    ):
        made = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
        assert isinstance(made, Reward)
        assert made.columns == ("answer",)


def test_reasoning_gym_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r'ReasoningGymScore needs .*: pip install "opd-lightning\[tasks\]"'):
        ReasoningGymScore()


class FakeGym:
    """The two functions of reasoning_gym that are called."""

    @staticmethod
    def get_score_answer_fn(task: str) -> object:
        if task == "unknown":
            raise ValueError("Dataset 'unknown' not registered")

        def score(answer: str, entry: dict[str, object]) -> float:
            assert entry["question"] == "p"
            return {"half": 0.5}.get(answer, float(answer == entry["metadata"]["grid"]))  # type: ignore[index]

        return score


@pytest.fixture
def fake_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", FakeGym)
    reward._reasoning_gym_scorer.cache_clear()


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score() -> None:
    score = ReasoningGymScore(after="=")
    for metadata in (encode_metadata({"grid": "1"}), '{"grid": "1"}', {"grid": "1"}):
        example = {"prompt": "p", "answer": None, "task": "any", "metadata": metadata}
        assert [score(text, example) for text in ("= 1", "= half", "2 = 3", "1")] == [1, 0.5, 0, 0]


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_counts_a_failing_scorer() -> None:
    score = ReasoningGymScore()
    assert score("1", {"prompt": "p", "task": "any", "metadata": "{}"}) == 0
    assert score.failures == {"KeyError": 1}


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_refuses_foreign_rows() -> None:
    with pytest.raises(ValueError, match=r"needs the column 'task'; this example has prompt, answer"):
        ReasoningGymScore()("1", {"prompt": "p", "answer": "1"})
    with pytest.raises(ValueError, match=r"the column 'task' names 'unknown', which is no task of reasoning-gym"):
        ReasoningGymScore()("1", {"prompt": "p", "task": "unknown", "metadata": "{}"})


@given(st.recursive(st.integers() | st.text() | st.none() | st.booleans(), lambda x: st.tuples(x, x) | st.lists(x)))
def test_metadata_survives_as_text(value: object) -> None:
    assert reward.decode_metadata(encode_metadata({"x": value, 1: (2,)})) == {"x": value, 1: (2,)}


def test_metadata_that_is_no_literal_becomes_json() -> None:
    assert reward.decode_metadata(encode_metadata({"path": Path("a")})) == {"path": "a"}
