"""How servers that run get the student's weights: an adapter of its own, or all weights in place of the server's."""

from __future__ import annotations

import shutil
import uuid
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ....printable import printable
from .replica import ANSWERS_WITHIN, Refusal, Replica


class ServedWeights(ABC):
    """Weights of a student as vLLM servers have them.

    Args:
        folder: where weights are written; each server must see it under the same path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own, self._number = f"opd-{uuid.uuid4().hex[:8]}", 0  # ranks and runs may share a server
        self.path: Path | None = None

    def sync(self, model: Any, replicas: list[Replica]) -> dict[Replica, Exception]:
        """Gives the weights to the servers that lack them, all at once; returns who did not take them, and why."""
        # 1. a new name for weights that have changed
        old = self.path
        if self._changed(model):
            self._number += 1
            self.path = self.folder / f"{self._own}-{self._number}"
        assert self.path is not None
        lacking = [replica for replica in replicas if replica.given != self.path]
        if not lacking:
            return {}
        # 2. written once for all of them
        failed: dict[Replica, Exception] = {}

        def give(replica: Replica) -> None:
            try:
                self._give(replica)
                replica.given, replica.unproven = self.path, bool(replica.read)
            except ConnectionError as error:
                replica.given, failed[replica] = None, error

        try:
            if not self.path.exists():
                self._save(model, self.path)
            with ThreadPoolExecutor(len(lacking)) as threads:
                list(threads.map(give, lacking))
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        # 3. nothing is left of what nobody reads any more
        if old is not None and old != self.path:
            shutil.rmtree(old, ignore_errors=True)
        if not self._read_later or len(failed) == len(lacking):
            shutil.rmtree(self.path, ignore_errors=True)
        return failed

    def name(self, replica: Replica) -> str:
        """Returns the name under which a server has them."""
        return replica.base

    def close(self, replicas: list[Replica]) -> None:
        """Leaves nothing of the student in the folder, nor in the servers where that can be undone."""
        for replica in replicas:
            replica.given = None
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    _read_later: bool
    """True where a server may read the folder again."""

    @abstractmethod
    def _changed(self, model: Any) -> bool:
        """Tells whether the weights are others than at the call before; True at the first."""

    @abstractmethod
    def _save(self, model: Any, path: Path) -> None:
        """Writes the weights that were last compared."""

    @abstractmethod
    def _give(self, replica: Replica) -> None:
        """Has a server take what is at ``path``."""


class ServedAdapter(ServedWeights):
    """A LoRA adapter, loaded under a new name whenever it has changed, so that no key or value that was computed with
    the old one can be used; the old one is unloaded."""

    _read_later = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._weights: dict[str, Tensor] = {}
        self._config: Any = None

    def name(self, replica: Replica) -> str:
        assert self.path is not None
        return self.path.name

    def _changed(self, model: Any) -> bool:
        self._config, weights = _adapter(model)
        old, self._weights = self._weights, weights
        return old.keys() != weights.keys() or not all(torch.equal(w, old[name]) for name, w in weights.items())

    def _save(self, model: Any, path: Path) -> None:
        self._config.save_pretrained(path)
        save_file(self._weights, path / "adapter_model.safetensors")

    def _give(self, replica: Replica) -> None:
        assert self.path is not None
        name, is_new = self.path.name, self.path.name not in replica.adapters
        if is_new:  # also where no answer comes: it may be loaded all the same
            replica.adapters.append(name)
        try:
            replica.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.path.absolute())})
        except Refusal as refusal:
            if is_new or "already been loaded" not in str(refusal):  # nobody else has this name
                raise
        self._unload(replica, name)

    def _unload(self, replica: Replica, but: str = "") -> list[Exception]:
        """Has a server forget adapters; returns what kept it from that, after which it is asked again another time."""
        errors: list[Exception] = []
        for name in [name for name in replica.adapters if name != but]:
            try:
                replica.ask("/v1/unload_lora_adapter", {"lora_name": name}, timeout=ANSWERS_WITHIN)
                replica.adapters.remove(name)
            except Refusal:  # it was started again, and knows nothing of it
                replica.adapters.remove(name)
            except ConnectionError as error:
                errors.append(error)
        return errors

    def close(self, replicas: list[Replica]) -> None:
        with ThreadPoolExecutor(len(replicas)) as threads:
            for replica, errors in zip(replicas, threads.map(self._unload, replicas), strict=True):
                if errors:
                    names = ", ".join(replica.adapters)
                    warn(f"{printable(errors[0])}; if it is still there, it keeps the adapter {names}", stacklevel=2)
        super().close(replicas)


class ServedModel(ServedWeights):
    """All weights, which a server reads from the folder in place of its own (``reload_weights``), after which it
    forgets the keys and values of prompts that it has read. It has the last ones when the run has ended."""

    _read_later = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._bits: Tensor | None = None

    def _changed(self, model: Any) -> bool:
        if getattr(model, "is_quantized", False):
            raise ValueError("VllmServer: a server can't take the weights of a quantized student; give it student.lora")
        if any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise ValueError("VllmServer: weights that are sharded (fsdp2) can't be sent to a server; use ddp")
        old, self._bits = self._bits, _bits(model)
        return old is None or not torch.equal(old, self._bits)

    def _save(self, model: Any, path: Path) -> None:
        model.save_pretrained(path)

    def _give(self, replica: Replica) -> None:
        weights = {"weights_path": str(self.path and self.path.absolute())}
        replica.ask("/collective_rpc", {"method": "reload_weights", "kwargs": weights})
        replica.ask("/reset_prefix_cache", {})


def served(model: Any, folder: Path) -> ServedWeights:
    """Builds what a student needs: its adapter where it has one, else all of its weights.

    Raises:
        ValueError: several adapters are switched on.
    """
    return (ServedAdapter if _active(model) else ServedModel)(folder)


def _active(model: Any) -> set[str]:
    active = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    if len(active) > 1:
        raise ValueError(f"VllmServer is for a student with one LoRA adapter or none; this one has {len(active)}")
    return active


def _adapter(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Copies configuration and weights of the one adapter that is switched on, named as PEFT saves them."""
    (name,) = _active(model)
    state = get_peft_model_state_dict(model, adapter_name=name)
    # copies: training goes on, and the next rollout compares with these
    weights = {f"base_model.model.{key}": weight.detach().cpu().clone() for key, weight in state.items()}
    return model.peft_config[name], weights


def _bits(model: Any) -> Tensor:
    """Sums the bits of each weight over rows and over columns, by their places, which an update changes; a copy to
    compare with would be as large as the model."""
    sums = []
    for weight in model.state_dict().values():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        table = weight.detach().contiguous().view(integer).reshape(-1, weight.shape[-1] if weight.ndim else 1)
        for axis in (0, 1):
            of_line = table.sum(axis, dtype=torch.int64)
            places = torch.arange(1, len(of_line) + 1, device=of_line.device)
            sums.append((of_line * places * places).sum())
    return torch.stack([total.cpu() for total in sums])
