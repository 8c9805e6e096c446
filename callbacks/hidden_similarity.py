"""HiddenSimilarity: how alike student and teacher represent what the student does.

Shape legend: n states, B trajectories of T steps, H and H′ hidden sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..policy import evaluating
from ..teacher import Elsewhere
from ..trajectory import Example, Trajectories


class HiddenSimilarity(DistillationCallback):
    """Logs the centered kernel alignment of hidden states, linear CKA, with a teacher on the student's trajectories.

    1 where one is a rotation and a scaling of the other, so that neither widths nor coordinates have to be equal. With
    a damaged model's former self as the teacher it follows the recovery (2604.15794). ``train/cka/layer_<l>`` is over
    all steps of a logged optimizer step and all ranks, before the update; it costs a forward pass of each model there.

    Example::

        callbacks+:
          - {class_path: HiddenSimilarity, init_args: {layers: {-1: -1}}}

    Args:
        layers: of the student, each with the teacher's beside it, as in `HiddenMatch`. Default: the last of both.
        teacher: an entry of ``model.teachers``, which reads its own view. Default ``teacher``.

    Raises:
        ValueError: no layers; when the run begins: a setting or a teacher that shows no hidden states.
    """

    def __init__(self, layers: dict[int, int] | None = None, teacher: str = "teacher") -> None:
        self.layers, self.teacher = {-1: -1} if layers is None else layers, teacher
        if not self.layers:
            raise ValueError("HiddenSimilarity.layers names none: there is nothing to compare")
        self.asks = frozenset({teacher})

    def check(self, module: OnPolicyDistillation) -> None:
        if "layers" not in module.provides:
            raise ValueError("HiddenSimilarity needs hidden states, which this setting does not show")
        teacher = module.teachers.get(self.teacher)
        if teacher is not None and isinstance(teacher.weights, Elsewhere):
            raise ValueError(
                f"HiddenSimilarity.teacher: model.teachers.{self.teacher} has no model in this process, which alone "
                "has hidden states of layers"
            )

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if not module.is_logged(module.global_step + 1):
            return
        moments = [Moments() for _ in self.layers]
        for trajectories in step.trajectories:
            batch = trajectories.to(module.device)
            views = module.streams.seen(self.teacher, batch.examples, batch.student_view)
            available = torch.tensor([view is not None for view in views], device=batch.mask.device)
            own = module.shown(batch.examples, batch.student_view)
            reading = [example if view is None else view for example, view in zip(own, views, strict=True)]
            here = batch.mask & available[:, None]
            student = self._read(module, "student", batch, [*self.layers], None)
            teacher = self._read(module, self.teacher, batch, [*self.layers.values()], reading)
            for sums, one, other in zip(moments, student, teacher, strict=True):
                sums.add(one[here.to(one.device)], other[here.to(other.device)].to(one.device))
        for number, sums in zip(self.layers, moments, strict=True):
            together = Moments({name: module.ranks.sum(total) for name, total in sums.totals.items()})
            module.record(f"cka/layer_{number}", together.cka())

    @torch.no_grad()
    def _read(
        self,
        module: OnPolicyDistillation,
        name: str,
        batch: Trajectories,
        layers: list[int],
        view: list[Example] | None,
    ) -> list[Tensor]:
        policy = module.policies[name]
        with evaluating(policy.model), module.trainer.precision_plugin.forward_context():
            return module.hidden_states(policy, batch, layers, view)


class Moments:
    """Sums over states from which linear CKA is computed, so that no batch has to hold all of them.

    Args:
        totals: sums that were made before, by name.
    """

    def __init__(self, totals: dict[str, Tensor] | None = None) -> None:
        self.totals = totals or {}

    def add(self, one: Tensor, other: Tensor) -> None:
        """Adds hidden states ``[n, H]`` and ``[n, H′]`` at the same states."""
        x, y = one.double(), other.double()
        sums = {
            "count": x.new_tensor(float(len(x))),
            "x": x.sum(0),
            "y": y.sum(0),
            "xx": x.T @ x,
            "yy": y.T @ y,
            "xy": x.T @ y,
        }
        self.totals = {name: total + self.totals.get(name, 0.0) for name, total in sums.items()}

    def cka(self) -> float:
        """Computes ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) of centered X and Y; 0 where one of them is constant."""
        sums = self.totals
        xx, yy, xy = (
            (sums[a + b] - torch.outer(sums[a], sums[b]) / sums["count"].clamp(min=1)).norm()
            for a, b in ("xx", "yy", "xy")
        )
        # what centering leaves of a constant is rounding
        rounding = 1e-10 * sums["xx"].norm() * sums["yy"].norm()
        return float(xy.square() / (xx * yy).clamp(min=rounding.clamp(min=1e-30)))
