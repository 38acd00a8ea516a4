"""What pretraining can be told. Imports no torch, so that `simclr --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from serve.errors import TrainingError

Arch: TypeAlias = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"]
Stem: TypeAlias = Literal["imagenet", "small", "small-s2"]
PresetName: TypeAlias = Literal["cifar10", "imagenet-100ep", "imagenet-1000ep", "small-batch", "reid-256x128"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Learn an encoder from pictures without labels."""

    images: str
    """Folder, .csv, .zip, .tar or a known dataset's root."""
    run: Path
    """Folder for the encoder, checkpoint and metrics."""
    preset: PresetName | None = None
    """Settings from the literature (docs/training.md); options beside it win."""
    arch: Arch = "resnet18"
    """Depth of the ResNet."""
    width: float = 1.0
    """Width multiplier of every stage; 0.5 or 0.25 for a CPU."""
    sk: bool = False
    """Selective kernels (SimCLR v2)."""
    stem: Stem | None = None
    """First layers: 3x3 of stride 1, 3x3 of stride 2, or ImageNet's 7x7 and max-pool. Default: by the image size."""
    image_size: str | None = None
    """Pixels of the encoder's input, PX or HxW. Default: from the pictures."""
    head_layers: int = 2
    """Layers of the projection head: 2 (paper) or 3 (SimCLR v2)."""
    projection_dim: int = 128
    """Numbers that the projection head puts out."""
    batch_size: int = 256
    """Pictures per step, over all processes; each gives two views."""
    chunk: int | None = None
    """Pictures per forward pass and process, for batches that do not fit: same negatives, batch norm by the chunk."""
    epochs: float = 100
    """Passes over the pictures."""
    temperature: float = 0.2
    """Of NT-Xent. Lower for long training with large batches."""
    positives: Literal["picture", "track"] = "picture"
    """The two views: of one picture, or of two of one track, as a tracker gives it (columns track and camera of a CSV)."""
    crop_area: float | None = None
    """Smallest share of the picture that a view shows. Default: 0.08 (paper), 0.4 where pictures are stretched (re-ID)."""
    strength: float | None = None
    """Strength of the colour jitter. Default: 0.5 at 32 px (paper, B.9), else 1.0."""
    augmentation: Literal[1, 2] = 2
    """Brightness is multiplied (2: SimCLR v2, the official default) or added to (1)."""
    learning_rate: float | None = None
    """Peak of LARS, as it is. Default: by --lr-rule from the batch size."""
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    """0.075 * sqrt(batch size), better for short runs and small batches, or 0.3 * batch size / 256 (paper, B.1)."""
    weight_decay: float = 1e-6
    """Of all weights but batch norms and biases (paper 1e-6, SimCLR v2 1e-4)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network; the loss is always fp32. Default: bf16 where the processor has it, fp16 on older GPUs."""
    compile: bool = False
    """Compile the network first (torch.compile): minutes at the start, faster steps on a GPU."""
    workers: int | None = None
    """Processes that decode and crop while training; 0 keeps all pictures in memory. Default: 0 if they fit."""
    seed: int = 0
    """Of weights, order and views."""
    resume: bool = False
    """Go on from RUN's checkpoint."""

    def __post_init__(self) -> None:
        """Raises: TrainingError for values that cannot work."""
        for name, value, minimum in (
            ("batch-size", self.batch_size, 2),
            ("epochs", self.epochs, 0.001),
            ("width", self.width, 0.125),
            ("projection-dim", self.projection_dim, 2),
        ):
            if not minimum <= value < math.inf:
                raise TrainingError(f"--{name} is {value}, wanted at least {minimum}")
        for name, chosen, most in (
            ("crop-area", self.crop_area, 1),
            ("strength", self.strength, 1.25),  # beyond it contrast would turn negative
            ("learning-rate", self.learning_rate, 1000),
            ("weight-decay", self.weight_decay, 1),
            ("workers", self.workers, 1024),
        ):
            if chosen is not None and not 0 <= chosen <= most:
                raise TrainingError(f"--{name} is {chosen}, wanted 0 to {most}")
        if self.chunk is not None and self.chunk < 2:
            raise TrainingError(f"--chunk is {self.chunk}, wanted at least 2: batch norm needs more than one picture")
        if self.head_layers not in (2, 3):
            raise TrainingError(f"--head-layers is {self.head_layers}, wanted 2 or 3")
        if self.sk and self.arch in ("resnet18", "resnet34"):
            raise TrainingError(f"--sk with --arch {self.arch}: selective kernels are for resnet50 and deeper")
        if not 0.002 <= self.temperature < math.inf:
            raise TrainingError(f"--temperature is {self.temperature}, wanted at least 0.002")
