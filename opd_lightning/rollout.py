"""Rollouts are data: prompts in, trajectories out.

Shape legend: P prompts of a generation batch on this rank, B = P × group_size trajectories.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from . import fingerprint
from .actor import Actor, Judging
from .callback import followers
from .contract import check_rollouts
from .heart import HEART
from .metrics import Metrics, forget_logged
from .optimizer_step import Cache, MicroBatch, OptimizerStep
from .ranks import Ranks
from .reader import Reader
from .resume import StepStart
from .rollout_settings import chosen, derived_seed
from .rows import row_of
from .sharding import mesh_of
from .student_view import shown
from .trajectory import Example, Trajectories
from .worker import RolloutWorker


class RolloutLoader:
    """The training dataloader: pulls prompts, lets the behavior policy act, yields micro-batches of trajectories.

    Each generation batch sees the current weights, or those of ``rollout.max_staleness`` generations ago. Every draw is
    seeded by (seed, place of the prompt in the global order, member of the group): it depends neither on the order of
    calls nor on how many ranks share the work. Position and the trajectories of every rank that are not yet trained are
    in the checkpoint, those made ahead too; another number of ranks goes on from there if it trains equal batches. The
    position is that of the last optimizer step that was done, also in a checkpoint from the middle of one.

    Args:
        dataset: examples by index.
        actor: who acts, and what that is worth.
        reader: evaluates the parts of the objective that see a generation batch.
        metrics: where rewards are recorded.
        trainer: of the run.
        seed: of the prompt order and of all sampling.
        before: an earlier loader, which ends; this one begins with the epoch after it if both are the same trainer's.

    Raises:
        ValueError: fewer examples than one generation batch over all ranks.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        actor: Actor,
        reader: Reader,
        metrics: Metrics,
        trainer: L.Trainer,
        seed: int = 0,
        before: RolloutLoader | None = None,
    ) -> None:
        self.dataset, self.actor, self.reader, self.metrics = dataset, actor, reader, metrics
        self.trainer, self.seed = trainer, seed
        self.ranks, self.rank, self.world_size = Ranks(trainer), trainer.global_rank, trainer.world_size
        self.accumulate: int = trainer.accumulate_grad_batches
        self.size, self.per_generation = actor.rollout.micro_batches(self.accumulate)
        self.rounds = actor.rollout.epochs
        self.prompts = actor.rollout.batch_size * self.world_size
        if len(dataset) < self.prompts:
            raise ValueError(
                f"the training data has {len(dataset)} examples, fewer than one generation batch of {self.prompts} "
                f"(rollout.batch_size × ranks)"
            )
        self.generations = len(dataset) // self.prompts
        self.epoch = self.generation = self.next = 0
        self.pending: Trajectories | None = None
        self.begun: StepStart | None = None
        self._marked: tuple[Any, ...] | None = None
        self._round: list[MicroBatch] = []
        self._caches: list[Cache] = []
        self._in_step = mesh_of(trainer) is not None
        self._ahead: deque[Future[Trajectories]] = deque()
        self._worker = RolloutWorker(actor, trainer) if actor.rollout.max_staleness else None
        if before is not None and before.trainer is trainer:
            before.close()
            self.epoch = before.epoch + 1

    @cached_property
    def fingerprints(self) -> Tensor:
        """Fingerprints ``[N]`` of the rows, by which a resumed run recognizes them."""
        return fingerprint.of_rows(self.dataset)

    def __len__(self) -> int:
        """Counts micro-batches per epoch on this rank; prompts that fill no generation batch wait for another epoch."""
        return self.generations * self.rounds * self.per_generation

    def __iter__(self) -> Iterator[MicroBatch]:
        # the last iterator stopped at its yield: Lightning asks for no batch beyond the epoch's length
        self._leave_behind()
        if self.generation == self.generations:
            self.epoch, self.generation = self.epoch + 1, 0
        while self.generation < self.generations:
            if self.pending is None:
                self._hold(self._generate())
            done, place = divmod(self.next, self.per_generation)
            if not self._round:
                self._round = self._cut(done)
            batch = self._round[place]
            if place % self.accumulate == 0:
                forget_logged(self.trainer, self.trainer.global_step)
                # a checkpoint from the middle of this step goes back to here
                self.begun = StepStart(self.trainer.global_step, self.metrics.averages)
            self.next += 1
            if place + 1 == self.per_generation:
                self._round = []
            yield batch
            self._leave_behind()

    @property
    def unfinished(self) -> int:
        """Micro-batches that were handed out for an optimizer step that is not done."""
        if self.begun is None or self.begun.step != self.trainer.global_step:
            return 0
        return (self.next - 1) % self.accumulate + 1

    def _leave_behind(self) -> None:
        """Goes on to the next generation batch after one that was trained as often as it is to be."""
        if self.next == self.rounds * self.per_generation:
            self._hold(None)
            self.begun, self.next = None, 0
            self.generation += 1

    def _hold(self, trajectories: Trajectories | None) -> None:
        self.pending, self._round = trajectories, []
        self._caches = [{} for _ in range(self.per_generation)]

    def _cut(self, done: int) -> list[MicroBatch]:
        """Cuts the pending generation batch, which was trained ``done`` times, into optimizer steps."""
        assert self.pending is not None
        pieces = list(self.pending.split(self.size))
        micro_batches: list[MicroBatch] = []
        steps = torch.arange(self.per_generation).view(-1, self.accumulate)
        if done:
            number = self.epoch * self.generations + self.generation
            # whole optimizer steps change places, so the order depends neither on micro_batch_size nor on ranks
            steps = steps[torch.randperm(len(steps), generator=self._generator(2, number, done))]
        for indices in steps.tolist():
            caches = [self._caches[i] for i in indices]
            micro_batches += OptimizerStep([pieces[i] for i in indices], caches=caches)
        return micro_batches

    def _generate(self) -> Trajectories:
        """Makes the next generation batch, with rewards."""
        number, metrics = self.epoch * self.generations + self.generation, self.metrics
        with metrics.stopwatch.phase("rollout"):
            if self._worker is None:
                trajectories = self._roll_out(number, self.trainer.global_step, self.actor)
            else:
                self._keep_ahead(number, self._worker)
                with HEART.waiting_for("worker"):
                    trajectories = self._ahead.popleft().result()
        metrics.stopwatch.count("rollout", int(trajectories.mask.sum()))
        # here and not in the worker's thread, where rewards would have no time limit, and with the weights of now
        judged = Judging(self.actor, self.ranks)
        with metrics.stopwatch.phase("reward"):
            trajectories = judged(trajectories)
        if trajectories.reward is not None:
            metrics.record("reward", trajectories.reward[~trajectories.reward.isnan()])
            metrics.record("abstained", trajectories.reward.isnan())
        for callback in followers(self.trainer):
            # again, where it put others in their place
            trajectories = judged(check_rollouts(callback, callback.on_rollouts(self.actor.setting, trajectories)))
        return self.reader.settle(trajectories)

    def _keep_ahead(self, number: int, worker: RolloutWorker) -> None:
        """Sees to it that the generation batches up to number + max_staleness are on their way."""
        with HEART.waiting_for("worker"):
            for rolled in self._ahead:  # the weights must not change while it acts, and what it raised is raised here
                rolled.result()
        worker.refresh()
        version = self.trainer.global_step
        for later in range(number + len(self._ahead), number + self.actor.rollout.max_staleness + 1):
            self._ahead.append(worker.submit(partial(self._roll_out, later, version)))

    def _roll_out(self, number: int, version: int, actor: Actor) -> Trajectories:
        """Rolls out generation batch ``number`` since the start of the run, without rewards."""
        epoch, generation = divmod(number, self.generations)
        first = generation * self.prompts + self.rank * actor.rollout.batch_size
        return self._act(epoch, range(first, first + actor.rollout.batch_size), version, actor)

    def first_epoch(self, done: Container[int] = ()) -> Iterator[tuple[int, Trajectories]]:
        """Rolls out the whole first epoch with the weights of now, as one rank has it; yields number and batch.

        What fills no generation batch is the last one. Those in ``done`` are left out.
        """
        for number, first in enumerate(range(0, len(self.dataset), self.prompts)):
            if number not in done:
                places = range(first, min(first + self.prompts, len(self.dataset)))
                yield number, self._act(0, places, self.trainer.global_step, self.actor)

    def _act(self, epoch: int, prompts: range, version: int, actor: Actor) -> Trajectories:
        """Rolls out the prompts at some places of an epoch's order."""
        # 1. rows and seeds, by their numbers since the start of the run
        rollout, count = actor.rollout, len(prompts)
        order = torch.randperm(len(self.dataset), generator=self._generator(epoch))
        rows = order[prompts.start : prompts.stop].repeat_interleave(rollout.group_size)
        # one number for each draw of a prompt in the whole run
        draws = epoch * len(self.dataset) + torch.tensor(prompts)
        draws = draws.repeat_interleave(rollout.group_size)
        members = torch.arange(rollout.group_size).repeat(count)
        examples: list[Example] = [row_of(self.dataset, int(row)) for row in rows]
        seeds = [derived_seed(self.seed, int(d), int(m)) for d, m in zip(draws, members, strict=True)]

        # 2. each behavior policy acts on its prompts
        sources = tuple(rollout.members or rollout.behavior)
        if rollout.members is None:
            source = chosen(draws, torch.tensor(list(rollout.behavior.values())), self.seed)
        else:
            counts = torch.tensor(list(rollout.members.values()))
            source = torch.arange(len(sources)).repeat_interleave(counts).repeat(count)
        parts, places = [], []
        for i, name in enumerate(sources):
            indices = (source == i).nonzero().squeeze(-1)
            # whose weights are cut can't act without the other ranks, so all of them act
            some = indices if len(indices) or not self._in_step else indices.new_zeros(1)
            if len(some):
                acted = actor.act(name, [examples[j] for j in some], [seeds[j] for j in some])
            if len(indices):
                # all parts name the same sources, so that `source` below holds for each
                parts.append(dataclasses.replace(acted.to("cpu"), sources=sources))
                places.append(indices)
        # 3. joined in the order of the rows
        trajectories = Trajectories.concatenate(parts, actor.setting.padding)
        return dataclasses.replace(
            trajectories.select(torch.cat(places).argsort()),
            examples=examples,
            row=rows,
            group=draws,
            source=source,
            weights_version=torch.full_like(rows, version),
        )

    def close(self) -> None:
        """Ends the thread that rolls out ahead, if there is one."""
        if self._worker is not None:
            self._worker.close()

    def refresh(self) -> None:
        """Throws away what was rolled out and not yet trained, the rest of a generation batch too: the same prompts
        are rolled out again with the current weights. Only between optimizer steps."""
        for rolled in self._ahead:
            if not rolled.cancel():
                rolled.result()  # the weights must not change while it acts
        self._ahead.clear()
        self._leave_behind()
        self._hold(None)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, *key))

    def state_dict(self) -> dict[str, Any]:
        """Saves the position, on every rank, and pending trajectories without examples, which ``row`` restores."""
        done = self.next - self.unfinished
        over = done == self.rounds * self.per_generation
        return {
            "epoch": self.epoch,
            "generation": self.generation + over,
            "next": 0 if over else done,
            "pending": None if over or self.pending is None else self._of_all_ranks(self.pending),
            "ahead": [self._of_all_ranks(rolled.result()) for rolled in self._ahead],
            "rows": self.fingerprints,
            "seed": self.seed,
            "cut": self._cuts,
        }

    @property
    def _cuts(self) -> list[int]:
        return [self.prompts, self.per_generation, self.size * self.world_size, self.rounds]

    def mark(self) -> None:
        """Remembers the position between two optimizer steps, to `go_back` to; nothing is copied."""
        start = StepStart(self.trainer.global_step, self.metrics.averages)
        self._marked = self.epoch, self.generation, self.next, self.pending, deque(self._ahead), start

    @property
    def can_go_back(self) -> bool:
        """True where `state_dict` would wait for nobody from there: nothing is being rolled out ahead."""
        return self._marked is not None and all(rolled.done() for rolled in self._marked[4])

    def go_back(self) -> StepStart:
        """Goes back to where it was marked, on a rank that trains no more."""
        assert self._marked is not None
        self.epoch, self.generation, self.next, self.pending, self._ahead, start = self._marked
        self.begun, self.metrics.averages = None, start.averages
        return start

    def _of_all_ranks(self, trajectories: Trajectories) -> list[dict[str, Any]]:
        return self.ranks.gather_objects(trajectories.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position and pending trajectories.

        Raises:
            ValueError: the checkpoint was written over other rows, by another seed, or with other batches over all
                ranks.
        """
        # 1. refusals
        self._check_rows(state)
        if state["seed"] != self.seed:
            raise ValueError(
                f"seed_everything was {state['seed']} in the checkpoint and is now {self.seed}: the order of the rows "
                "would be another one in the middle of an epoch; keep the seed"
            )
        if state["cut"] != self._cuts:
            raise ValueError(
                "the checkpoint was written with {} prompts per generation (rollout.batch_size × ranks), cut into {} "
                "micro-batches of {} trajectories (rollout.micro_batch_size × ranks), trained {} times (rollout.epochs)"
                "; now these would be {}, {}, {} and {}, so its position means nothing here: with more ranks lower "
                "rollout.batch_size and micro_batch_size, with fewer raise them".format(*state["cut"], *self._cuts)
            )
        if state["next"] % self.accumulate:
            raise ValueError(
                f"the checkpoint is from the middle of an optimizer step of trainer.accumulate_grad_batches="
                f"{self.accumulate} micro-batches; keep the value that it was written with"
            )
        if len(state["ahead"]) > self.actor.rollout.max_staleness:
            raise ValueError(
                f"the checkpoint holds {len(state['ahead'])} generation batches that were rolled out ahead; "
                f"rollout.max_staleness is {self.actor.rollout.max_staleness}, which would train them out of turn"
            )
        # 2. position, pending trajectories, and those that were rolled out ahead
        self.epoch, self.generation = state["epoch"], state["generation"]
        self.begun, self.next, pending = None, state["next"], state["pending"]
        self._hold(None if pending is None else self._restored(pending, self.per_generation))
        self._ahead.clear()
        for saved in state["ahead"]:
            rolled: Future[Trajectories] = Future()
            rolled.set_result(self._restored(saved, 1))
            self._ahead.append(rolled)

    def _check_rows(self, state: dict[str, Any]) -> None:
        if "rows" not in state:
            raise ValueError("the checkpoint is of an earlier version, which kept no fingerprints of its rows")
        before = state["rows"]
        place = fingerprint.first_difference(self.fingerprints, before)
        if place is None:
            return
        moved = torch.equal(self.fingerprints.sort().values, before.sort().values)
        if place == len(self.dataset):
            now = f"row {place + 1} is missing"
        else:
            row = row_of(self.dataset, place)
            now = f"{row.location} is {'new' if place == len(before) else 'now'} {str(row)[:200]}"
        order = " (the same in another order)" if moved else ""
        counts = f"{len(before)} training examples, there are now {len(self.dataset)}, and"
        written = f"other training examples{order}:" if len(before) == len(self.dataset) else counts
        raise ValueError(
            f"the checkpoint was written with {written} {now}. Its position and pending rollouts mean "
            "nothing here: give it the rows that it was written with (data.train, columns, on_bad_row and seed), or "
            "train its exported student in a new run"
        )

    def _restored(self, saved: list[dict[str, Any]], pieces: int) -> Trajectories:
        """This rank's share of a generation batch; each of its pieces is dealt anew to another number of ranks."""
        parts = [
            Trajectories.from_state_dict(s, [row_of(self.dataset, row) for row in s["row"].tolist()]) for s in saved
        ]
        # refuses a checkpoint of another view now, not when it is trained
        shown(self.actor.student_view, [], parts[0].student_view)
        if len(parts) == self.world_size:
            return parts[self.rank]
        everyone = Trajectories.concatenate(parts, self.actor.setting.padding)
        # [old ranks, pieces, n] → [pieces, all n of a piece], of which each rank takes its share
        places = torch.arange(len(everyone)).view(len(parts), pieces, -1).transpose(0, 1).reshape(pieces, -1)
        indices: Tensor = places.chunk(self.world_size, 1)[self.rank]
        return everyone.select(indices.flatten())


class EndOfRollouts(L.Callback):
    """Ends what rolls out ahead when the run ends, however it does; every module brings one."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.train_dataloader, RolloutLoader):
            trainer.train_dataloader.close()
        pl_module.release()  # type: ignore[operator]
        pl_module.streams.close()  # type: ignore[union-attr,operator]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out where a run fails
