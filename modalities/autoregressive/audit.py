"""The start-up audit of a token-writing setting: rows of its table, and refusals."""

from __future__ import annotations

import hashlib
import math
from itertools import groupby
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ...comparisons import ACTED, TRAINING
from ...distribution import Head
from ...noise import noise
from ...note import Note, stand_ins
from ...policy import Policy
from ...pretrained import Pretrained
from ...printable import printable, quoted
from ...rollout_settings import Rollout
from ...rows import reason_of
from ...sharding import gathered
from ...teacher import Elsewhere, Teacher
from ...trajectory import Example
from .engines import RolloutEngine
from .engines.trial import Trial, check_causal, check_head, problem_with_shared_prefix
from .models import bare, check_tokenizer, context_length, eos_ids, listed, output_embeddings, rope_kinds, rope_switch
from .observing import Given
from .rendering import Renderer
from .view import FirstOf

SHOWN, RUN = 500, 3
"""Characters of a prompt that are printed, and equal tokens in a row that are written out."""


class Audited(Protocol):
    """Interface of a setting that the audit reads."""

    policies: dict[str, Policy]
    teachers: dict[str, Teacher]
    notes: dict[str, Note]
    rollout: Rollout
    engine: RolloutEngine
    trials: dict[str, Trial]
    chat_template_kwargs: dict[str, Any]
    _student_spec: Pretrained

    @property
    def vocabulary(self) -> int: ...
    @property
    def eos(self) -> list[int]: ...
    @property
    def padding_id(self) -> int: ...
    def tokenizer(self, policy: Policy | None = None) -> Any: ...
    def reads_as(self, policy: Policy) -> Policy: ...
    def renderer(self, policy: Policy) -> Renderer: ...
    def head(self, policy: Policy) -> Head: ...
    def filled_in(self, policy: Policy) -> list[int]: ...
    def shown(self, examples: list[Example]) -> list[Example]: ...
    def asked(self, example: Example) -> Example: ...
    def answered(self, example: Example, seen: Example, policy: Policy) -> Example: ...
    def given(self, policy: Policy, row: Example) -> Given: ...
    def written_as(self, tokens: list[int]) -> str: ...
    def suppressed(self) -> list[int]: ...
    def prompt_ids(self, example: Example, policy: Policy) -> Tensor: ...


def audit_rows(module: Audited) -> list[tuple[str, dict[str, str]]]:
    """Builds the rows of the table: a name, and a value for each role.

    Raises:
        ValueError: a teacher reads token ids differently, a head is not computed the way the objective assumes, or
            there is no stop token that could be written.
    """
    # 1. refusals
    student = module.policies["student"]
    if not any(i < module.vocabulary for i in module.eos):
        with_rows = f" with a row in its head and its embeddings (of {module.eos})" if module.eos else ""
        raise ValueError(f"{student.path}: the student has no stop token{with_rows}, so no rollout could end by itself")
    module.renderer(student).check_options("model.chat_template_kwargs")
    roles = module.policies.items()
    for name, policy in roles:
        kind = "student" if name == "student" else type(module.teachers[name].weights).__name__
        check_tokenizer(student, policy, module.vocabulary, kind)
        check_head(name, policy, module.head(policy))
        check_causal(policy, module.vocabulary)
    # 2. the table
    stops = {name: stop_ids(module, policy) for name, policy in roles}
    limits = {name: teacher.max_prompt_length for name, teacher in module.teachers.items()}
    limits["student"] = module.rollout.max_prompt_length
    actors = {"student", *module.rollout.policies}
    return [
        ("path", {name: policy.path for name, policy in roles}),
        ("weights", {name: _weights(module, name) for name, _ in roles}),
        (
            "parameters",
            {name: f"{sum(p.numel() for p in policy.model.parameters()):,}" for name, policy in roles},
        ),
        (
            "dtype",
            {name: str(next(policy.model.parameters()).dtype).removeprefix("torch.") for name, policy in roles},
        ),
        ("dropout", {name: _dropout(policy) for name, policy in roles}),
        (
            "tokens known / head rows",
            {n: f"{len(module.tokenizer(p))} / {output_embeddings(p).weight.shape[0]}" for n, p in roles},
        ),
        ("ids compared", {name: str(module.vocabulary) for name, _ in roles}),
        (
            "stop ids",
            {n: f"{i}{'' if i == module.eos else ' (differs: the student stops rollouts)'}" for n, i in stops.items()},
        ),
        ("rollouts by", {name: _engine(module, policy) for name, policy in roles if name in actors}),
        ("shared prefixes", {name: _prefixes(module, policy) for name, policy in roles}),
        ("chat template", {name: _template(module, name, policy) for name, policy in roles}),
        ("prompt limit", {name: str(limits.get(name) or context_length(policy)) for name, policy in roles}),
    ]


def check_horizon(module: Audited) -> None:
    """Refuses horizons that leave no room for a prompt.

    Raises:
        ValueError: rollouts are as long as the context of a policy that reads them, so that no prompt is short enough.
    """
    horizon = module.rollout.horizon
    for name, policy in module.policies.items():
        if horizon >= context_length(policy):
            key = "model.student" if name == "student" else f"model.teachers.{name}"
            raise ValueError(
                f"rollout.horizon is {horizon}, and the context of {key} ({policy.path}) is {context_length(policy)} "
                "tokens, which leaves none for a prompt; lower the horizon"
            )


def readings(module: Audited, example: Example, limit: int = SHOWN) -> list[tuple[str, str]]:
    """Lists the text that each policy reads of a row, special tokens included, and the tokens that are trained.

    Args:
        module: the setting.
        example: the row.
        limit: characters of each text.
    """
    (student_example,) = module.shown([example])
    student = module.policies["student"]
    prompt = module.prompt_ids(student_example, student).tolist()
    lines = [("student reads", _spelled(module, prompt, limit))]
    if (
        "dataset" in module.rollout.sources
        and module.answered(example, student_example, student).get("completion") is not None
    ):
        trained = given_ids(module, example, student_example, student).own
        lines.append(("given, trained", f"{_spelled(module, trained, limit)} = {quoted(trained)}"))
    if module.rollout.sources - {"dataset"}:
        ends = " or ".join(f"{module.tokenizer().decode([i])!r} = {i}" for i in module.eos)
        text = f"trained up to and including {ends}, at most {module.rollout.horizon} tokens"
        lines.append(("rollouts", text))
    missing = stand_ins(module.notes, example)
    for name, teacher in module.teachers.items():
        if teacher.view is not None and missing.keys() & {*teacher.view.columns}:
            lines += _without_notes(module, name, example | missing, limit)
            continue
        view = teacher.look(example)
        reader = reader_of(module, name)
        same = teacher.view is None and module.reads_as(reader) is student
        teacher_example = student_example if teacher.view is None or view is None else view
        ids = module.prompt_ids(teacher_example, module.reads_as(reader)).tolist()
        spelled = _spelled(module, ids, limit, module.reads_as(reader))
        text = "nothing of this row" if view is None else "the same" if same else spelled
        lines.append((f"{name} reads", text))
    return lines


def _without_notes(module: Audited, name: str, example: Example, limit: int) -> list[tuple[str, str]]:
    """Lists what a teacher will read once there are notes, of each view that it may be shown.

    As text: what stands for a note may have no tokens.
    """
    teacher = module.teachers[name]
    renderer = module.renderer(module.reads_as(reader_of(module, name)))
    views = teacher.view.views if isinstance(teacher.view, FirstOf) else [teacher.view]
    lines = []
    for number, view in enumerate(views):
        try:
            row = teacher.look(example, view)
            text = "nothing of this row" if row is None else quoted(renderer.prompt(module.asked(row)), limit)
        except ValueError:  # a view need not take what stands for a note
            text = "what notes will say of a rollout"
        lines.append((f"{name} reads" if number == 0 else f"{name}, or else", text))
    return lines


def reader_of(module: Audited, name: str) -> Policy:
    """Returns the policy that reads a teacher's prompts: the student, for one that has no model here."""
    weights = module.teachers[name].weights
    own = weights.policy if isinstance(weights, Elsewhere) else module.policies[name]
    return own or module.policies["student"]


def stop_ids(module: Audited, policy: Policy) -> list[int]:
    """Collects the ids that end a turn: a policy's own, and that of its template."""
    known = eos_ids(policy)
    own = module.renderer(policy).turn_end(known) if policy.processor.chat_template is not None else None
    return sorted({*known, *listed(own)})


def given_ids(module: Audited, example: Example, seen: Example, policy: Policy) -> Given:
    """Lists the ids of a row's given completion, which of them are trained, and what else was observed among them.

    Args:
        module: the setting.
        example: the row.
        seen: the row as the student is shown it.
        policy: the student, whose processor reads it.

    Raises:
        ValueError: as in `Renderer.completion`; an id that can be no action; ids that don't write the completion.
    """
    row = {**module.asked(seen), "completion": module.answered(example, seen, policy)["completion"]}
    if (ids := example.get("completion_ids")) is not None:
        given = Given(list(ids), [True] * len(ids))
        if not ids or module.written_as(given.ids) != row["completion"]:
            raise ValueError(
                f"completion_ids write {quoted(module.written_as(ids))}, and completion is {quoted(row['completion'])},"
                " so they were written with another tokenizer"
            )
    else:
        given = module.given(policy, row)
    if impossible := [i for i in given.own if i >= module.vocabulary or i in module.suppressed()]:
        token = module.tokenizer(policy).convert_ids_to_tokens(impossible[0])
        raise ValueError(f"the completion holds {token!r} (id {impossible[0]}), which no student could write")
    return given


def problem_with_row(module: Audited, example: Example) -> str | None:
    """Finds what is wrong with a row: its prompt, its completion, or a teacher's view of it; None if nothing is."""
    # 1. the student's prompt, and the completion
    (student_example,) = module.shown([example])
    student, rollout = module.policies["student"], module.rollout
    prompt, renderer = module.prompt_ids(student_example, student), module.renderer(student)
    if not len(prompt):
        return "the prompt is empty"
    if (
        "dataset" in rollout.sources
        and module.answered(example, student_example, student).get("completion") is not None
    ):
        given_ids(module, example, student_example, student)
    if rollout.max_prompt_length is not None and len(prompt) > rollout.max_prompt_length:
        return f"the prompt has {len(prompt)} tokens, rollout.max_prompt_length is {rollout.max_prompt_length}"
    room = context_length(student)
    if len(prompt) + rollout.horizon > room:
        return (
            f"the prompt's {len(prompt)} tokens and rollout.horizon {rollout.horizon} exceed the context of {room}: "
            "shorten it or lower the horizon"
        )
    is_raw = renderer.is_raw(student_example["prompt"])
    if problem := problem_with_prompt(module, prompt, "student", is_raw):
        return problem
    if end := renderer.rendered_already(module.asked(student_example), module.eos):
        return (
            f"the prompt holds {end!r}, the end of a turn, and would be put into a turn itself: was it rendered "
            "already? Give messages; text models read text as it is with model.raw_prompts"
        )
    # 2. the prompt of each teacher that has a view
    problems = (problem_with_view(module, name, example) for name in module.teachers)
    return next((problem for problem in problems if problem is not None), None)


def problem_with_view(module: Audited, name: str, example: Example) -> str | None:
    """Finds why a teacher can't read its view of an example; None if it can, or has none."""
    teacher = module.teachers[name]
    policy, student = reader_of(module, name), module.policies["student"]
    read = [example]
    try:
        if (view := teacher.look(example)) is None:
            return None
        read.insert(0, module.shown([example])[0] if teacher.view is None else view)
        ids = module.prompt_ids(read[0], module.reads_as(policy))
    except Exception as error:  # of a row that the student can read
        told = " in place of ".join(quoted(one.get("prompt"), 200) for one in read)
        raise ValueError(f"model.teachers.{name} can't read what it is shown, {told}: {reason_of(error)}") from error
    renderer = module.renderer(module.policies["student"])
    if teacher.view is not None and (end := renderer.rendered_already(module.asked(view), module.eos)):
        return f"the view of model.teachers.{name} puts {end!r}, the end of a turn, into a turn itself"
    is_here = policy is not student or name in module.policies  # a horizon of the student's tokens, or about that
    room = context_length(policy) - module.rollout.horizon if is_here else math.inf
    if len(ids) > (limit := min(teacher.max_prompt_length or room, room)):
        return f"the teacher's prompt has {len(ids)} tokens, the limit of model.teachers.{name} is {limit}"
    return problem_with_prompt(module, ids, name, renderer.is_raw(module.shown([example])[0]["prompt"]))


def problem_with_prompt(module: Audited, ids: Tensor, name: str, is_raw: bool) -> str | None:
    """Finds why a policy can't continue token ids ``[P]``; None if it can.

    Args:
        module: whose policy it is.
        ids: of the prompt.
        name: of the policy.
        is_raw: whether text was read as it is. A chat template may end a prompt with the stop token, behind which its
            model was taught to answer.
    """
    policy = module.policies["student"] if name == "student" else reader_of(module, name)
    key = "model.student" if name == "student" else f"model.teachers.{name}"
    rows = bare(policy.model).get_input_embeddings().weight.shape[0]
    for i in ids[ids >= rows].tolist():
        if i not in module.filled_in(policy):
            token = module.tokenizer(policy).convert_ids_to_tokens(i)
            return f"the prompt holds {token!r} (id {i}), and {key} has embeddings for ids below {rows} only"
    reader = module.reads_as(policy)
    stops = module.eos if reader is module.policies["student"] else stop_ids(module, reader)
    if is_raw and int(ids[-1]) in stops:
        token = module.tokenizer(reader).decode([int(ids[-1])])
        return f"the prompt of {key} ends with the stop token {token!r}, behind which a model writes nothing"
    return None


def _spelled(module: Audited, ids: list[int], limit: int, reader: Policy | None = None) -> str:
    """Decodes token ids, up to so many characters; runs of one token, such as an image's, are written once.

    Args:
        module: the setting.
        ids: of a prompt.
        limit: characters.
        reader: whose tokens they are; None: the student's.
    """
    decode, text = module.tokenizer(reader).decode, ""
    several: list[int] = []
    for token, group in groupby(ids):
        count = len(list(group))
        if count <= RUN:
            several += [token] * count
            continue
        text += f"{decode(several)}{decode([token])}×{count}"
        several = []
    return f"{quoted(text + decode(several), limit)}, {len(ids)} tokens"


def _weights(module: Audited, name: str) -> str:
    if name == "student":
        return "trained" if module._student_spec.lora is None else f"LoRA r={module._student_spec.lora.r}"
    teacher = module.teachers[name]
    return type(teacher.weights).__name__ + (f", view {type(teacher.view).__name__}" if teacher.view else "")


def _dropout(policy: Policy) -> str:
    on = noise(policy.model) if policy.name == "student" else 0.0
    return f"up to {on:g} in training, as asked for" if on else "off"


def _engine(module: Audited, policy: Policy) -> str:
    """Names the engine by which a policy writes, and warns where it is not the one that was asked for."""
    with gathered(policy.model):  # as it will be when it acts
        engine, why = module.engine, module.engine.refusal(policy)
        name = type(engine).__name__ if why is None else f"generate ({why})"
        if engine.runs_the_model:
            trial = Trial(engine, policy, module.head(policy), module.padding_id)
            module.trials[policy.name] = trial
            name = name if trial.reason is None else f"{name}; {trial.reason}"
    if rope_switch(bare(policy.model)) is not None and module.rollout.blend is not None:
        name = f"{name}; its rows part where longrope switches"
    if name != type(engine).__name__ and module.rollout.blend is not None:
        raise ValueError(
            f"{printable(policy.path)}: rollout.blend needs a loop in which this policy writes beside another one; by "
            f"itself it is written by {name}"
        )
    if name != type(engine).__name__:
        rank_zero_warn(
            f"{printable(policy.path)}: {type(engine).__name__} is not used as it is, which may take longer: {name}"
        )
    return name


def _prefixes(module: Audited, policy: Policy) -> str:
    problem = problem_with_shared_prefix(policy, module.head(policy))
    return "read once" if problem is None else f"read in every row ({problem})"


def suspects(module: Audited, policy: Policy, what: str) -> list[str]:
    """Lists what may make a policy disagree with itself, in one of the `comparisons`."""
    model = bare(policy.model)
    if what == TRAINING:
        if rate := noise(policy.model):
            return [f"dropout or router noise of up to {rate:g} in training mode: set student.dropout to false"]
        return [f"{type(model).__name__} draws random numbers in training mode (as the routers of PhiMoE do)"]
    causes = [f"rope_type {rope}, which depends on the longest row" for rope in rope_kinds(model)]
    if what == ACTED:
        causes.append(f"rollouts by {type(module.engine).__name__}: try model.engine: Generate")
    return [*causes, f"{type(model).__name__} reads padding, caches or positions in a way of its own"]


def _template(module: Audited, name: str, policy: Policy) -> str:
    template = policy.processor.chat_template
    if template is None:
        return "none: prompts as they are"
    mark = hashlib.sha256(str(template).encode()).hexdigest()[:8]
    used = name == "student" or module.teachers[name].own_template
    options = getattr(module, "chat_template_kwargs", {})
    return f"{mark} {'used' if used else 'not used (own_template: false)'}" + (
        f", {options}" if options and used else ""
    )
