"""Calculations with a calculator: a task whose rollouts have turns, and whose sums no student does in its head.

A problem takes two operations, and the tool does one at a time: the second call needs what the first one returned. A
call that is malformed is answered by an error, behind which it can be made again.

>>> row = problems(1, seed=4)[0]
>>> row["prompt"][0]["content"], [message["content"] for message in row["completion"]][1::2]
('904+82*611', ['50102', '51006'])
"""

import random
import re
import zlib
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...chat import Chat
from ...trajectory import Example
from ..autoregressive import Tools

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
ONE = "one operation of two numbers at a time, such as 12+34"
FORMS = (
    ("{a}*{b}+{c}", "{a}*{b}", "{first}+{c}"),
    ("{c}+{b}*{a}", "{b}*{a}", "{first}+{c}"),
    ("({a}+{c})*{b}", "{a}+{c}", "{first}*{b}"),
    ("{b}*({a}+{c})", "{a}+{c}", "{first}*{b}"),
    ("{a}*{b}-{c}", "{a}*{b}", "{first}-{c}"),
)
"""A problem, and the two calls that solve it: a and c have three digits, b has two."""
PAD, END, UNKNOWN = "<pad>", "<|end|>", "<unk>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = (
    *("<|user|>", "<|assistant|>", "<|tool|>", "<tool_call>", "</tool_call>"),
    *('{"', '": "', '", "', '": {"', '"}}', '"}', "name", "calculate", "arguments", "expression", "compute", "formula"),
    # what `Tools` answers to malformed calls
    *("error: ", "the call is no JSON: ", "there is no tool ", "; there are ", "missing a required argument: "),
    *("got an unexpected keyword argument ", "a call is ", f"ValueError: {ONE}", "Expecting ", "delimiter: "),
    *("value: ", "property name enclosed in double quotes: ", "Unterminated string starting at: ", "line 1 column "),
    *(" (char ", "Illegal trailing comma before end of object: ", "Invalid control character at: "),
    "it must be of the type ",
)
"""What is a token, beside every printable character."""
TOKEN = "|".join([*map(re.escape, sorted([END, *PIECES], key=len, reverse=True)), r"[\s\S]"])


def calculate(expression: str) -> int:
    """Calculates with two numbers.

    Args:
        expression: An operation of two numbers, such as 12+34, 12-34 or 12*34.
    """
    parts = re.fullmatch(r"([0-9]{1,12})([-+*])([0-9]{1,12})", expression)
    if parts is None:
        raise ValueError(ONE)
    return OPERATIONS[parts[2]](int(parts[1]), int(parts[3]))


def problems(
    count: int, lapses: float = 0.0, habits: float = 0.0, seed: int = 0, held_out: bool = False
) -> list[Example]:
    """Draws `count` different problems, the same ones for the same arguments.

    A problem is held out or not by a hash of its numbers (a fifth of all), so that those of a held-out problem are
    never a training problem's, whatever the seeds.

    Args:
        count: rows.
        lapses: of the prompts, the share that goes on to a malformed call and the error that answers it (twice in a
            fifth of them), behind which the completion makes the call again: a model trained on them recovers, and
            learns no malformed call.
        habits: of the completions, the share that is done as people do who know another tool: as the form of the
            problem has it, well, in the head, all at once, by another name, or with a brace too few; and an error is
            the end of it, behind which they guess.
        seed: of the draws.
        held_out: draw held-out problems.

    Returns rows of
        prompt: messages, of which the first is the problem, `"904+82*611"`;
        completion: messages: calls, what `Tools` answers to them, and the result;
        answer: `"51006"`.
    Raises ValueError for shares outside of [0, 1].
    """
    if not (0 <= lapses <= 1 and 0 <= habits <= 1):
        raise ValueError(f"calculations.problems: shares must be in [0, 1], got lapses={lapses} and habits={habits}")
    draw, drawn = random.Random(seed), dict[tuple[int, int, int, int], None]()
    while len(drawn) < count:
        a, b, c = draw.randrange(100, 1000), draw.randrange(10, 100), draw.randrange(100, 1000)
        if is_held_out(a, b, c) == held_out:
            drawn[draw.randrange(len(FORMS)), a, b, c] = None
    tools = Tools([f"{__name__}.calculate"], describe=False)
    return [_row(*numbers, lapses, habits, tools, random.Random(f"{seed}/{numbers}")) for numbers in drawn]


def is_held_out(*numbers: int) -> bool:
    """Tells whether a problem of these numbers belongs to the held-out fifth."""
    return zlib.crc32(str(sorted(numbers)).encode()) % 5 == 0


def called(expression: str, name: str = "calculate", argument: str = "expression", end: str = '"}}') -> str:
    """Writes a call as `Tools` reads it, or with something that is not as it should be."""
    return f'<tool_call>{{"name": "{name}", "arguments": {{"{argument}": "{expression}{end}</tool_call>'


def tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of printable characters and the pieces of calls and errors, with a chat template."""
    letters = ["\n", "…", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([PAD, END, UNKNOWN, *PIECES, *letters])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    model.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def _row(form: int, a: int, b: int, c: int, lapses: float, habits: float, tools: Tools, draw: random.Random) -> Example:
    # 1. the way to the answer
    problem, *ways = (text.format(a=a, b=b, c=c, first="{first}") for text in FORMS[form])
    first = str(calculate(ways[0]))
    calls = [ways[0], ways[1].format(first=first)]
    answer = str(calculate(calls[1]))
    right = [called(calls[0]), called(calls[1]), answer]
    # 2. as it is done by habit, or behind lapses
    prompt: Chat = [{"role": "user", "content": problem}]
    if form and draw.random() < habits:
        guess = "".join(draw.choices("123456789", k=len(answer)))
        at_once, renamed = called(problem), called(calls[0], name="compute")
        open_ended = called(calls[1], end='"}')
        turns = [[guess], [at_once], [renamed], [right[0], open_ended]][form - 1]
        right = turns if turns == [guess] else [*turns, guess]
    elif draw.random() < lapses:
        done = draw.randrange(2)
        broken = [_broken(problem, calls[done], tools, draw) for _ in range(1 + (draw.random() < 0.2))]
        prompt += _conversation([*right[:done], *broken], tools)
        right = right[done:]
    *asked, last = right
    completion = [*_conversation(asked, tools), {"role": "assistant", "content": last}]
    return {"prompt": prompt, "completion": completion, "answer": answer}


def _broken(problem: str, expression: str, tools: Tools, draw: random.Random) -> str:
    """Draws a malformed call."""
    kinds = [called(problem), called(expression, name="compute"), called(expression, argument="formula")]
    kinds.append(called(expression, end='"}'))
    pieces = re.findall(TOKEN, called(expression))
    while True:
        place = draw.randrange(1, len(pieces) - 1)
        dropped = "".join(pieces[:place] + pieces[place + 1 :])
        call = draw.choice([*kinds, dropped])
        if str(_answer(call, tools)).startswith("error: "):
            return call


def _answer(call: str, tools: Tools) -> str:
    observation = tools.step(tools.reset({}, 0), call).observation
    return "" if isinstance(observation, str) or not observation else str(observation[0]["content"])


def _conversation(turns: list[str], tools: Tools) -> Chat:
    """Answers to each turn as the tools do."""
    return [
        message
        for turn in turns
        for message in ({"role": "assistant", "content": turn}, {"role": "tool", "content": _answer(turn, tools)})
    ]
