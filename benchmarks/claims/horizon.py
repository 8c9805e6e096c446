"""A short horizon keeps the accuracy at a share of the tokens.

Source: ESR, Less is More (2605.27028).

Measured on the text quickstart (60 updates on 32 rollouts, KL(student‖teacher)): whole rollouts of about 43 tokens
against rollouts that end after 24 and are trained there alone, with all weights and, as in the paper, with LoRA of rank
32. Accuracy is that of greedy texts of up to 56 tokens on 128 held-out problems.
"""

from __future__ import annotations

from opd_lightning.objective import ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained

from .runs import STUDENT, full_rollouts, make, train
from .verdict import at_least

UPDATES, SHORT = 60, 24


def measure(seed: int) -> dict[str, float]:
    full = full_rollouts(seed)
    short = train(make([Term(ReverseKL())], horizon=SHORT), seed, UPDATES)
    adapter = Pretrained(STUDENT, lora=Lora(r=32, alpha=64))
    lora = train(make([Term(ReverseKL())], student=adapter, horizon=SHORT), seed, UPDATES)
    return {
        "whole rollouts, % right": full.accuracy(UPDATES),
        "first 24 tokens, % right": short.accuracy(UPDATES),
        "first 24 tokens with LoRA, % right": lora.accuracy(UPDATES),
        "tokens, share of whole rollouts": short.tokens(UPDATES) / full.tokens(UPDATES),
        "accuracy kept, share": short.accuracy(UPDATES) / full.accuracy(UPDATES),
        "accuracy kept with LoRA, share": lora.accuracy(UPDATES) / full.accuracy(UPDATES),
    }


RULES = [at_least("accuracy kept, share", 0.95), at_least("accuracy kept with LoRA, share", 0.95)]
TRIED = (
    "Longer runs, a horizon of 36 and a window that grows are in [horizons.md](horizons.md): the first two end at 0 "
    "%, the third two points below whole rollouts with 13 % fewer tokens."
)
