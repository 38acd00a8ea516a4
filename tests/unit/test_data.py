"""Pictures into memory: the frame that is chosen, what is left out, the order of an epoch and its random numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.contract import Preprocess
from serve.errors import SourceError
from serve.preprocess import load_image
from serve.samples import Sample
from train import data
from train.data import epoch_order, load_pixels, preprocess_for, sources_sha256, step_generator, training_frame


def draw(folder: Path, sizes: Sequence[tuple[int, int]], identity: str | None = None) -> list[Sample]:
    """Pictures of these widths and heights, each of its own noise."""
    rng = np.random.default_rng(0)
    samples = []
    for number, (width, height) in enumerate(sizes):
        path = folder / f"{number:03}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(str(path), identity=identity))
    return samples


def frame(height: int, width: int, resize: str = "stretch", crop: float = 1.0) -> Preprocess:
    return Preprocess.model_validate(
        {"height_px": height, "width_px": width, "resize": resize, "crop": crop, "resample": "bicubic", "jpeg": "reduced"}
    )


# --- the frame --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((32, 32), frame(32, 32, "center_crop", 1.0)),
        ((40, 90), frame(32, 32, "center_crop", 1.0)),
        ((41, 64), frame(64, 64, "center_crop", 0.875)),
        ((100, 100), frame(64, 64, "center_crop", 0.875)),
        ((300, 101), frame(224, 224, "center_crop", 0.875)),
    ],
)
def test_the_frame_follows_the_pictures(tmp_path: Path, size: tuple[int, int], wanted: Preprocess) -> None:
    assert preprocess_for(draw(tmp_path, [size] * 3), None) == wanted


def test_it_is_the_median_picture_that_counts(tmp_path: Path) -> None:
    assert preprocess_for(draw(tmp_path, [(32, 32), (32, 32), (400, 400)]), None).height_px == 32


@pytest.mark.parametrize(
    ("size", "identity", "height"),
    [((64, 128), "7", 256), ((64, 128), None, 64), ((64, 90), "7", 64)],
)
def test_tall_boxes_with_identities_are_for_re_identification(
    tmp_path: Path, size: tuple[int, int], identity: str | None, height: int
) -> None:
    preprocess = preprocess_for(draw(tmp_path, [size] * 3, identity), None)
    assert preprocess == (frame(256, 128) if height == 256 else frame(64, 64, "center_crop", 0.875))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("64", frame(64, 64, "center_crop", 0.875)),
        ("32", frame(32, 32, "center_crop", 1.0)),
        ("16", frame(16, 16, "center_crop", 1.0)),
        ("256x128", frame(256, 128)),
        ("128X128", frame(128, 128, "center_crop", 0.875)),
        ("1024", frame(1024, 1024, "center_crop", 0.875)),
    ],
)
def test_a_size_that_is_asked_for_is_taken(text: str, wanted: Preprocess) -> None:
    assert preprocess_for([], text) == wanted


@pytest.mark.parametrize("text", ["15", "1025", "64x8", "64x64x64", "big", "x64", "-64", "64.5", " x "])
def test_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(SourceError, match="wanted PX or HxW with 16 to 1024 px"):
        preprocess_for([], text)


def test_pictures_that_cannot_be_read_do_not_decide(tmp_path: Path) -> None:
    samples = draw(tmp_path, [(32, 32)] * 2)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = [Sample(str(tmp_path / "broken.png")), Sample(str(tmp_path / "missing.png"))]
    assert preprocess_for(broken + samples, None).height_px == 32
    with pytest.raises(SourceError, match=r"none of the first pictures can be read, such as .*broken\.png"):
        preprocess_for(broken, None)


def test_at_most_fifty_pictures_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    content = Path(draw(tmp_path, [(32, 32)])[0].source).read_bytes()
    monkeypatch.setattr(data, "read_bytes", lambda source: looked_at.append(source) or content)
    preprocess_for([Sample(str(number)) for number in range(99)], None)
    assert 25 <= len(looked_at) <= 50


@pytest.mark.parametrize(
    ("preprocess", "height", "width"),
    [
        (frame(224, 224, "center_crop", 0.875), 256, 256),
        (frame(64, 64, "center_crop", 0.875), 73, 73),
        (frame(32, 32, "center_crop", 1.0), 32, 32),
        (frame(256, 128), 256, 128),
    ],
)
def test_training_sees_what_the_central_crop_would_take(preprocess: Preprocess, height: int, width: int) -> None:
    assert training_frame(preprocess) == frame(height, width, preprocess.resize)


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_serving_in_order(tmp_path: Path) -> None:
    samples = draw(tmp_path, [(30 + k, 50 - k) for k in range(9)])
    pixels = load_pixels(samples, frame(20, 16))
    assert pixels.images.dtype == torch.uint8
    assert pixels.samples == tuple(samples)
    assert len(pixels) == 9
    for picture, sample in zip(pixels.images, samples, strict=True):
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), load_image(sample.source, frame(20, 16)))


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    samples = draw(tmp_path, [(20, 20)] * 600)
    bad = {0, 7, 299, 599}
    for number in bad - {7}:
        Path(samples[number].source).write_bytes(b"no picture")
    Path(samples[7].source).unlink()
    pixels = load_pixels(samples, frame(16, 16))
    assert [picture.source for picture in pixels.unreadable] == [samples[number].source for number in sorted(bad)]
    assert all(picture.source in picture.reason or "not a readable picture" in picture.reason for picture in pixels.unreadable)
    assert pixels.samples == tuple(sample for number, sample in enumerate(samples) if number not in bad)
    assert len(pixels.images) == len(pixels) == 596
    for row in (0, 298, 595):
        wanted = load_image(pixels.samples[row].source, frame(16, 16))
        assert np.array_equal(pixels.images[row].permute(1, 2, 0).numpy(), wanted)


def test_no_readable_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"none of 1 pictures can be read; the first: .*not a readable picture"):
        load_pixels([Sample(str(tmp_path / "broken.png"))], frame(16, 16))


def test_pictures_that_do_not_fit_into_memory_are_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_SHARE", 1e-9)
    with pytest.raises(SourceError, match=r"1000 pictures of 64x32 px take 0\.0 GiB.*choose a smaller --image-size") as refusal:
        load_pixels([Sample("nowhere.png")] * 1000, frame(64, 32))
    assert "\n" not in str(refusal.value)


# --- order and random numbers -----------------------------------------------------------------------------------------


def test_an_epoch_takes_every_picture_once_in_an_order_of_its_own() -> None:
    order = epoch_order(100, epoch=3, seed=5)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, epoch=3, seed=5))
    for other in (epoch_order(100, epoch=4, seed=5), epoch_order(100, epoch=3, seed=6)):
        assert not torch.equal(order, other)


def test_the_order_does_not_depend_on_what_was_drawn_before() -> None:
    order = epoch_order(50, epoch=0, seed=0)
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(order, epoch_order(50, epoch=0, seed=0))


def test_processes_do_not_take_neighbours_at_the_same_time() -> None:
    """Rank r holds every W-th picture: with one order for all, neighbours in the list would always meet in one batch."""
    orders = [epoch_order(100, epoch=0, seed=0, rank=rank) for rank in (0, 1, 2)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert sum((orders[0] == orders[1]).tolist()) < 10
    assert sum((orders[1] == orders[2]).tolist()) < 10


def test_seed_number_and_stream_each_give_other_random_numbers() -> None:
    def draws(*args: int, **more: int) -> tuple[float, ...]:
        return tuple(torch.rand(3, generator=step_generator(*args, **more)).tolist())

    assert draws(1, 2) == draws(1, 2) == draws(1, 2, stream="views")
    different = [draws(1, 2), draws(2, 1), draws(1, 3), draws(1, 2, stream="order"), draws(-1, 2), draws(1, 12), draws(11, 2)]
    assert len(set(different)) == len(different)


def test_the_digest_of_a_source_knows_its_pictures_and_their_order() -> None:
    a, b = Sample("a.png"), Sample("b.png")
    assert sources_sha256([a, b]) == sources_sha256([Sample("a.png", label="x"), b])
    assert len({sources_sha256(samples) for samples in ([a, b], [b, a], [a], [Sample("a.png\n"), b])}) == 4
