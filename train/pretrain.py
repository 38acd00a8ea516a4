"""SimCLR pretraining, top to bottom: images -> two views -> one forward pass -> NT-Xent -> step.

Chen et al. 2020, algorithm 1. Every random draw is a function of (seed, step), so a resumed run repeats what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from serve.contract import Preprocess
from serve.errors import TrainingError
from serve.sources import ImageSet, open_source
from train.augment import SimCLRAugment
from train.checkpoint import CHECKPOINT, CONFIG, METRICS, load_checkpoint, save_checkpoint, save_encoder, write_config
from train.config import PretrainConfig, Stem
from train.data import Pixels, epoch_order, load_pixels, preprocess_for, sources_sha256, step_generator, training_frame
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.health import chance_loss, contrastive_top1
from train.loss import nt_xent_loss, similarity_logits
from train.optim import LARS, lr_at, parameter_groups
from train.probe import OnlineKnn

CHECKPOINT_EVERY_S = 120
"""At most this much work is lost when a machine dies."""
PROBES_PER_RUN = 8


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration and its pictures."""

    preprocess: Preprocess
    stem: Stem
    crop_area: float
    strength: float
    blur: bool
    peak_lr: float
    steps_per_epoch: int
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Ten epochs (paper, section 2.2), but never more than a tenth of the run."""
        return min(10 * self.steps_per_epoch, self.total_steps // 10)


def pretrain(config: PretrainConfig) -> Path:
    """Train, or go on training, and return the RUN folder. Raises: SourceError, TrainingError, OSError.

    SIGINT and SIGTERM end the current step, save a checkpoint and raise KeyboardInterrupt.
    """
    _check_run(config)
    images = open_source(config.images)
    plan = make_plan(config, images)
    pixels = load_pixels(images.train, training_frame(plan.preprocess), progress="reading images")
    steps_per_epoch, total_steps = count_steps(config, len(pixels))  # what cannot be read shortens the epochs
    plan = replace(plan, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    return Trainer(config, plan, images, pixels).train()


def make_plan(config: PretrainConfig, images: ImageSet) -> Plan:
    """Choose what the configuration leaves open, from the pictures. Raises: TrainingError if there are too few."""
    count = len(images.train)
    if count < 2:
        raise TrainingError(f"{config.images}: {count} picture to learn from; SimCLR tells pictures apart and needs at least 2")
    if config.batch_size > count:
        raise TrainingError(
            f"--batch-size is {config.batch_size}, but there are {count} pictures; use --batch-size {count} or less"
        )
    preprocess = preprocess_for(images.train, config.image_size)
    short = min(preprocess.height_px, preprocess.width_px)
    steps_per_epoch, total_steps = count_steps(config, count)
    default_lr = 0.075 * math.sqrt(config.batch_size)
    return Plan(
        preprocess=preprocess,
        stem=config.stem or ("small" if short <= 64 else "imagenet"),
        crop_area=config.crop_area if config.crop_area is not None else (0.4 if preprocess.resize == "stretch" else 0.08),
        strength=config.strength if config.strength is not None else (0.5 if short <= 32 else 1.0),
        blur=short > 32,
        peak_lr=config.learning_rate if config.learning_rate is not None else default_lr,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def count_steps(config: PretrainConfig, pictures: int) -> tuple[int, int]:
    """Whole batches in an epoch (what is left over waits for another one), and steps in all."""
    return pictures // config.batch_size, max(1, round(config.epochs * pictures / config.batch_size))


class Trainer:
    """The state of one run and its loop."""

    def __init__(self, config: PretrainConfig, plan: Plan, images: ImageSet, pixels: Pixels) -> None:
        if len(pixels) < config.batch_size:
            raise TrainingError(
                f"{len(pixels)} pictures can be read, fewer than --batch-size {config.batch_size}; first failure: "
                f"{pixels.unreadable[0].reason}"
            )
        self.config, self.plan, self.pixels = config, plan, pixels
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        encoder = Encoder(config.arch, config.width, plan.stem)
        self.model = SimCLR(encoder, ProjectionHead(encoder.feature_dim)).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = LARS(parameter_groups(self.model), lr=0.0)
        frame = plan.preprocess.height_px, plan.preprocess.width_px
        self.augment = SimCLRAugment(frame, plan.strength, plan.blur, crop_area=plan.crop_area)
        self.knn = OnlineKnn.from_samples(images, plan.preprocess)
        self.step = 0

    def train(self) -> Path:
        """Run all steps that are left."""
        run, config = self.config.run, self.config
        facts = self._facts()
        if config.resume:
            self._restore(facts)
        else:
            write_config(run, facts)
            self._save(facts)  # so that a run which dies early, or on a full disk, can always be resumed
        self._announce()
        with stop_signals() as stopped, MetricsLog(run, self.step) as log, self._bar() as bar:
            saved_at = time.monotonic()
            while self.step < self.plan.total_steps and not stopped:
                metrics = self._one_step()
                if self._probe_is_due():
                    metrics |= self.knn.measure(self.model.encoder, self.device)
                log.write(self.step, metrics)
                _show(bar, metrics)
                if time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                    self._save(facts)
                    saved_at = time.monotonic()
        self._save(facts)
        save_encoder(run, self.model.encoder, self.plan.preprocess, facts | {"steps": self.step})
        if stopped:
            done = f"stopped after step {self.step} of {self.plan.total_steps}, saved"
            raise KeyboardInterrupt(f"{done}; repeat the command to go on (simclr pretrain: with --resume)")
        return run

    def _one_step(self) -> dict[str, float]:
        started = time.perf_counter()
        views = self._views(self.step)
        viewed = time.perf_counter()
        rate = lr_at(self.step, peak=self.plan.peak_lr, warmup_steps=self.plan.warmup_steps, total_steps=self.plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16_is_fast(self.device)):
            projections = self.model(views)
        loss = nt_xent_loss(projections, temperature=self.config.temperature)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.step}, the weights were left as they were; "
                f"start a new --run with a lower --learning-rate (peak now {self.plan.peak_lr:.3g})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            top1 = contrastive_top1(*similarity_logits(projections.detach(), self.config.temperature))
        seconds = time.perf_counter() - started
        return {
            "epoch": self.step * self.config.batch_size / len(self.pixels),
            "loss": loss.item(),
            "chance_loss": chance_loss(self.config.batch_size),
            "contrastive_top1": top1,
            "chance_top1": 1 / (2 * self.config.batch_size - 1),
            "lr": rate,
            "samples_per_s": self.config.batch_size / seconds,
            "data_share": (viewed - started) / seconds,
        }

    def _views(self, step: int) -> Tensor:
        """Both views of the step's pictures, stacked: one forward pass, joint batch norm (data.py:124 of the official code)."""
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        order = epoch_order(len(self.pixels), epoch, self.config.seed)
        rows = order[place * self.config.batch_size : (place + 1) * self.config.batch_size]
        batch = self.pixels.images[rows].to(self.device, non_blocking=True)
        views = self.augment(torch.cat([batch, batch]), step_generator(self.config.seed, step, device=self.device))
        return views.contiguous(memory_format=torch.channels_last)

    def _probe_is_due(self) -> bool:
        every = max(self.plan.steps_per_epoch, self.plan.total_steps // PROBES_PER_RUN)
        return self.knn.has_labels and (self.step % every == 0 or self.step == self.plan.total_steps)

    def _facts(self) -> dict[str, Any]:
        """Provenance: what config.json, the checkpoint and the encoder's card record."""
        settings = asdict(self.config) | {"run": str(self.config.run)}
        del settings["resume"]
        plan = asdict(self.plan) | {"preprocess": self.plan.preprocess.model_dump()}
        digest = sources_sha256(self.pixels.samples)
        return {"method": "SimCLR", **settings, **plan, "pictures": len(self.pixels), "sources_sha256": digest}

    def _restore(self, facts: dict[str, Any]) -> None:
        state = load_checkpoint(self.config.run)
        recorded = state["facts"]
        different = [name for name, value in facts.items() if name != "run" and recorded.get(name) != value]
        if different:
            was = ", ".join(f"{name} {recorded.get(name)!r} -> {facts[name]!r}" for name in different[:3])
            raise TrainingError(
                f"{self.config.run}: the run was started differently ({was}); resume with its own settings, in {CONFIG}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _save(self, facts: dict[str, Any]) -> None:
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "facts": facts}
        save_checkpoint(self.config.run, state)

    def _announce(self) -> None:
        plan, config = self.plan, self.config
        frame = f"{plan.preprocess.height_px}x{plan.preprocess.width_px}"
        left_out = f", {len(self.pixels.unreadable)} unreadable left out" if self.pixels.unreadable else ""
        blur = "blur" if plan.blur else "no blur"
        precision = "bfloat16" if bfloat16_is_fast(self.device) else "float32"
        print(
            f"{len(self.pixels)} pictures{left_out} · {config.arch} x{config.width:g}, {plan.stem} stem, {frame} px, "
            f"crops from {plan.crop_area:.0%}, jitter {plan.strength:g}, {blur} · {plan.total_steps} steps of "
            f"{config.batch_size}, LARS, peak lr {plan.peak_lr:.3g} · {self.device.type}, {precision}",
            file=sys.stderr,
        )
        for picture in self.pixels.unreadable[:3]:
            print(f"left out: {picture.reason}", file=sys.stderr)

    def _bar(self) -> tqdm[Any]:
        return tqdm(total=self.plan.total_steps, initial=self.step, desc="pretraining", unit="step", dynamic_ncols=True)


def samples_per_second(config: PretrainConfig, images: ImageSet, *, seconds: float = 8) -> float:
    """Measure what this machine does with this configuration: pictures (of two views each) per second, warm-up left out."""
    plan = make_plan(config, images)
    few = images.train[: config.batch_size]
    pixels = load_pixels(few, training_frame(plan.preprocess))
    trainer = Trainer(replace(config, batch_size=len(pixels)), plan, ImageSet(train=few), pixels)
    rates: list[float] = []
    started = time.monotonic()
    while len(rates) < 4 or time.monotonic() - started < seconds:
        trainer.step = 0
        rates.append(trainer._one_step()["samples_per_s"])
    return statistics.median(rates[len(rates) // 2 :])


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class MetricsLog:
    """Every step to RUN/metrics.jsonl and TensorBoard; lines after the step that a run resumes from are dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        path = run / METRICS
        lines = path.read_text().splitlines() if path.exists() and first_step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        self._file = path.open("w", buffering=1)
        self._file.writelines(f"{line}\n" for line in kept)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step."""
        self._file.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in metrics.items()}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second one kills as usual."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _check_run(config: PretrainConfig) -> None:
    if not config.resume and ((config.run / CHECKPOINT).exists() or (config.run / CONFIG).exists()):
        raise TrainingError(f"{config.run}: already holds a run; add --resume to go on with it, or choose another --run")


def _show(bar: tqdm[Any], metrics: dict[str, float]) -> None:
    shown = {
        "img/s": f"{metrics['samples_per_s']:.0f}",
        "data": f"{metrics['data_share']:.0%}",
        "loss": f"{metrics['loss']:.2f}/{metrics['chance_loss']:.2f}",
        "top1": f"{metrics['contrastive_top1']:.0%}/{metrics['chance_top1']:.1%}",
    }
    if "knn_accuracy" in metrics:
        bar.write(f"step {bar.n + 1}: kNN accuracy {metrics['knn_accuracy']:.1%}", file=sys.stderr)
    bar.set_postfix(shown, refresh=False)
    bar.update()
