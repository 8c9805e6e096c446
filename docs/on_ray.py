"""`opd fit` on Ray Train: one worker for each rank, which Ray places, watches and starts again.

python on_ray.py WORKERS -c CONFIG …
"""

import sys

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from opd_lightning.cli import run


def rank(config: dict[str, list[str]]) -> None:
    context = ray.train.get_context()
    here, everywhere = context.get_local_world_size(), context.get_world_size()
    placed = [
        '--trainer.plugins={"class_path": "ray.train.lightning.RayLightningEnvironment"}',
        '--trainer.strategy={"class_path": "ray.train.lightning.RayDDPStrategy"}',
        f"--trainer.devices={here}",
        f"--trainer.num_nodes={everywhere // here}",
        "--ckpt_path=last",  # workers that were started again go on; the first time there is none
    ]
    run(["fit", *placed, *config["arguments"]])


if __name__ == "__main__":
    TorchTrainer(
        rank,
        train_loop_config={"arguments": sys.argv[2:]},
        scaling_config=ScalingConfig(num_workers=int(sys.argv[1]), use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
