"""Distillation: the loss against loops, the student's files against what serving does, and going on after a stop."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from serve.classify import Head
from serve.errors import EncoderMismatch, TrainingError
from serve.pictures import Picture, prepare_batch
from serve.sources import open_source
from tests.flat_colours import COLOURS, SIZE, MeanColour, draw_classes
from train import distill as module
from train.checkpoint import load_checkpoint, load_encoder
from train.distill import Student, distill, distillation_loss, report_line
from train.encoder import Encoder
from train.linear import Recipe
from train.torch_encoder import open_run

pytestmark = pytest.mark.usefixtures("one_cpu")


TEACHER = MeanColour()
HEAD = Head(
    weight=4 * np.eye(3, dtype=np.float32)[::-1].copy(),
    bias=np.zeros(3, np.float32),
    classes=tuple(COLOURS),
    encoder_id=TEACHER.encoder_id,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes are in the folders' names, for scoring."""
    return draw_classes(tmp_path_factory.mktemp("images"), 8)


def taught(images: Path, run: Path, **options: Any) -> dict[str, Any]:
    return distill(TEACHER, HEAD, str(images), run, **({"width": 0.125, "batch_size": 12, "epochs": 3} | options))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_the_loss_is_the_cross_entropy_of_tempered_answers(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    total = 0.0
    for one, other in zip(student, teacher, strict=True):
        weights = [math.exp(value / temperature) for value in other]
        powers = [math.exp(value / temperature) for value in one]
        for weight, power in zip(weights, powers, strict=True):
            total -= weight / sum(weights) * math.log(power / sum(powers))
    got = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert got.item() == pytest.approx(temperature**2 * total / 6, rel=1e-9)


def test_the_loss_is_lowest_where_the_student_answers_as_its_teacher() -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    student = (teacher + 5).requires_grad_()  # softmax does not see a constant
    distillation_loss(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_at_a_high_temperature_gradients_do_not_fade() -> None:
    """T^2 takes back what 1/T of the logits and 1/T of the softmax took away (Hinton et al. 2015)."""
    sizes = []
    for temperature in (10.0, 1000.0):
        student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        distillation_loss(student, torch.tensor([[3.0, 0.0, -3.0]], dtype=torch.float64), temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


# --- the student ------------------------------------------------------------------------------------------------------


def test_the_student_answers_in_training_as_its_head_does_in_serving(images: Path, tmp_path: Path) -> None:
    taught(images, tmp_path / "run")
    encoder, manifest = load_encoder(tmp_path / "run")
    head = Head.load(tmp_path / "run" / "head.npz")
    head.require(open_run(tmp_path / "run").encoder_id)
    student = Student(encoder, 3)
    state = load_checkpoint(tmp_path / "run")["model"]
    student.load_state_dict(state)
    samples = open_source(images).train
    pixels = prepare_batch([sample.source for sample in samples], manifest.preprocess)
    with torch.no_grad():
        wanted = student.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).softmax(1)
    served = head.probabilities(open_run(tmp_path / "run").embed([sample.source for sample in samples]))
    np.testing.assert_allclose(served, wanted.numpy(), atol=1e-5)


def test_a_student_learns_from_answers_alone(images: Path, tmp_path: Path) -> None:
    report = taught(images, tmp_path / "run", epochs=50, stem="small-s2")
    assert report["teacher_accuracy"] == 1
    assert report["agreement"] == report["accuracy"] > 0.9
    assert report_line(report) == (
        f"the student agrees with its teacher on {report['agreement']:.2%} of 24 pictures; "
        f"right on {report['accuracy']:.2%}, its teacher on 100.00%"
    )
    assert Head.load(tmp_path / "run" / "head.npz").report == report


def test_without_labels_only_the_agreement_is_known(images: Path, tmp_path: Path) -> None:
    report = taught(images / "red", tmp_path / "run", batch_size=4, epochs=1)
    assert (report["accuracy"], report["teacher_accuracy"], report["scored"]) == (None, None, 8)
    assert report_line(report).endswith(" of 8 pictures")


def test_teacher_and_student_see_the_same_pixels(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[NDArray[np.uint8]]] = {"teacher": [], "student": []}

    class Watching(MeanColour):
        def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
            seen["teacher"].append(np.stack([np.asarray(image) for image in images]))
            return super().embed(images)

    original = module.as_input
    monkeypatch.setattr(module, "as_input", lambda views: seen["student"].append(views.numpy()) or original(views))
    distill(Watching(), HEAD, str(images), tmp_path / "run", width=0.125, batch_size=12, epochs=1)
    assert len(seen["student"]) == 2
    for given, answered in zip(seen["student"], seen["teacher"], strict=False):
        np.testing.assert_array_equal(given.transpose(0, 2, 3, 1), answered)


def test_the_linear_layer_decays_in_the_loss_and_is_not_adapted(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Student(Encoder("resnet18", 0.125, "small"), 3)
    recipe = Recipe(optimizer="LARS", rate=0.1, rule="sqrt", batch_size=4, epochs=1, weight_decay=0.5)
    views = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    facts = {"temperature": 1.0, "seed": 0}
    losses = []
    for decay in (0.0, 0.5):
        training = module._Training(TEACHER, HEAD, student, None, replace(recipe, weight_decay=decay), tmp_path, facts)  # type: ignore[arg-type]
        losses.append(training.loss(views, torch.arange(4)).item())
        last = training.optimizer.param_groups[-1]
        assert [id(weight) for weight in last["params"]] == [id(weight) for weight in student.linear.parameters()]
        assert not last["adapt"]
    assert losses[1] - losses[0] == pytest.approx(0.25 * student.linear.weight.square().sum().item(), rel=1e-3)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_says_who_taught_it(images: Path, tmp_path: Path) -> None:
    taught(images, tmp_path / "run", temperature=0.5, stem="small-s2")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "checkpoint.pt", "encoder.safetensors", "encoder.json", "head.npz"}
    training: dict[str, Any] = load_encoder(tmp_path / "run")[1].training
    assert (training["teacher"], training["temperature"], training["arch"], training["stem"]) == (
        TEACHER.encoder_id,
        0.5,
        "resnet18",
        "small-s2",
    )
    assert load_encoder(tmp_path / "run")[1].preprocess == TEACHER.manifest.preprocess


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    original, due = module._Training.loss, [step]

    def loss(training: Any, *given: torch.Tensor) -> torch.Tensor:
        if due:
            due[0] -= 1
            if due[0] < 0:
                due.clear()
                action()
        return original(training, *given)

    monkeypatch.setattr(module._Training, "loss", loss)


def test_a_stopped_run_goes_on_bit_for_bit(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught(images, tmp_path / "whole")
    before_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4, saved; repeat the command with --resume"):
        taught(images, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "head.npz").exists()
    assert load_checkpoint(tmp_path / "stopped")["step"] == 4
    taught(images, tmp_path / "stopped", resume=True)
    whole, stopped = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    heads = [Head.load(tmp_path / name / "head.npz") for name in ("whole", "stopped")]
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)


def test_a_run_is_not_overwritten_nor_resumed_differently(images: Path, tmp_path: Path) -> None:
    taught(images, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="run: already holds a run; add --resume"):
        taught(images, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match=r"started differently \(epochs 1 -> 2\); resume with its own settings"):
        taught(images, tmp_path / "run", epochs=2, resume=True)
    assert taught(images, tmp_path / "run", epochs=1, resume=True)["scored"] == 24, "a finished run has no steps left"
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        taught(images, tmp_path / "none", resume=True)


def test_a_head_of_another_encoder_is_refused(images: Path, tmp_path: Path) -> None:
    stranger = Head(weight=HEAD.weight, bias=HEAD.bias, classes=HEAD.classes, encoder_id="someone else")
    with pytest.raises(EncoderMismatch, match="fitted on vectors of encoder someone else"):
        distill(TEACHER, stranger, str(images), tmp_path / "run")
    assert not (tmp_path / "run").exists()
