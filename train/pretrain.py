"""SimCLR pretraining, top to bottom: images -> two views -> one forward pass -> NT-Xent -> step.

Chen et al. 2020, algorithm 1. Every random draw is a function of (seed, process, step), so a resumed run repeats what an
uninterrupted one would have drawn. With torchrun, every process takes its share of the pictures and of each batch; the
negatives come from all of them and the gradient is that of one process with the whole batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from serve.contact_sheet import save_sheet
from serve.errors import TrainingError
from serve.samples import ImageSet
from serve.sources import describe_traits, open_source
from train import distributed
from train.augment import SimCLRAugment
from train.checkpoint import (
    CONTACT_SHEET,
    load_checkpoint,
    refuse_other_settings,
    refuse_to_overwrite,
    save_checkpoint,
    save_encoder,
    write_config,
)
from train.config import PretrainConfig
from train.contact_sheet import contact_sheet
from train.data import Batch, Pixels, load_pixels, preprocess_for, sources_sha256, step_generator, step_rows, training_frame
from train.duplicates import report_duplicates
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.estimate import memory_estimate
from train.feed import fit_to, open_feed
from train.gradcache import cached_backward
from train.health import Watch, chance_loss, signs_of_life
from train.loss import nt_xent_with_top1, tile_rows_for
from train.online import OnlineProbe, OnlineSet
from train.optim import LARS, lr_at, parameter_groups
from train.plan import DTYPES, Plan, choose_workers, describe, duration, make_plan
from train.positives import tracks_sha256
from train.record import MetricsLog, stop_signals
from train.stream import Streamed, worker_died

REHEARSAL_PICTURES = 32
LOOKS_PER_RUN, SIGNS_EVERY = 8, 10
"""How often pictures are embedded to score and show them, and in which steps the projections' spread is measured."""
SHOWN = {"knn_accuracy": "kNN accuracy", "probe_accuracy": "linear probe"}
CHECKPOINT_EVERY_S = 120
"""At most this much work is lost when a machine dies."""


def pretrain(config: PretrainConfig) -> Path:
    """Train, or go on training, and return the RUN folder. Raises: SourceError, TrainingError, OSError.

    SIGINT and SIGTERM end the current step, save a checkpoint and raise KeyboardInterrupt.
    """
    device = distributed.start()
    try:
        refuse_to_overwrite(config.run, resume=config.resume)
        images = open_source(config.images)
        plan = make_plan(config, images, device)
        feed = open_feed(config, plan, images)
        return Trainer(config, fit_to(feed, config, plan), images, feed, device).train()
    except RuntimeError as error:
        if death := worker_died(error):
            raise death from error
        raise
    finally:
        distributed.stop()


class Trainer:
    """The state of one run and its loop."""

    def __init__(
        self, config: PretrainConfig, plan: Plan, images: ImageSet, feed: Pixels | Streamed, device: torch.device
    ) -> None:
        self.config, self.plan, self.images, self.feed, self.device = config, plan, images, feed, device
        torch.manual_seed(config.seed)
        encoder = Encoder(config.arch, config.width, plan.stem, sk=config.sk)
        head = ProjectionHead(encoder.feature_dim, config.projection_dim, config.head_layers)
        self.model = SimCLR(encoder, head).to(device).to(memory_format=torch.channels_last)
        frame = plan.preprocess.height_px, plan.preprocess.width_px
        self.tile_rows = tile_rows_for(config.batch_size)
        self.share = config.batch_size // plan.world_size
        self.chunk = min(config.chunk or self.share, self.share)
        self.memory = memory_estimate(
            self.model,
            frame,
            batch_size=config.batch_size,
            chunk=self.chunk,
            dtype=DTYPES[plan.precision],
            tile_rows=self.tile_rows,
            world_size=plan.world_size,
            on_gpu=device.type == "cuda",
        )
        self.network: nn.Module = self.model
        if plan.world_size > 1:
            distributed.convert_batchnorm(self.model)
            self.network = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if config.compile:
            self.model.compile()
        self.optimizer = LARS(parameter_groups(self.model), lr=0.0, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        self.augment = SimCLRAugment(frame, plan.strength, plan.blur, config.augmentation, crop_area=plan.crop_area)
        self.pictures = distributed.total(len(feed))
        self.step = 0

    def train(self) -> Path:
        """Run all steps that are left."""
        run, facts = self.config.run, self._facts()
        self.online = OnlineSet.from_samples(self.images, self.plan.preprocess) if distributed.rank() == 0 else None
        self.probe = self._online_probe()
        if self.config.resume:
            self._restore(facts)
        self._announce()
        if not self.config.resume and distributed.rank() == 0:
            write_config(run, facts)
            self._save(facts)  # so that a run which dies early, or on a full disk, can always be resumed
        batches = self.feed.batches(self._rows_left())
        with stop_signals() as stopped, self._log() as log, closing(batches):
            watch = self._watch(log)
            saved_at = time.monotonic()
            while self.step < self.plan.total_steps and not distributed.any_of(bool(stopped)):
                metrics = self._one_step(batches)
                if log:
                    metrics |= self._look(log)
                    log.write(self.step, metrics)
                    for trouble in watch.look(self.step, metrics):
                        log.say(trouble)
                if time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                    self._save(facts)
                    saved_at = time.monotonic()
            self._save(facts)
            if distributed.rank() == 0:
                save_encoder(run, self.model.encoder, self.plan.preprocess, facts | {"steps": self.step})
            if self.plan.streamed:
                self._tell_of_pictures()
            distributed.any_of(False)  # until all is written: torchrun ends the others when one process leaves
        if self.step < self.plan.total_steps:
            done = f"stopped after step {self.step} of {self.plan.total_steps}, saved"
            raise KeyboardInterrupt(f"{done}; repeat the command to go on (simclr pretrain: with --resume)")
        return run

    def _log(self) -> AbstractContextManager[MetricsLog | None]:
        """Of the first process only."""
        return MetricsLog(self.config.run, self.step, self.plan.total_steps) if distributed.rank() == 0 else nullcontext()

    def _rows_left(self) -> Iterator[tuple[int, Tensor]]:
        return step_rows(
            len(self.feed),
            self.share,
            self.config.seed,
            rank=distributed.rank(),
            first_step=self.step,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            tracks=self.feed.tracks,
        )

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        started = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        rate = lr_at(self.step, peak=self.plan.peak_lr, warmup_steps=self.plan.warmup_steps, total_steps=self.plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, top1 = self._backward(batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.step}, the weights were left as they were; "
                f"start a new --run with a lower --learning-rate (peak now {self.plan.peak_lr:.3g})"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "epoch": self.step * self.config.batch_size / self.pictures,
            "loss": loss.item(),
            "chance_loss": chance_loss(self.config.batch_size),
            "contrastive_top1": top1.item(),
            "chance_top1": 1 / (2 * self.config.batch_size - 1),
            "lr": rate,
            "samples_per_s": self.config.batch_size / seconds,
            "data_share": (arrived - started) / seconds,
        }

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and contrastive top-1 of the whole batch; gradients are left in the parameters."""
        count = math.ceil(len(batch) / self.chunk)
        edges = [len(batch) * number // count for number in range(count + 1)]  # equal chunks, lest the last one is tiny
        parts = [slice(*pair) for pair in itertools.pairwise(edges)]
        if len(parts) == 1:
            loss, top1 = self._loss(self._project(batch, parts[0]))
            self.scaler.scale(loss).backward()
            return loss.detach(), top1
        chunks = [partial(self._project, batch, part) for part in parts]
        return cached_backward(self.network, chunks, self._loss, self.scaler)

    def _project(self, batch: Batch, part: slice) -> Tensor:
        """Projections of both views of some pictures: one forward pass, joint batch norm (data.py:124 of the official code)."""
        stream = f"views/{distributed.rank()}/{part.start}"
        views = batch.views(part, self.augment, step_generator(self.config.seed, self.step, stream=stream, device=self.device))
        with torch.autocast(self.device.type, DTYPES[self.plan.precision], enabled=self.plan.precision != "fp32"):
            features, projections = self.network(views)
        self._latest = features.detach(), projections.detach(), batch.rows[part]
        return cast("Tensor", projections)

    def _loss(self, projections: Tensor) -> tuple[Tensor, Tensor]:
        return nt_xent_with_top1(projections, temperature=self.config.temperature, tile_rows=self.tile_rows)

    def _look(self, log: MetricsLog) -> dict[str, float]:
        """Signs of life on what the step has seen last (with `--chunk`, its last chunk); now and then kNN and a picture."""
        features, projections, rows = self._latest
        found = self.probe.learn(features, self.targets[rows]) if self.probe else {}
        last = self.step == self.plan.total_steps
        if last or self.step % SIGNS_EVERY == 0:
            found |= signs_of_life(projections, features)
        if not last and self.step % max(self.plan.steps_per_epoch, self.plan.total_steps // LOOKS_PER_RUN):
            return found
        assert self.online is not None
        scores, vectors = self.online.measure(self.model.encoder, self.device, self.probe)
        sheet = contact_sheet(self.online.images.numpy(), vectors, title=f"step {self.step} of {self.plan.total_steps}")
        save_sheet(self.config.run / CONTACT_SHEET, sheet)
        log.show(self.step, "nearest neighbours", np.asarray(sheet))
        if scores:
            named = ", ".join(f"{SHOWN[name]} {share:.1%}" for name, share in scores.items())
            log.say(f"step {self.step}: {named}")
        return found | scores

    def _online_probe(self) -> OnlineProbe | None:
        """Of the first process, which sees its own share of the labels."""
        if self.online is None or not self.online.has_labels:
            return None
        probe = OnlineProbe(self.images, self.model.encoder.feature_dim, self.device)
        self.targets = probe.targets(self.feed.samples)
        return probe

    def _watch(self, log: MetricsLog | None) -> Watch:
        watch = Watch(
            batch_size=self.chunk,
            warmup_steps=self.plan.warmup_steps,
            learning_rate=self.plan.peak_lr,
            temperature=self.config.temperature,
            projection_dim=self.config.projection_dim,
            workers=choose_workers(self.config, len(self.images.train), self.plan.preprocess),
        )
        if log:
            for line in log.past:
                watch.look(int(line["step"]), line)
            log.past.clear()
        return watch

    def _facts(self) -> dict[str, Any]:
        """Provenance: what config.json, the checkpoint and the encoder's card record."""
        settings = asdict(self.config) | {"run": str(self.config.run)}
        for name in ("resume", "workers"):
            del settings[name]
        plan = asdict(self.plan) | {"preprocess": self.plan.preprocess.model_dump()}
        digests = {"sources_sha256": sources_sha256(self.images.train)}
        if self.config.positives == "track":
            digests["tracks_sha256"] = tracks_sha256(self.images.train)
        return {"method": "SimCLR", **settings, **plan, "pictures": self.pictures, **digests}

    def _restore(self, facts: dict[str, Any]) -> None:
        state = load_checkpoint(self.config.run)
        refuse_other_settings(self.config.run, state["facts"], facts)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.probe and state["probe"] and len(state["probe"]["bias"]) == len(self.probe.classes):  # else labels have changed
            self.probe.load_state_dict(state["probe"])
        self.step = state["step"]

    def _save(self, facts: dict[str, Any]) -> None:
        """From the first process: the others hold the same weights, and all randomness follows from seed, process and step."""
        if distributed.rank() == 0:
            state = {"step": self.step, "facts": facts, "model": self.model.state_dict()}
            state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            state["probe"] = self.probe.state_dict() if self.probe else None
            save_checkpoint(self.config.run, state)

    def _announce(self) -> None:
        """Before the first step: what was chosen, what it takes, what is wrong with the pictures."""
        seconds = self.seconds_per_picture() * self.config.batch_size * (self.plan.total_steps - self.step)
        if distributed.rank() == 0:
            print(describe(self.plan, self.config, self.device, self.pictures), file=sys.stderr)
            print(f"memory    {self.memory}\ntime      about {duration(seconds)}", file=sys.stderr)
            if self.feed.tracks:
                print(f"positives {self.feed.tracks}{self._of_this_process()}", file=sys.stderr)
        self._tell_of_pictures()
        if distributed.rank() == 0 and isinstance(self.feed, Pixels):
            duplicates = report_duplicates(self.feed.images, self.feed.samples)
            print(f"{duplicates.sentence()}{self._of_this_process()}", file=sys.stderr)

    def _tell_of_pictures(self) -> None:
        """What stood out among them, on all processes together: at the start, or, streamed, at the end."""
        faults = self.feed.unreadable
        count = distributed.total(len(faults))
        if distributed.rank() != 0:
            return
        if traits := describe_traits(self.feed.traits):
            print(f"of the pictures{self._of_this_process()}: {traits}", file=sys.stderr)
        if count:
            print(f"{count} unreadable pictures left out{f', such as {faults[0].reason}' if faults else ''}", file=sys.stderr)

    def _of_this_process(self) -> str:
        return " of the first process" if self.plan.world_size > 1 else ""

    def seconds_per_picture(self) -> float:
        """Time of a forward and backward pass on made-up pictures; nothing of the run changes."""
        count = self.chunk if self.device.type == "cuda" else min(self.chunk, REHEARSAL_PICTURES)
        frame = self.plan.preprocess.height_px, self.plan.preprocess.width_px
        batch = Batch(torch.zeros((2, count, 3, *frame), dtype=torch.uint8), torch.arange(count))
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            loss, _top1 = self._backward(batch)
            loss.item()
            seconds = time.perf_counter() - started
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])
        self.optimizer.zero_grad(set_to_none=True)
        passes = 4 / 3 if self.chunk < self.share else 1  # chunks go forward twice, which is about a third of a step
        return passes * seconds / count / self.plan.world_size


def ready_trainer(config: PretrainConfig, images: ImageSet, feed: Pixels | Streamed | None = None) -> Trainer:
    """A trainer at step 0 that has written nothing: for measuring. Raises: SourceError, TrainingError."""
    device = distributed.start()
    plan = make_plan(config, images, device)
    feed = feed or open_feed(config, plan, images)
    return Trainer(config, fit_to(feed, config, plan), images, feed, device)


def samples_per_second(config: PretrainConfig, images: ImageSet, *, seconds: float = 8) -> float:
    """Pictures (of two views each) per second that this machine trains, its warm-up left out."""
    few = ImageSet(train=images.train[: config.batch_size])
    preprocess = preprocess_for(images.train, config.image_size)
    pixels = load_pixels(few.train, training_frame(preprocess))
    trainer = ready_trainer(replace(config, batch_size=len(pixels)), few, pixels)
    return samples_per_second_of(trainer, seconds=seconds)


def samples_per_second_of(trainer: Trainer, *, seconds: float) -> float:
    """The same of a trainer, which is spoilt by it."""
    batches = itertools.repeat(next(trainer.feed.batches(trainer._rows_left())))
    rates: list[float] = []
    started = time.monotonic()
    while len(rates) < 4 or time.monotonic() - started < seconds:
        trainer.step = 0
        rates.append(trainer._one_step(batches)["samples_per_s"])
    return statistics.median(rates[len(rates) // 2 :])
