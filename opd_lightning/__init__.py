"""On-policy distillation on Lightning.

What people write has its name here, and is imported when it is first asked for: ``import opd_lightning`` alone costs
nothing. Settings are in `opd_lightning.modalities`, callbacks that ship in `opd_lightning.callbacks`, parts of single
papers in `opd_lightning.methods`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401
if TYPE_CHECKING:  # the same names, for whoever checks types
    from .callback import DistillationCallback
    from .data import PromptData
    from .distribution import Categorical, Gaussian, Head
    from .environment import Environment, Turn
    from .evaluation_settings import Evaluation
    from .module import OnPolicyDistillation
    from .note import Note
    from .objective import (
        JSD,
        STATISTICS,
        Advantage,
        CrossEntropy,
        Divergence,
        ForwardKL,
        Generation,
        Objective,
        OpenSteps,
        PolicyGradient,
        ReverseKL,
        Signal,
        Steps,
        Support,
        Target,
        Term,
        Weight,
    )
    from .optimization import LRSchedule
    from .optimizer_step import MicroBatch, OptimizerStep
    from .policy import Policy, View
    from .pretrained import Lora, Pretrained
    from .reward import Reward
    from .rollout_settings import Rollout
    from .teacher import EMA, Frozen, Initial, Live, Same, Teacher
    from .trajectory import Example, Trajectories

_NAMES = {
    "callback": "DistillationCallback",
    "data": "PromptData",
    "distribution": "Categorical Gaussian Head",
    "environment": "Environment Turn",
    "evaluation_settings": "Evaluation",
    "module": "OnPolicyDistillation",
    "note": "Note",
    "objective": "Advantage CrossEntropy Divergence ForwardKL Generation JSD Objective OpenSteps PolicyGradient "
    "ReverseKL STATISTICS Signal Steps Support Target Term Weight",
    "optimization": "LRSchedule",
    "optimizer_step": "MicroBatch OptimizerStep",
    "policy": "Policy View",
    "pretrained": "Lora Pretrained",
    "reward": "Reward",
    "rollout_settings": "Rollout",
    "teacher": "EMA Frozen Initial Live Same Teacher",
    "trajectory": "Example Trajectories",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOMES]

for _name in ("assets", "callbacks", "configs", "methods", "modalities"):
    _path = Path(__file__).with_name(_name)
    if not _path.is_dir():
        raise ImportError(
            f"{_path} should be a symbolic link to ../{_name}: this clone was made without them "
            "(git on Windows leaves text files in their places). Clone again with `git clone -c core.symlinks=true`, "
            "on Windows in developer mode"
        )

if not TYPE_CHECKING:  # or else any name would be one

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'opd_lightning' has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
