"""Tools: calls as chat templates write them, malformed ones, several in a turn; and a calculator that holds."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning import Rollout
from opd_lightning.environment import Episode
from opd_lightning.modalities.autoregressive import Calculator, Tools
from opd_lightning.modalities.autoregressive.calculator import LONGEST, WORKER, run_program
from opd_lightning.modalities.autoregressive.tools import read_calls
from tests.modalities.autoregressive.test_rendering import CHATML, GEMMA, renderer
from tests.tiny import CHAT_TEMPLATE, act, chat_tokenizer, make_module, make_rows, no_teacher, save_model

HERE = "tests.modalities.autoregressive.test_tools"


def add(first: int, second: int = 1) -> int:
    """Adds two numbers.

    Args:
        first: One of them.
        second: The other one.
    """
    return first + second


def shout(text: str) -> str:
    """Writes in capitals.

    Args:
        text: What is shouted.
    """
    if text == "boom":
        raise RuntimeError("too loud")
    return text.upper()


def undescribed(text):
    return text


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


HERMES = CHATML.replace(
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>",
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>',
)
LISTED = CHATML.replace(
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>",
    '[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]',
)
BARE = CHATML.replace(
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>",
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
)


@pytest.fixture
def tools() -> Tools:
    return Tools([f"{HERE}.add", f"{HERE}.shout"])


def answers(tools: Tools, text: str) -> list[str]:
    turn = tools.step(tools.reset({}, 0), text)
    assert turn.done == (not turn.observation)
    return [message["content"] for message in turn.observation or ()]  # type: ignore[index]


def test_a_turn_may_hold_several_calls_and_one_without_ends_the_episode(tools):
    assert answers(tools, "let me see\n" + called("add", first=3, second=4)) == ["7"]
    assert answers(tools, called("add", first=3) + "\n" + called("shout", text="a")) == ["4", "A"]
    assert answers(tools, "the answer is 7") == []
    episode = Episode(tools, {"prompt": "a"}, Rollout())
    assert [message["role"] for message in episode.step(called("add", first=1)).observation] == ["tool"]  # type: ignore[index]
    assert not episode.over
    episode.step("2")
    assert episode.over


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>\n{'name': 'add'}\n</tool_call>", "error: the call can't be read: "),
        ("<tool_call>", "error: the call can't be read: "),
        ("<tool_call>" + "[" * 100_000, "error: the call can't be read: "),
        ("<tool_call>3</tool_call>", 'error: a call is {"name": …, "arguments": {…}}'),
        ('<tool_call>{"name": 3}</tool_call>', 'error: a call is {"name": …, "arguments": {…}}'),
        (called("subtract"), "error: there is no tool 'subtract'; there are add, shout"),
        (called("add"), "error: add: missing a required argument: 'first'"),
        (called("add", first=1, third=2), "error: add: got an unexpected keyword argument 'third'"),
        (called("add", first="1"), "error: add: first is '1'; it must be of the type integer"),
        (called("add", first=True), "error: add: first is True; it must be of the type integer"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "error: add: arguments are [1]; they must be an"),
        ('<tool_call>{"name": "add", "arguments": "{"}</tool_call>', "error: JSONDecodeError: "),
        (called("shout", text="boom"), "error: RuntimeError: too loud"),
    ],
)
def test_a_malformed_call_is_answered_by_an_error(tools, text, error):
    (answer,) = answers(tools, text)
    assert answer.startswith(error)


def test_calls_may_have_their_arguments_as_text_and_be_wrapped(tools):
    wrapped = {"type": "function", "function": {"name": "add", "arguments": '{"first": 2}'}}
    assert answers(tools, f"<tool_call>{json.dumps(wrapped)}</tool_call>") == ["3"]
    assert read_calls('[{"name": "a"}, {"name": "b"}]', ("", "")) == [{"name": "a"}, {"name": "b"}]
    assert read_calls("the answer is {3}", ("", "")) == []


@pytest.mark.parametrize(
    ("template", "tags"),
    [(HERMES, ("<tool_call>", "</tool_call>")), (LISTED, ("[TOOL_CALLS]", "")), (BARE, ("", ""))],
)
def test_calls_are_read_as_the_chat_template_writes_them(tools, template, tags):
    made = renderer(template)
    tools.adopt(made)
    assert tools._tags == tags
    call = {"type": "function", "function": {"name": "add", "arguments": {"first": 3}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = made.render([{"role": "user", "content": "?"}, turn], {"prompt": "?"}).partition("assistant\n")[2]
    assert answers(tools, text.removesuffix("<|im_end|>\n")) == ["4"]


XML = CHATML.replace(
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>",
    "<tool_call>\n<function={{ c.function.name }}>\n{% for key, value in c.function.arguments.items() %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
)
READS_XML = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}


@pytest.mark.parametrize("whose", ["the tokenizer's", "set"])
def test_calls_in_another_format_are_read_by_a_response_template(whose):
    made = renderer(XML)
    template = READS_XML if whose == "set" else None
    if whose != "set":
        made.tokenizer.response_template = READS_XML
    tools = Tools([f"{HERE}.add", f"{HERE}.shout"], response_template=template)
    tools.adopt(made)
    turn = "".join(
        f"<tool_call>\n<function={name}>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
        for name, key, value in (("add", "first", "41"), ("shout", "text", "7"), ("add", "first", "x"))
    )
    assert answers(tools, f"I ask.\n{turn}") == ["42", "7", "error: add: first is 'x'; it must be of the type integer"]
    assert answers(tools, "<tool_call>\n<function=take>\n</function>\n</tool_call>") == [
        "error: there is no tool 'take'; there are add, shout"
    ]
    assert tools.step({"calls": 0}, "It is 42.").done


def test_a_malformed_call_that_a_response_template_can_t_read_is_answered_by_an_error():
    fields = {"open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json"}
    template = {**READS_XML, "fields": {"tool_calls": fields, "content": {"content": "text"}}}
    tools = Tools([f"{HERE}.add"], response_template=template)
    with pytest.raises(ValueError, match=r"which the response template reads as \[ValueError"):
        tools.adopt(renderer(XML))
    with pytest.raises(ValueError, match=r"which the response template reads as \[\{'name': 'name_of_a_tool'"):
        tools.adopt(renderer(HERMES))  # the format has a function around it
    wrapped = {**fields, "transform": {"type": "function", "function": "{content}"}}
    tools = Tools(
        [f"{HERE}.add"], response_template={**template, "fields": {**template["fields"], "tool_calls": wrapped}}
    )
    tools.adopt(renderer(HERMES))
    assert answers(tools, called("add", first=2)) == ["3"]
    (answer,) = answers(tools, '<tool_call>{"name": "add", "arguments": </tool_call>')
    assert answer.startswith("error: the call can't be read: ")
    assert answers(pickle.loads(pickle.dumps(tools)), called("add", first=2)) == ["3"]
    with pytest.raises(ValueError, match="that writes none; set tags"):
        tools.adopt(renderer(GEMMA))
    with pytest.raises(ValueError, match="by tags or by a response_template"):
        Tools([f"{HERE}.add"], tags=["<a>", "</a>"], response_template=template)


def test_a_template_that_writes_calls_otherwise_is_refused(tools):
    with pytest.raises(ValueError, match=r"writes a call as '<call>name_of_a_tool.*describe calls in the prompt"):
        tools.adopt(renderer(CHATML))
    set_by_hand = Tools([f"{HERE}.add"], tags=["<a>", "</a>"])
    set_by_hand.adopt(renderer(CHATML))
    assert answers(set_by_hand, '<a>{"name": "add", "arguments": {"first": 1}}</a>') == ["2"]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], r"Tools\.functions is empty"),
        (["nowhere.at.all"], r"Tools\.functions: 'nowhere.at.all' can't be imported"),
        ([f"{HERE}.undescribed"], r"Tools\.functions: .* can't be described: .*docstring"),
        ([f"{HERE}.add"] * 2, r"Tools\.functions: two functions are called 'add'"),
    ],
)
def test_functions_that_can_t_be_tools_are_named(functions, message):
    with pytest.raises(ValueError, match=message):
        Tools(functions)


def test_prompts_tell_policies_of_the_tools_and_observations_are_the_tools(tmp_path):
    folder = save_model(tmp_path / "model", tokenizer=chat_tokenizer(HERMES), max_position_embeddings=4096)
    tools = Tools([f"{HERE}.add"])
    module = make_module(folder, {}, no_teacher(), environment=tools, rollout=Rollout(batch_size=2, horizon=300))
    module.prepare_for_rows()
    student = module.policies["student"]
    prompt = module.renderer(student).prompt({"prompt": "1+2?"})
    assert "Adds two numbers." in prompt
    module.engine = Caller(module, called("add", first=1, second=2))
    acted = act(module, make_rows(2))
    text = module.tokenizer().decode(acted.actions[0][: int(acted.extent[0])])
    call = called("add", first=1, second=2)
    assert text == f"{call}<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    trained = module.tokenizer().decode(acted.actions[0][acted.mask[0]])
    assert trained == f"{call}<|im_end|>3<|im_end|>"
    assert acted.stopped.all()


class Caller:
    """An engine that writes a call, then an answer."""

    runs_the_model = False
    blends = False

    def __init__(self, module: Any, call: str) -> None:
        self.module, self.texts = module, [call, "3"]

    def begin(self, policy: Any, head: Any, prompts: Any, eos: Any, pad: int) -> Any:
        self.read, self.turn = [0] * len(prompts.examples), 0
        return self

    def write(self, rows: list[int], heard: Any, rollout: Rollout, seeds: Any, ended: Any = None) -> Any:
        ids = self.module.tokenizer()(self.texts[self.turn] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        self.turn += 1
        written = torch.tensor([ids] * len(rows))
        return written, torch.zeros(written.shape)

    def close(self) -> None: ...


def test_templates_that_tell_nobody_of_tools_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", tokenizer=chat_tokenizer(CHAT_TEMPLATE))
    module = make_module(folder, {}, no_teacher(), environment=Calculator())
    with pytest.raises(ValueError, match=r"model\.environment: the chat template of .* reads no 'tools'"):
        module.prepare_for_rows()
    make_module(folder, {}, no_teacher(), environment=Calculator(describe=False)).prepare_for_rows()
    raw = save_model(tmp_path / "raw")
    with pytest.raises(
        ValueError, match=r"model\.environment: .* has no chat template that would tell policies of tools"
    ):
        make_module(raw, {}, no_teacher(), environment=Calculator()).prepare_for_rows()
    gemma = save_model(tmp_path / "gemma", tokenizer=chat_tokenizer(GEMMA))
    with pytest.raises(ValueError, match=r"can't go on behind an observation of the role 'tool': roles must"):
        make_module(gemma, {}, no_teacher(), environment=Calculator(describe=False)).prepare_for_rows()


# -- the calculator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("2**10", "1024"),
        ("import math\nprint(math.comb(10, 3))\nmath.sqrt(16)", "120\n4.0"),
        ("from fractions import Fraction\nFraction(1, 3) + 1", "4/3"),
        ("x = 3", "(it printed nothing)"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax (<unknown>, line 1)"),
        ("'é' * 3", "ééé"),
    ],
)
def test_it_computes(code, answer):
    assert run_program(code, 20, 256, 1000) == answer


def test_it_is_a_tool():
    calculator = Calculator(seconds=20)
    (answer,) = calculator.step(calculator.reset({}, 0), called("python", code="sum(range(10))")).observation
    assert answer == {"role": "tool", "content": "45"}
    assert calculator.options["tools"][0]["function"]["parameters"]["required"] == ["code"]
    with pytest.raises(ValueError, match="Calculator: seconds=0, memory=256 and output=1000 must be positive"):
        Calculator(seconds=0)


ESCAPE = "[c for c in object.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__"
HOSTILE = {
    "endless": ("while True: pass", "no end within 1 s"),
    "sleep": ("import time\ntime.sleep(100)", "there is no module 'time' here"),
    "10 GB": ("x = bytearray(10**10)", "MemoryError"),
    "tower": ("9**9**9**9", "no end within 1 s|MemoryError"),
    "much": ("while True: print('x' * 10_000)", r"x{1000}… \[cut\]"),
    "recursion": ("f = lambda: f()\nf()", "RecursionError"),
    "nesting": ("eval('(' * 100_000)", "MemoryError|SyntaxError|signal"),
    "open": ("open('/etc/passwd').read()", "PermissionError: open is not allowed"),
    "write": ("open('FOLDER/left', 'w').write('x')", "PermissionError"),
    "os": ("import os\nos.fork()", "there is no module 'os' here"),
    "subprocess": ("__import__('subprocess').run('id')", "there is no module 'subprocess'"),
    "socket": ("import socket", "there is no module 'socket'"),
    "bomb": (f"while True: {ESCAPE}['fork']()", "PermissionError: os.fork is not allowed"),
    "system": (f"{ESCAPE}['system']('touch FOLDER/left')", "PermissionError: os.system is not allowed"),
    "exec": (f"{ESCAPE}['execv']('/bin/true', ['true'])", "PermissionError: os.exec is not allowed"),
    "kill": (f"{ESCAPE}['kill'](PARENT, 9)", "PermissionError|KeyError"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "environment": (f"dict({ESCAPE}['environ'])", r"^\{\}$|^\{'LC_CTYPE': 'C.UTF-8'\}$"),
    "descriptors": ("import sys\nsys.stdin.buffer.read()\nsys.stdout.buffer.raw.write(b'y')", "y"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_cost_a_message_and_leave_nothing_behind(name, tmp_path):
    code, answer = HOSTILE[name]
    code = code.replace("FOLDER", str(tmp_path)).replace("PARENT", str(os.getpid()))
    before = children()
    start = time.monotonic()
    text = run_program(code, 1.0 if "1 s" in answer else 20.0, 256, 1000)
    assert time.monotonic() - start < 60
    assert re.search(answer, text), text
    assert not list(tmp_path.iterdir())
    assert children() == before, "no process is left"


# what the kernel refuses when Python's own refusals are out of the way, as after a fault of Python
UNHOOKED = {
    "open": "import io; io.open('/etc/passwd')",
    "socket": "import socket; socket.socket()",
    "fork": "import os; os.fork()",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "unlink": "import os; os.unlink('/tmp/nothing')",
    "kill": "import os; os.kill(1, 0)",
}


@pytest.mark.parametrize("name", UNHOOKED)
def test_the_kernel_refuses_what_python_would_not(name):
    code = (
        f"import socket, os, io, sys; sys.path.insert(0, {str(WORKER.parent)!r}); import calculator_worker as worker\n"
    )
    code += f"assert worker.limit_calls()\ntry:\n    {UNHOOKED[name]}\nexcept OSError as error:\n"
    code += "    os.write(1, b'%d' % error.errno)\nos._exit(0)"
    python = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(python, capture_output=True, check=True).stdout == b"1", "not permitted"


def children() -> set[int]:
    return set(map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="utf-8").split()))


def test_a_program_that_is_too_long_is_not_run():
    assert (
        run_program("1" * (LONGEST + 1), 1, 256, 10)
        == f"error: the program has {LONGEST + 1} characters, {LONGEST} are read"
    )
