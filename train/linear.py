"""Classifiers by gradient descent, as SimCLR evaluates: a linear layer on a frozen encoder, or all of it fine-tuned.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from serve.contract import Preprocess
from serve.errors import TrainingError
from serve.samples import Sample, Unreadable
from serve.sources import read_batches
from train.augment import SimCLRAugment
from train.data import Batch, load_pixels, memory_shortage, step_generator, step_rows, training_frame
from train.encoder import Encoder
from train.optim import LARS, lr_at, parameter_groups

CHUNK = 256
"""Pictures in one pass through a frozen network, which is exact: its batch norms do not look at the others."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are fitted to labels: momentum 0.9, and the rate falls along a cosine to 0."""

    optimizer: Literal["Nesterov", "LARS"]
    rate: float
    rule: Literal["linear", "sqrt"]
    """The peak is rate * B / 256, or rate * sqrt(B)."""
    batch_size: int
    epochs: float
    weight_decay: float = 0.0
    warmup: float = 0.0
    """Share of the steps."""
    drops: tuple[float, ...] = ()
    """Shares of the steps after which the rate falls to a tenth, instead of the cosine."""

    @property
    def peak_lr(self) -> float:
        """For this batch size."""
        return self.rate * (self.batch_size / 256 if self.rule == "linear" else math.sqrt(self.batch_size))

    def for_pictures(self, count: int) -> Recipe:
        """The same with a batch that is no larger than the data."""
        return replace(self, batch_size=min(self.batch_size, count))

    def steps(self, pictures: int) -> tuple[int, int]:
        """Whole batches in an epoch, and steps in all."""
        return pictures // self.batch_size, max(1, round(self.epochs * pictures / self.batch_size))

    def lr_at(self, step: int, total_steps: int) -> float:
        """The rate of one step, counted from 0."""
        if self.drops:
            return self.peak_lr * 0.1 ** sum(step >= round(drop * total_steps) for drop in self.drops)
        return lr_at(step, peak=self.peak_lr, warmup_steps=round(self.warmup * total_steps), total_steps=total_steps)


LINEAR_SGD = Recipe(optimizer="Nesterov", rate=0.1, rule="linear", batch_size=512, epochs=100)
"""The official README's linear evaluation of CIFAR-10; `imagenet-linear` is its sister."""


class Feed(Protocol):
    """Training pictures, in memory (`train.data.Pixels`) or read anew (`train.stream.Streamed`)."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """One for each row."""

    @property
    def unreadable(self) -> Sequence[Unreadable]:
        """What was left out so far."""

    def __len__(self) -> int: ...

    def batches(self, steps: Iterator[tuple[int, Tensor]]) -> Generator[Batch]:
        """The pictures of each (epoch, rows)."""


def open_feed(samples: Sequence[Sample], preprocess: Preprocess, *, seed: int) -> Feed:
    """Pictures in memory if they fit, else streamed. Raises: SourceError if none can be read."""
    frame = training_frame(preprocess)
    if memory_shortage(len(samples), frame) is None:
        return load_pixels(samples, frame, progress="reading images")
    from train.stream import Streamed

    return Streamed(samples, preprocess, crop_area(preprocess), workers=os.cpu_count() or 1, seed=seed)


def crop_area(preprocess: Preprocess) -> float:
    """Smallest share of a picture that a view shows, as in pretraining."""
    return 0.4 if preprocess.resize == "stretch" else 0.08


def descend(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    recipe: Recipe,
    preprocess: Preprocess,
    *,
    device: torch.device,
    name: str,
    seed: int = 0,
    first_step: int = 0,
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Take every step of a recipe. `loss_of` is given views uint8 (B, 3, H, W) and their rows (B,).

    Order and crops are functions of (seed, step). Raises: TrainingError if the loss is not finite.
    """
    steps_per_epoch, total_steps = recipe.steps(len(feed))
    rows = step_rows(
        len(feed), recipe.batch_size, seed, first_step=first_step, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    augment = SimCLRAugment((preprocess.height_px, preprocess.width_px), crop_area=crop_area(preprocess))
    with (
        closing(feed.batches(rows)) as batches,
        tqdm(total=total_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True) as bar,
    ):
        for step, batch in enumerate(batches, start=first_step):
            views = crop_and_flip(batch, augment, step_generator(seed, step, stream=name, device=device))
            loss = loss_of(views, batch.rows)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"{name}: the loss is {loss.item()} at step {step} (peak learning rate {recipe.peak_lr:.3g}); "
                    "try a smaller --batch-size, which lowers it"
                )
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step, total_steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            after_step(step + 1)


def crop_and_flip(batch: Batch, augment: SimCLRAugment, generator: torch.Generator) -> Tensor:
    """One view of each picture, uint8 (B, 3, H, W): crop, resize and flip only (data.py:164 of the official code)."""
    pixels = batch.pixels.to(generator.device, non_blocking=True)
    crops = pixels[0] if pixels.ndim == 5 else augment.crop(pixels, generator)  # the workers crop both views of pretraining
    flipped = torch.rand(len(crops), generator=generator, device=generator.device) < 0.5
    return torch.where(flipped[:, None, None, None], crops.flip(3), crops)


def as_input(pixels_BCHW: Tensor) -> Tensor:
    """uint8 -> float in [0, 1], in the memory order that convolutions like."""
    return (pixels_BCHW.float() / 255).contiguous(memory_format=torch.channels_last)


def make_optimizer(recipe: Recipe, head: nn.Linear, body: nn.Module | None = None) -> torch.optim.Optimizer:
    """Over the linear layer and the network below, if that is trained too. LARS does not adapt the layer (model_util.py:94)."""
    if recipe.optimizer == "LARS":
        groups: list[dict[str, Any]] = parameter_groups(body) if body is not None else []
        groups.append({"params": list(head.parameters()), "adapt": False})
        return LARS(groups, lr=0.0, weight_decay=recipe.weight_decay)
    parameters = [*(body.parameters() if body is not None else ()), *head.parameters()]
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


class Classifier(nn.Module):
    """Encoder, maybe a layer above it, and a linear layer that starts at zero (`zero_init_logits_layer`)."""

    def __init__(self, encoder: Encoder, classes: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(encoder) if layer is None else nn.Sequential(encoder, layer)
        self.linear = nn.Linear(encoder.feature_dim, classes)  # a layer above is as wide as the features
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Float in [0, 1] (B, 3, H, W) -> logits (B, C)."""
        logits: Tensor = self.linear(self.body(images_BCHW))
        return logits


def fit(
    model: Classifier,
    feed: Feed,
    numbers: Mapping[str, int],
    recipe: Recipe,
    preprocess: Preprocess,
    *,
    frozen: bool,
    device: torch.device,
    seed: int = 0,
) -> None:
    """Fit the linear layer on a frozen body, its batch norms in evaluation mode, or fine-tune all. Crops are drawn anew."""
    model.to(device).to(memory_format=torch.channels_last).train(not frozen)
    targets = label_numbers(feed.samples, numbers)

    def loss_of(views: Tensor, rows: Tensor) -> Tensor:
        logits = model.linear(frozen_features(model.body, as_input(views))) if frozen else model(as_input(views))
        return F.cross_entropy(logits, targets[rows].to(device))

    optimizer = make_optimizer(recipe, model.linear, None if frozen else model.body)
    name = "linear head" if frozen else "fine-tuning"
    descend(loss_of, optimizer, feed, recipe, preprocess, device=device, name=name, seed=seed)


@torch.no_grad()
def frozen_features(body: nn.Module, views_BCHW: Tensor) -> Tensor:
    """Features (B, D) of a network in evaluation mode, not normalised."""
    return torch.cat([body(chunk) for chunk in views_BCHW.split(CHUNK)])


def label_numbers(samples: Sequence[Sample], numbers: Mapping[str, int]) -> Tensor:
    """Class numbers (N,) of labelled pictures; -1 for a class that is not among them."""
    return torch.tensor([numbers.get(str(sample.group), -1) for sample in samples])


@torch.inference_mode()
def score(
    model: nn.Module, samples: Sequence[Sample], numbers: Mapping[str, int], preprocess: Preprocess, *, device: torch.device
) -> tuple[dict[str, Any], list[Unreadable]]:
    """Top-1 and top-5 of a classifier (no top-5 with five classes or less), and what cannot be read. Raises: TrainingError."""
    hits, count, unreadable = torch.zeros(2), 0, []
    model.eval()
    with tqdm(total=len(samples), desc="scoring", unit="img", dynamic_ncols=True) as bar:
        for good, pixels, bad in read_batches(samples, preprocess):
            if good:
                logits = model(as_input(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))).cpu()
                targets = label_numbers(good, numbers)
                hits += torch.tensor([top_hits(logits, targets, k) for k in (1, 5)])
            count += len(good)
            unreadable += bad
            bar.update(len(good) + len(bad))
    if not count:
        raise TrainingError(f"none of {len(samples)} pictures to score on can be read; the first: {unreadable[0].reason}")
    top1, top5 = (hits / count).tolist()
    return {"accuracy": top1, "top5": top5 if len(numbers) > 5 else None, "queries": count}, unreadable


def top_hits(logits_BC: Tensor, targets_B: Tensor, k: int) -> int:
    """How many pictures have their class among their k likeliest."""
    likeliest = logits_BC.topk(min(k, logits_BC.shape[1]), dim=1).indices
    return int((likeliest == targets_B[:, None]).any(1).sum())
