"""Laws of every part of a method: nothing depends on how the batch is cut, on ranks, or on the order of its rows.

Parts are found, not listed: a new one is held to these as soon as it is there, built from its defaults.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from opd_lightning import methods, objective
from opd_lightning.config_keys import is_abstract
from opd_lightning.objective import Objective, Part, Term, availability
from opd_lightning.trajectory import Trajectories
from tests.methods.world import SHAPE, World, defaults, term_of
from tests.objective.reference import close

EVERY = torch.arange(SHAPE[0])
CUTS = [[EVERY], list(EVERY.split(3)), list(EVERY.split(1))]


def kinds() -> Iterator[type[Part]]:
    """Every signal, advantage and weight of the methods, and those that they are made of."""
    families = [module for module in vars(methods).values() if isinstance(module, ModuleType)]
    for module in (*families, objective):
        for cls in vars(module).values():
            here = module is objective or getattr(cls, "__module__", "") == module.__name__
            if isinstance(cls, type) and issubclass(cls, Part) and here and not is_abstract(cls):
                yield cls


KINDS = sorted(
    {cls for cls in kinds() if cls.__name__ not in ("Part", "Advantage", "Weight")}, key=lambda c: c.__name__
)


def settled(world: World, term: Term, pieces: Iterable[Tensor], everywhere: Callable = lambda values: values) -> Tensor:
    """The rows that the pieces hold, with the values of parts that are settled on the generation batch."""
    rows = torch.cat(list(pieces))
    trajectories, parts = world.trajectories.select(rows), Objective([term])
    if not parts.generation_parts():
        return trajectories
    queried = [(*world.queried(piece), world.trajectories.select(piece)) for piece in pieces]
    return parts.settle(trajectories, {}, parts.measure(queried, SHAPE[1]), everywhere)


def trained(world: World, term: Term, batch: Trajectories, pieces: list[Tensor]) -> Tensor:
    """The loss of an optimizer step that is cut like this."""
    parts, begin, batches = Objective([term], chunk_steps=2), 0, []
    for piece in pieces:
        batches.append(batch.select(torch.arange(begin, begin + len(piece))))
        begin += len(piece)
    queried = [world.queried(piece) for piece in pieces]
    sums = parts.weight_sums(queried, batches)
    available = [(part, availability(streams)) for part, (_, streams) in zip(batches, queried, strict=True)]
    normalizers = parts.normalizers(available, sums, float)
    losses = [parts(*q, b, normalizers)[0] for q, b in zip(queried, batches, strict=True)]
    return torch.stack(losses).sum()


def world_of(cls: type[Part]) -> tuple[World, Term]:
    term = term_of(defaults(cls))
    aligned = 8 if "other_tokenizer" in term.needs else None
    return World(7, sorted(term.teachers | {"teacher"}), stale=True, aligned=aligned), term


def outcome(world: World, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *world.student.gradients(loss)]


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_nothing_depends_on_how_the_batch_is_cut(cls):
    world, term = world_of(cls)
    whole, *cut = (outcome(world, trained(world, term, settled(world, term, pieces), pieces)) for pieces in CUTS)
    for other in cut:
        for value, expected in zip(other, whole, strict=True):
            close(value, expected, 1e-6)


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_nothing_depends_on_the_order_of_rows(cls):
    world, term = world_of(cls)
    shuffled = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(3))
    results = [outcome(world, trained(world, term, settled(world, term, [rows]), [rows])) for rows in (EVERY, shuffled)]
    for value, expected in zip(*results, strict=True):
        close(value, expected, 1e-6)


@pytest.mark.parametrize("cls", [c for c in KINDS if defaults(c).scope == "generation"], ids=lambda cls: cls.__name__)
def test_what_is_settled_is_the_same_on_two_ranks(cls):
    """Groups stay whole, as the loader keeps them: the third is on a rank of its own."""
    world, term = world_of(cls)
    alone = settled(world, term, [EVERY]).channels
    barrier, given, found = threading.Barrier(2, timeout=20), [None, None], {}

    def run(rank: int, rows: Tensor) -> None:
        def everywhere(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait()
            joined = torch.cat(given)
            barrier.wait()
            return joined

        found[rank] = settled(world, term, [rows], everywhere).channels

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((EVERY[:6], EVERY[6:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, values in alone.items():
        close(torch.cat([found[0][name], found[1][name]]), values, 1e-6)
