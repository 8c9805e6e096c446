"""Sums with a digit-by-digit scratchpad: the quickstart's verifiable task, small enough for a CPU.

>>> sums(1, digits=2, seed=3)[0]["solution"].endswith("#" + sums(1, digits=2, seed=3)[0]["answer"])
True
"""

import random
import zlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789+=# ?"
PAD, EOS = "<pad>", "<eos>"


def sums(
    count: int, digits: int = 4, seed: int = 0, held_out: bool = False, hinted: float = 0.0
) -> list[dict[str, str]]:
    """Draws `count` different problems, the same ones for the same arguments.

    A problem is held out or not by a hash of its two operands in any order, so that no held-out problem
    (a fifth of them all) is ever a training problem, nor its mirror image, whatever the seeds.

    A share `hinted` of the prompts begins with the solution and a `?`: a model trained on some of them can later be
    its own teacher, shown what it will not have at test time.

    Returns rows of
        prompt: `"4821+1937="`, both operands with exactly `digits` digits;
        solution: `"1+7+0=08 2+3+0=05 8+9+0=17 4+1+1=06 #6758"`, digits from the right, each as
            `first+second+carry=total`, then the answer after a `#`;
        completion: the solution;
        answer: `"6758"`;
        other_prompt: the prompt of another row, without its solution; empty where there is no other.
    Raises ValueError when there are fewer than `10 * count` pairs of operands.
    """
    low, high = 10 ** (digits - 1), 10**digits
    if count * 10 > (high - low) ** 2:
        raise ValueError(
            f"sums: {count} different problems of {digits} digits asked for, at most {(high - low) ** 2 // 10} "
            "can be drawn; use more digits or a smaller count"
        )
    draw = random.Random(seed)
    problems: dict[tuple[int, int], None] = {}
    while len(problems) < count:
        pair = draw.randrange(low, high), draw.randrange(low, high)
        if is_held_out(*pair) == held_out:
            problems[pair] = None
    hints = random.Random(seed + 1)
    others = [_prompt(*pair) if count > 1 else "" for pair in [*problems][1:] + [*problems][:1]]
    return [_row(*pair, hints.random() < hinted, other) for pair, other in zip(problems, others, strict=True)]


def is_held_out(first: int, second: int) -> bool:
    """Tells whether `first + second`, and so `second + first`, belongs to the held-out fifth."""
    small, large = sorted((first, second))
    return zlib.crc32(f"{small}+{large}".encode()) % 5 == 0


def scratchpad(first: int, second: int) -> str:
    """Writes the worked steps of a sum of two numbers with equally many digits."""
    steps, carry = [], 0
    for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return " ".join([*steps, f"#{first + second}"])


def character_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """Builds a tokenizer of characters, `<pad>` and `<eos>`, without a chat template, padding on the left.

    A character outside the alphabet raises when encoded, instead of vanishing.
    """
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _prompt(first: int, second: int) -> str:
    return f"{first}+{second}="


def _row(first: int, second: int, hinted: bool, other: str) -> dict[str, str]:
    solution, prompt = scratchpad(first, second), _prompt(first, second)
    return {
        "prompt": f"{solution}?{prompt}" if hinted else prompt,
        "answer": str(first + second),
        "solution": solution,
        "completion": solution,
        "other_prompt": other,
    }
