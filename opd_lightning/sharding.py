"""FSDP2: every rank holds a slice of each weight, and gathers a layer's weights only while that layer computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

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
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy without tensor parallelism: ``--trainer.strategy=fsdp2``.

    A checkpoint holds whole tensors in the layout of a single process, so it resumes under any strategy and on any
    number of ranks, and exports.

    Args:
        process_group_backend: default: nccl on GPUs, gloo on CPUs.
        timeout: of collectives; a rank may have to wait for the longest rollout of another.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # the parent restores from folders of slices, by itself

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathers unsharded tensors, on rank 0 only; every rank must call it."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gathers unsharded tensors, on rank 0 only; every rank must call it."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        gathered: dict[str, Any] = tree_map_only(Tensor, lambda tensor: unsharded(tensor).cpu(), state)
        return gathered if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

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


StrategyRegistry.register("fsdp2", FSDP2, description="weights, gradients and optimizer state cut over all ranks")


def mesh_of(trainer: L.Trainer | None) -> Any:
    """Returns the ranks over which weights are sharded; None where each has all of them.

    Raises:
        ValueError: a strategy that shards in a way which rollouts and the objective can't follow.
    """
    strategy = trainer.strategy if trainer is not None else None
    if isinstance(strategy, FSDP2):
        return strategy.device_mesh["data_parallel"]
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


def shard(model: nn.Module, mesh: Any) -> None:
    """Cuts the weights of a model over the mesh, layer by layer, in place.

    The layers are those that every forward pass goes through: one that a batch without images leaves out would be
    gathered by some ranks only. The rest, with the head, is gathered with the whole.

    Raises:
        ValueError: the weights are quantized.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("trainer.strategy=fsdp2 can't cut quantized weights; use ddp, or set quantization to null")
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
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
    return isinstance(model, FSDPModule)


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
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_of(tensor: Tensor) -> Tensor:
    """Returns this rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sliced_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Shards ``value``, which every rank has, like ``tensor``."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.to(tensor.device)
    # no source rank: every rank cuts its own, and nothing is sent
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
