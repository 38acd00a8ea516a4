"""Pretraining end to end on pictures of 16 pixels: what it writes, that it learns, and that nothing breaks a run."""

import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from serve.contract import Manifest
from serve.errors import ContractError, SourceError, TrainingError
from serve.sources import open_source
from train import distributed
from train import pretrain as module
from train.checkpoint import is_finished, load_checkpoint, load_encoder, save_checkpoint
from train.config import PretrainConfig
from train.data import Batch
from train.plan import make_plan
from train.pretrain import Trainer, pretrain, ready_trainer, samples_per_second
from train.record import MetricsLog, stop_signals

COUNT, BATCH, STEPS = 24, 8, 6
CPU = torch.device("cpu")
KEYS = {"step", "epoch", "loss", "chance_loss", "contrastive_top1", "chance_top1", "lr", "samples_per_s", "data_share"}
KEYS |= {"probe_loss", "probe_train_accuracy"}
NOW_AND_THEN = {"knn_accuracy", "probe_accuracy"}
NOW_AND_THEN |= {"effective_rank", "dimension_std", "alignment", "uniformity", "feature_std"}


pytestmark = pytest.mark.usefixtures("one_cpu")


def draw(folder: Path, count: int = COUNT, seed: int = 0) -> Path:
    """Pictures of blocks of colour, each of its own, in three classes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"class {number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST).save(path)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"))


def settings(images: Path, run: Path, **changes: Any) -> PretrainConfig:
    fields = {
        "precision": "fp32",
        "width": 0.125,
        "image_size": "16",
        "batch_size": BATCH,
        "epochs": STEPS * BATCH / COUNT,
        "learning_rate": 2.0,
    }
    return PretrainConfig(images=str(images), run=run, **(fields | changes))


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    return pretrain(settings(pictures, tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_result(run: Path, other: Path) -> None:
    """Weights, batch norms, momentum and the course of the loss, bit for bit."""
    ours, theirs = load_file(run / "encoder.safetensors"), load_file(other / "encoder.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [load_checkpoint(folder) for folder in (run, other)]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    momenta = [state["optimizer"]["state"] for state in states]
    assert momenta[0].keys() == momenta[1].keys() != set()
    assert all(torch.equal(momenta[0][key]["momentum_buffer"], momenta[1][key]["momentum_buffer"]) for key in momenta[0])
    timeless = [[{k: v for k, v in line.items() if k not in ("samples_per_s", "data_share")} for line in lines(folder)]
                for folder in (run, other)]  # fmt: skip
    assert timeless[0] == timeless[1]


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of this step, once."""
    original, due = Trainer._one_step, [True]

    def one_step(trainer: Trainer, batches: Iterator[Batch]) -> dict[str, float]:
        if trainer.step == step and due:
            due.clear()
            action()
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "_one_step", one_step)


def fail(error: Exception) -> Callable[..., None]:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


def one_line(refusal: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = {
        "config.json",
        "checkpoint.pt",
        "encoder.safetensors",
        "encoder.json",
        "metrics.jsonl",
        "contact_sheet.png",
        "tensorboard",
    }
    assert {path.name for path in finished.iterdir()} == names
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    config = json.loads((finished / "config.json").read_text())
    assert (config["seed"], config["batch_size"], config["total_steps"], config["pictures"]) == (0, BATCH, STEPS, COUNT)
    manifest = Manifest.read(finished / "encoder.json")
    assert manifest.training == config | {"steps": STEPS}
    assert manifest.input.shape == (16, 16, 3)
    encoder, _ = load_encoder(finished)
    assert encoder.feature_dim == manifest.embedding_dim


def test_every_step_has_its_line(finished: Path) -> None:
    found = lines(finished)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert all(line.keys() - NOW_AND_THEN == KEYS for line in found)
    for name in ("knn_accuracy", "probe_accuracy"):
        assert [line["step"] for line in found if name in line] == [3, 6], "once an epoch, for there are labels"
    assert found[-1].keys() == KEYS | NOW_AND_THEN
    assert all(math.isfinite(value) for line in found for value in line.values())
    assert [line["epoch"] for line in found] == pytest.approx([step / 3 for step in range(1, 7)], abs=1e-6)
    assert {line["chance_loss"] for line in found} == {round(math.log(2 * BATCH - 1), 6)}
    assert {line["chance_top1"] for line in found} == {round(1 / (2 * BATCH - 1), 6)}
    rates = [2 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert [line["lr"] for line in found] == pytest.approx(rates, abs=1e-6)


def test_it_learns_to_tell_pictures_apart(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 32)
    easy = {"batch_size": 16, "epochs": 24, "learning_rate": 10.0, "strength": 0.0, "crop_area": 0.8}
    found = lines(pretrain(settings(images, tmp_path / "run", **easy)))
    first, last = (
        {name: sum(line[name] for line in part) / len(part) for name in ("loss", "contrastive_top1")}
        for part in (found[:4], found[-4:])
    )
    assert last["loss"] < 1.3 < 2.5 < first["loss"], "without steps it stays at 2.8; chance is 3.4"
    assert last["contrastive_top1"] > 0.7 > 0.45 > first["contrastive_top1"], "chance is 0.03"


def test_the_same_seed_gives_the_same_encoder_and_another_does_not(pictures: Path, finished: Path, tmp_path: Path) -> None:
    assert_same_result(pretrain(settings(pictures, tmp_path / "same")), finished)
    other = pretrain(settings(pictures, tmp_path / "other", seed=1))
    assert (other / "encoder.safetensors").read_bytes() != (finished / "encoder.safetensors").read_bytes()


def trainer_of(images: Path, run: Path, **changes: Any) -> Trainer:
    return ready_trainer(settings(images, run, **changes), open_source(images))


def batches_of(trainer: Trainer) -> Iterator[Batch]:
    return trainer.feed.batches(trainer._rows_left())


def test_an_epoch_shows_every_picture_once_and_twins_are_b_rows_apart(pictures: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pictures, tmp_path / "run")
    trainer.augment = lambda images, _generator: images.float()  # type: ignore[assignment]
    whole = slice(0, BATCH)
    steps = [batch.views(whole, trainer.augment, torch.Generator()).chunk(2) for batch in batches_of(trainer)]
    assert all(torch.equal(*views) for views in steps)
    for epoch in (steps[:3], steps[3:]):
        seen = torch.cat([views[0] for views in epoch]).byte()
        assert sorted(picture.flatten().tolist() for picture in seen) == sorted(
            picture.flatten().tolist() for picture in trainer.feed.images
        )
    assert not torch.equal(steps[0][0], steps[3][0])


def test_both_views_go_through_the_network_together(pictures: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pictures, tmp_path / "run")
    shapes: list[tuple[int, ...]] = []
    trainer.model.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    trainer._one_step(batches_of(trainer))
    assert shapes == [(2 * BATCH, 3, 16, 16)]


def test_chunks_see_few_pictures_at_a_time_and_all_negatives(pictures: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pictures, tmp_path / "run", chunk=3)
    shapes: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _module, inputs: shapes.append(len(inputs[0])))
    metrics = trainer._one_step(batches_of(trainer))
    assert shapes == [4, 6, 6, 4, 6, 6], "once for the projections, once for the gradients"
    assert metrics["chance_loss"] == math.log(2 * BATCH - 1)


def test_chunks_larger_than_the_batch_are_no_chunks(pictures: Path, tmp_path: Path) -> None:
    losses = [
        [line["loss"] for line in lines(pretrain(settings(pictures, tmp_path / str(chunk), chunk=chunk, epochs=1)))]
        for chunk in (None, 100)
    ]
    assert losses[0] == losses[1]


def test_a_chunk_draws_the_same_views_both_times(pictures: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pictures, tmp_path / "run", chunk=4)
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    trainer._one_step(batches_of(trainer))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    "changes",
    [{"workers": 1}, {"chunk": 4}, {"precision": "bf16"}, {"augmentation": 1}, {"head_layers": 3}],
    ids=str,
)
def test_every_way_of_training_trains(pictures: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = lines(pretrain(settings(pictures, tmp_path / "run", **changes)))
    assert len(found) == STEPS
    assert all(1 < line["loss"] < 6 for line in found), "more than chance, 2.7, where batch norm sees few pictures"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"precision": "bf16", "compile": True}], ids=str)
def test_training_on_a_gpu(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.start().type == "cuda"
    found = lines(pretrain(settings(pictures, tmp_path / "run", **changes)))
    assert len(found) == STEPS
    assert all(1 < line["loss"] < 4 for line in found)


def test_the_compiled_network_is_the_same_one(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by the backend that changes nothing: what is pinned is that training and its files work around it."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="eager"))
    plain, compiled = (
        lines(pretrain(settings(pictures, tmp_path / str(chosen), compile=chosen, epochs=1))) for chosen in (False, True)
    )
    assert [line["loss"] for line in plain] == pytest.approx([line["loss"] for line in compiled], abs=1e-4)
    assert load_encoder(tmp_path / "True")[0].feature_dim == load_encoder(tmp_path / "False")[0].feature_dim


def test_a_run_shows_itself_before_and_while_it_trains(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(settings(pictures, tmp_path / "run", learning_rate=None))
    said = capsys.readouterr().err
    assert f"peak lr {0.075 * math.sqrt(BATCH):.3g} (sqrt rule)" in said
    for part in ("memory    about", "time      about", "no duplicates among 24 pictures", "kNN accuracy", "linear probe"):
        assert part in said
    with Image.open(tmp_path / "run" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_the_rehearsal_leaves_no_trace(pictures: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pictures, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert 0 < trainer.seconds_per_picture() < 10
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(weight.grad is None for weight in trainer.model.parameters())


# --- what follows from the pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ("32", {"stem": "small", "crop_area": 0.08, "strength": 0.5, "blur": False}),
        ("64", {"stem": "small", "crop_area": 0.08, "strength": 1.0, "blur": True}),
        ("224", {"stem": "imagenet", "crop_area": 0.08, "strength": 1.0, "blur": True}),
        ("256x128", {"stem": "imagenet", "crop_area": 0.4, "strength": 1.0, "blur": True}),
    ],
)
def test_the_plan_follows_the_frame(pictures: Path, tmp_path: Path, size: str, wanted: dict[str, Any]) -> None:
    source = open_source(pictures)
    plan = make_plan(settings(pictures, tmp_path, image_size=size, learning_rate=None), source, CPU)
    assert {name: getattr(plan, name) for name in wanted} == wanted
    assert plan.peak_lr == pytest.approx(0.075 * math.sqrt(BATCH))
    asked = {"stem": "small-s2", "crop_area": 0.3, "strength": 0.7}
    plan = make_plan(settings(pictures, tmp_path, image_size=size, **asked), source, CPU)
    assert {name: getattr(plan, name) for name in asked} == asked
    assert plan.peak_lr == 2.0


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(2, 6, 0), (10, 30, 3), (100, 300, 30), (1000, 3000, 30), (0.01, 1, 0)]
)
def test_the_number_of_steps(pictures: Path, tmp_path: Path, epochs: float, steps: int, warmup: int) -> None:
    plan = make_plan(settings(pictures, tmp_path, epochs=epochs), open_source(pictures), CPU)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (3, steps, warmup)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "--batch-size is 1, wanted at least 2"),
        ({"epochs": 0}, "--epochs is 0, wanted at least 0.001"),
        ({"epochs": math.nan}, "--epochs is nan"),
        ({"epochs": math.inf}, "--epochs is inf"),
        ({"crop_area": 1.1}, "--crop-area is 1.1, wanted 0 to 1"),
        ({"strength": 2}, "--strength is 2, wanted 0 to 1.25"),
        ({"learning_rate": -1}, "--learning-rate is -1, wanted 0 to 1000"),
        ({"learning_rate": math.nan}, "--learning-rate is nan"),
        ({"width": 0.1}, "--width is 0.1, wanted at least 0.125"),
        ({"temperature": 0}, "--temperature is 0, wanted at least 0.002"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"sk": True}, "--sk with --arch resnet18"),
        ({"chunk": 1}, "--chunk is 1, wanted at least 2"),
        ({"head_layers": 4}, "--head-layers is 4, wanted 2 or 3"),
        ({"projection_dim": 1}, "--projection-dim is 1, wanted at least 2"),
        ({"weight_decay": -1}, "--weight-decay is -1, wanted 0 to 1"),
        ({"workers": -1}, "--workers is -1, wanted 0 to 1024"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        settings(tmp_path, tmp_path, **changes)


def test_one_picture_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "images", 1)
    with pytest.raises(TrainingError, match=r"images: 1 picture to learn from.*needs at least 2") as refusal:
        pretrain(settings(tmp_path / "images", tmp_path / "run"))
    one_line(refusal)
    assert not (tmp_path / "run").exists()


def test_two_pictures_are_enough(tmp_path: Path) -> None:
    draw(tmp_path / "images", 2)
    assert len(lines(pretrain(settings(tmp_path / "images", tmp_path / "run", batch_size=2, epochs=2)))) == 2


def test_a_batch_larger_than_the_set_is_refused_with_the_size_that_fits(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--batch-size is 25, but there are 24 pictures; use --batch-size 24 or less"):
        pretrain(settings(pictures, tmp_path / "run", batch_size=25))
    assert not (tmp_path / "run").exists()


def spoil(folder: Path, count: int) -> None:
    for path in sorted(folder.rglob("*.png"))[:count]:
        path.write_bytes(b"no picture")


def test_pictures_that_cannot_be_read_do_not_shorten_any_batch(tmp_path: Path) -> None:
    """24 are listed and 15 are left: one batch of 8 in an epoch, not three of 8, 7 and 0."""
    spoil(draw(tmp_path / "images"), 9)
    found = lines(pretrain(settings(tmp_path / "images", tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pictures"] == 15
    assert len(found) == round(STEPS * 15 / COUNT)
    assert found[-1]["epoch"] == pytest.approx(len(found) * BATCH / 15, abs=1e-6)


def test_too_few_readable_pictures_are_refused(tmp_path: Path) -> None:
    spoil(draw(tmp_path / "images"), 17)
    with pytest.raises(TrainingError, match=r"7 pictures can be read, fewer than --batch-size 8; first failure: .*readable"):
        pretrain(settings(tmp_path / "images", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_pictures_at_all_are_refused(tmp_path: Path) -> None:
    spoil(draw(tmp_path / "images"), COUNT)
    with pytest.raises(SourceError, match="none of 24 pictures can be read"):
        pretrain(settings(tmp_path / "images", tmp_path / "run"))


def test_speed_is_measured_even_if_a_picture_cannot_be_read(tmp_path: Path) -> None:
    images = draw(tmp_path / "images")
    spoil(images, 1)
    rate = samples_per_second(settings(images, tmp_path / "run"), open_source(images), seconds=0)
    assert 1 < rate < 1e6
    assert not (tmp_path / "run").exists()


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_encoder(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    config = settings(pictures, tmp_path / "run")
    before_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step + 1} of {STEPS}, saved.*--resume"):
        pretrain(config)
    assert load_checkpoint(config.run)["step"] == step + 1
    assert load_encoder(config.run)[1].training["steps"] == step + 1
    assert (is_finished(tmp_path), is_finished(config.run), is_finished(finished)) == (False, False, True)
    assert len(lines(config.run)) == step + 1
    pretrain(replace(config, resume=True))
    assert_same_result(config.run, finished)


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_died_goes_on_from_its_last_checkpoint(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also if it died before the first one was due: a run can always be resumed."""
    config = settings(pictures, tmp_path / "run")
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_S", 3600 if step == 0 else -1)
    before_step(monkeypatch, step, fail(MemoryError()))
    with pytest.raises(MemoryError):
        pretrain(config)
    assert load_checkpoint(config.run)["step"] == step
    pretrain(replace(config, resume=True))
    assert_same_result(config.run, finished)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(pictures: Path, finished: Path, tmp_path: Path) -> None:
    config = settings(pictures, tmp_path / "run")
    config.run.mkdir()
    (config.run / "config.json").write_text("{}")
    pretrain(config)
    assert_same_result(config.run, finished)


def test_labels_may_change_between_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They teach the online probe alone, which then starts anew."""
    images = draw(tmp_path / "images")
    sources = sorted(images.rglob("*.png"))
    table = tmp_path / "pictures.csv"
    table.write_text("path\n" + "".join(f"{path}\n" for path in sources))
    config = settings(table, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    table.write_text("path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in sources))
    pretrain(replace(config, resume=True))
    assert "probe_accuracy" not in lines(config.run)[2]
    assert "probe_accuracy" in lines(config.run)[-1]


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_a_worker_that_is_killed_is_told_in_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """torch raises wherever the trainer is then: waiting for a batch, or in the middle of a step."""

    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        if how == "busy":
            time.sleep(5)

    before_step(monkeypatch, 2, kill)
    with pytest.raises(TrainingError, match=r"a worker process died.*fewer --workers.*--resume") as refusal:
        pretrain(settings(pictures, tmp_path / "run", workers=1))
    one_line(refusal)


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(pictures: Path, finished: Path, run: Path) -> None:
    pretrain(settings(pictures, run, resume=True))
    assert_same_result(run, finished)


def test_a_moved_run_goes_on(pictures: Path, finished: Path, run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "elsewhere")
    pretrain(settings(pictures, tmp_path / "elsewhere", resume=True))
    assert_same_result(tmp_path / "elsewhere", finished)


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    written = [json.dumps({"step": step, "loss": 1.5}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(written) + '\n{"step": 8, "lo')
    metrics = dict.fromkeys(KEYS - {"step"}, 0.5) | {"loss": 0.123456789}
    with MetricsLog(tmp_path, 5, 10) as log:
        assert [line["step"] for line in log.past] == [1, 2, 3, 4, 5]
        log.write(6, metrics)
    assert lines(tmp_path) == [*map(json.loads, written[:5]), metrics | {"step": 6, "loss": 0.123457}]


def test_a_second_ctrl_c_stops_at_once_and_the_handlers_come_back() -> None:
    """SIGTERM may come twice, from a cluster and from torchrun, and still lets the step end."""
    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        assert not received
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former


# --- refusals: the files stay as they are -----------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(pictures: Path, run: Path) -> None:
    before = contents(run)
    with pytest.raises(TrainingError, match="already holds a run; add --resume to go on with it, or choose another --run"):
        pretrain(settings(pictures, run))
    assert contents(run) == before


def test_there_must_be_something_to_resume(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume; start it without --resume"):
        pretrain(settings(pictures, tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"batch_size": 4}, "batch_size 8 -> 4"),
        ({"temperature": 0.5}, "temperature 0.2 -> 0.5"),
        ({"crop_area": 0.5}, "crop_area 0.08 -> 0.5"),
        ({"arch": "resnet34"}, "arch 'resnet18' -> 'resnet34'"),
    ],
)
def test_other_settings_are_refused(pictures: Path, run: Path, changes: dict[str, Any], named: str) -> None:
    before = contents(run)
    with pytest.raises(TrainingError, match="started differently") as refusal:
        pretrain(settings(pictures, run, resume=True, **changes))
    assert named in one_line(refusal)
    assert contents(run) == before


def test_other_pictures_are_refused(pictures: Path, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    moved = shutil.copytree(pictures, tmp_path / "moved")
    for change in (lambda: None, lambda: draw(moved, COUNT + 1)):
        change()
        with pytest.raises(TrainingError, match="started differently") as refusal:
            pretrain(settings(moved, run, resume=True))
        assert "sources_sha256" in one_line(refusal)
    assert contents(run) == before


def test_one_picture_more_is_noticed(tmp_path: Path) -> None:
    images = draw(tmp_path / "images")
    config = settings(images, tmp_path / "run")
    pretrain(config)
    draw(images, COUNT + 1)
    (images / "class 0" / "000.png").unlink()
    with pytest.raises(TrainingError, match=r"started differently \(sources_sha256 ") as refusal:
        pretrain(replace(config, resume=True))
    one_line(refusal)


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("holiday.txt", "beach")
    return buffer.getvalue()


FOREIGN: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda whole, trap: b"",
    "cut to 10 bytes": lambda whole, trap: whole[:10],
    "cut in half": lambda whole, trap: whole[: len(whole) // 2],
    "cut by a byte": lambda whole, trap: whole[:-1],
    "zeros": lambda whole, trap: bytes(1000),
    "text": lambda whole, trap: b"not a checkpoint\n",
    "json": lambda whole, trap: b'{"step": 3}',
    "another zip": lambda whole, trap: zip_bytes(),
    "a tensor": lambda whole, trap: torch_bytes(torch.ones(3)),
    "plain weights": lambda whole, trap: torch_bytes({"weight": torch.ones(3)}),
    "another trainer's": lambda whole, trap: torch_bytes({"step": 3, "model": {}, "optimizer": {}}),
    "code": lambda whole, trap: torch_bytes({"step": 3, "facts": Trap(trap)}),
    "old code": lambda whole, trap: pickle.dumps(Trap(trap)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_runs(
    pictures: Path, run: Path, tmp_path: Path, kind: str
) -> None:
    path, trap = run / "checkpoint.pt", tmp_path / "trap"
    path.write_bytes(FOREIGN[kind](path.read_bytes(), trap))
    before = contents(run)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt.*start a new --run") as refusal:
        pretrain(settings(pictures, run, resume=True))
    one_line(refusal)
    assert contents(run) == before
    assert not trap.exists()


def test_a_loss_that_is_not_finite_stops_before_the_step(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(pictures, tmp_path / "run")
    batches = batches_of(trainer)
    trainer._one_step(batches)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    monkeypatch.setattr(module, "nt_xent_with_top1", lambda z, **_: ((z * math.nan).sum(), torch.zeros(())))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1.*lower --learning-rate") as refusal:
        trainer._one_step(batches)
    assert "--resume" not in one_line(refusal), "which would refuse the lower rate"
    assert trainer.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["torch.save", "os.fsync"])
def test_a_full_disk_leaves_the_former_checkpoint_whole(run: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = contents(run)
    monkeypatch.setattr(*((torch, "save") if place == "torch.save" else (os, "fsync")), fail(FULL))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, {"step": 9})
    assert contents(run) == before


def test_a_write_that_the_system_cuts_short_is_an_oserror(run: Path) -> None:
    """The real thing: torch's own writer meets a limit on the size of files."""
    before = contents(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt|File too large") as refusal:
            save_checkpoint(run, {"step": 9, "model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(refusal)
    assert contents(run) == before


def test_a_run_whose_disk_was_full_goes_on(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(pictures, tmp_path / "run")
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_S", -1)
    with pytest.MonkeyPatch.context() as full:
        before_step(full, 3, lambda: full.setattr(torch, "save", fail(FULL)))
        with pytest.raises(OSError, match="No space left"):
            pretrain(config)
    assert load_checkpoint(config.run)["step"] == 3
    pretrain(replace(config, resume=True))
    assert_same_result(config.run, finished)


# --- opening a run ----------------------------------------------------------------------------------------------------


def test_weights_that_are_not_those_of_the_card_are_refused(run: Path) -> None:
    raw = bytearray((run / "encoder.safetensors").read_bytes())
    raw[-1] ^= 1
    (run / "encoder.safetensors").write_bytes(raw)
    with pytest.raises(ContractError, match=r"is not the file that encoder\.json describes") as refusal:
        load_encoder(run)
    one_line(refusal)


@pytest.mark.parametrize("missing", ["encoder.json", "encoder.safetensors"])
def test_a_run_without_its_encoder_is_refused(run: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(ContractError, match=missing) as refusal:
        load_encoder(run)
    one_line(refusal)
