import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from opd_lightning import reward
from opd_lightning.isolated import Isolated
from opd_lightning.isolated_worker import decoded, evaluate
from opd_lightning.reward import (
    CallableReward,
    ExactMatch,
    JSONForm,
    MathVerify,
    Mentions,
    ReasoningGymScore,
    RegexMatch,
    RelaxedMatch,
    Reward,
    encode_metadata,
)
from opd_lightning.scoring import RewardError, Scoring

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
    with pytest.raises(ValueError, match=r"RelaxedMatch.tolerance is -1; it must be a number of at least 0"):
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


def test_regex_match_ends_a_search_that_would_not() -> None:
    verify = RegexMatch(r"((a+)+)b", timeout=0.2)
    assert verify("a" * 60, {"answer": "a"}) == 0
    assert verify.failures == {"timeout": 1}
    assert verify("aab", {"answer": "aa"}) == 1
    with pytest.raises(ValueError, match=r"RegexMatch\.timeout is 0 s; it must be greater than 0"):
        RegexMatch("(x)", timeout=0)


anything = st.text() | st.text("0123456789.,-+e%_ #=/()[]{}\\\n\x00\u0664\u2212\ud800", max_size=12)


@given(completion=anything, answer=anything | st.integers() | st.floats() | st.booleans() | st.lists(st.text()))
@example(completion="1e999", answer="1e-999")
@example(completion="nan", answer="nan")
@example(completion="9" * 5000, answer="9" * 5000)
def test_no_completion_and_no_answer_makes_a_verifier_raise(completion: str, answer: object) -> None:
    for verify in (
        *[ExactMatch(), ExactMatch(after="="), ExactMatch(strip=False, ignore_case=True)],
        *[RelaxedMatch(), RelaxedMatch(after="#"), RegexMatch(r"(\d+)"), RegexMatch(r"x?(y)?", which="first")],
    ):
        assert verify(completion, {"answer": answer}) in (0, 1)


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
    assert verify._worker.process is not None
    verify._worker.process.kill()
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
        assert twin._worker.process is None
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


GYM = """
def get_score_answer_fn(task):
    if task == "unknown":
        raise ValueError("Dataset 'unknown' not registered")

    def score(answer, entry):
        assert entry["question"] == "p"
        if answer == "endless":
            while True:
                pass
        if answer.startswith("run "):
            return float(eval(answer[4:]))
        if answer.startswith("do "):
            exec(answer[3:], {})
        return {"half": 0.5}.get(answer, float(answer == entry["metadata"]["grid"]))

    return score
"""


@pytest.fixture
def fake_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of reasoning_gym that is called."""
    (tmp_path / "fake" / "reasoning_gym").mkdir(parents=True)
    (tmp_path / "fake" / "reasoning_gym" / "__init__.py").write_text(GYM, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score() -> None:
    score = ReasoningGymScore(after="=", timeout=60)
    for metadata in (encode_metadata({"grid": "1"}), '{"grid": "1"}', {"grid": "1"}):
        example = {"prompt": "p", "answer": None, "task": "any", "metadata": metadata}
        assert [score(text, example) for text in ("= 1", "= half", "2 = 3", "1")] == [1, 0.5, 0, 0]
    assert not score.failures


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_counts_what_fails_or_is_late() -> None:
    score = ReasoningGymScore(timeout=60)
    row = {"prompt": "p", "task": "any", "metadata": "{}"}
    assert score("1", row) == 0
    assert score.failures == {"KeyError": 1}
    score.prepare()
    score.timeout = 0.5
    assert score("endless", row) == 0
    assert score.failures == {"KeyError": 1, "timeout": 1}
    score.timeout = 60
    assert score("half", {**row, "metadata": '{"grid": 1}'}) == 0.5, "a new worker"


@pytest.mark.usefixtures("fake_gym")
def test_reasoning_gym_score_refuses_foreign_rows() -> None:
    with pytest.raises(ValueError, match=r"needs the column 'task'; this example has prompt, answer"):
        ReasoningGymScore()("1", {"prompt": "p", "answer": "1"})
    with pytest.raises(ValueError, match=r"the column 'task' names 'unknown', which is no task of reasoning-gym"):
        ReasoningGymScore()("1", {"prompt": "p", "task": "unknown", "metadata": "{}"})
    with pytest.raises(ValueError, match=r"ReasoningGymScore\.timeout is nan s; it must be greater than 0"):
        ReasoningGymScore(timeout=float("nan"))


def test_a_worker_that_does_not_come_up_is_no_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('half installed')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    score, row = ReasoningGymScore(), {"prompt": "p", "task": "any", "metadata": "{}"}
    for _ in range(2):
        with pytest.raises(
            RewardError, match=r"process that scores with reasoning_gym does not come up; to see why: .*py"
        ):
            Scoring()(score, "1", row)


# -- what is never executed -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_gym")
@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch PATH')",
        "open('PATH', 'w')",
        "().__class__.__base__.__subclasses__()",
        "[x for x in (1,)]",
        "(lambda: 1)()",
        "eval('1')",
        "print('1')",
        "f'{1}'",
        "9**9**9**9",
        "1 << 10**9",
    ],
)
def test_scorers_that_eval_execute_nothing(code: str, tmp_path: Path) -> None:
    score = ReasoningGymScore(timeout=60)
    row = {"prompt": "p", "task": "any", "metadata": "{}"}
    for completion in (f"run {code}", f"do {code}"):
        assert score(completion.replace("PATH", str(tmp_path / "executed")), row) == 0
    assert score.failures["ValueError"] == 2
    assert score("run (3 + 4) * 0.5 - 2**1", row) == 1.5
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("[['_', 'Q'], ['Q', '_']]", [["_", "Q"], ["Q", "_"]]),
        ("((0x3a + 0x1f) >> 0x2) & ~1 ^ 3", ((0x3A + 0x1F) >> 0x2) & ~1 ^ 3),
        ("{'a': (1, -2.5), 'b': {3, 4}}", {"a": (1, -2.5), "b": {3, 4}}),
        (" not True\n", False),
        ("7 // 2 % 2 | 4", 5),
    ],
)
def test_expressions_that_compute_are_evaluated(source: str, value: object) -> None:
    assert evaluate(source) == value


def test_what_verifies_mathematics_executes_nothing_and_keeps_to_itself(math: MathVerify, tmp_path: Path) -> None:
    code = f"__import__('os').system('touch {tmp_path}/executed')"
    for text in (code, f"${code}$", f"\\boxed{{{code}}}"):
        assert math(text, {"answer": "7"}) == 0
        math("7", {"answer": text})
    assert not (tmp_path / "executed").exists()


WORKER = """
import os, socket, subprocess, sys
sys.path.insert(0, FOLDER)
import isolated_worker

isolated_worker._isolate()
done = []
for attempt in (
    lambda: os.system("true"), lambda: subprocess.run(["true"]), lambda: open("x", "w"), lambda: open("x", "ab"),
    lambda: os.open("x", os.O_CREAT | os.O_WRONLY), lambda: socket.socket(), lambda: os.remove("x"), lambda: os.fork(),
    lambda: os.mkdir("x"), lambda: os.kill(os.getpid(), 9), lambda: os.execv("/bin/true", ["true"]),
    lambda: socket.getaddrinfo("localhost", 1), lambda: os.rename("x", "y"), lambda: os.symlink("x", "y"),
):
    try:
        attempt()
        done.append(attempt)
    except PermissionError:
        pass
open(isolated_worker.__file__).read()
print(len(done))
"""


def test_once_isolated_a_process_has_no_effects(tmp_path: Path) -> None:
    """Should a scorer execute something after all."""
    folder = repr(str(Path(reward.__file__).parent))
    asked = [sys.executable, "-P", "-c", WORKER.replace("FOLDER", folder)]
    out = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "0"
    assert not list(tmp_path.iterdir())


def test_the_worker_knows_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker = Isolated("math_verify")
    worker.start()
    assert worker.process is not None
    environment = Path(f"/proc/{worker.process.pid}/environ")
    if environment.exists():
        assert b"secret" not in environment.read_bytes()
    folder = os.readlink(f"/proc/{worker.process.pid}/cwd") if environment.exists() else ""
    assert worker.ask(["7", "7"], 60) == {"value": True}
    worker._close()
    assert not folder or not Path(folder).exists(), "its folder goes with it"


REASONING_GYM = [
    ("countdown", "{code}", {"metadata": {"numbers": [1], "target": 3}}, 0.01),
    ("countdown", "9**9**9**9", {"metadata": {"numbers": [9] * 4, "target": 3}}, 0.01),
    ("countdown", "(1 + 2) * 4 - 6/2", {"metadata": {"numbers": [1, 2, 2, 4, 6], "target": 9}}, 1.0),
    ("puzzle24", "{code}", {"metadata": {}}, 0.01),
    ("puzzle24", "(1 + 2 + 3) * 4", {"metadata": {}}, 1.0),
    ("string_insertion", "{code} and 'x'", {"metadata": {}}, 0.0),
    ("string_insertion", "['A', 'B']", {"metadata": {}, "answer": "AB"}, 0.1),
    ("spiral_matrix", "{code}", {"metadata": {}}, 0.0),
    ("spiral_matrix", "[1, 2]", {"metadata": {}, "answer": "1 2"}, 0.1),
    ("binary_matrix", "{code}", {"metadata": {}}, 0.0),
    ("binary_matrix", "[[1, 0], [0, 1]]", {"metadata": {}, "answer": "1 0\n0 1"}, 0.1),
    ("n_queens", "{code}", {"metadata": {"valid_answers": []}}, 0.0),
    ("n_queens", "[['_', 'Q']]", {"metadata": {"valid_answers": ["_ Q"]}}, 0.5),
    ("number_sorting", "[1]", {"metadata": {"direction": "ascending"}, "answer": "{code} or [1]"}, 0.0),
    ("number_sorting", "[1, 2]", {"metadata": {"direction": "ascending"}, "answer": "['1', '2']"}, 1.0),
    ("bitwise_arithmetic", "1", {"metadata": {"problem": "{code}"}}, 0.0),
    ("bitwise_arithmetic", "0x6", {"metadata": {"problem": "((0x1 + 0x2) << 0x1)"}}, 1.0),
    ("polynomial_multiplication", "{code}", {"metadata": {}, "answer": "{code}"}, 0.0),
    ("polynomial_multiplication", "x**2 - 1", {"metadata": {}, "answer": "x**2 - 1"}, 1.0),
    ("simple_integration", "{code}", {"metadata": {"variable": "x", "integrand": "{code}"}}, 0.0),
    ("simple_integration", "x**2 + C", {"metadata": {"variable": "x", "integrand": "2*x"}}, 1.0),
    ("intermediate_integration", "sin(x)**2/2 + sqrt(3)", {"metadata": {"variable": "x", "integrand": "sin(x)*cos(x)"}},
     1.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def gym() -> ReasoningGymScore:
    pytest.importorskip("reasoning_gym")
    return ReasoningGymScore(timeout=60)


@pytest.mark.parametrize(("task", "completion", "row", "score"), REASONING_GYM)
def test_reasoning_gym_scores_execute_neither_completions_nor_rows(
    task: str, completion: str, row: dict[str, Any], score: float, gym: ReasoningGymScore, tmp_path: Path
) -> None:
    """Every task of reasoning-gym 0.1.25 whose scorer evaluates what it is given still scores what is right."""
    code = f"__import__('os').system('touch {tmp_path}/executed')"
    row = json.loads(json.dumps({"prompt": "x", "answer": "a", **row}).replace("{code}", code))
    assert gym(completion.replace("{code}", code), {**row, "task": task}) == score
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_every_task_of_reasoning_gym_scores_as_it_does_without_a_worker(gym: ReasoningGymScore) -> None:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite"}):
        item = reasoning_gym.create_dataset(task, seed=3, size=1)[0]
        row = {"prompt": item["question"], "answer": item["answer"], "task": task}
        row["metadata"] = encode_metadata(item["metadata"])
        for text in (str(item["answer"]).strip(), "x", "[1, 2]", "1+1"):
            try:
                expected = float(reasoning_gym.get_score_answer_fn(task)(text, item))
            except Exception:
                expected = 0.0
            assert gym(text, row) == expected, (task, text)


@given(st.recursive(st.integers() | st.text() | st.none() | st.booleans(), lambda x: st.tuples(x, x) | st.lists(x)))
def test_metadata_survives_as_text(value: object) -> None:
    assert decoded(encode_metadata({"x": value, 1: (2,)})) == {"x": value, 1: (2,)}


def test_metadata_that_is_no_literal_becomes_json() -> None:
    assert decoded(encode_metadata({"path": Path("a")})) == {"path": "a"}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"answer": "Paris"}', 1),
        (' {"answer": "The capital is Paris."}\n', 1),
        ('{"answer": "Paris", "city": "Paris"}', 0),
        ('{"city": "Paris"}', 0),
        ('{"answer": 7}', 0),
        ('{"answer": "Paris"} That is it.', 0),
        ('["answer"]', 0),
        ("{'answer': 'Paris'}", 0),
        ("[" * 100_000, 0),
        ("Paris", 0),
        ("", 0),
    ],
)
def test_json_form_wants_one_object_with_its_keys_and_nothing_else(completion: str, expected: int) -> None:
    assert JSONForm()(completion, {}) == expected


def test_json_form_takes_other_keys() -> None:
    assert JSONForm(("name", "age"))('{"age": "7", "name": "Ada"}', {}) == 1
    with pytest.raises(ValueError, match=r"JSONForm\.keys is empty"):
        JSONForm(())


@pytest.mark.parametrize(
    ("completion", "fault"),
    [
        ('{"answer": "one two", "why": "three"}', None),
        ('{"answer": "one two", "why": "three four"}', "has 4 words, which is more than 3"),
        ("Bern", "is no JSON object"),
        ('["Bern"]', "is no JSON object"),
        ('{"answer": "Bern"}', 'has the keys ["answer"] instead of ["answer", "why"]'),
        ('{"answer": "Bern", "why": 7}', "has no text under why"),
    ],
)
def test_json_form_says_what_keeps_a_completion_from_it(completion: str, fault: str | None) -> None:
    form = JSONForm(("answer", "why"), words=3)
    assert form(completion, {}) == (fault is None)
    whole = None if fault is None else f'The answer {fault}. Write {{"answer": "...", "why": "..."}} and nothing else.'
    assert form.feedback(completion, {}) == whole


def test_json_form_of_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"JSONForm\.words must be >= 1, got 0"):
        JSONForm(words=0)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The capital is Bern.", 1),
        ('{"answer": "berne"}', 1),
        ("It is Bernard.", 0),
        ("Zurich", 0),
    ],
)
def test_mentions_wants_an_answer_or_an_alias_as_whole_words(completion: str, expected: int) -> None:
    assert Mentions()(completion, {"answer": "Bern", "aliases": ["Berne"]}) == expected


def test_mentions_needs_no_aliases_and_reads_no_pattern() -> None:
    assert Mentions()("It costs $5 (about).", {"answer": "$5 (about)"}) == 1
    assert Mentions()("It is 1500.", {"answer": "1.00", "aliases": None}) == 0
