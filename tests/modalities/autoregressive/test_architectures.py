"""docs/architectures.md is true of the transformers that is installed, and nothing trains on wrong log-probs."""

from __future__ import annotations

import pytest
import transformers

from tests.modalities.autoregressive.architectures import PAGE, Found, in_a_process, kinds, page


def test_the_page_lists_every_architecture():
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip("the page is of another version")
    assert not [kind for kind in kinds() if f"`{kind}`" not in text]


@pytest.mark.parametrize(
    ("kind", "verdict", "why"),
    [
        ("llama", "works", "DecodeLoop"),
        ("rwkv", "works with generate", "one row at a time: its rows influence each other"),
        ("bert", "refused", "its logits are not head(hidden states)"),
    ],
)
def test_one_of_each(kind, verdict, why):
    found = in_a_process(kind)
    assert found.verdict == verdict, found
    assert why in found.why


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_causal_language_model_of_transformers():
    """Rewrites the page, which is part of the repository: what changed shows in its difference."""
    found: list[Found] = [in_a_process(kind) for kind in kinds()]
    assert not [one for one in found if one.verdict in ("wrong", "unreadable")]
    assert sum(one.verdict != "not built" for one in found) > 0.75 * len(found), "built tiny"
    PAGE.write_text(page(found), encoding="utf-8")
