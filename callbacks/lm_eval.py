"""LMEval: tasks of EleutherAI's lm-evaluation-harness, of the student while it trains."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from ..callback import DistillationCallback
from ..optimizer_step import OptimizerStep
from ..policy import evaluating
from ..printable import printable
from ..progress import phase
from ..sharding import mesh_of


class LMEval(DistillationCallback):
    """Hands the student as it is to the harness: before the first step and every so many optimizer steps.

    Logged are ``val/lm_eval/<task>/<metric>``, and ``…/<metric>/<filter>`` where a task has filters, without standard
    errors. What an exported student would be scored, the student is: ids that it can't write are suppressed, and its
    stop ids end its turn. Draws of the run are not touched. Every rank scores all rows. Needs the extra ``eval``.

    Example::

        callbacks+:
          - {class_path: LMEval, init_args: {tasks: [arc_easy, my_tasks/closed.yaml], limit: 100, every: 200}}

    Args:
        tasks: names of the harness's tasks, or YAML files of one's own. Most of its own fetch their rows from the hub.
        limit: the first rows of each task; None: all.
        num_fewshot: examples before each prompt; None: as the task has it.
        every: optimizer steps between two measurements.
        before: measure before the first step, too.
        chat: put prompts into the student's chat template.
        batch_size: rows of a forward pass. Default 8.

    Raises:
        ValueError: no tasks, or a number below 1; when the run begins: a task that is not there, or a student that
            writes no text or whose weights are sharded.
        ModuleNotFoundError: the harness is missing; the message names the extra.
    """

    def __init__(
        self,
        tasks: list[str],
        every: int,
        limit: int | None = None,
        num_fewshot: int | None = None,
        before: bool = True,
        chat: bool = False,
        batch_size: int = 8,
    ) -> None:
        if not tasks:
            raise ValueError("LMEval.tasks names none")
        for name, value in (("every", every), ("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"LMEval.{name} must be >= 1, got {value}")
        self.tasks, self.limit, self.num_fewshot = tasks, limit, num_fewshot
        self.every, self.before, self.chat, self.batch_size = every, before, chat, batch_size
        self._manager: Any = None

    def check(self, module: Any) -> None:
        # 1. what can be measured at all
        if not hasattr(module, "generation_settings"):
            raise ValueError(
                f"LMEval reads what a student writes, and {type(module).__name__} trains none that writes text"
            )
        if mesh_of(module.trainer) is not None:
            raise ValueError("LMEval: under trainer.strategy=fsdp2 no rank has the whole student; score exported ones")
        try:
            with phase("importing lm-evaluation-harness"):
                from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "LMEval needs lm-evaluation-harness: pip install 'opd-lightning[eval]'"
            ) from error
        # 2. its tasks, before anything is trained
        self._manager = TaskManager()
        for task in self.tasks:
            try:
                with isolate_rng(), phase(f"rows of the task {task}"):
                    self._manager.load([task])
            except Exception as error:  # of a file, a hub, a task's own code
                raise ValueError(f"LMEval.tasks: {task} can't be loaded: {printable(error)}") from error

    def measured(self, module: Any) -> dict[str, float]:
        """Returns what the harness makes of the student now, by the name under which it is logged."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = module.policies["student"].model
        # the harness seeds all generators anew, and pads with a tokenizer of its own
        with isolate_rng(), evaluating(model), phase(f"lm-evaluation-harness, {', '.join(self.tasks)}"):
            tokenizer = copy.deepcopy(module.tokenizer())
            student = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=self.batch_size)
            results = simple_evaluate(
                student,
                tasks=list(self.tasks),
                task_manager=self._manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.chat,
                gen_kwargs=module.generation_settings(),
                log_samples=False,
                bootstrap_iters=0,
            )
        assert results is not None
        return {
            f"val/lm_eval/{task}/{name}": value
            for task, metrics in results["results"].items()
            for name, value in named(metrics).items()
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before and trainer.global_step == 0:
            self._log(pl_module, 0)

    def on_optimizer_step_end(self, module: Any, step: OptimizerStep) -> None:
        if module.global_step % self.every == 0:
            module.log_dict(self._log(module, module.global_step), logger=False)  # for whoever monitors them

    def _log(self, module: Any, step: int) -> dict[str, float]:
        values = self.measured(module)
        for logger in module.trainer.loggers:
            logger.log_metrics(values, step=step)
        return values


def named(metrics: dict[str, Any]) -> dict[str, float]:
    """Names the metrics of a task: without the filter ``none``, standard errors and texts."""
    values = {}
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
            values[name if filtered == "none" else f"{name}/{filtered}"] = float(value)
    return values
