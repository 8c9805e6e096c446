"""benchmarks/claims: verdicts follow from rules, a stopped run goes on, the page has what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims.__main__ as main

    yield main
    for name in [name for name in sys.modules if name.partition(".")[0] == "claims"]:
        del sys.modules[name]


def test_verdicts_follow_from_the_rules(claims):
    from claims.verdict import above, at_least, at_most, verdict

    numbers = {"new": [3.0, 2.0, 4.0], "old": [1.0, 1.5, 1.9], "near": [2.5, 1.0, 1.0]}
    assert above("new", "old").holds(numbers)
    assert not above("new", "near").holds(numbers), "one seed of the one is below one seed of the other"
    assert at_least("new", 2).holds(numbers)
    assert not at_most("new", 3.5).holds(numbers)
    rules = [above("new", "old"), above("new", "near")]
    assert verdict(rules[:1], numbers) == "holds"
    assert verdict(rules, numbers) == "holds in part"
    assert verdict(rules[1:], numbers) == "does not hold here"


def test_a_stopped_run_goes_on_and_the_page_has_its_numbers(claims, monkeypatch, tmp_path):
    """Something is so.

    Source: Nobody.

    Measured by hand.
    """
    asked = []

    def measure(seed: int) -> dict[str, float]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(seed)
        return {"size": seed + 1.0}

    from claims.verdict import at_least

    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.json")
    monkeypatch.setattr(claims, "PAGE", tmp_path / "claims.md")
    monkeypatch.setattr(claims, "CLAIMS", ("so",))
    monkeypatch.setattr(sys, "argv", ["claims"])
    doc = test_a_stopped_run_goes_on_and_the_page_has_its_numbers.__doc__
    rules = [at_least("size", 0.5), at_least("size", 2)]
    claim = SimpleNamespace(__doc__=doc, measure=measure, RULES=rules, TRIED="Nothing else.")
    monkeypatch.setattr(claims, "load", lambda name: claim)
    claims.PAGE.write_text("above\n<!-- make claims -->\nold\n<!-- end -->\nbelow\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        claims.main()
    asked.clear()
    asked.append(0)
    claims.main()
    assert asked == [0, 2], "two seeds were kept"
    page = claims.PAGE.read_text(encoding="utf-8")
    assert page.startswith("above\n<!-- make claims -->\n\n| | claim |")
    assert page.endswith("<!-- end -->\nbelow\n")
    assert "| 1 | Something is so | Nobody | **holds in part** | 1 of 2 | 3 | 0 |" in page
    assert "| size | 1 | 2 | 3 | 2 ± 1 |" in page
    assert "* “size” at least 2: **no**" in page
    assert "Verdict: **holds in part**. Nothing else." in page


def test_every_claim_is_stated_and_its_rules_read_what_was_measured(claims):
    results = json.loads(claims.RESULTS.read_text(encoding="utf-8"))
    assert results.keys() <= set(claims.CLAIMS)
    for name in claims.CLAIMS:
        claim = claims.load(name)
        title, source, method = claims.statement(claim)
        assert all((title, source, claim.RULES)), name
        assert method.startswith("Measured"), name
        for run in results.get(name, {}).values():
            assert {key for rule in claim.RULES for key in rule.names} <= run.keys(), name


def test_the_page_is_what_the_results_say(claims, monkeypatch, tmp_path):
    before = claims.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(claims, "PAGE", tmp_path / "claims.md")
    claims.PAGE.write_text(before, encoding="utf-8")
    claims.write()
    assert claims.PAGE.read_text(encoding="utf-8") == before


def test_the_sampled_token_is_unbiased_and_a_baseline_leaves_it_so(claims):
    from claims import baseline, variance

    exact = variance.exact_moments({"full": variance.ReverseKL(), **baseline.signals(2)}, seed=3)
    mean, spread = exact["full"]
    for name in ("none", "exact", "likeliest"):
        assert float((exact[name][0] - mean).norm()) <= 1e-9 * float(mean.norm())
        assert exact[name][1] > spread
    assert exact["exact"][1] < exact["none"][1]


def test_a_dropped_tail_pulls_a_student_from_its_teacher(claims):
    from claims import tail

    from opd_lightning.objective import ReverseKL, Support

    teacher = tail.random_logits(tail.STATES, tail.IDS, 5)
    slopes = {r: tail.slope(ReverseKL(Support("student", 4, r)), teacher, teacher).norm() for r in ("tail", "drop")}
    assert slopes["tail"] < 1e-9 < 1e-3 < slopes["drop"]
