"""Turns: which of them a step belongs to, and recorded ones that rollouts go on from.

A turn is what a policy writes in one go, and what it reads before that: turn 0 reads the prompt, a later one what was
observed behind the turn before it.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from ...environment import Answering, Environment, Episode, Turn, side_by_side
from ...objective import Objective
from ...policy import Acting, Policy
from ...rollout_settings import Rollout, derived_seed
from ...sharding import mesh_of
from ...trajectory import Example, Trajectories
from .audit import given_ids
from .engines.engine import until_stop
from .lines import OF_TURNS, TURN, WRITTEN, Line, joined
from .observing import Given, Heard, between, check_observations, check_shown
from .rendering import Renderer
from .tools import Tools
from .writing import Writing, engine_of, go_on, prompts_of, write

TURNS = 8


class Turning(Writing, Protocol):
    """Interface of a setting whose rollouts may have several turns."""

    objective: Objective
    environment: Environment | None
    observes: ClassVar[frozenset[str]]
    _trainer: Any

    def heard(self, reader: Policy, example: Example, observation: str | list[Any], role: str) -> Heard: ...


class TakingTurns:
    """Mixin of a setting whose policies go on behind what was written and observed before."""

    environment: Environment | None

    @property
    def has_rewards(self) -> bool:
        """True where there is a verifier, or an environment with rewards."""
        own = self.environment is not None and self.environment.rewards
        return own or super().has_rewards  # type: ignore[misc]

    def required_columns(self) -> dict[str, str]:
        """Lists the required columns, the environment's among them."""
        needed: dict[str, str] = super().required_columns()  # type: ignore[misc]
        for column in self.environment.columns if self.environment is not None else ():
            needed[column] = f"{needed[column]}, model.environment" if column in needed else "model.environment"
        return needed

    def check(self) -> None:
        """Refuses settings of turns that mean nothing together.

        Raises:
            ValueError: turns without an environment; an environment beside a blend; as in `check_shown`.
        """
        super().check()  # type: ignore[misc]
        rollout = cast(Turning, self).rollout
        if self.environment is None and rollout.turns is not None:
            raise ValueError(f"rollout.turns={rollout.turns}, and nothing answers to a turn: set model.environment")
        if self.environment is not None:
            check_shown(self, self.environment)
        if self.environment is not None and rollout.blend is not None:
            raise ValueError("rollout.blend: policies that act as one write one turn; leave out model.environment")

    def prefixes(self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout) -> Trajectories:
        """Collects recorded turns (`Setting.prefixes`)."""
        return prefixes(cast(Turning, self), policy, examples, seen, rollout)

    def go_on(self, acting: Acting, begun: Trajectories, rollout: Rollout, seeds: list[int]) -> Trajectories:
        """Writes behind what was begun (`Setting.go_on`): a turn, or those of an environment behind recorded ones."""
        module = cast(Turning, self)
        if module.environment is not None and WRITTEN in begun.channels:
            return converse(module, module.environment, acting, rollout, seeds, begun)
        return go_on(module, acting, begun, rollout, seeds)

    def heard(self, reader: Policy, example: Example, observation: str | list[Any], role: str) -> Heard:
        """Reads an observation, as it stands between two turns (`between`).

        Args:
            reader: whose processor reads it.
            example: whose prompt the conversation begins with.
            observation: of an environment.
            role: of what is no message.
        """
        module = cast(Turning, self)
        return Heard(between(module.renderer(reader), module.asked(example), observation, role, module.eos))

    def given(self, policy: Policy, row: Example) -> Given:
        """Reads a row's given completion as ``policy``, the student, would have written it."""
        module = cast(Turning, self)
        return Given(*module.renderer(policy).completion(row, module.eos))

    def observing(self, policy: Policy, example: Example, values: list[dict[str, Any]]) -> Example:
        """Adds to an example what ``policy`` observed behind its prompt that is more than tokens, for `media`."""
        return example

    def typed(self, name: str, ids: Tensor) -> Tensor:
        """Computes what a tensor of the model's inputs, such as token types, says of ids behind the prompt."""
        return torch.zeros_like(ids)

    def act_in_turns(self, acting: Acting, rollout: Rollout, seeds: list[int]) -> Trajectories:
        """Writes a turn, or as many as an environment has."""
        module = cast(Turning, self)
        if module.environment is not None:
            return converse(module, module.environment, acting, rollout, seeds)
        return with_turns(module, rollout, write(module, acting, rollout, seeds))


def with_turns(module: Turning, rollout: Rollout, trajectories: Trajectories) -> Trajectories:
    """Adds the channels of turns where the run has them; trajectories of one generation batch all have, or none has."""
    asked = any(TURN in part.needs for term in module.objective.terms for part in term.parts())
    if module.environment is None and not rollout.prefix_turns and not asked:
        return trajectories
    # nobody knows what an environment would have said of them
    shape, names = trajectories.mask.shape, OF_TURNS if module.environment else ()
    unknown = {name: torch.full(shape, torch.nan, dtype=torch.float32) for name in names}
    return replace(trajectories, channels={**trajectories.channels, **unknown, TURN: turn_of(trajectories.mask)})


def turn_of(written: Tensor) -> Tensor:
    """Counts the turns ``[B, T]`` before each step: one ends where ``written`` steps are followed by others."""
    ends = written[:, :-1].long() - written[:, 1:].long()
    return torch.nn.functional.pad(ends.clamp(min=0), (1, 0)).cumsum(1)


def check_environment(module: Turning) -> None:
    """Refuses an environment that the models of this run can't act in, once they are loaded.

    Raises:
        ValueError: as in `check_observations`; under fsdp2, where every rank must make equally many passes.
    """
    if module.environment is None:
        return
    if mesh_of(module._trainer) is not None:
        raise ValueError(
            "model.environment: under trainer.strategy=fsdp2 every rank must make equally many forward passes, and "
            "episodes differ in their turns; take ddp"
        )
    renderer = module.renderer(module.policies["student"])
    for option in module.environment.options if renderer.processor.chat_template is None else ():
        raise ValueError(
            f"model.environment: {renderer.tokenizer.name_or_path} has no chat template that would tell policies of "
            f"{option}: describe them in prompts, and leave them out there (for Tools: describe: false)"
        )
    for option in module.environment.options:
        if not renderer.reads(option):
            raise ValueError(
                f"model.environment: the chat template of {renderer.tokenizer.name_or_path} reads no {option!r}, so no "
                f"policy would be told of them: describe them in prompts (for Tools: describe: false)"
            )
    if isinstance(module.environment, Tools):
        module.environment.adopt(renderer)
    check_observations(renderer, module.environment.role, module.eos)


def converse(
    module: Turning,
    environment: Environment,
    acting: Acting,
    rollout: Rollout,
    seeds: list[int],
    begun: Trajectories | None = None,
) -> Trajectories:
    """Lets one policy act in an environment, turn after turn; a turn reads nothing that was read before.

    A trajectory ends when the environment says so (it has stopped then), when its turn is cut by the horizon, or when
    turns or horizon leave no room for another one.

    Args:
        module, environment, acting, rollout, seeds: as elsewhere.
        begun: recorded turns to go on from (`prefixes`); the environment answers to them first, and what it says is not
            read: what was recorded is.
    """
    # 1. episodes begin
    policy, examples, prompts = acting.policy, acting.examples, prompts_of(module, acting, rollout)
    reader, most = module.reads_as(policy), rollout.turns or TURNS
    renderer = module.renderer(reader)
    lines = [Line() for _ in examples]
    recorded = [line.hold(begun, row) if begun is not None else [] for row, line in enumerate(lines)]
    texts = [[_text(renderer, ids, module.eos) for ids in turns] for turns in recorded]
    begins = [
        partial(Episode.begun, environment, *pair, rollout, module.observes)
        for pair in zip(examples, texts, strict=True)
    ]
    episodes = side_by_side(begins, environment.at_once)
    # an episode that the recorded turns have ended is left as it is, with nothing to train
    live, before = [row for row, episode in enumerate(episodes) if not episode.over], [0] * len(lines)
    if not live:
        return joined(prompts, examples, lines, module.padding_id)
    place = {row: i for i, row in enumerate(live)}
    fresh = [Heard() for _ in live]
    with policy.active(), Answering(environment.at_once) as answering:
        engine, observed = engine_of(module, policy), [line.observed for line in lines]
        behind = prompts.behind([line.ids for line in lines], observed).only(live)
        conversation = engine.begin(policy, module.head(policy), behind, module.eos, module.padding_id)
        while live:
            # 2. a turn is written, each row up to its own horizon
            left = [rollout.horizon - len(lines[row].ids) for row in live]
            draws = [derived_seed(seeds[row], lines[row].turn) if lines[row].turn else seeds[row] for row in live]
            places, shorter = [place[row] for row in live], replace(rollout, horizon=max(left))
            ended = partial(_ended, answering, renderer, module.eos, [(episodes[row], row) for row in live], left)
            written = conversation.write(places, fresh, shorter, draws, ended)
            stopped = _add(lines, live, left, written, module.eos)
            for row in live:
                read = conversation.read[place[row]]
                lines[row].channels["read"][-1], before[row] = read - before[row], read
            # 3. the environment answers those that ended theirs, also while others write, and is heard in their order
            live, fresh = [], []
            for row in stopped:
                answering.begin(row, episodes[row], _text(renderer, lines[row].written(), module.eos))
            for row in stopped:
                line = lines[row]
                heard = _heard(module, reader, episodes[row], line, examples[row], answering.end(row))
                line.turn += 1
                if line.turn < most and heard is not None and len(line.ids) + len(heard.ids) < rollout.horizon:
                    line.hear(heard)
                    live.append(row)
                    fresh.append(heard)
    return joined(prompts, examples, lines, module.padding_id)


def _ended(
    answering: Answering,
    renderer: Renderer,
    stops: list[int],
    acting: list[tuple[Episode, int]],
    left: list[int],
    place: int,
    ids: list[int],
) -> None:
    """Lets the environment answer a turn that has ended, unless the horizon cuts it."""
    episode, row = acting[place]
    if len(ids) <= left[place]:
        answering.begin(row, episode, _text(renderer, ids, stops))


def _text(renderer: Renderer, ids: list[int], stops: list[int]) -> str:
    """Decodes a turn, special tokens included, but for the one that ended it."""
    return str(renderer.tokenizer.decode([i for i in ids if i not in stops]))


def _heard(
    module: Turning, reader: Policy, episode: Episode, line: Line, example: Example, answer: Turn
) -> Heard | None:
    """Notes what an environment answered to a turn; returns its observation, None where it is over."""
    assert module.environment is not None
    heard, line.stopped = None, episode.over
    if not episode.over:
        try:
            heard = module.heard(reader, example, answer.observation, module.environment.role)
        except Exception as error:  # of what was observed, which may be anything
            episode.end(error)
    line.channels["reward"][-1], line.channels["failures"][-1] = answer.reward or 0.0, float(episode.failed)
    return heard


def _add(
    lines: list[Line], rows: list[int], left: list[int], written: tuple[Tensor, Tensor], eos: list[int]
) -> list[int]:
    """Adds what was written to the lines of rows, ``left`` tokens at most; returns the rows that ended their turn."""
    tokens, log_probs = (tensor.cpu() for tensor in written)
    own, stops = until_stop(tokens, eos)
    ended = []
    for place, (row, room) in enumerate(zip(rows, left, strict=True)):
        kept = own[place].nonzero().squeeze(1)[:room]
        lines[row].add(tokens[place, kept].tolist(), log_probs[place, kept].tolist())
        if bool(stops[place]) and int(own[place].sum()) <= room:
            ended.append(row)
    return ended


def last_turn(trajectories: Trajectories) -> Trajectories:
    """Masks all but the last turn of each trajectory that has the channel ``turn``, which is its answer."""
    if (turn := trajectories.channels.get(TURN)) is None:
        return trajectories
    last = turn.masked_fill(~trajectories.mask, -1).amax(1, keepdim=True)
    return replace(trajectories, mask=trajectories.mask & (turn == last))


def conversations(module: Turning, trajectories: Trajectories) -> list[dict[str, Any]]:
    """Decodes each trajectory for people, all of it and what was written in each turn; empty without an environment."""
    if module.environment is None:
        return []
    decode, told = module.tokenizer().decode, []
    placeholders = {*module.suppressed()}
    for i, extent in enumerate(trajectories.extent.tolist()):
        row, own, turn = (
            values[i, :extent].tolist()
            for values in (trajectories.actions, trajectories.mask, trajectories.channels[TURN])
        )
        # an image has many tokens, of which one is enough
        spelled = [t for n, t in enumerate(row) if t not in placeholders or not n or row[n - 1] != t]
        written: dict[int, list[int]] = {}
        for token, is_own, number in zip(row, own, turn, strict=True):
            if is_own:
                written.setdefault(number, []).append(token)
        texts = [module.written_as(ids) for ids in written.values()]
        told.append({"conversation": str(decode(spelled)), "turns": texts})
    return told


def environment_rewards(module: Turning, trajectories: Trajectories) -> list[float | None] | None:
    """Sums the rewards of an environment's turns ``[B]``; None where nobody knows them; None alone if it has none."""
    if module.environment is None or not module.environment.rewards:
        return None
    return [None if total != total else total for total in trajectories.channels["reward"].sum(1).tolist()]


def prefixes(
    module: Turning, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout
) -> Trajectories:
    """Collects the recorded turns that rollouts go on from, ``rollout.prefix_turns`` of each row."""
    rows = [_prefix(module, example, view, policy, rollout) for example, view in zip(examples, seen, strict=True)]
    width = max(1, *(len(row.ids) for row in rows))
    actions = torch.full((len(rows), width), module.padding_id)
    mask = torch.zeros(actions.shape, dtype=torch.bool)
    for i, (ids, written, _) in enumerate(rows):
        actions[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), torch.tensor(written)
    held = torch.arange(width) < torch.tensor([len(row.ids) for row in rows])[:, None]
    stopped = torch.zeros(len(rows), dtype=torch.bool)
    nobody = torch.zeros(mask.shape, dtype=torch.float32)
    channels = {TURN: turn_of(mask), WRITTEN: mask}
    observed = [row.observed for row in rows] if any(row.observed for row in rows) else None
    return Trajectories({}, actions, held, examples, stopped, nobody, channels=channels, observed=observed)


def problem_with_prefix(module: Turning, example: Example) -> str | None:
    """Finds why a rollout can't go on from a row's recorded turns; None if it can."""
    rollout, student = module.rollout, module.policies["student"]
    if not rollout.prefix_turns:
        return None
    (view,) = module.shown([example])
    length = len(_prefix(module, example, view, student, rollout).ids)
    if length < rollout.horizon:
        return None
    return (
        f"what rollout.prefix_turns={rollout.prefix_turns} goes on from has {length} tokens, and rollout.horizon is "
        f"{rollout.horizon}, which leaves none to write"
    )


def _prefix(module: Turning, example: Example, seen: Example, policy: Policy, rollout: Rollout) -> Given:
    """Lists the ids of a row's recorded turns, observations included, and which of them the assistant wrote."""
    if module.answered(example, seen, policy).get("completion") is None:
        return Given([], [])
    ids, written, observed = given_ids(module, example, seen, policy)
    starts = [i for i, own in enumerate(written) if own and not (i and written[i - 1])]
    begin = starts[min(rollout.prefix_turns, len(starts) - 1)]
    return Given(ids[:begin], written[:begin], [value for value in observed if value["at"] < begin])
