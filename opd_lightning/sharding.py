"""FSDP2: every rank holds a slice of each weight, and gathers a layer's weights only while that layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import lightning as L
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_map_only

from .checkpoint_file import is_slices
from .ranks import exchanged, is_speaking
from .remote import is_url, refuse_url
from .slices import WEIGHTS, read_slices, write_slices

T = TypeVar("T")


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy without tensor parallelism: ``--trainer.strategy=fsdp2``.

    A checkpoint of either form resumes under any strategy and on any number of ranks, and exports.

    Args:
        process_group_backend: default: nccl on GPUs, gloo on CPUs.
        timeout: of collectives; a rank may have to wait for the longest rollout of another.
        checkpoints: ``file``: whole tensors in one file, which pass through rank 0; ``slices``: a folder into which
            each rank writes its own (`opd convert` makes one of the other).
        copies: of the sliced model (HSDP): weights are cut over the ranks of one copy, and gradients are averaged over
            copies; ``nodes``: one on each machine, so that weights are gathered within it alone.
        rollouts: ``whole``: a policy that acts is gathered once for each rollout, on every rank; ``layers``: layer by
            layer for every token, in lock step. ``auto`` gathers what fits into the memory that is free when models are
            loaded, on the rank with the least (`fits_whole`).
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        checkpoints: Literal["file", "slices"] = "file",
        copies: int | Literal["nodes"] = 1,
        rollouts: Literal["auto", "whole", "layers"] = "auto",
    ) -> None:
        if checkpoints not in ("file", "slices"):
            raise ValueError(f"fsdp2: checkpoints={checkpoints!r} must be 'file' or 'slices'")
        if rollouts not in ("auto", "whole", "layers"):
            raise ValueError(f"fsdp2: rollouts={rollouts!r} must be 'auto', 'whole' or 'layers'")
        self.checkpoints, self.copies, self.rollouts = checkpoints, copies, rollouts
        self._mesh: Any = None
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        ranks = self.num_processes * self.num_nodes
        copies = self.num_nodes if self.copies == "nodes" else self.copies
        if copies < 1 or ranks % copies:
            raise ValueError(f"fsdp2: copies={copies} must divide the {ranks} ranks")
        self._data_parallel_size = ranks  # Lightning's "auto" is the number of nodes
        super().setup_environment()
        self._mesh = self.device_mesh["data_parallel"]
        if copies > 1:
            # neighbors share a copy: Lightning numbers the ranks of a machine one after the other
            names = ("copies", "slices")
            self._mesh = init_device_mesh(self.root_device.type, (copies, ranks // copies), mesh_dim_names=names)

    @property
    def mesh(self) -> Any:
        """The ranks over which weights are sharded, of several copies in two dimensions."""
        return self._mesh

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # the parent restores from folders of slices, by itself

    def allow_whole(self, model: nn.Module) -> None:
        """Decides whether `gathered` gathers a sharded model; every rank must call it."""
        free = free_memory(self.root_device, self.num_processes)
        fits = self.rollouts == "whole" or (self.rollouts == "auto" and fits_whole(model, free))
        bare_of(model).may_be_whole = self.reduce_boolean_decision(fits, all=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathers unsharded tensors, on rank 0 only, or returns this rank's slices; every rank must call it."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gathers unsharded tensors, on rank 0 only, or returns this rank's slices; every rank must call it."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        # ranks whose main threads hang write one file: slices are written in collectives
        if self.checkpoints == "slices" and not is_speaking():
            return state
        gathered: dict[str, Any] = tree_map_only(Tensor, lambda tensor: unsharded(tensor).cpu(), state)
        return gathered if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.checkpoints == "file":
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = self.broadcast(str(filepath))
        refuse_url("checkpoint.dirpath", path, "fsdp2 with checkpoints=slices writes files of many ranks")
        write_slices(checkpoint, Path(path), self.is_global_zero, self.barrier)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(str(checkpoint_path))
        if not is_url(path) and is_slices(path):
            return read_slices(Path(path), self._like())
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    def _like(self) -> Callable[[str, torch.Size], Tensor | None]:
        """Finds the tensor that a part of a checkpoint is sliced like: a weight, for moments that of their place."""
        module: Any = self.lightning_module
        weights, trained = module.state_dict(), module.trained_parameters()

        def like(key: str, shape: torch.Size) -> Tensor | None:
            kind, _, name = key.partition(".")
            if kind == WEIGHTS:
                tensor = weights.get(name)
            else:
                place = int(name.split(".")[1])
                tensor = trained[place] if place < len(trained) else None
            # whose shape differs is whole, and refused with both shapes
            return tensor if isinstance(tensor, DTensor) and tensor.shape == shape else None

        return like

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        # every rank has read all of it, and takes its slices
        saved = checkpoint["state_dict"]
        slices = {name: sliced_like(t, saved[name]) for name, t in module.state_dict().items() if name in saved}
        module.load_state_dict(slices, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            places = [place for group in saved["param_groups"] for place in group["params"]]
            state = {
                place: {
                    # a moment has the shape of its parameter, a count of steps has none
                    key: sliced_like(parameter, value) if value.shape == parameter.shape else value
                    for key, value in saved["state"][place].items()
                }
                for place, parameter in zip(places, parameters, strict=True)
                if place in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


CUT = "weights, gradients and optimizer state cut over all ranks"
StrategyRegistry.register("fsdp2", FSDP2, description=CUT)
StrategyRegistry.register("fsdp2_slices", FSDP2, description=f"{CUT}, checkpoints in slices", checkpoints="slices")


def mesh_of(trainer: L.Trainer | None) -> Any:
    """Returns the ranks over which weights are sharded; None where each has all of them.

    Raises:
        ValueError: a strategy that shards in a way which rollouts and the objective can't follow.
    """
    strategy = trainer.strategy if trainer is not None else None
    if isinstance(strategy, FSDP2):
        return strategy.mesh
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy: {type(strategy).__name__} is not supported: rollouts in lock step, the checks of "
            "gradients and checkpoints know only how fsdp2 cuts weights; it also cuts gradients and optimizer state"
        )
    return None


def refuse_sharded(trainer: Any, who: str, why: str) -> None:
    """Refuses a strategy under which no rank holds the whole student.

    Raises:
        ValueError: ``who`` cannot work with it, and ``why``: "which …" or "whose …", of the student.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"{who}: {type(trainer.strategy).__name__} shards the student, {why}")


_WHOLE: WeakSet[nn.Module] = WeakSet()
"""Sharded models that are gathered for now."""
SPARE = 0.8
"""Share of the free memory that whole weights may take; the rest is for caches and logits."""


def fits_whole(model: nn.Module, free: float) -> bool:
    """Tells whether a rank can hold the whole of a sharded model while it acts.

    Args:
        model: sharded.
        free: bytes of this rank's device that are free before there is an optimizer.

    The whole beside the slices, gradients and moments of the slices (three numbers each) within `SPARE` of the memory.
    """
    parameters = list(model.parameters())
    full = sum(p.numel() * p.element_size() for p in parameters)
    kept = sum(3 * slice_of(p).numel() * p.element_size() for p in parameters if p.requires_grad)
    return full + kept <= SPARE * free


def free_memory(device: torch.device, ranks: int) -> float:
    """Returns the free bytes of a device, of main memory this rank's share of ``ranks``; 0 where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / ranks


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers a sharded model once, where that was allowed (`FSDP2.allow_whole`), and shards it again.

    Within it is like any other: no forward pass is a collective, so ranks need not keep pace. Every rank must enter.
    """
    bare = bare_of(model)
    if not getattr(bare, "may_be_whole", False) or bare in _WHOLE:
        yield
        return
    units = [module for module in bare.modules() if isinstance(module, FSDPModule)]
    # a layer's own hooks would shard it behind each token; the root is left gathered anyway
    inner = [unit for unit in units if unit is not bare]
    for unit in inner:
        unit.set_reshard_after_forward(False, recurse=False)
    # the root first: what runs first is taken for it
    bare.as_forward(lambda: None)
    for unit in units:
        unit.unshard()
    _WHOLE.add(bare)
    try:
        yield
    finally:
        _WHOLE.discard(bare)
        for unit in inner:
            unit.set_reshard_after_forward(True, recurse=False)
        reshard(bare)


def bare_of(model: Any) -> Any:
    """Returns the model below adapters, which is what is sharded."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shard(model: nn.Module, mesh: Any) -> None:
    """Cuts the weights of a model over the mesh, layer by layer, in place.

    The layers are those that every forward pass goes through: one that a batch without images leaves out would be
    gathered by some ranks only. The rest, with the head, is gathered with the whole.

    Raises:
        ValueError: the weights are quantized.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("trainer.strategy=fsdp2 can't cut quantized weights; use ddp, or set quantization to null")
    bare = bare_of(model)
    kinds = set(getattr(bare, "_no_split_modules", None) or ())
    trunk = bare.get_decoder() if hasattr(bare, "get_decoder") else bare
    for layer in [module for module in trunk.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh)
    # after its layers: what they leave, with the head, is one unit
    fully_shard(bare, mesh=mesh)
    # FSDP2 gathers for `forward` alone, and neither `generate` nor the body without its head is one
    bare.as_forward = lambda call: call()
    register_fsdp_forward_method(bare, "as_forward")


def is_sharded(model: nn.Module) -> bool:
    """Tells whether a forward pass gathers weights, so that every rank must make it."""
    return isinstance(model, FSDPModule) and model not in _WHOLE


def as_forward(model: Any, call: Callable[[], T]) -> T:
    """Runs ``call()`` as the model's forward pass, for calls that use a part of it; then its head is unsharded."""
    return model.as_forward(call) if is_sharded(model) else call()


def reshard(model: nn.Module) -> None:
    """Reshards weights that a forward pass left gathered: they would not follow updates of the slices."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor from all ranks, each of which must call it; others are returned as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    if (slices := exchanged(tensor.to_local())) is not None:
        # of several copies the first: its ranks are the first ones
        return torch.cat(slices[: tensor.device_mesh.shape[-1]], tensor.placements[-1].dim)  # type: ignore[attr-defined]
    return tensor.full_tensor()


def numbers_at(tensor: Tensor, places: Tensor) -> Tensor:
    """Reads the numbers at ``places [n]`` of a flattened tensor; of a sharded one every rank asks, and none gathers it.

    Rows are cut, so a slice holds a range of the places.
    """
    if not isinstance(tensor, DTensor):
        return tensor.flatten()[places.to(tensor.device)]
    own, mesh = tensor.to_local().flatten(), tensor.device_mesh
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    first = offset[0] * (tensor.numel() // tensor.shape[0]) if tensor.ndim else 0
    here = (places >= first) & (places < first + len(own))
    numbers = torch.zeros(len(places), dtype=own.dtype, device=own.device)
    numbers[here] = own[(places[here] - first).to(own.device)]
    # one rank of each copy has it, and the others have zeros
    summed = [Replicate()] * (mesh.ndim - 1) + [Partial()]
    return DTensor.from_local(numbers, mesh, summed, run_check=False).full_tensor()


def slice_of(tensor: Tensor) -> Tensor:
    """Returns this rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sliced_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Shards ``value``, which every rank has, like ``tensor``."""
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(tensor.device)
    # no source rank: every rank cuts its own, and nothing is sent
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
