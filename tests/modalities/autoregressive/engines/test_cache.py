"""Keys and values of rows being written, and of the prompts that they share."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from opd_lightning.modalities.autoregressive.engines.cache import RowCache, SharedPrompts


def test_the_cache_shows_a_window_of_its_rows():
    """Rows move, columns that only rows before them had are left out, and what was written stays."""
    read, row = DynamicCache(), torch.tensor([0, 0, 1, 1])
    keys = torch.randn(2, 1, 3, 4)
    read.update(keys, -keys, 0)
    cache = RowCache(read, row, torch.tensor([[True, True, True], [False, False, True]]), horizon=4)
    assert cache.get_seq_length() == 3
    assert cache.attention_mask().tolist() == [[True] * 4] * 2 + [[False, False, True, True]] * 2
    new = torch.randn(4, 1, 1, 4)
    shown, values = cache.update(new, -new, 0)
    assert torch.equal(shown, torch.cat([keys[row], new], 2))
    assert torch.equal(values, -shown)
    cache.advance()
    cache.keep(torch.tensor([3, 2]))
    assert cache.attention_mask() is None
    assert cache.get_seq_length() == 2
    newer = torch.randn(2, 1, 1, 4)
    shown, _ = cache.update(newer, -newer, 0)
    assert torch.equal(shown, torch.cat([keys[[1, 1], :, 2:], new[[3, 2]], newer], 2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_shared_prompts_are_what_copies_would_be(rows, seed):
    """Scores and sums, for any number of rows of any prompt, and after some have left."""
    generator = torch.Generator().manual_seed(seed)
    prompts, heads, each, size, width = max(rows) + 1, 2, 3, 4, 5
    read, keys, values = DynamicCache(), *torch.randn(2, prompts, heads, width, size, generator=generator)
    read.update(keys, values, 0)
    seen = torch.arange(width) >= torch.randint(width, (prompts, 1), generator=generator)
    row = torch.tensor(rows)
    shared = SharedPrompts(read, row, seen)
    while len(row):
        queries = torch.randn(len(row), heads, each, size, generator=generator)
        shares = torch.rand(len(row), heads, each, width, generator=generator)
        scores = (queries @ keys[row].transpose(2, 3)).masked_fill(~seen[row][:, None, None], -torch.inf)
        assert torch.allclose(shared.scores(queries, 0), scores, atol=1e-5)
        assert torch.allclose(shared.read(shares, 0), shares @ values[row], atol=1e-5)
        going = torch.rand(len(row), generator=generator) < 0.6
        order = going.nonzero().squeeze(1)[torch.randperm(int(going.sum()), generator=generator)]
        row = row[order]
        if len(row):
            shared.keep(order)
