"""What follows from a configuration, its pictures and the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from serve.contract import Preprocess
from serve.errors import TrainingError
from serve.samples import ImageSet
from train.config import PretrainConfig, Stem
from train.data import memory_shortage, preprocess_for, training_frame
from train.distributed import world_size
from train.optim import peak_lr

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does, beyond its configuration."""

    preprocess: Preprocess
    stem: Stem
    crop_area: float
    strength: float
    blur: bool
    precision: Precision
    streamed: bool
    """Whether worker processes decode while training; otherwise all pictures are in memory."""
    peak_lr: float
    world_size: int
    steps_per_epoch: int
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Ten epochs (paper, section 2.2), but never more than a tenth of the run."""
        return min(10 * self.steps_per_epoch, self.total_steps // 10)


def make_plan(config: PretrainConfig, images: ImageSet, device: torch.device) -> Plan:
    """Choose what the configuration leaves open. Raises: TrainingError if pictures, processes and batch do not go together."""
    count, world = len(images.train), world_size()
    if count < 2:
        raise TrainingError(f"{config.images}: {count} picture to learn from; SimCLR tells pictures apart and needs at least 2")
    if config.batch_size > count:
        raise TrainingError(
            f"--batch-size is {config.batch_size}, but there are {count} pictures; use --batch-size {count} or less"
        )
    if config.batch_size % world or config.batch_size < 2 * world:
        raise TrainingError(
            f"--batch-size is {config.batch_size} on {world} processes; it is that of all together, a multiple of {world} and "
            f"at least {2 * world}"
        )
    preprocess = preprocess_for(images.train, config.image_size)
    short = min(preprocess.height_px, preprocess.width_px)
    steps_per_epoch, total_steps = count_steps(config, count)
    return Plan(
        preprocess=preprocess,
        stem=config.stem or ("small" if short <= 64 else "imagenet"),
        crop_area=config.crop_area if config.crop_area is not None else (0.4 if preprocess.resize == "stretch" else 0.08),
        strength=config.strength if config.strength is not None else (0.5 if short <= 32 else 1.0),
        blur=short > 32,
        precision=fast_precision(device) if config.precision == "auto" else config.precision,
        streamed=bool(choose_workers(config, count, preprocess)),
        peak_lr=config.learning_rate if config.learning_rate is not None else peak_lr(config.batch_size, config.lr_rule),
        world_size=world,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def count_steps(config: PretrainConfig, pictures: int) -> tuple[int, int]:
    """Whole batches in an epoch (what is left over waits for another one), and steps in all."""
    return pictures // config.batch_size, max(1, round(config.epochs * pictures / config.batch_size))


def choose_workers(config: PretrainConfig, pictures: int, preprocess: Preprocess) -> int:
    """Processes that decode for each of ours: as asked; else none if memory holds the pictures, or one per core."""
    if config.workers is not None:
        return config.workers
    if memory_shortage(pictures, training_frame(preprocess)) is None:
        return 0
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fast_precision(device: torch.device) -> Precision:
    """What the processor multiplies natively: bf16, or fp16 on older GPUs; float32 where that would be emulated."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "fp32"


def describe(plan: Plan, config: PretrainConfig, device: torch.device, pictures: int) -> str:
    """Everything that was chosen, a line each."""
    frame = f"{plan.preprocess.height_px}x{plan.preprocess.width_px}"
    network = f"{config.arch} x{config.width:g}{', SK' if config.sk else ''}"
    chunks = f", {config.chunk} at a time" if config.chunk else ""
    processes = f" on {plan.world_size} processes" if plan.world_size > 1 else ""
    negatives = 2 * config.batch_size - 2
    rule = "as given" if config.learning_rate is not None else f"{config.lr_rule} rule"
    lines = {
        "pictures": f"{pictures:,}, {'streamed' if plan.streamed else 'in memory'}, {frame} px",
        "views": f"crops from {plan.crop_area:.0%}, jitter {plan.strength:g}, {'blur' if plan.blur else 'no blur'}",
        "network": f"{network}, {plan.stem} stem, {config.head_layers}-layer head",
        "steps": f"{plan.total_steps:,} of {config.batch_size} pictures{chunks}{processes}, {negatives:,} negatives each",
        "LARS": f"peak lr {plan.peak_lr:.3g} ({rule}) after {plan.warmup_steps} steps, weight decay {config.weight_decay:g}, "
        f"temperature {config.temperature:g}",
        "device": f"{device.type}, {plan.precision}",
    }
    return "\n".join(f"{name:9} {text}" for name, text in lines.items())


def duration(seconds: float) -> str:
    """In the unit that a person would choose."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"
