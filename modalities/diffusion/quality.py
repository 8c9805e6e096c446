"""Quality of samples: distances between their distribution and that of real images, at several numbers of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ...data import STAND_IN
from ...evaluation import Evaluator
from ...ranks import Ranks
from ...shipped import shipped
from ...trajectory import Example, Trajectories
from .families import Family
from .images import contact_sheet, log_image


class Sampling(Protocol):
    """Interface of the setting that `SampleQuality` reads."""

    @property
    def evaluator(self) -> Evaluator: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def family(self) -> Family: ...
    @property
    def trainer(self) -> Any: ...
    @property
    def loggers(self) -> list[Any]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def global_step(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def images(self, trajectories: Trajectories) -> Tensor:
        """Decodes the images ``[B, 3, H, W]`` in [0, 1]."""


class Features(nn.Module, ABC):
    """Features by which images are compared.

    Attributes:
        num_features: d.
    """

    num_features: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Computes features ``[n, d]`` of images ``[n, 3, H, W]`` in [0, 1]."""

    def classify(self, images: Tensor) -> Tensor | None:
        """Classifies images ``[n]``, as the column ``label`` does; None: there are no classes."""
        return None


class Inception(Features):
    """Features of Inception-v3, with which FID is published; needs torch-fidelity, which downloads its weights.

    Args:
        layer: 64, 192, 768 or 2048. Default 2048.

    Raises:
        ModuleNotFoundError: torch-fidelity is missing.
    """

    def __init__(self, layer: int = 2048) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise ModuleNotFoundError("Inception needs torch-fidelity: pip install torch-fidelity") from error
        self.network: Any = NoTrainInceptionV3(name="inception-v3-compat", features_list=[str(layer)])
        self.num_features = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 255).byte())


class DigitFeatures(Features):
    """Features of a small convolutional network that classifies scikit-learn's digits of any color.

    32 of them, each divided by its standard deviation over the real digits.

    Args:
        path: its weights, made by ``assets/make_diffusion_quickstart.py``.
    """

    num_features = 32
    spread: Tensor

    def __init__(self, path: str | None = "opd:assets/diffusion_quickstart/features.safetensors") -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
            nn.Linear(32 * 16, 32), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)
        self.register_buffer("spread", torch.ones(32))
        if path is not None:
            self.load_state_dict(load_file(shipped(path)))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images) / self.spread

    def raw(self, images: Tensor) -> Tensor:
        """Computes the features before they are divided."""
        return self.body(nn.functional.interpolate(images, (16, 16), mode="bilinear") * 2 - 1)

    def classify(self, images: Tensor) -> Tensor:
        return self.head(self.raw(images)).argmax(1)


class SampleQuality:
    """Metrics of sample quality at each number of steps: ``val/fid_4``, ….

    Frechet distance (``fid``), kernel distance (``kid``, an MMD²), precision and recall (k = 3) of features, and class
    accuracy.

    The real images are the column ``image`` of the training examples, or of the validation examples where those have
    none. Class accuracy says little about few-step samples, which tend to be each class's mean.

    Args:
        features: by which images are compared.
        steps: numbers of denoising steps at every validation.
        test_steps: at `test`. Default: 1, 2, 4, 8, 16, 32.
        real: the most real images that are compared with.
        grid: images in a picture of each number of steps.

    Raises:
        ValueError: a number of steps below 1.
    """

    def __init__(
        self,
        features: Features,
        steps: list[int],
        test_steps: list[int] | None = None,
        real: int = 2000,
        grid: int = 50,
    ) -> None:
        self.features, self.steps, self.test_steps = features, steps, test_steps or [1, 2, 4, 8, 16, 32]
        self.real, self.grid = real, grid
        if min([*self.steps, *self.test_steps]) < 1:
            raise ValueError(f"quality: numbers of steps must be >= 1, got {steps} and {test_steps}")
        self._real: Tensor | None = None
        self._features: dict[int, list[Tensor]] = {}
        self._right: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def see(self, module: Sampling, who: str, examples: list[Example], batch_idx: int, steps: list[int]) -> None:
        """Samples a batch of examples at each number of steps."""
        for count in steps:
            acted = module.evaluator.act(who, examples, batch_idx, horizon=count)
            counts = [i for i, example in enumerate(acted.examples) if STAND_IN not in example]
            if not counts:
                continue
            acted = acted.select(torch.tensor(counts))
            images = module.images(acted)
            self._features.setdefault(count, []).append(self.features(images))
            classes = self.features.classify(images)
            if classes is not None and "label" in examples[0]:
                wanted = torch.tensor([example["label"] for example in acted.examples])
                self._right.setdefault(count, []).append((classes == wanted).float())
            if batch_idx == 0 and module.trainer.is_global_zero:
                self._draw(module, who, images[: self.grid], count)

    def _draw(self, module: Sampling, who: str, images: Tensor, count: int) -> None:
        path = module.folder / "grids" / f"{who}_step-{module.global_step}_steps-{count}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(images)
        sheet.save(path)
        for logger in module.loggers:
            log_image(logger, f"{who}/{count}_steps", sheet, module.global_step)

    @torch.no_grad()
    def finish(self, module: Sampling, stage: str) -> dict[str, float]:
        """Computes the metrics of all samples since the last call, over all ranks."""
        real = self._reference(module)
        values: dict[str, float] = {}
        # once, whatever this rank has: one with stand-ins alone has seen no sample
        of_ranks = module.ranks.gather_objects((self._features, self._right))
        for count in sorted({count for features, _ in of_ranks for count in features}):
            samples = torch.cat([batch for features, _ in of_ranks for batch in features.get(count, [])])
            values |= {f"{stage}/{name}_{count}": value for name, value in compare(real, samples).items()}
            if right := [batch for _, of_rank in of_ranks for batch in of_rank.get(count, [])]:
                values[f"{stage}/class_accuracy_{count}"] = float(torch.cat(right).mean())
        self._features, self._right = {}, {}
        return values

    def _reference(self, module: Sampling) -> Tensor:
        if self._real is None:
            data = getattr(module.trainer, "datamodule", None)
            splits = [getattr(data, name, None) for name in ("train", "validation", "test")]
            rows = next(
                (rows for rows in splits if rows is not None and len(rows) and rows[0].get("image") is not None), None
            )
            if rows is None:
                raise ValueError("model.quality compares with real images, but no split has a column 'image'")
            batches = []
            for start in range(0, min(len(rows), self.real), 64):
                images = [rows[i]["image"] for i in range(start, min(start + 64, len(rows), self.real))]
                batches.append(self.features(module.family.pixels(images).float().cpu() / 2 + 0.5))
            self._real = torch.cat(batches)
        return self._real


def compare(real: Tensor, samples: Tensor) -> dict[str, float]:
    """Distances between features ``[n, d]`` and ``[m, d]``: fid, kid, precision, recall."""
    passing = _Passing(real.shape[1])
    fid = FrechetInceptionDistance(feature=passing, normalize=True).set_dtype(torch.float64)
    size = min(len(real), len(samples), 500)
    kid = KernelInceptionDistance(feature=passing, normalize=True, subset_size=size, subsets=1)
    for metric in (fid, kid):
        metric.update(real.double(), real=True)
        metric.update(samples.double(), real=False)
    if len(samples) < 2 * real.shape[1]:
        rank_zero_warn(f"quality: {len(samples)} samples are few for a covariance of {real.shape[1]} features")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # which subset KID draws
        kernel, _ = kid.compute()
    precision, recall = precision_and_recall(real, samples)
    return {"fid": float(fid.compute()), "kid": float(kernel), "precision": precision, "recall": recall}


def precision_and_recall(real: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Computes the shares of ``samples [m, d]`` within the manifold of ``real [n, d]``, and vice versa (1904.06991).

    The manifold of points is the union of balls around each, with the distance to its k-th nearest neighbor as radius.
    """

    def covered(points: Tensor, by: Tensor) -> float:
        # k + 1: the nearest to a point is itself
        radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values
        return float((torch.cdist(points, by) <= radius).any(1).float().mean())

    return covered(samples, real), covered(real, samples)


class _Passing(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
