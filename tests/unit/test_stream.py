"""Streaming: what workers hand over, in which order, and what happens to pictures and workers that fail."""

import multiprocessing
import os
import signal
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.contract import Preprocess
from serve.errors import SourceError, TrainingError
from serve.samples import Sample
from serve.sources import open_source
from train import stream as module
from train.augment import SimCLRAugment
from train.data import Batch, step_generator, step_rows
from train.stream import Streamed, worker_died

FRAME = Preprocess(height_px=16, width_px=16, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
COUNT, BATCH = 10, 4


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Sample, ...]:
    """Pictures of one colour each, so that any crop says which picture it is of."""
    for number in range(COUNT):
        colour = np.full((30, 20, 3), 20 * number + 10, dtype=np.uint8)
        Image.fromarray(colour).save(tmp_path / f"{number:02}.png")
    return open_source(tmp_path).train


def stream(samples: tuple[Sample, ...], *, workers: int = 1, seed: int = 0, crop_area: float = 0.2) -> Streamed:
    return Streamed(samples, FRAME, crop_area, workers=workers, seed=seed)


def steps(count: int = COUNT, first: int = 0, total: int = 5) -> Iterator[tuple[int, torch.Tensor]]:
    return step_rows(count, BATCH, 0, first_step=first, total_steps=total, steps_per_epoch=count // BATCH)


def test_a_batch_holds_two_crops_of_each_of_its_pictures(pictures: tuple[Sample, ...]) -> None:
    batches = list(stream(pictures).batches(steps()))
    assert [tuple(batch.pixels.shape) for batch in batches] == [(2, BATCH, 3, 16, 16)] * 5
    for batch, (_, rows) in zip(batches, steps(), strict=True):
        assert torch.equal(batch.rows, rows)
        colours = (20 * rows + 10).byte()[None, :, None, None, None]
        assert torch.equal(batch.pixels, colours.expand_as(batch.pixels))


def noise(folder: Path) -> tuple[Sample, ...]:
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return open_source(folder).train


def test_neither_workers_nor_an_interruption_change_a_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = noise(tmp_path)
    whole = [batch.pixels for batch in stream(samples).batches(steps())]
    monkeypatch.setattr(module, "PIECE", 3)  # a batch comes in pieces, of any worker
    several = [batch.pixels for batch in stream(samples, workers=2).batches(steps())]
    resumed = [batch.pixels for batch in stream(samples).batches(steps(first=3))]
    assert all(torch.equal(*pair) for pair in zip(whole, several, strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole[3:], resumed, strict=True))


def test_crops_differ_between_views_epochs_and_seeds(tmp_path: Path) -> None:
    samples = noise(tmp_path)
    order = iter([(epoch, torch.arange(BATCH)) for epoch in (0, 1)])
    first, second = (batch.pixels for batch in stream(samples).batches(order))
    (other,) = (batch.pixels for batch in stream(samples, seed=1).batches(iter([(0, torch.arange(BATCH))])))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_picture_that_cannot_be_read_is_replaced_by_the_next_and_told_once(
    tmp_path: Path, pictures: tuple[Sample, ...]
) -> None:
    (tmp_path / "03.png").write_bytes(b"no picture")
    (tmp_path / "04.png").unlink()
    feed = stream(pictures)
    order = iter([(epoch, torch.tensor([3, 9])) for epoch in range(3)])
    batches = list(feed.batches(order))
    assert all(batch.rows.tolist() == [5, 9] for batch in batches)
    assert {int(batch.pixels[:, 0].unique()) for batch in batches} == {110}
    assert [Path(fault.source).name for fault in feed.unreadable] == ["03.png", "04.png"]


def test_nothing_readable_is_refused(tmp_path: Path, pictures: tuple[Sample, ...]) -> None:
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"none of 10 pictures can be read; the first: .*\.png") as refusal:
        list(stream(pictures).batches(steps()))
    assert "\n" not in str(refusal.value)


def test_a_worker_that_dies_is_named_in_one_line(pictures: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_picture", lambda _source, _traits: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError) as raised:
        list(stream(pictures).batches(steps()))
    death = worker_died(raised.value)
    assert isinstance(death, TrainingError)
    assert "a worker process died" in str(death)
    assert "\n" not in str(death)
    for other in (RuntimeError("CUDA out of memory"), RuntimeError()):
        assert worker_died(other) is None


def test_closing_ends_the_workers_though_they_ignore_sigterm(pictures: tuple[Sample, ...]) -> None:
    with closing(stream(pictures, workers=2).batches(steps(total=50))) as batches:
        next(batches), next(batches)  # one of each worker: both have begun
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
        assert len(next(batches)) == BATCH
    assert not any(worker.is_alive() for worker in workers)


def test_workers_read_one_archive_at_the_same_time(tmp_path: Path) -> None:
    """Each needs a file of its own: one that is shared has one position for all."""
    (tmp_path / "folder").mkdir()
    samples = noise(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for sample in samples:
            archive.write(sample.source, Path(sample.source).name)
    zipped = open_source(tmp_path / "all.zip").train
    module.read_picture(zipped[0].source)  # the archive is open when the workers start
    feed = stream(zipped, workers=4)
    order = [(epoch, torch.randperm(COUNT)) for epoch in range(8)]
    assert all(torch.equal(batch.rows, rows) for batch, (_, rows) in zip(feed.batches(iter(order)), order, strict=True))
    assert not feed.unreadable


def test_a_frame_that_stretches_crops_in_the_proportions_of_the_picture(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 80)[:, None, None], (80, 20, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    samples = open_source(tmp_path).train
    spans = {}
    for resize, crop_area in (("stretch", 0.9), ("center_crop", 0.05)):
        feed = Streamed(samples, FRAME.model_copy(update={"resize": resize}), crop_area, workers=1, seed=0)
        batches = feed.batches(iter([(epoch, torch.tensor([0])) for epoch in range(20)]))
        rows = torch.stack([batch.pixels.float().mean(dim=(2, 4)).flatten(0, 1) for batch in batches])
        spans[resize] = rows[..., -1] - rows[..., 0]
    assert spans["stretch"].min() > 190, "nine tenths of the picture, at least 0.77 of its height"
    assert spans["center_crop"].max() < 100, "at most 27 of its 80 rows"


def test_whole_frames_and_crops_become_views_of_the_same_kind() -> None:
    augment = SimCLRAugment(16, strength=0.5, blur=False)
    frames = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    for pixels in (frames, crops):
        views = Batch(pixels, torch.arange(4)).views(slice(1, 4), augment, step_generator(0, 0))
        assert views.shape == (6, 3, 16, 16)
        assert views.dtype == torch.float32
        assert views.min() >= 0
        assert views.max() <= 1


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(
    pictures: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    class Arriving:
        def __iter__(self) -> "Arriving":
            return self

        def __next__(self) -> None:
            raise broken

        def _shutdown_workers(self) -> None:
            pass

    monkeypatch.setattr(module, "DataLoader", lambda *_, **__: Arriving())
    with pytest.raises(TrainingError, match=r"a worker process died \(.+\); use fewer --workers"):
        next(stream(pictures).batches(steps()))
