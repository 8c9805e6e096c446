"""Rollouts are data: prompts in, trajectories out.

Shape legend: P prompts of a generation batch on this rank, B = P × group_size trajectories.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from . import fingerprint
from .contract import check_rollouts
from .finite import Finite
from .optimizer_step import Cache, MicroBatch, OptimizerStep
from .rows import row_of
from .sharding import mesh_of
from .trajectory import Example, Trajectories
from .worker import RolloutWorker

if TYPE_CHECKING:
    from .module import OnPolicyDistillation
    from .resume import StepStart


@dataclass
class Rollout:
    """How the behavior policy acts. The fields are public knobs: callbacks may turn them between generations.

    Temperature and filters shape what is sampled and nothing else: stored log-probs, importance ratios and signals are
    those of the plain distribution at temperature 1 (a divergence may have a temperature of its own).

    Args:
        batch_size: prompts per generation batch, on each rank.
        group_size: trajectories per prompt.
        micro_batch_size: trajectories per forward and backward pass. Default: one generation batch is one optimizer
            step. Smaller: a generation batch serves several micro-batches, and several optimizer steps if it is
            larger than micro_batch_size × trainer.accumulate_grad_batches.
        epochs: how often each generation batch is trained. Default 1. From the second time on its optimizer steps come
            in an order drawn from the run's seed (each keeps its trajectories, so the order depends neither on
            micro_batch_size nor on the number of ranks), and the student is no longer the one that acted: behavior
            log-probs and ``weights_version`` stay those of sampling. What a teacher whose weights stand still
            (`Frozen`, `Initial`) said is kept in the machine's memory for the next time, as hidden states: the steps of
            a generation batch (padding included) × hidden size × bytes of the teacher's dtype, on each rank, as long as
            its view shows the same; teachers that move are asked again, and so are all under fsdp2 and after a resume.
        horizon: steps after which a rollout ends if it has not stopped by itself (for text: max new tokens).
        temperature: 0 is greedy. Default 1.
        top_p, top_k, min_p: filters, off by default.
        behavior: who acts, with shares that sum to 1, drawn per prompt: ``student``, ``dataset`` (the column
            ``completion``), or the name of a teacher, who sees its own view. GKD's λ is
            ``{student: λ, dataset: 1 − λ}``; SFT is ``{dataset: 1}``.
        max_prompt_length: student prompts beyond it are refused or skipped when the data is set up (never cut).
        max_staleness: how many generation batches are rolled out ahead, by a thread with a copy of the student, while
            it is trained. A generation batch that is trained after optimizer step n was sampled with the weights
            before the max_staleness generation batches that came before it: that is fixed, not a matter of timing, so
            runs are reproducible and resume exactly. 0, the default, is on-policy. From 1 on rollouts and training
            overlap; larger values only add lag.

    Raises:
        ValueError: a value out of range, named.
    """

    batch_size: int = 32
    group_size: int = 1
    micro_batch_size: int | None = None
    epochs: int = 1
    horizon: int = 128
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    behavior: dict[str, float] = field(default_factory=lambda: {"student": 1.0})
    max_prompt_length: int | None = None
    max_staleness: int = 0

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"rollout.max_staleness must be >= 0, got {self.max_staleness}")
        for name in ("batch_size", "group_size", "micro_batch_size", "epochs", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {value}")
        check_sampling("rollout", self)
        shares = self.behavior.values()
        if not self.behavior or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"rollout.behavior: shares must be >= 0 and sum to 1, got {self.behavior}")

    @property
    def sources(self) -> set[str]:
        """Behavior policies that act at all."""
        return {name for name, share in self.behavior.items() if share > 0}

    def micro_batches(self, accumulate: int) -> tuple[int, int]:
        """Trajectories per micro-batch, and micro-batches per generation batch, for this accumulation.

        Raises:
            ValueError: the generation batch cannot be cut into whole optimizer steps.
        """
        total = self.batch_size * self.group_size
        size = self.micro_batch_size or total // accumulate
        if size < 1 or total % (size * accumulate):
            raise ValueError(
                f"a generation batch of {total} trajectories (rollout.batch_size={self.batch_size} × "
                f"group_size={self.group_size}) cannot be cut into optimizer steps of {size or 1} × {accumulate} "
                f"(rollout.micro_batch_size × trainer.accumulate_grad_batches); make it a multiple"
            )
        return size, total // size


def check_sampling(key: str, settings: Any) -> None:
    """The settings that rollouts and evaluation share.

    Raises:
        ValueError: a value out of range, named below ``key``.
    """
    for name in ("horizon", "top_k"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{key}.{name} must be >= 1, got {value}")
    if settings.temperature < 0:
        raise ValueError(f"{key}.temperature must be >= 0 (0 is greedy), got {settings.temperature}")
    for name in ("top_p", "min_p"):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{key}.{name} must be in (0, 1], got {value}")


def check_limit(trainer: Any) -> None:
    """
    Raises:
        ValueError: an epoch would end in the middle of an optimizer step, which Lightning would then take with a part
            of its micro-batches.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches % accumulate and not trainer.fast_dev_run:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} ends an epoch after {batches} micro-batches, "
            f"in the middle of an optimizer step of trainer.accumulate_grad_batches={accumulate}; make it a multiple"
        )


def derived_seed(*key: int) -> int:
    """A 63-bit seed from whole numbers such as (run seed, prompt draw, member of the group)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


class RolloutLoader:
    """The training dataloader: pulls prompts, lets the behavior policy act, yields micro-batches of trajectories.

    Each generation batch sees the current weights, or those of ``rollout.max_staleness`` generations ago. Every draw is
    seeded by (seed, place of the prompt in the global order, member of the group): it depends neither on the order of
    calls nor on how many ranks share the work. Position and the trajectories of every rank that are not yet trained are
    in the checkpoint, those made ahead too; another number of ranks goes on from there if it trains equal batches. The
    position is that of the last optimizer step that was done, also in a checkpoint from the middle of one. Another
    loader for the same trainer begins with the epoch after this one's.

    Args:
        dataset: examples by index.
        module: the student's module, which acts and scores.
        seed: of the prompt order and of all sampling.

    Raises:
        ValueError: fewer examples than one generation batch over all ranks.
    """

    def __init__(self, dataset: Sequence[Example], module: OnPolicyDistillation, seed: int = 0) -> None:
        self.dataset, self.module, self.trainer, self.seed = dataset, module, module.trainer, seed
        self.rank, self.world_size = module.global_rank, module.trainer.world_size
        self.accumulate = module.trainer.accumulate_grad_batches
        self.size, self.per_generation = module.rollout.micro_batches(self.accumulate)
        self.rounds = module.rollout.epochs
        self.prompts = module.rollout.batch_size * self.world_size
        if len(dataset) < self.prompts:
            raise ValueError(
                f"the training data has {len(dataset)} examples, fewer than one generation batch of {self.prompts} "
                f"(rollout.batch_size × ranks)"
            )
        self.generations = len(dataset) // self.prompts
        self.epoch = self.generation = self.next = 0
        self.pending: Trajectories | None = None
        self.begun: StepStart | None = None
        self._round: list[MicroBatch] = []
        self._caches: list[Cache] = []
        self._in_step = mesh_of(module.trainer) is not None
        self._ahead: deque[Future[Trajectories]] = deque()
        self._worker = RolloutWorker(module) if module.rollout.max_staleness else None
        if module.loader is not None and module.loader.trainer is self.trainer:
            module.loader.close()
            self.epoch = module.loader.epoch + 1
        module.loader = self

    @cached_property
    def fingerprints(self) -> Tensor:
        """``[N]`` of the rows, by which a resumed run knows them again."""
        return fingerprint.of_rows(self.dataset)

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank; prompts that fill no generation batch wait for another epoch."""
        return self.generations * self.rounds * self.per_generation

    def __iter__(self) -> Iterator[MicroBatch]:
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
                self.begun = self.module.begin_step()
            self.next += 1
            if place + 1 == self.per_generation:
                self._round = []
            yield batch
            self._leave_behind()

    @property
    def unfinished(self) -> int:
        """Micro-batches that were handed out for an optimizer step that is not done."""
        if self.begun is None or self.begun.step != self.module.global_step:
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
            steps = steps[torch.randperm(len(steps), generator=self._generator(2, number, done))]
        for mine in steps.tolist():
            caches = [self._caches[i] for i in mine]
            micro_batches += OptimizerStep([pieces[i] for i in mine], caches=caches)
        return micro_batches

    def _generate(self) -> Trajectories:
        """The next generation batch, with rewards."""
        number, module = self.epoch * self.generations + self.generation, self.module
        with module.stopwatch.phase("rollout"):
            if self._worker is None:
                trajectories = self._roll_out(number, module.global_step, module)
            else:
                self._keep_ahead(number, self._worker)
                trajectories = self._ahead.popleft().result()
        module.stopwatch.count("rollout", int(trajectories.mask.sum()))
        trajectories = module.with_rewards(trajectories)
        if trajectories.reward is not None:
            module.record("reward", trajectories.reward[~trajectories.reward.isnan()])
            module.record("abstained", trajectories.reward.isnan())
        for callback in module.callbacks:
            trajectories = check_rollouts(callback, callback.on_rollouts(module, trajectories))
            if trajectories.reward is None:  # it put others in their place
                trajectories = module.with_rewards(trajectories)
        return module.settle(trajectories)

    def _keep_ahead(self, number: int, worker: RolloutWorker) -> None:
        """Sees to it that the generation batches up to number + max_staleness are on their way."""
        for rolled in self._ahead:  # the weights must not change while it acts, and what it raised is raised here
            rolled.result()
        worker.refresh()
        version = self.module.global_step
        for later in range(number + len(self._ahead), number + self.module.rollout.max_staleness + 1):
            self._ahead.append(worker.submit(partial(self._roll_out, later, version)))

    def _roll_out(self, number: int, version: int, actor: OnPolicyDistillation) -> Trajectories:
        """Generation batch ``number`` since the start of the run, without rewards."""
        rollout = actor.rollout
        epoch, generation = divmod(number, self.generations)
        order = torch.randperm(len(self.dataset), generator=self._generator(epoch))
        first = generation * self.prompts + self.rank * rollout.batch_size
        rows = order[first : first + rollout.batch_size].repeat_interleave(rollout.group_size)
        draws = epoch * len(self.dataset) + torch.arange(first, first + rollout.batch_size)
        draws = draws.repeat_interleave(rollout.group_size)
        members = torch.arange(rollout.group_size).repeat(rollout.batch_size)
        examples: list[Example] = [row_of(self.dataset, int(row)) for row in rows]
        seeds = [derived_seed(self.seed, int(d), int(m)) for d, m in zip(draws, members, strict=True)]

        sources = tuple(rollout.behavior)
        source = self._choose(draws, torch.tensor(list(rollout.behavior.values())))
        parts, places = [], []
        for i, name in enumerate(sources):
            mine = (source == i).nonzero().squeeze(-1)
            # whose weights are cut can't act without the other ranks, so all of them act
            some = mine if len(mine) or not self._in_step else mine.new_zeros(1)
            if len(some):
                who = actor.act(name, [examples[j] for j in some], [seeds[j] for j in some])
            if len(mine):
                parts.append(dataclasses.replace(who.to("cpu"), sources=sources))
                places.append(mine)
        trajectories = Trajectories.concatenate(parts, actor.padding)
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

    def _choose(self, draws: Tensor, shares: Tensor) -> Tensor:
        """``[B]`` which behavior policy acts: one draw per prompt, so a group is never mixed."""
        if len(shares) == 1:
            return torch.zeros_like(draws)
        uniform = torch.tensor([np.random.default_rng((self.seed, 1, int(draw))).random() for draw in draws])
        return torch.searchsorted(shares.double().cumsum(0), uniform, right=True).clamp(max=len(shares) - 1)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, *key))

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, on every rank; trajectories without their examples, which ``row`` finds again."""
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

    def _of_all_ranks(self, trajectories: Trajectories) -> list[dict[str, Any]]:
        everyone: list[Any] = [trajectories.state_dict()] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(everyone, everyone[0])
        return everyone

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the checkpoint was written over other rows, by another seed, or with other batches over all
                ranks.
        """
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
        if len(state["ahead"]) > self.module.rollout.max_staleness:
            raise ValueError(
                f"the checkpoint holds {len(state['ahead'])} generation batches that were rolled out ahead; "
                f"rollout.max_staleness is {self.module.rollout.max_staleness}, which would train them out of turn"
            )
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
        self.module.shown([], parts[0].student_view)  # refuses a checkpoint of another view now, not when it is trained
        if len(parts) == self.world_size:
            return parts[self.rank]
        everyone = Trajectories.concatenate(parts, self.module.padding)
        places = torch.arange(len(everyone)).view(len(parts), pieces, -1).transpose(0, 1).reshape(pieces, -1)
        mine: Tensor = places.chunk(self.world_size, 1)[self.rank]
        return everyone.select(mine.flatten())


class EndOfRollouts(L.Callback):
    """Ends what rolls out ahead when the run ends, however it does; every module brings one."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.train_dataloader, RolloutLoader):
            trainer.train_dataloader.close()
        pl_module.release()  # type: ignore[operator]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def group_statistics(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of the rewards ``[B]`` within each group, ``[B]`` each.

    Rewards that are NaN (they abstain) count in neither; both are NaN where all of a group do.
    """
    _, member = group.unique(return_inverse=True)
    known = ~reward.isnan()
    count = torch.zeros(int(member.max()) + 1).index_add(0, member, known.float())
    mean = torch.zeros_like(count).index_add(0, member, torch.where(known, reward, 0.0)) / count
    centered = torch.where(known, reward - mean[member], 0.0)
    variance = torch.zeros_like(count).index_add(0, member, centered.square()) / count
    return mean[member], variance.sqrt()[member]
