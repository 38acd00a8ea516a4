"""Distillation (SimCLR v2, section 2): a small student learns a teacher's answers on pictures without labels.

The student's linear layer stands on unit vectors times sqrt(D), where the paper's stands on plain features: so it is at once
the HEAD.npz that serving applies to unit vectors. Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve.bulk import embed_samples
from serve.classify import Head
from serve.contract import Manifest
from serve.encoder import Encoder as ServedEncoder
from serve.samples import ImageSet
from serve.sources import open_source
from train.checkpoint import (
    load_checkpoint,
    refuse_other_settings,
    refuse_to_overwrite,
    save_checkpoint,
    save_encoder,
    write_config,
)
from train.config import Arch, Stem
from train.data import sources_sha256, spread
from train.encoder import Encoder
from train.linear import Feed, Recipe, as_input, descend, make_optimizer, open_feed
from train.record import stop_signals
from train.torch_encoder import TorchEncoder

HEAD = "head.npz"
CHECKPOINT_EVERY_S = 120
SCORED = 5000
"""Pictures on which student and teacher are compared at the end."""


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """T^2 * mean over B of the cross entropy between softmax(teacher / T) and softmax(student / T), of logits.

    Source: SimCLR v2, equation 2, and `add_kd_loss` of the official distillation colab, which has the factor T^2.
    """
    targets_BC = F.softmax(teacher_BC / temperature, dim=1)
    return temperature**2 * F.cross_entropy(student_BC / temperature, targets_BC)


class Student(nn.Module):
    """Encoder and linear layer on its unit vectors times sqrt(D): float (B, 3, H, W) in [0, 1] -> logits (B, C)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.feature_dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)  # model_util.py, `linear_layer`
        nn.init.zeros_(self.linear.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C)."""
        features = F.normalize(self.encoder(images_BCHW), dim=1)
        logits: Tensor = self.linear(features * features.shape[1] ** 0.5)
        return logits

    def head(self, classes: tuple[str, ...], encoder_id: str, report: dict[str, Any]) -> Head:
        """The linear layer as serving applies it, to unit vectors."""
        weight = self.linear.weight.detach().cpu().numpy() * np.float32(self.encoder.feature_dim**0.5)
        bias = self.linear.bias.detach().cpu().numpy()
        return Head(weight=weight, bias=bias, classes=classes, encoder_id=encoder_id, report=report)


def distill(
    teacher: ServedEncoder,
    head: Head,
    source: str,
    run: Path,
    *,
    arch: Arch = "resnet18",
    width: float = 1.0,
    stem: Stem | None = None,
    temperature: float = 1.0,
    batch_size: int = 256,
    epochs: float = 400,
    weight_decay: float = 1e-4,
    seed: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a student and write RUN/encoder.safetensors, encoder.json and head.npz, which export and the app use.

    LARS with the rate 0.1 * sqrt(batch size), 5 % warm-up, cosine; crops and flips only. Labels are not used but to score.
    SIGINT and SIGTERM save a checkpoint and raise KeyboardInterrupt.
    Returns: the report that head.npz carries. Raises: EncoderMismatch, SourceError, TrainingError, OSError.
    """
    head.require(teacher.encoder_id)
    refuse_to_overwrite(run, resume=resume)
    images = open_source(source)
    preprocess = teacher.manifest.preprocess
    feed = open_feed(images.train, preprocess, seed=seed)
    recipe = Recipe(
        optimizer="LARS", rate=0.1, rule="sqrt", batch_size=batch_size, epochs=epochs, weight_decay=weight_decay, warmup=0.05
    ).for_pictures(len(feed))
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(arch, width, stem or ("small" if min(preprocess.height_px, preprocess.width_px) <= 64 else "imagenet"))
    student = Student(encoder, len(head.classes)).to(device).to(memory_format=torch.channels_last)
    facts: dict[str, Any] = {
        "method": "SimCLR v2 distillation",
        **encoder.facts,
        "teacher": teacher.encoder_id,
        "classes": list(head.classes),
        "temperature": temperature,
        "batch_size": recipe.batch_size,
        "epochs": epochs,
        "weight_decay": weight_decay,
        "seed": seed,
        "images": source,
        "pictures": len(feed),
        "sources_sha256": sources_sha256(feed.samples),
    }
    training = _Training(teacher, head, student, feed, recipe, run, facts)
    training.start(resume)
    manifest = save_encoder(run, encoder, preprocess, facts)
    report: dict[str, Any] = {"fit": "distillation", "teacher": teacher.encoder_id, "temperature": temperature}
    report |= {"pictures": len(feed), **_compare(teacher, head, student, manifest, images)}
    student.head(head.classes, manifest.encoder_id, report).save(run / HEAD)
    return report


class _Training:
    """The state of one distillation and its loop."""

    def __init__(
        self,
        teacher: ServedEncoder,
        head: Head,
        student: Student,
        feed: Feed,
        recipe: Recipe,
        run: Path,
        facts: dict[str, Any],
    ) -> None:
        self.teacher, self.student, self.feed, self.recipe, self.run, self.facts = teacher, student, feed, recipe, run, facts
        self.weight, self.bias = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
        self.optimizer = make_optimizer(recipe, student.linear, student.encoder)
        self.device = student.linear.weight.device
        self.saved_at = time.monotonic()
        self.stopped: list[int] = []

    def start(self, resume: bool) -> None:
        """Take all steps, or those that are left."""
        first_step = self._restore() if resume else 0
        if not resume:
            write_config(self.run, self.facts)
            self._save(0)  # so that a run which dies early can be resumed
        self.student.train()
        with stop_signals() as self.stopped:
            descend(
                self.loss,
                self.optimizer,
                self.feed,
                self.recipe,
                self.teacher.manifest.preprocess,
                device=self.device,
                name="distilling",
                seed=self.facts["seed"],
                first_step=first_step,
                after_step=self.after_step,
            )
        self._save(self.recipe.steps(len(self.feed))[1])

    def loss(self, views: Tensor, _rows: Tensor) -> Tensor:
        """Teacher and student see the same pixels; the decay of the linear layer stands here, LARS leaves it out."""
        vectors = torch.from_numpy(self.teacher.embed(list(views.permute(0, 2, 3, 1).cpu().numpy())))
        answers = (vectors @ self.weight.T + self.bias).to(self.device)
        decay = self.recipe.weight_decay / 2 * self.student.linear.weight.square().sum()  # model_util.py, `add_weight_decay`
        return distillation_loss(self.student(as_input(views)), answers, self.facts["temperature"]) + decay

    def after_step(self, step: int) -> None:
        """Save now and then, and when asked to stop."""
        if self.stopped or time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S:
            self._save(step)
            self.saved_at = time.monotonic()
        if self.stopped:
            raise KeyboardInterrupt(f"stopped after step {step}, saved; repeat the command with --resume to go on")

    def _save(self, step: int) -> None:
        state = {"model": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_checkpoint(self.run, {"step": step, "facts": self.facts, **state})

    def _restore(self) -> int:
        state = load_checkpoint(self.run)
        refuse_other_settings(self.run, state["facts"], self.facts)
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _compare(teacher: ServedEncoder, head: Head, student: Student, manifest: Manifest, images: ImageSet) -> dict[str, Any]:
    """How often the student names the teacher's class, and how often each is right where labels are known."""
    samples = images.test or images.train
    some = spread(samples, SCORED)
    teacher_vectors, kept, _ = embed_samples(teacher, some, "teacher")
    student_vectors, _, _ = embed_samples(TorchEncoder(student.encoder, manifest), some, "student")
    own_head = student.head(head.classes, manifest.encoder_id, {})
    named = {
        "teacher_accuracy": head.probabilities(teacher_vectors).argmax(1),
        "accuracy": own_head.probabilities(student_vectors).argmax(1),
    }
    agreement = float((named["accuracy"] == named["teacher_accuracy"]).mean())
    labels = np.array([head.classes.index(str(sample.group)) if sample.group in head.classes else -1 for sample in kept])
    report: dict[str, Any] = {"agreement": agreement, "scored": len(kept), "accuracy": None, "teacher_accuracy": None}
    known = labels >= 0
    if known.any():
        report |= {name: float((numbers[known] == labels[known]).mean()) for name, numbers in named.items()}
    return report


def report_line(report: dict[str, Any]) -> str:
    """A report of `distill` in words."""
    right = ""
    if report["accuracy"] is not None:
        right = f"; right on {report['accuracy']:.2%}, its teacher on {report['teacher_accuracy']:.2%}"
    return f"the student agrees with its teacher on {report['agreement']:.2%} of {report['scored']} pictures{right}"
