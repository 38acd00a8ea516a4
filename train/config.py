"""What pretraining can be told. Imports no torch, so that `simclr --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from serve.errors import TrainingError

Arch: TypeAlias = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Stem: TypeAlias = Literal["imagenet", "small", "small-s2"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Learn an encoder from pictures without labels."""

    images: str
    """Folder, .csv, .zip, .tar or a known dataset's root."""
    run: Path
    """Folder for the encoder, checkpoint and metrics."""
    arch: Arch = "resnet18"
    """Depth of the ResNet."""
    width: float = 1.0
    """Width multiplier of every stage; 0.5 or 0.25 for a CPU."""
    stem: Stem | None = None
    """First layers: 3x3 of stride 1, 3x3 of stride 2, or ImageNet's 7x7 and max-pool. Default: by the image size."""
    image_size: str | None = None
    """Pixels of the encoder's input, PX or HxW. Default: from the pictures."""
    batch_size: int = 256
    """Pictures per step; each gives two views."""
    epochs: float = 100
    """Passes over the pictures."""
    temperature: float = 0.2
    """Of NT-Xent. Lower for long training with large batches."""
    crop_area: float | None = None
    """Smallest share of the picture that a view shows. Default: 0.08 (paper), 0.4 where pictures are stretched (re-ID)."""
    strength: float | None = None
    """Strength of the colour jitter. Default: 0.5 at 32 px (paper, B.9), else 1.0."""
    learning_rate: float | None = None
    """Peak of LARS. Default: 0.075 * sqrt(batch size) (paper, B.1)."""
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
        ):
            if not minimum <= value < math.inf:
                raise TrainingError(f"--{name} is {value}, wanted at least {minimum}")
        for name, chosen, most in (
            ("crop-area", self.crop_area, 1),
            ("strength", self.strength, 1.25),  # beyond it contrast would turn negative
            ("learning-rate", self.learning_rate, 1000),
        ):
            if chosen is not None and not 0 <= chosen <= most:
                raise TrainingError(f"--{name} is {chosen}, wanted 0 to {most}")
        if not self.temperature > 0:
            raise TrainingError(f"--temperature is {self.temperature}, wanted more than 0")
