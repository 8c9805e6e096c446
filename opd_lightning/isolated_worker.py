"""Worker process in which rewards that read mathematics or Python score completions (see `isolated.Isolated`).

Run as a script, so that it starts without torch: ``python -P isolated_worker.py math_verify|reasoning_gym``. JSON lines
[arguments, timeout in seconds] in; a line each out: {"value": …} or {"failure": why there is none}.

Completions are never executed: where the libraries call `eval`, `evaluate` stands in for it, which knows numbers,
containers, operators and sympy's functions alone. Besides, once everything is imported, the process can't start
another one, open a socket or write a file; its memory is limited, and its time by the process that it serves.
"""

import ast
import importlib
import json
import operator
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY = 4 << 30
LARGEST_POWER = 1 << 17  # bits of a result; beyond it only time is lost

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_CONTAINERS: dict[type[ast.AST], Callable[..., Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}
# of sympy's functions that are no classes, and of Python's
_FUNCTIONS = frozenset({"sqrt", "cbrt", "root", "real_root", "abs", "pow"})


def evaluate(source: Any, names: dict[str, Any] | None = None, local: dict[str, Any] | None = None) -> Any:
    """Evaluates an expression that only computes, in place of `eval`; ``source`` is text or its syntax tree.

    Raises:
        ValueError: it holds anything else (an attribute, a comprehension, a call of what is no function of sympy's).
    """
    tree = ast.parse(source.strip(), mode="eval") if isinstance(source, str) else source
    return _value(tree.body, {**(names or {}), **(local or {})})


def _value(node: ast.AST, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if type(node) in _CONTAINERS:
        return _CONTAINERS[type(node)](_value(item, names) for item in node.elts)  # type: ignore[attr-defined]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, names) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(value, names) for value in node.values), strict=True))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, names), _value(node.right, names)
        _refuse_vast(node.op, left, right)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Name) and _computes(node.id, names.get(node.id)):
        return names[node.id]
    if isinstance(node, ast.Call) and all(keyword.arg for keyword in node.keywords):
        function, arguments = _value(node.func, names), [_value(item, names) for item in node.args]
        # a power that is called, checked as the operator is
        if getattr(function, "__name__", "") in ("Pow", "pow") and len(arguments) > 1:
            _refuse_vast(ast.Pow(), *arguments[:2])
        return function(*arguments, **{str(k.arg): _value(k.value, names) for k in node.keywords})
    raise ValueError(f"an expression with {type(node).__name__} is not evaluated")


def _computes(name: str, value: Any) -> bool:
    """Tells whether a name stands for a number, a symbol or a function of sympy's."""
    basic = sys.modules["sympy"].Basic if "sympy" in sys.modules else ()
    return isinstance(value, basic) or (isinstance(value, type) and issubclass(value, basic)) or name in _FUNCTIONS


def _refuse_vast(operation: ast.AST, left: Any, right: Any) -> None:
    """Refuses powers and shifts whose result has too many digits.

    Raises:
        ValueError: the result would have more than `LARGEST_POWER` bits.
    """
    if isinstance(operation, ast.Pow | ast.LShift):
        try:
            bits = int(right) * (1 if isinstance(operation, ast.LShift) else max(int(left).bit_length(), 1))
        except (TypeError, ValueError, OverflowError):
            return
        if abs(bits) > LARGEST_POWER:
            raise ValueError("a number with too many digits")


def _math_verify() -> Callable[..., Any]:
    math_verify = importlib.import_module("math_verify")

    def right(answer: str, completion: str) -> bool | str:
        # Of a bare "3\sqrt{2}" math-verify would read the 3 alone: it looks for LaTeX between dollars.
        bare = re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[|\n", answer) is None
        gold = math_verify.parse(f"${answer}$" if bare else answer, parsing_timeout=None)
        if not gold:
            return "answer not understood"
        guess = math_verify.parse(completion, parsing_timeout=None)
        return bool(math_verify.verify(gold, guess, timeout_seconds=None))

    return right


def _reasoning_gym() -> Callable[..., Any]:
    gym = importlib.import_module("reasoning_gym")
    scorers: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym":
            # globals of a module go before builtins
            module.eval, module.exec = evaluate, _refuse  # type: ignore[attr-defined]

    def score(task: str, completion: str, entry: dict[str, Any]) -> float | str:
        if task not in scorers:
            try:
                scorers[task] = gym.get_score_answer_fn(task)
            except ValueError:
                return "unknown task"
        return float(scorers[task](completion, {**entry, "metadata": decoded(entry["metadata"])}))

    return score


def decoded(metadata: str) -> Any:
    """Reads the column `metadata`, JSON or a Python literal; nothing in it is executed."""
    try:
        return json.loads(metadata)
    except ValueError:
        return ast.literal_eval(metadata)


def _refuse(*_: Any) -> None:
    raise ValueError("nothing is executed here")


def _isolate() -> None:
    """Limits the process to computing and answering, for good."""
    if "sympy" in sys.modules:
        parser: Any = importlib.import_module("sympy.parsing.sympy_parser")
        # what sympy would compile is a syntax tree, which `evaluate` reads as it is
        parser.eval, parser.compile = evaluate, lambda tree, *_: tree
    # A tower of powers would take all memory well within the time limit.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    sys.addaudithook(_refuse_effects)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EFFECTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "webbrowser.", "urllib.", "signal.")
_HARMLESS = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk"})  # an import looks around


def _refuse_effects(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or (event.startswith(_EFFECTS) and event not in _HARMLESS):
        raise PermissionError(f"{event} is not for what a model wrote")


def serve(kind: str) -> None:
    """Answers until nobody asks any more."""
    # libraries in C print to descriptor 1: answers get another one
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # what libraries print is no answer
    answer = {"math_verify": _math_verify, "reasoning_gym": _reasoning_gym}[kind]()
    _isolate()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        arguments, timeout = json.loads(line)
        # Normally the one who asks kills a late worker; the alarm ends one who has nobody left.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        try:
            value = answer(*arguments)
            reply = {"failure": value} if isinstance(value, str) else {"value": value}
        except Exception as error:
            reply = {"failure": type(error).__name__}
        print(json.dumps(reply), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(sys.argv[1])
