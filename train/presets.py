"""Settings from the literature, each a full configuration with its source. Options beside --preset win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.config import PresetName, PretrainConfig


def cifar10(images: str, run: Path) -> PretrainConfig:
    """ResNet-18 on CIFAR-10: "around 91 %" linear (google-research/simclr, README; recipe of the paper's B.9).

    Learning rate 1.0 * 512 / 256, three layers in the head as that code has by default; no blur at 32 px.
    """
    return PretrainConfig(
        images=images,
        run=run,
        preset="cifar10",
        arch="resnet18",
        stem="small",
        image_size="32",
        head_layers=3,
        batch_size=512,
        epochs=1000,
        temperature=0.5,
        strength=0.5,
        learning_rate=2.0,
        weight_decay=1e-4,
    )


def imagenet_100ep(images: str, run: Path) -> PretrainConfig:
    """ResNet-50, batch 4096, 100 epochs: 64.6 % linear (paper, table B.1)."""
    return _imagenet(images, run, "imagenet-100ep", epochs=100)


def imagenet_1000ep(images: str, run: Path) -> PretrainConfig:
    """ResNet-50, batch 4096, 1000 epochs: 69.3 % linear (paper, table 6)."""
    return _imagenet(images, run, "imagenet-1000ep", epochs=1000)


def small_batch(images: str, run: Path) -> PretrainConfig:
    """ResNet-50 for one GPU: batch 256, 0.075 * sqrt(B), temperature 0.2 (the author, google-research/simclr#166).

    The paper has 64.3 % linear on ImageNet after 200 epochs of batch 256 with this rule, 61.9 % with the linear one (B.1).
    """
    return PretrainConfig(
        images=images,
        run=run,
        preset="small-batch",
        arch="resnet50",
        batch_size=256,
        epochs=200,
        temperature=0.2,
        lr_rule="sqrt",
    )


def reid_256x128(images: str, run: Path) -> PretrainConfig:
    """ResNet-50 for tall boxes of persons: 256 x 128 px, the whole box stretched, as in fast-reid and torchreid.

    Crops from 40 % of the box: smaller ones often show one half only, of which there are many alike; our measurement,
    on the generated set of `simclr demo`.
    """
    return PretrainConfig(
        images=images,
        run=run,
        preset="reid-256x128",
        arch="resnet50",
        image_size="256x128",
        batch_size=256,
        epochs=200,
        temperature=0.2,
        crop_area=0.4,
        lr_rule="sqrt",
    )


def _imagenet(images: str, run: Path, name: PresetName, *, epochs: int) -> PretrainConfig:
    return PretrainConfig(
        images=images,
        run=run,
        preset=name,
        arch="resnet50",
        stem="imagenet",
        image_size="224",
        head_layers=2,
        batch_size=4096,
        epochs=epochs,
        temperature=0.1,
        strength=1.0,
        augmentation=1,
        lr_rule="linear",
        weight_decay=1e-6,
    )


PRESETS: dict[PresetName, Callable[[str, Path], PretrainConfig]] = {
    "cifar10": cifar10,
    "imagenet-100ep": imagenet_100ep,
    "imagenet-1000ep": imagenet_1000ep,
    "small-batch": small_batch,
    "reid-256x128": reid_256x128,
}
