"""What `opd check` finds in a setting that writes tokens: rows, what rewards make of answers, learning rate, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from ...finding import Finding
from ...fingerprint import digests
from ...policy import Policy
from ...pretrained import Pretrained
from ...printable import quoted
from ...progress import phase
from ...rows import location_of, row_of
from ...splits import rows_of
from ...teacher import EMA, Frozen, Initial
from ...trajectory import Example, Trajectories
from .advice import FAR, learning_rate
from .audit import Audited, readings
from .elsewhere.other_tokenizer import OtherTokenizer
from .memory import Plan, Shape
from .models import bare
from .passes import pass_limits

SHOWN, TRIED, LOOKED_AT = 3, 8, 64
"""Rows that are written out, whose answers are given to the reward, and whose longest prompt memory is computed for."""
PROMPT = 512
"""Tokens of a prompt that memory is computed for where no rows were read."""
IMAGES = ("image", "images")
"""Columns that may hold what a prompt asks about."""
WIDTH = 16
"""Bytes of a digest, so that two rows are not taken for one."""
MARKED = 400
"""Characters of a rollout that are written out, with the id of each trained step."""


class Found(Audited, Protocol):
    """Interface of a setting that is looked at."""

    columns: Any
    reward: Any
    objective: Any
    pass_tokens: int | None

    @property
    def trainer(self) -> Any: ...
    def reward_of(self, completion: Any, example: Example) -> float | None: ...
    def parsed(self, completion: str, example: Example) -> dict[str, Any]: ...
    def trained_parameters(self) -> list[Any]: ...
    def decode_steps(self, trajectories: Trajectories) -> list[list[str]]: ...


class Foreseen:
    """Mixin of what a setting that writes tokens tells `opd check`."""

    def findings(self, examples: list[Example], acted: Trajectories, folder: Path) -> Iterator[Finding]:
        """Looks at rows, rewards and rates (`Setting.findings`)."""
        return findings(cast(Found, self), examples, acted)

    def forecast(self, trainer: Any, device_bytes: float | None) -> Plan:
        """Computes memory (`Setting.forecast`)."""
        on_gpu = device_bytes is not None or trainer.strategy.root_device.type != "cpu"
        return plan_of(cast(Found, self), trainer, on_gpu)


def findings(module: Found, examples: list[Example], acted: Trajectories) -> Iterator[Finding]:
    """Looks at rows as each policy reads them, at what the reward makes of them, and at the learning rate."""
    yield lengths(module, examples)
    yield from held_out(module)
    for number, example in enumerate(acted.examples[:SHOWN]):
        details = [*readings(module, example), ("it wrote, trained", _marked(module, acted, number))]
        yield Finding(f"row {number + 1}", "told", "as each policy reads it, and what the student wrote", "", details)
    if module.reward is not None:
        yield from rewarded(module, examples)
    yield rate(module)


def lengths(module: Found, examples: list[Example]) -> Finding:
    """Counts tokens of the student's prompts."""
    student = module.policies["student"]
    counted = sorted(len(module.prompt_ids(row, student)) for row in module.shown(examples))
    middle = counted[len(counted) // 2]
    text = f"prompts of {counted[0]} to {counted[-1]} tokens (median {middle}) in the first {len(counted)} rows"
    return Finding("lengths", "good", f"{text}; at most {module.rollout.horizon} new ones")


def held_out(module: Found) -> Iterator[Finding]:
    """Compares what held-out rows ask with what training rows do: the prompt, with its images."""
    train, held = (rows_of(module.trainer, split, "opd check") for split in ("train", "validation"))
    if not train or not held:
        return
    columns = [*dict.fromkeys((*module.columns, *IMAGES))]
    with phase("comparing held-out rows with those of training", len(train) + len(held)):
        trained = {digest: i for i, digest in reversed([*enumerate(digests(train, WIDTH, columns))])}
        doubles = [(i, trained[digest]) for i, digest in enumerate(digests(held, WIDTH, columns)) if digest in trained]
    if not doubles:
        yield Finding("held out", "good", f"none of {len(held):,} held-out rows asks what a training row does")
        return
    pairs = "; ".join(f"{location_of(row_of(held, i))} as {location_of(row_of(train, k))}" for i, k in doubles[:SHOWN])
    text = f"{len(doubles):,} of {len(held):,} held-out rows ask what a training row does: {pairs}"
    text += "; …" if len(doubles) > SHOWN else ""
    advice = (
        "val/accuracy is measured there on what is trained: leave the doubles out, or name a file of others in "
        "data.validation"
    )
    yield Finding("held out", "doubtful", text, advice)


def _marked(module: Found, acted: Trajectories, row: int) -> str:
    """Writes a rollout with the id of each trained step: ``'4' 6 '6' 8``."""
    (steps,) = module.decode_steps(acted.select(torch.tensor([row])))
    ids = acted.actions[row][acted.mask[row]].tolist()
    text = " ".join(f"{step!r} {token}" for step, token in zip(steps, ids, strict=True))
    return quoted(text, MARKED)[1:-1]


# -- rewards --------------------------------------------------------------------------------------------------------


def rewarded(module: Found, examples: list[Example]) -> Iterator[Finding]:
    """Gives the reward a row's own answer in several forms, another row's, and nothing."""
    rows = [row for row in examples if any(_forms(module, row))][:TRIED]
    if not rows:
        text = "no row has an answer or a completion to try it with"
        yield Finding("reward", "told", text)
        return
    # 1. the form that scores best over the rows
    forms = {name for row in rows for name in _forms(module, row)}
    scores = {name: [_score(module, _forms(module, row).get(name), row) for row in rows] for name in forms}
    best = max(sorted(forms), key=lambda name: sum(score or 0.0 for score in scores[name]))
    right, gold = rows[0], _forms(module, rows[0]).get(best)
    own = scores[best][0]
    # 2. an answer of another row, the worst of them, since some may be right here, too; and nothing
    others = {f for row in rows[1:] if (f := _forms(module, row).get(best)) not in (None, gold)}
    other = min(sorted(others), key=lambda form: _score(module, form, right) or 0.0, default=None)
    wrong, empty = _score(module, other, right), _score(module, "", right)
    where = f"{location_of(right)}: " if location_of(right) else ""
    tried = f"{where}its own answer {quoted(gold)} {own}, another row's {quoted(other)} {wrong}, nothing {empty}"
    # 3. the verdict
    if own is None and wrong is None and empty is None:
        yield Finding("reward", "doubtful", f"it abstains: {tried}", "does it read the columns that the rows have?")
    elif own is not None and empty is not None and empty < own and wrong is not None and own <= wrong:
        advice = "is it right here, too, as places that overlap are? If not, the reward can't tell them apart"
        yield Finding("reward", "doubtful", tried, advice)
    elif own is None or (wrong is not None and own <= wrong) or (empty is not None and own <= empty):
        advice = (
            "no form of the right answer is worth more than a wrong one: has it the form that the reward looks for, "
            f"and is that in the rows? Tried: {', '.join(sorted(forms))} (docs/rewards.md)"
        )
        yield Finding("reward", "bad", tried, advice)
    else:
        yield Finding("reward", "good", f"{tried} ({best})")


def _forms(module: Found, row: Example) -> dict[str, str]:
    """Writes a row's own answer in the forms that verifiers look for."""
    student = module.policies["student"]
    (reading,) = module.shown([row])
    forms = {"completion": module.answered(row, reading, student).get("completion"), "solution": row.get("solution")}
    answer = row.get("answer")
    if isinstance(answer, str | int | float) and str(answer).strip():
        after = getattr(module.reward, "after", "")
        forms |= {"answer": str(answer), "boxed": f"\\boxed{{{answer}}}", "sentence": f"The answer is {answer}."}
        forms |= {"marked": f"{after}{answer}"} if after else {}
    return {name: form for name, form in forms.items() if isinstance(form, str) and form.strip()}


def _score(module: Found, text: str | None, row: Example) -> float | None:
    return None if text is None else module.reward_of(text, row | module.parsed(text, row))


# -- learning rate --------------------------------------------------------------------------------------------------


def rate(module: Found) -> Finding:
    """Compares the learning rate with what models of this size are trained with."""
    (optimizer,) = module.trainer.optimizers
    given = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    model, spec = bare(module.policies["student"].model), module._student_spec
    size = sum(parameter.numel() for parameter in model.parameters())
    usual = learning_rate(size, spec.lora is not None)
    trained = sum(parameter.numel() for parameter in module.trained_parameters())
    text = f"{given:g}, where {trained:,} of {size:,} parameters are trained; {usual:g} is what one begins with"
    if usual / FAR <= given <= usual * FAR:
        return Finding("learning rate", "good", text)
    return Finding("learning rate", "doubtful", text, f"it is {max(given / usual, usual / given):.0f} times off")


# -- memory ---------------------------------------------------------------------------------------------------------


def plan_of(module: Found, trainer: Any, on_gpu: bool) -> Plan:
    """Collects what decides how much memory a step of the configured run takes.

    Args:
        module: whose models need not be loaded; where they are not, prompts are `PROMPT` tokens long.
        trainer: of the run.
        on_gpu: whether it runs on a GPU rather than on a CPU.
    """
    # 1. the longest prompt of the first rows
    spec, rollout = module._student_spec, module.rollout
    prompt = rollout.max_prompt_length or PROMPT
    if module.policies and (rows := rows_of(trainer, "train", "the forecast of memory")):
        prompts = module.shown([row_of(rows, i) for i in range(min(len(rows), LOOKED_AT))])
        prompt = max(len(module.prompt_ids(row, module.policies["student"])) for row in prompts)
    # 2. models and sizes
    own = {name: weights.pretrained for name, weights in _with_models(module).items()}
    shapes = [(_shape(module, name, of_teacher), _bits(of_teacher, trained=False)) for name, of_teacher in own.items()]
    shapes.sort(key=lambda of_one: of_one[0].layers * of_one[0].hidden * of_one[0].inner)
    teacher, teacher_bits = shapes.pop() if shapes else (None, 16)
    copied = sum(isinstance(entry.weights, Initial | EMA) for entry in module.teachers.values())
    micro, per_generation = rollout.micro_batches(trainer.accumulate_grad_batches)
    limit = pass_limits(torch.device("cuda" if on_gpu else "cpu"), module.pass_tokens)[0]
    return Plan(
        student=_shape(module, "student", spec),
        teacher=teacher,
        others=tuple(shapes),
        # adapters are switched off for a teacher, but not for a thread
        copies=(0 if spec.lora else copied) + bool(rollout.max_staleness),
        prompt=prompt,
        completion=rollout.horizon,
        lora=0 if spec.lora is None else spec.lora.r,
        bits=_bits(spec, trained=spec.lora is None),
        teacher_bits=teacher_bits,
        adam=8 if "8bit" in _optimizer_name(module) else 32,
        rows=micro * per_generation,
        micro=micro,
        checkpointing=spec.gradient_checkpointing,
        mixed="16" in str(trainer.precision),
        cpu=not on_gpu,
        pass_tokens=None if limit == float("inf") else int(limit),
        chunk_mib=module.objective.chunk_mib,
        about=f"{micro * per_generation} rows of {prompt} + {rollout.horizon} tokens, {micro} at once",
    )


def _with_models(module: Found) -> dict[str, Any]:
    """Selects the teachers that are models of their own in this process, by name."""
    weights = {name: teacher.weights for name, teacher in module.teachers.items()}
    own = {name: w for name, w in weights.items() if isinstance(w, Frozen | OtherTokenizer)}
    return {name: w for name, w in own.items() if getattr(w, "server", None) is None}


def _shape(module: Found, name: str, spec: Pretrained) -> Shape:
    policy: Policy | None = module.policies.get(name)
    if policy is None:
        return Shape.of(spec.config())
    model = bare(policy.model)
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    beside = [p for name, p in model.named_parameters() if id(p) not in text and "lora_" not in name]
    frozen = sum(p.numel() for p in beside if not p.requires_grad)
    return Shape.of(model.config, sum(p.numel() for p in beside), frozen)


def _bits(spec: Pretrained, trained: bool) -> int:
    if spec.quantization:
        return int(spec.quantization.removesuffix("bit"))
    if trained or spec.dtype == "float32":
        return 32
    stored = str(getattr(spec.config(), "dtype", None) or "float32") if spec.dtype == "auto" else spec.dtype
    return 16 if "16" in stored else 32


def _optimizer_name(module: Any) -> str:
    optimizer = module._optimizer
    return str(getattr(optimizer, "func", optimizer)) + str(getattr(optimizer, "keywords", "")) + repr(optimizer)
