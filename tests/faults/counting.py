"""A note that counts its calls, and a kill between notes and training, for configurations of real processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from opd_lightning.callback import DistillationCallback
from opd_lightning.modalities.autoregressive import PromptView, Written
from opd_lightning.optimizer_step import OptimizerStep
from opd_lightning.trajectory import Trajectories


class Counted(Written):
    """A reflection, the number of the call, and in the file ``$CALLS`` a line with whom each call was about."""

    remembers = ("count",)

    def __init__(self) -> None:
        super().__init__(PromptView("{{ written }}+{{ prompt }}"), horizon=4)
        self.writes, self.count = ("reflection", "number"), 0

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        with Path(os.environ["CALLS"]).open("a", encoding="utf-8") as calls:
            calls.write(json.dumps(trajectories.seed.tolist()) + "\n")
        self.count += 1
        reflections = [row["reflection"] for row in super().__call__(module, trajectories).examples]
        return trajectories.noted({"reflection": reflections, "number": [str(self.count)] * len(trajectories)})


class Killed(DistillationCallback):
    """Kills its own process before it trains the optimizer step number ``$KILL_AT``, counted from 0."""

    def on_optimizer_step_start(self, module: Any, step: OptimizerStep) -> None:
        if str(module.global_step) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
