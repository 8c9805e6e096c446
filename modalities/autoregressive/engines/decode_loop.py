"""The default rollout engine: a loop over the model's own forward pass, with a cache that shrinks as rows end.

Shape legend: B trajectories, U different prompts, n rows still being written, P prompt width (left padded), T horizon,
L = P + T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ....blend import Blend
from ....distribution import IMPOSSIBLE, Head
from ....policy import Policy, evaluating
from ....progress import advance
from ....rollout_settings import Rollout
from ..models import bare, cache_name, problem_with_cache
from ..observing import Heard
from ..passes import pass_limits
from ..prefix import read_prompts
from .cache import RowCache
from .draw import draw, uniforms
from .engine import Conversation, Ended, Prompts, Rereading, RolloutEngine, Writer, until_stop
from .generate import Generate
from .layers import PackedDecoder, packed_linear
from .trial import problem_with_shared_prefix, shares_prefixes


class DecodeLoop(RolloutEngine):
    """Engine that reads every different prompt once, drops rows that have ended, and copies nothing per step.

    Serves decoders all of whose layers keep the keys and values of every token (no sliding window, no recurrent
    state), whose weights are not sharded. All others are handed to `Generate`.

    Args:
        packed: on a CPU, decode layers of a known kind by `PackedDecoder` (for each rollout a copy of their weights)
            instead of the model's own forward pass, with prompts kept once for all trajectories that begin with them.
    """

    runs_the_model = True
    blends = True

    def __init__(self, packed: bool = True) -> None:
        self.packed = packed

    def refusal(self, policy: Policy) -> str | None:
        return problem_with_cache(bare(policy.model))

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        if self.refusal(policy) is not None:
            return Generate().write(policy, head, prompts, rollout, seeds, eos, pad)
        model = bare(policy.model)
        with torch.no_grad(), evaluating(model):
            voice = Voice(replace(policy, active=nullcontext), head, prompts, rollout.horizon, self.packed)
            return _write([voice], lambda logits: logits[0], prompts.written, rollout, seeds, eos, pad)

    def begin(self, policy: Policy, head: Head, prompts: Prompts, eos: list[int], pad: int) -> Conversation:
        if self.refusal(policy) is not None or problem_with_shared_prefix(policy, head) is not None:
            return Rereading(self, policy, head, prompts, eos, pad)
        return Remembering(policy, head, prompts, eos, pad, self.packed)

    def write_blended(
        self, writers: dict[str, Writer], blend: Blend, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        ends = one_end(eos, [stop for writer in writers.values() for stop in writer.stops])

        def mix(logits: list[Tensor]) -> Tensor:
            log_probs = [ends(z.to(logits[0].device).clamp(min=IMPOSSIBLE).log_softmax(-1)) for z in logits]
            return blend.mixed(dict(zip(writers, log_probs, strict=True)))

        with torch.no_grad(), ExitStack() as stack:
            for writer in writers.values():
                stack.enter_context(evaluating(bare(writer.policy.model)))
            voices = [Voice(w.policy, w.head, w.prompts, rollout.horizon, self.packed) for w in writers.values()]
            return _write(voices, mix, 0, rollout, seeds, eos, pad)


class Voice:
    """One policy in the loop: what it has read of every row, and what it says comes next.

    Args:
        policy: entered (`Policy.active`) around each of its forward passes.
        head: its own.
        prompts: as it reads them.
        horizon: tokens to be written at most.
        packed: as in `DecodeLoop`.
        share: keep prompts that rows share once, where that is possible.

    Attributes:
        logits: ``[n, V]`` of the tokens behind the prompts.
    """

    def __init__(
        self, policy: Policy, head: Head, prompts: Prompts, horizon: int, packed: bool, share: bool = True
    ) -> None:
        model, self._active = bare(policy.model), policy.active
        self._device = device = next(model.parameters()).device
        with self._active():
            # 1. read every different prompt once
            first, prompt_of = prompts.distinct
            inputs = prompts.inputs(first, device)
            # transformers' own, since some models have several axes (Qwen-VL)
            position = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
            attended = inputs["attention_mask"].bool()
            if inputs.keys() == {"input_ids", "attention_mask"}:
                shares = partial(shares_prefixes, policy, head)
                read, hidden = read_prompts(model, inputs, shares, *pass_limits(device, None))
            else:
                read = DynamicCache(config=model.config)
                cached = {str(cache_name(model)): read}
                # left padded: the last column has the last token of every prompt
                hidden = model.base_model(**inputs, position_ids=position, **cached, use_cache=True)[0][:, -1]
                del cached
            # 2. one row per trajectory: its prompt's cache, position and next logits
            row = torch.tensor(prompt_of, device=device)
            packed = packed and PackedDecoder.refusal(model) is None
            self._body = PackedDecoder(model, len(row)) if packed else partial(own_forward, model)
            self._project = projection(head, hidden, len(row))
            # the model's own forward pass can't read prompts that rows share
            share = share and packed and len(attended) < len(row)
            self._begin(RowCache(read, row, attended, horizon, share), row, hidden, position)

    def _begin(self, cache: RowCache, row: Tensor, hidden: Tensor, position: Tensor) -> None:
        """Begins to write behind U texts: hidden states of their last tokens, and the positions of all."""
        self._cache, self.logits = cache, self._project(hidden)[row]
        self._position = position[..., -1:].expand(*position.shape[:-2], len(hidden), 1)[..., row, :] + 1

    def keep(self, order: Tensor) -> None:
        """Moves row ``order[i]`` to row i; the others are dropped."""
        order = order.to(self._device)
        self._cache.keep(order)
        self._position = self._position[..., order, :]

    def read(self, tokens: Tensor, step: int) -> None:
        """Reads the tokens ``[n]`` that were written at a step."""
        with self._active():
            self.logits = self._project(self._body(tokens.to(self._device), self._position + step, self._cache))
        self._cache.advance()


@dataclass(frozen=True)
class Kept:
    """Row that is not written at the moment: keys and values of all that was read of it, ``[G, L, S]`` per layer."""

    layers: list[tuple[Tensor, Tensor]]
    position: Tensor  # of the next token, with as many axes as the model has


class KeepingVoice(Voice):
    """Voice that keeps what was read of rows that leave, so that they can go on.

    Args:
        policy, head, prompts, horizon, packed: as in `Voice`.

    Attributes:
        count: ``[B]`` tokens that were read of each row.
    """

    def __init__(self, policy: Policy, head: Head, prompts: Prompts, horizon: int, packed: bool) -> None:
        super().__init__(policy, head, prompts, horizon, packed, share=False)
        self._model, self._prompts = bare(policy.model), prompts
        self._rows, self._reads = list(range(len(prompts.examples))), 0
        self._kept: dict[int, Kept] = {}
        self.count = [0] * len(self._rows)
        for row in prompts.distinct[0]:
            self.count[row] = int(prompts.length[row])

    def keep(self, order: Tensor) -> None:
        staying = order.tolist()
        self._leave(place for place in range(len(self._rows)) if place not in staying)
        self._rows = [self._rows[place] for place in staying]
        super().keep(order)

    def read(self, tokens: Tensor, step: int) -> None:
        super().read(tokens, step)
        self._reads += 1
        for row in self._rows:
            self.count[row] += 1

    def end_turn(self) -> None:
        """Keeps all rows that are left."""
        self._leave(range(len(self._rows)))
        self._rows = []

    def _leave(self, places: Iterable[int]) -> None:
        cache = self._cache
        for place in places:
            attended = cache.attended(place)
            layers = [(layer.keys[place][:, attended], layer.values[place][:, attended]) for layer in cache.rows_of()]
            self._kept[self._rows[place]] = Kept(layers, self._position[..., place, :] + self._reads)

    def go_on(self, rows: list[int], heard: list[Heard], horizon: int) -> None:
        """Reads what is new behind what was kept of rows, in one pass, and begins to write them again."""
        # 1. keys and values, aligned to the right
        kept, count, device = [self._kept.pop(row) for row in rows], len(rows), self._device
        lengths, widths = [one.layers[0][0].shape[1] for one in kept], [len(more.ids) for more in heard]
        past, width = max(lengths), max(widths)
        layers: list[Any] = []
        for number, pair in enumerate(kept[0].layers):
            layer, states = DynamicLayer(), []
            for part, first in enumerate(pair):
                states.append(first.new_zeros(count, first.shape[0], past, first.shape[2]))
                for i, one in enumerate(kept):
                    states[-1][i, :, past - lengths[i] :] = one.layers[number][part]
            layer.keys, layer.values = states
            layer.dtype, layer.device, layer.is_initialized = states[0].dtype, device, True
            layers.append(layer)
        # 2. the new tokens behind them, aligned to the right, too
        ids = torch.zeros(count, width, dtype=torch.long)
        attended = torch.zeros(count, past + width, dtype=torch.bool)
        for i, more in enumerate(heard):
            ids[i, width - widths[i] :] = torch.tensor(more.ids)
            attended[i, past - lengths[i] : past] = attended[i, past + width - widths[i] :] = True
            self.count[rows[i]] += widths[i]
        ids, attended, read = ids.to(device), attended.to(device), Cache(layers=layers)
        new: dict[str, Any] = {"input_ids": ids, "attention_mask": attended[:, past:].long()}
        if media := self._prompts.media_of([more.values for more in heard]):
            types = {
                n: self._prompts.typed(n, ids).to(t.dtype) for n, t in self._prompts.tokens.items() if n not in new
            }
            new |= types | {name: tensor.to(device) for name, tensor in media.items()}
        # transformers' own of what is new, behind the last position of what is kept, on each of the model's axes
        offset = self._model._prepare_position_ids_for_generation(ids, new)
        position = torch.stack([one.position for one in kept], -2) + offset
        # 3. one pass
        new |= {"attention_mask": attended.long(), "position_ids": position, str(cache_name(self._model)): read}
        with self._active():
            hidden = self._model.base_model(use_cache=True, **new)[0][:, -1]
            row = torch.arange(count, device=device)
            self._begin(RowCache(read, row, attended, horizon), row, hidden, position)
        self._rows, self._reads = list(rows), 0


class Remembering(Conversation):
    """Conversation in which every token is read once: keys and values of all turns are kept."""

    def __init__(self, policy: Policy, head: Head, prompts: Prompts, eos: list[int], pad: int, packed: bool) -> None:
        self._policy, self._head, self._prompts = replace(policy, active=nullcontext), head, prompts
        self._eos, self._pad, self._packed = eos, pad, packed
        self._voice: KeepingVoice | None = None
        self._last: dict[int, int] = {}

    @property
    def read(self) -> list[int]:  # type: ignore[override]
        assert self._voice is not None
        return self._voice.count

    def write(
        self, rows: list[int], heard: list[Heard], rollout: Rollout, seeds: list[int], ended: Ended | None = None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), evaluating(bare(self._policy.model)):
            if self._voice is None:
                self._voice = KeepingVoice(self._policy, self._head, self._prompts, rollout.horizon, self._packed)
            else:
                # the last token of a turn was drawn and not read
                behind = [replace(h, ids=[self._last[row], *h.ids]) for row, h in zip(rows, heard, strict=True)]
                self._voice.go_on(rows, behind, rollout.horizon)
            written = _write([self._voice], lambda logits: logits[0], 0, rollout, seeds, self._eos, self._pad, ended)
            self._voice.end_turn()
        own, _ = until_stop(written[0], self._eos)
        for row, ids, kept in zip(rows, written[0], own, strict=True):
            self._last[row] = int(ids[kept][-1])
        return written


def _write(
    voices: list[Voice],
    mix: Callable[[list[Tensor]], Tensor],
    written: int,
    rollout: Rollout,
    seeds: list[int],
    eos: list[int],
    pad: int,
    ended: Ended | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws step by step from what the voices say together; rows that ended leave, so that a pass is small."""
    device = voices[0].logits.device
    stop = torch.tensor(eos, device=device)
    # what goes on behind tokens that were written before goes on with its own draws
    uniform = uniforms(seeds, written + rollout.horizon)[:, written:].to(device)
    tokens = torch.full((len(seeds), rollout.horizon), pad, device=device)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    live = torch.arange(len(seeds), device=device)
    for step in range(rollout.horizon):
        advance(step, rollout.horizon)
        chosen, log_prob = draw(mix([voice.logits for voice in voices]), uniform[live, step], rollout)
        tokens[live, step], log_probs[live, step] = chosen, log_prob.float()
        going = ~torch.isin(chosen, stop)
        if ended is not None:
            for row in live[~going].tolist():
                ended(row, tokens[row, : step + 1].tolist())
        left = int(going.sum())
        if not left or step + 1 == rollout.horizon:
            break
        if left < len(live):
            order = compact_rows(going, left)
            chosen, live = chosen[order], live[order]
            for voice in voices:
                voice.keep(order)
        for voice in voices:
            voice.read(chosen, step)
    return tokens[:, : step + 1], log_probs[:, : step + 1]


def one_end(eos: list[int], stops: list[int]) -> Callable[[Tensor], Tensor]:
    """Returns how log-probs ``[n, V]`` of policies with other stop ids come to speak of one end (TRB, 2605.31159).

    The probability of each id by which anyone ends goes to the first of the student's, so that what a teacher thinks of
    its own end is not lost on an id that the student never stops at.

    Args:
        eos: the student's stop ids; nothing changes where there are no others.
        stops: stop ids of all policies.
    """
    ids = sorted({*eos, *stops})
    if ids == sorted(eos):
        return lambda log_probs: log_probs

    def together(log_probs: Tensor) -> Tensor:
        known = [i for i in ids if i < log_probs.shape[-1]]
        end = log_probs[:, known].logsumexp(-1)
        log_probs[:, known] = IMPOSSIBLE
        log_probs[:, next(i for i in eos if i in known)] = end
        return log_probs

    return together


def own_forward(model: Any, tokens: Tensor, position: Tensor, cache: RowCache) -> Tensor:
    """Computes hidden states ``[n, H]`` of tokens ``[n]`` by the model itself: the reference for `PackedDecoder`."""
    hidden: Tensor = model.base_model(
        input_ids=tokens[:, None],
        attention_mask=cache.attention_mask(),
        position_ids=position,
        use_cache=True,
        **{str(cache_name(model)): cache},
    )[0]
    return hidden[:, -1]


def compact_rows(going: Tensor, left: int) -> Tensor:
    """Returns the source ``[left]`` of each row where those not ``going [n]`` leave: the last ones fill the gaps."""
    order = torch.arange(left, device=going.device)
    order[~going[:left]] = left + going[left:].nonzero().squeeze(1)
    return order


def projection(head: Head, hidden: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Prepares the head for many passes of up to so many rows: cast once, and on a CPU packed once.

    That is a copy of its weights, for the time of the rollout.
    """
    if not head.is_linear:
        return head
    device = hidden.device.type
    weight, bias = head.linear(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    linear = packed_linear(weight, bias, rows)
    return lambda h: head.finish(linear(h))
