"""Resuming: values of the checkpoint, values of the configuration, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import nn

from .adapters import STUDENT, adapter_parameters
from .changes import changes, check_permitted, other_weights, told
from .checkpoint_file import plain_rng_states
from .diagnostics import Averages
from .own_code import edited, fingerprints
from .pretrained import Pretrained

ADVICE = "keep what the checkpoint was written with, or train its exported student in a new run"
_SHOWN = 20


# -- optimizers -------------------------------------------------------------------------------------------------------


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Collects an optimizer's class, and for each group its settings and the number of parameters."""
    plain = (bool, int, float, str, tuple, type(None))
    groups = [
        {name: value for name, value in group.items() if name != "params" and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]
    kind = type(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups, "sizes": sizes}


def check_settings(key: str, make: Callable[[Any], torch.optim.Optimizer], then: dict[str, Any], now: Any) -> None:
    """Checks that an optimizer can continue with the moments of another.

    Args:
        key: of the optimizer.
        make: from parameters to the optimizer as it is configured now.
        then, now: their settings (`settings_of`).

    Raises:
        ValueError: the moments of one mean nothing to the other, or it needs some that the one did not keep.
    """
    if then["class"] != now["class"]:
        raise ValueError(
            f"{key} was {then['class']} in the checkpoint and is now {now['class']}, to which its moments mean "
            f"nothing: {ADVICE}"
        )
    if then["sizes"] != now["sizes"]:
        raise ValueError(
            f"{key} had {then['sizes']} parameters (by group) in the checkpoint and has now {now['sizes']}: something "
            f"else is trained (student.freeze, …); {ADVICE}"
        )
    _check_moments(key, make, then, now)


def _check_moments(key: str, make: Callable[[Any], torch.optim.Optimizer], then: dict[str, Any], now: Any) -> None:
    """Steps on one weight, with the settings of then and of now."""
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros_like(weight)
    try:
        # the first step makes the moments of then, which the second one needs
        optimizer = make([weight])
        for settings in (then, now):
            for group, values in zip(optimizer.param_groups, settings["groups"], strict=False):
                group.update(values)
            optimizer.step()
    except KeyError as error:
        changed = [
            f"{name} was {before.get(name)} in the checkpoint and is now {value}"
            for before, after in zip(then["groups"], now["groups"], strict=True)
            for name, value in after.items()
            if before.get(name) != value
        ]
        raise ValueError(
            f"{key}: {', '.join(changed)}, and so it needs {error}, which it did not keep: {ADVICE}"
        ) from None
    except Exception:  # one that can't be tried on a single weight
        return


def apply_settings(optimizer: torch.optim.Optimizer, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Settings that changed take effect; whatever else a group holds stays as it was restored, as do the moments."""
    for group, before, after in zip(optimizer.param_groups, then["groups"], now["groups"], strict=True):
        group.update({name: value for name, value in after.items() if name not in before or before[name] != value})


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def kept_names(student: nn.Module, names: Iterable[str], spec: Pretrained) -> set[str]:
    """Names of the state that a checkpoint holds: trained weights, adapters and EMA teachers; of bases a drawn one.

    Args:
        student: the model.
        names: of all state of the run; the student's begin with ``student.``.
        spec: what the student was loaded from.
    """
    if spec.lora is None or spec.random_init:  # nobody else has the drawn base
        return set(names)
    # a tied head is the same parameter under a second name
    trained = {name for name, p in student.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {f"student.{name}" for name in trained | adapter_parameters(student).keys()}
    return {name for name in names if name in kept or not name.startswith("student.")}


class History:
    """History of a run: its settings and their changes, which travel through checkpoints.

    Attributes:
        config_yaml: the resolved configuration; empty where nobody says.
        code: fingerprints of the code of one's own that it names (`own_code`).
        may_change: keys whose changes are permitted (`Checkpoint`).
        changes: of each resume that changed it, the optimizer step, and ``[key, old, new]`` of each value.
        optimizer: its settings (`settings_of`).
        step: optimizer steps of the checkpoint that was loaded; 0 if none was.
    """

    def __init__(self) -> None:
        self.config_yaml, self.code = "", dict[str, str]()
        self.may_change: Sequence[str] = ()
        self.changes: list[dict[str, Any]] = []
        self.optimizer: dict[str, Any] = {}
        self.step = 0
        self._restored: dict[str, Any] = {}

    def begin(self, config_yaml: str) -> None:
        """Takes down the configuration, and the code that it names, which may be edited while the run goes on."""
        self.config_yaml, self.code = config_yaml, fingerprints(config_yaml)

    def record(self, checkpoint: dict[str, Any], student: nn.Module) -> None:
        """Adds what a resumed run is compared with, and what was changed on the way."""
        checkpoint["opd_config"], checkpoint["changes"] = self.config_yaml, self.changes
        checkpoint["code"] = self.code
        checkpoint["made_with"] = {
            "optimizer": self.optimizer,
            "adapter": _adapter(student),
            "trained": _trained(student),
        }

    def check(
        self,
        checkpoint: dict[str, Any],
        student: nn.Module,
        parameters: list[nn.Parameter],
        make: Callable[[Any], torch.optim.Optimizer],
        fits: bool,
        marks: Mapping[str, str],
    ) -> None:
        """Compares a checkpoint with the configuration, before anything of it is restored.

        Args:
            checkpoint: as `record` left it.
            student: as it is configured now.
            parameters: what is trained.
            make: from parameters to the optimizer.
            fits: whether its run goes on.
            marks: fingerprints of the weights of teachers, by name.

        Raises:
            ValueError: something differs whose change could not take effect, or is not permitted; the message says
                what, and both values.
        """
        self.step = int(checkpoint["global_step"])
        made_with = checkpoint.get("made_with")
        if made_with is None:
            if fits:
                raise ValueError("the checkpoint was written by an earlier version, whose runs can't be resumed")
            return
        _check_adapter(made_with["adapter"], _adapter(student))
        self.changes = list(checkpoint["changes"])
        if not fits:
            return
        if not checkpoint.get("optimizer_states"):
            raise ValueError("the checkpoint holds weights only: it can be evaluated and exported, not resumed")
        _check_trained(made_with["trained"], _trained(student))
        settings = settings_of(make(parameters))
        check_settings("model.optimizer", make, made_with["optimizer"], settings)
        self._restored = made_with
        if not self.config_yaml or not checkpoint["opd_config"]:
            return
        changed = changes(checkpoint["opd_config"], self.config_yaml)
        changed += other_weights(checkpoint.get("teachers", {}), marks)
        changed += edited(checkpoint.get("code", {}), self.code)
        check_permitted(changed, self.may_change)
        if changed:
            self.changes.append({"step": checkpoint["global_step"], "keys": changed})
            for line in told(self.changes[-1:])[:_SHOWN]:
                rank_zero_info(f"Changed {line}")

    def renew(self, trainer: Any) -> None:
        """Sets optimizer and schedule as they are configured now, in place of the settings that were restored."""
        if not self._restored:
            return
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        schedule: Any = config.scheduler
        apply_settings(optimizer, self._restored["optimizer"], self.optimizer)
        schedule.base_lrs = [group["lr"] for group in self.optimizer["groups"]]
        # a LambdaLR multiplies `initial_lr`, which was restored, and would be that of the checkpoint
        for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base, base * rate(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        self._restored = {}


def fits(trainer: Any) -> bool:
    """Tells whether a trainer trains; None does not."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def _trained(student: nn.Module) -> list[str]:
    return [name for name, p in student.named_parameters() if p.requires_grad]


def _check_trained(then: list[str], now: list[str]) -> None:
    for names, what in ((set(then) - set(now), "trained"), (set(now) - set(then), "not trained")):
        if names:
            raise ValueError(
                f"model.student: {min(names)} was {what} in the checkpoint, and now it is the other way round "
                f"({len(names)} parameters; student.freeze, …): {ADVICE}"
            )


def _adapter(student: Any) -> dict[str, Any]:
    if not isinstance(student, PeftModel):
        return {}
    config: Any = student.peft_config[STUDENT]
    targets = config.target_modules
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        "kind": [name for name in ("use_rslora", "use_dora", "lora_bias") if getattr(config, name, False)],
    }


def _check_adapter(then: dict[str, Any], now: dict[str, Any]) -> None:
    if bool(then) != bool(now):
        was, be = ("trained", "not set") if then else ("not set", "set")
        raise ValueError(f"model.student.lora was {was} in the checkpoint and is now {be}: {ADVICE}")
    for name, value in then.items():
        if now[name] != value:
            raise ValueError(
                f"model.student.lora.{name} was {_short(value)} in the checkpoint and is now {_short(now[name])}, with "
                f"which its adapter would be another one: {ADVICE}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_complete(kept: set[str], saved: Mapping[str, Any]) -> None:
    """Refuses checkpoints without all trained weights.

    Raises:
        ValueError: a checkpoint lacks some of the weights that are ``kept``.
    """
    missing = sorted(kept - set(saved))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the weights that this configuration trains, among them "
            f"{missing[0]}: was it written with another model.student or model.teachers?"
        )


def check_shapes(path: str, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses weights of other shapes.

    Raises:
        ValueError: the ``saved`` weights are of another model than those of the student from ``path``.
    """
    for name, weight in saved.items():
        if isinstance(weight, torch.Tensor) and name in mine and weight.shape != mine[name].shape:
            raise ValueError(
                f"{path} is another model now than the one that was trained: {name} has the "
                f"shape {list(weight.shape)} in the checkpoint and {list(mine[name].shape)} here"
            )


# -- in the middle of an optimizer step -------------------------------------------------------------------------------


class StepStart:
    """State before the first micro-batch of an optimizer step of all that changes during one.

    Attributes:
        step: optimizer steps that were done then.
        averages: what was recorded and not yet logged.
        rng: the states of all random number generators.
    """

    def __init__(self, step: int, averages: Averages) -> None:
        self.step, self.rng = step, plain_rng_states()
        self.averages = Averages(averages.device)
        # shallow: `Averages` replaces its sums and changes none in place
        self.averages.sums = dict(averages.sums)


def rewind(checkpoint: dict[str, Any], unfinished: int) -> None:
    """Takes Lightning's counters back by the ``unfinished`` micro-batches of an optimizer step that is not done.

    Gradients are in no checkpoint: the step is trained from its beginning again, with the same weights.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counted in (progress["total"], progress["current"]):
        done = counted["ready"] - unfinished
        counted.update(ready=done, started=done, processed=done, completed=done)
    progress["is_last_batch"] = False  # or Lightning would take the epoch for done
