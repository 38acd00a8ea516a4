"""Two pictures of one track as the two views: who is whose partner, what is in a batch, and that nothing else decides it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from serve.contract import Preprocess
from serve.errors import TrainingError
from serve.samples import Sample
from train.augment import SimCLRAugment
from train.config import PretrainConfig
from train.data import Pixels, epoch_order, load_pixels, preprocess_for, step_generator, step_rows
from train.positives import Tracks, share_of_tracks, track_numbers, tracks_sha256
from train.pretrain import Trainer, pretrain
from train.stream import Streamed

pytestmark = pytest.mark.usefixtures("one_cpu")

FRAME = Preprocess(height_px=16, width_px=16, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
LENGTHS = 1, 3, 5, 2, 4, 3, 1, 4
"""Pictures of each track; camera and tracker's number follow, so that numbers are used again in another camera."""
BATCH, TOTAL = 4, 9


def keys() -> list[tuple[str, str]]:
    """(camera, track) of every picture of the toy."""
    return [(str(track % 2), str(track // 2)) for track, length in enumerate(LENGTHS) for _ in range(length)]


def toy() -> list[Sample]:
    """Tracks, and three pictures without one; identities and labels say something else entirely."""
    tracked = [
        Sample(f"{row}", identity=str(row % 2), label=str(row % 3), camera=camera, track=track)
        for row, (camera, track) in enumerate(keys())
    ]
    return [*tracked, *(Sample(f"free {n}", identity="0", label="0", camera="0") for n in range(3))]


def members(samples: Sequence[Sample], row: int) -> set[int]:
    """The slow twin: all other rows with the same camera and track."""
    mine = samples[row]
    same = {i for i, s in enumerate(samples) if mine.track is not None and (s.camera, s.track) == (mine.camera, mine.track)}
    return same - {row}


def epochs(samples: Sequence[Sample], tracks: Tracks, first: int = 0) -> list[tuple[int, Tensor]]:
    per_epoch = tracks.batches(BATCH)
    return list(
        step_rows(len(samples), BATCH, 0, first_step=first, total_steps=TOTAL, steps_per_epoch=per_epoch, tracks=tracks)
    )


# --- who is whose partner ---------------------------------------------------------------------------------------------


def test_a_partner_is_another_picture_of_the_same_track_or_the_picture_itself() -> None:
    samples = toy()
    tracks = Tracks(samples, seed=0)
    for row, sample in enumerate(samples):
        mates = members(samples, row)
        assert set(tracks.others(row)) == mates
        for epoch in range(20):
            assert tracks.partner(row, sample.source, epoch) in (mates or {row})


def test_partners_are_drawn_evenly_and_anew_in_every_epoch() -> None:
    samples = toy()
    tracks, row, draws = Tracks(samples, seed=3), 5, 4000
    drawn = Counter(tracks.partner(row, samples[row].source, epoch) for epoch in range(draws))
    assert set(drawn) == members(samples, row)
    expected = draws / len(drawn)
    chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert len(drawn) == 4
    assert chi_square < 16.3, "0.1 % of fair draws have more, with three degrees of freedom"


def test_a_partner_depends_on_seed_epoch_and_picture_alone() -> None:
    samples = toy()

    def partners(these: Sequence[Sample], seed: int, epoch: int) -> dict[str, str]:
        tracks = Tracks(these, seed=seed)
        return {s.source: these[tracks.partner(row, s.source, epoch)].source for row, s in enumerate(these)}

    usual = partners(samples, 0, 0)
    assert partners(samples, 0, 0) == usual
    assert partners(samples, 1, 0) != usual
    assert partners(samples, 0, 1) != usual
    more = [*(Sample(f"new {n}", camera="9", track="9") for n in range(3)), *samples]
    assert partners(more, 0, 0).items() >= usual.items(), "others in the list change nothing"


def test_neither_identities_nor_labels_nor_times_leak() -> None:
    samples = toy()
    blind = [replace(sample, identity=None, label=None, time=float(row)) for row, sample in enumerate(samples)]
    assert torch.equal(track_numbers(blind), track_numbers(samples))
    assert tracks_sha256(blind) == tracks_sha256(samples)
    named = [Sample(f"{n}.jpg", identity="7", camera="1", label="x") for n in range(4)]
    assert [Tracks(named, seed=0).partner(row, "x", 0) for row in range(4)] == [0, 1, 2, 3]


# --- what is in a batch -----------------------------------------------------------------------------------------------


def test_no_batch_has_two_pictures_of_one_track() -> None:
    samples = toy()
    tracks, number = Tracks(samples, seed=0), track_numbers(samples)
    for _, rows in epochs(samples, tracks):
        assert len(rows) == BATCH
        assert len(set(number[rows].tolist())) == BATCH


@pytest.mark.parametrize("batch_size", [2, 3, 5, 11])
def test_an_epoch_is_what_a_slow_dealer_makes_of_it(batch_size: int) -> None:
    """Rounds: each track puts down its next picture; only whole batches of a round are played."""
    samples = toy()
    tracks, order = Tracks(samples, seed=0), epoch_order(len(samples), 0, 0)
    hands: dict[int, list[int]] = {}
    for row in order.tolist():
        hands.setdefault(int(track_numbers(samples)[row]), []).append(row)
    dealt = []
    for turn in range(max(LENGTHS)):
        round_ = sorted((hand[turn] for hand in hands.values() if len(hand) > turn), key=order.tolist().index)
        dealt += [round_[start : start + batch_size] for start in range(0, len(round_) - batch_size + 1, batch_size)]
    spread = tracks.spread(order, batch_size, step_generator(0, 0))
    assert tracks.batches(batch_size) == len(dealt)
    assert sorted(spread.view(-1, batch_size).tolist()) == sorted(dealt)


def test_every_picture_gets_its_turn_as_an_anchor() -> None:
    samples = toy()
    tracks = Tracks(samples, seed=0)
    seen = Counter(
        row
        for epoch in range(200)
        for row in tracks.spread(epoch_order(len(samples), epoch, 0), BATCH, step_generator(0, epoch)).tolist()
    )
    assert set(seen) == set(range(len(samples)))
    assert min(seen.values()) > 60


def test_processes_share_whole_tracks_about_evenly() -> None:
    samples = [
        s for n in range(9) for s in (replace(one, camera=f"{one.camera}/{n}", source=f"{one.source}/{n}") for one in toy())
    ]
    shares = [share_of_tracks(samples, rank, 4) for rank in range(4)]
    assert sorted(s.source for share in shares for s in share) == sorted(s.source for s in samples)
    owners: dict[Any, set[int]] = {}
    for rank, share in enumerate(shares):
        for sample in share:
            owners.setdefault((sample.camera, sample.track), set()).add(rank)
    assert all(len(ranks) == 1 for (_, track), ranks in owners.items() if track is not None)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= max(LENGTHS)
    assert share_of_tracks(samples, 0, 1) == samples


# --- both feeds -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Sample]:
    """The toy drawn: of one colour each, so that any crop says which picture it is of."""
    samples = [replace(sample, source=str(tmp_path / f"{sample.source}.png")) for sample in toy()]
    for row, sample in enumerate(samples):
        Image.fromarray(np.full((20, 20, 3), colour_of(row), np.uint8)).save(sample.source)
    return samples


def colour_of(row: int) -> int:
    return 8 * row + 4


def row_of(view: Tensor) -> int:
    """Whose colour a view has."""
    (colour,) = view.unique().tolist()
    return (int(colour) - 4) // 8


def in_memory(samples: Sequence[Sample], seed: int = 0) -> Pixels:
    pixels = load_pixels(samples, FRAME)
    return replace(pixels, tracks=Tracks(pixels.samples, seed=seed))


def streamed(samples: Sequence[Sample], seed: int = 0, workers: int = 1) -> Streamed:
    return Streamed(samples, FRAME, 0.2, workers=workers, seed=seed, tracks=Tracks(samples, seed=seed))


def pairs(feed: Pixels | Streamed, first: int = 0) -> list[list[tuple[int, int]]]:
    """(anchor, whom the second view is of) of every batch, read off the colours of the views."""
    assert feed.tracks
    found = []
    for batch in feed.batches(iter(epochs(feed.samples, feed.tracks, first))):
        views = batch.pixels if batch.partners is None else torch.stack([batch.pixels, batch.partners])
        found.append([(row_of(one), row_of(two)) for one, two in zip(*views, strict=True)])
        assert [anchor for anchor, _ in found[-1]] == batch.rows.tolist()
    return found


def test_the_second_view_is_of_the_same_track_in_memory_and_streamed(pictures: list[Sample]) -> None:
    found = pairs(in_memory(pictures))
    assert found == pairs(streamed(pictures))
    for anchor, partner in (pair for batch in found for pair in batch):
        assert partner in (members(pictures, anchor) or {anchor})


def test_neither_workers_nor_an_interruption_change_a_pair(pictures: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pairs(streamed(pictures))
    monkeypatch.setattr("train.stream.PIECE", 3)
    assert pairs(streamed(pictures, workers=2)) == whole
    assert pairs(streamed(pictures), first=4) == whole[4:]
    assert pairs(in_memory(pictures), first=4) == whole[4:]
    assert pairs(in_memory(pictures, seed=1)) != whole


def test_the_views_of_a_batch_in_memory_are_of_both_pictures(pictures: list[Sample]) -> None:
    feed = in_memory(pictures)
    batch = next(feed.batches(iter([(0, torch.tensor([1, 4, 0]))])))
    views = batch.views(slice(1, 3), SimCLRAugment(16, strength=0, blur=False), step_generator(0, 0))
    partner = feed.tracks.partner(4, pictures[4].source, 0) if feed.tracks else 0
    wanted = torch.tensor([colour_of(row) for row in (4, 0, partner, 0)]) / 255
    assert torch.allclose(views, wanted[:, None, None, None].expand_as(views), atol=1e-4)


def test_without_tracks_views_are_the_very_same_as_before(pictures: list[Sample]) -> None:
    alone = [replace(sample, track=None) for sample in pictures]
    order = [(0, torch.arange(6))]
    plain = Streamed(pictures, FRAME, 0.2, workers=1, seed=0)
    (one,), (two,) = (list(feed.batches(iter(order))) for feed in (plain, streamed(alone)))
    assert torch.equal(one.pixels, two.pixels)


def test_what_cannot_be_read_is_replaced_within_its_track_and_told_once(pictures: list[Sample]) -> None:
    rows = [row for row, key in enumerate(keys()) if key == ("0", "1")]
    Path(pictures[rows[0]].source).write_bytes(b"no picture")
    feed = streamed(pictures)
    anchors = [*rows, 0]
    batches = list(feed.batches(iter([(epoch, torch.tensor(anchors)) for epoch in range(8)])))
    for batch in batches:
        assert row_of(batch.pixels[0, 0]) in rows[1:]
        assert {row_of(view) for view in batch.pixels[1, :-1]} <= set(rows[1:])
    assert [fault.source for fault in feed.unreadable] == [pictures[rows[0]].source]


# --- a run ------------------------------------------------------------------------------------------------------------


def listed(folder: Path, samples: Sequence[Sample]) -> str:
    with (folder / "crops.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "camera", "track"))
        rows.writerows((Path(sample.source).name, sample.camera, sample.track) for sample in samples)
    return str(folder / "crops.csv")


def settings(images: str, run: Path, **changes: Any) -> PretrainConfig:
    fields = {"width": 0.125, "image_size": "16", "batch_size": BATCH, "epochs": 1, "precision": "fp32", "positives": "track"}
    return PretrainConfig(images=images, run=run, **(fields | changes))


@pytest.mark.parametrize("changes", [{}, {"workers": 1}, {"chunk": 2}])
def test_a_run_resumes_bit_for_bit(
    pictures: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    images = listed(tmp_path, pictures)
    whole = pretrain(settings(images, tmp_path / "whole", **changes))
    original = Trainer._one_step

    def one_step(trainer: Trainer, batches: Any) -> dict[str, float]:
        if trainer.step == 3:
            raise KeyboardInterrupt
        return original(trainer, batches)

    with monkeypatch.context() as broken:
        broken.setattr("train.pretrain.CHECKPOINT_EVERY_S", -1)
        broken.setattr(Trainer, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(images, tmp_path / "broken", **changes))
    resumed = pretrain(settings(images, tmp_path / "broken", resume=True, **changes))
    ours, theirs = (load_file(run / "encoder.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_says_what_it_pairs_and_records_it(pictures: list[Sample], tmp_path: Path, capsys: Any) -> None:
    run = pretrain(settings(listed(tmp_path, pictures), tmp_path / "run"))
    assert "positives another picture of the same track: 21 pictures in 6 tracks; 5 pictures alone" in capsys.readouterr().err
    config = (run / "config.json").read_text()
    assert '"positives": "track"' in config
    assert '"tracks_sha256"' in config


def test_other_tracks_are_not_resumed(pictures: list[Sample], tmp_path: Path) -> None:
    images = listed(tmp_path, pictures)
    pretrain(settings(images, tmp_path / "run"))
    listed(tmp_path, [*pictures[:-1], replace(pictures[-1], track="1")])
    with pytest.raises(TrainingError, match="the pictures' tracks are others"):
        pretrain(settings(images, tmp_path / "run", resume=True))


def test_pictures_without_tracks_are_refused_in_one_line(pictures: list[Sample], tmp_path: Path) -> None:
    images = listed(tmp_path, [replace(sample, track=None) for sample in pictures])
    with pytest.raises(TrainingError, match="no two of the 26 pictures are named as of one track; wanted a CSV") as refusal:
        pretrain(settings(images, tmp_path / "run"))
    assert "\n" not in str(refusal.value)


def test_a_batch_larger_than_there_are_tracks_is_refused(pictures: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there are 11 tracks, .* use --batch-size 11 or less"):
        pretrain(settings(listed(tmp_path, pictures), tmp_path / "run", batch_size=12))


def test_tall_boxes_with_tracks_are_those_of_re_id(tmp_path: Path) -> None:
    Image.new("RGB", (64, 128)).save(tmp_path / "a.png")
    assert preprocess_for([Sample(str(tmp_path / "a.png"), track="1")], None).height_px == 256
    assert preprocess_for([Sample(str(tmp_path / "a.png"))], None).height_px == 64


def test_on_many_processes_no_step_has_two_pictures_of_one_track() -> None:
    samples = toy()
    number = {sample.source: key for sample, key in zip(samples, track_numbers(samples).tolist(), strict=True)}
    shares = [share_of_tracks(samples, rank, 2) for rank in range(2)]
    steps = []
    for rank, share in enumerate(shares):
        tracks = Tracks(share, seed=0)
        count = min(Tracks(one, seed=0).batches(2) for one in shares)
        order = step_rows(len(share), 2, 0, first_step=0, total_steps=4, steps_per_epoch=count, rank=rank, tracks=tracks)
        steps.append([[number[share[row].source] for row in rows.tolist()] for _, rows in order])
    for ours, theirs in zip(*steps, strict=True):
        assert len({*ours, *theirs}) == 4
