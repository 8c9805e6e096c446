"""DistillationCallback: what a callback of this house is told, and when."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L

from .objective import Term
from .optimizer_step import MicroBatch, OptimizerStep
from .trajectory import Trajectories


class Stateful:
    """Keeps in the checkpoint what it names."""

    remembers: ClassVar[tuple[str, ...]] = ()
    """Attributes, of plain numbers, strings, lists, dicts and tensors."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.remembers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class DistillationCallback(Stateful, L.Callback):
    """Follows a run by optimizer steps. Lightning's own hooks are there as well; call ``super()`` in those used here.

    ``module`` is the setting that trains (an `OnPolicyDistillation`): a subclass names the type that it needs. What a
    callback declares is read before data and models are loaded.
    """

    asks: frozenset[str] = frozenset()
    """Entries of ``model.teachers`` that it queries, also where no term does."""
    distributions: frozenset[str] = frozenset()
    """Those of which it reads more than log-probs of actions, all that some teachers elsewhere tell."""
    sources: frozenset[str] = frozenset()
    """Behavior policies that it lets act, also without a share of ``rollout.behavior``."""
    provides: frozenset[str] = frozenset()
    """What it fills for parts of the objective (`Part.needs`), such as a channel of the trajectories."""
    terms: tuple[Term, ...] = ()
    """Terms that it adds to the objective."""

    def check(self, module: Any) -> None:
        """Refuses what cannot work, and reads what the run is configured with: called once, before training.

        Raises:
            ValueError: what is missing, by its key.
        """

    def on_rollouts(self, module: Any, trajectories: Trajectories) -> Trajectories:
        """Returns the generation batch ``[B, T]`` that is trained; default: the one that it is given.

        It is on the CPU, with rewards if there are any. Steps that leave the mask are not trained and count in no
        normalizer. Every rank is called at the same time.
        """
        return trajectories

    def on_optimizer_step_start(self, module: Any, step: OptimizerStep) -> None:
        """Acts before the first micro-batch of an optimizer step, whose totals are not known yet."""

    def on_optimizer_step_end(self, module: Any, step: OptimizerStep) -> None:
        """Acts after the update; ``module.global_step`` counts it already."""

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(pl_module)
            teachers: dict[str, Any] = pl_module.teachers  # type: ignore[assignment]
            for name in sorted((self.asks | self.sources) - {"student", "dataset"} - set(teachers)):
                known = sorted(teachers)
                raise ValueError(f"{type(self).__name__}: no {name!r} in model.teachers, which has {known}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: MicroBatch, batch_idx: int
    ) -> None:
        if batch.is_first:
            self.on_optimizer_step_start(pl_module, batch.step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if batch.is_last:
            self.on_optimizer_step_end(pl_module, batch.step)


def followers(trainer: Any) -> list[DistillationCallback]:
    """Callbacks of a trainer that follow its optimizer steps, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, DistillationCallback)]
