"""How a server that runs gets the student's weights: an adapter of its own, or all weights in place of the server's."""

from __future__ import annotations

import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ....printable import printable

Post = Callable[[str, dict[str, Any]], bytes]


class ServedWeights(ABC):
    """Weights of a student as a vLLM server has them.

    Args:
        post: sends a path and a body to the server.
        folder: where weights are written; the server must see it under the same path.
    """

    def __init__(self, post: Post, folder: Path) -> None:
        self.post, self.folder = post, folder
        self._own, self._number = f"opd-{uuid.uuid4().hex[:8]}", 0  # ranks and runs may share a server

    @abstractmethod
    def sync(self, model: Any) -> bool:
        """Gives the weights to the server if they have changed; True if they have."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name that was given to the server; empty: that of the model which it was started with."""

    @abstractmethod
    def close(self) -> None:
        """Leaves nothing of the student in the folder, nor in the server where that can be undone."""

    def _next(self) -> Path:
        self._number += 1
        return self.folder / f"{self._own}-{self._number}"


class ServedAdapter(ServedWeights):
    """A LoRA adapter, loaded under a new name whenever it has changed, so that no key or value that was computed with
    the old one can be used; the old one is unloaded."""

    def __init__(self, post: Post, folder: Path) -> None:
        super().__init__(post, folder)
        self._loaded: dict[str, Tensor] = {}
        self._path: Path | None = None

    @property
    def name(self) -> str:
        return "" if self._path is None else self._path.name

    def sync(self, model: Any) -> bool:
        config, weights = _adapter(model)
        if self._loaded.keys() == weights.keys() and all(torch.equal(w, self._loaded[n]) for n, w in weights.items()):
            return False
        path = self._next()
        try:
            config.save_pretrained(path)
            save_file(weights, path / "adapter_model.safetensors")
            self.post("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path.absolute())})
        except BaseException:  # the server has the old one yet, if any
            shutil.rmtree(path, ignore_errors=True)
            raise
        old, self._loaded, self._path = self._path, weights, path
        if old is not None:
            self._unload(old)
        return True

    def _unload(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self.post("/v1/unload_lora_adapter", {"lora_name": path.name})

    def close(self) -> None:
        path, self._loaded, self._path = self._path, {}, None
        if path is not None:
            try:
                self._unload(path)
            except ConnectionError as error:
                rank_zero_warn(f"{printable(error)}; if it is still there, it keeps the adapter {path.name}")


class ServedModel(ServedWeights):
    """All weights, which the server reads from the folder in place of its own (``reload_weights``), after which it
    forgets the keys and values of prompts that it has read. It has the last ones when the run has ended."""

    def __init__(self, post: Post, folder: Path) -> None:
        super().__init__(post, folder)
        self._bits: Tensor | None = None

    @property
    def name(self) -> str:
        return ""

    def sync(self, model: Any) -> bool:
        if getattr(model, "is_quantized", False):
            raise ValueError("VllmServer: a server can't take the weights of a quantized student; give it student.lora")
        if any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise ValueError("VllmServer: weights that are sharded (fsdp2) can't be sent to a server; use ddp")
        bits = _bits(model)
        if self._bits is not None and torch.equal(bits, self._bits):
            return False
        self._bits = None  # if it fails half-way, the server has no student that is known
        path = self._next()
        try:
            model.save_pretrained(path)
            weights = {"weights_path": str(path.absolute())}
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": weights})
        finally:
            shutil.rmtree(path, ignore_errors=True)
        self.post("/reset_prefix_cache", {})
        self._bits = bits
        return True

    def close(self) -> None:
        self._bits = None


def served(model: Any, post: Post, folder: Path) -> ServedWeights:
    """Builds what a student needs: its adapter where it has one, else all of its weights.

    Raises:
        ValueError: several adapters are switched on.
    """
    return (ServedAdapter if _active(model) else ServedModel)(post, folder)


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
    """Sums the bits of each weight, which an update changes; a copy to compare with would be as large as the model."""
    sums = []
    for weight in model.state_dict().values():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        sums.append(weight.detach().contiguous().view(integer).sum(dtype=torch.int64))
    return torch.stack([total.cpu() for total in sums])
