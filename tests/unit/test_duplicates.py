"""Doubles among pictures: what is found, what is not, and that the work stays bounded."""

import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from serve.contract import Preprocess
from serve.samples import Sample
from serve.sources import open_source
from train import duplicates
from train.duplicates import FINGERPRINT, NEAR_CORRELATION, find_duplicates, fingerprints, report_duplicates

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10.zip"


def scenes(count, size=(32, 32), seed=0):
    """Pictures as cameras make them, rough and smooth at once: noise of three scales. uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, *size)
    for cells in (3, 6, 12):
        coarse = torch.rand(count, 3, cells, cells, generator=generator)
        total += F.interpolate(coarse, size, mode="bilinear") * 85
    return total.to(torch.uint8)


def report(images, names=None):
    return report_duplicates(images, [Sample(name) for name in names or (f"/p/{i}.png" for i in range(len(images)))])


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def as_jpeg(image, quality):
    stream = io.BytesIO()
    pil(image).save(stream, "JPEG", quality=quality)
    return tensor(Image.open(stream))


CHANGES = {
    "recompressed": lambda image: as_jpeg(image, 40),
    "smaller and back": lambda image: tensor(pil(image).resize((20, 20)).resize((32, 32))),
    "brighter": lambda image: (image.float() * 0.8 + 40).clamp(0, 255).to(torch.uint8),
    "less contrast": lambda image: (image.float() * 0.5 + 60).to(torch.uint8),
    "tinted": lambda image: (image.float() * torch.tensor([1.1, 0.95, 0.8]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8),
    "noisy": lambda image: (
        (image.float() + 5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).to(torch.uint8)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_near_and_not_exact(change):
    images = scenes(40)
    copies = torch.stack([CHANGES[change](image) for image in images[:10]])
    found = report(torch.cat([images, copies]))
    assert (found.exact_pictures, found.near_pictures) == (0, 20)
    assert found.groups == tuple((f"/p/{i}.png", f"/p/{40 + i}.png") for i in range(10))


def test_equal_pixels_are_exact_however_they_lie_in_memory():
    images = scenes(30)
    strided = images[[3, 3, 7]].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    found = report(torch.cat([images, strided]))
    assert (found.pictures, found.exact_pictures, found.near_pictures) == (33, 5, 0)
    assert found.groups == (("/p/3.png", "/p/30.png", "/p/31.png"), ("/p/7.png", "/p/32.png"))
    assert (fingerprints(strided)["digest"] == fingerprints(images[[3, 3, 7]])["digest"]).all()


def test_one_changed_pixel_makes_an_exact_copy_a_near_one():
    images = scenes(5)
    copy = images[:1].clone()
    copy[0, 0, 0, 0] ^= 1
    found = report(torch.cat([images, copy]))
    assert (found.exact_pictures, found.near_pictures) == (0, 2)


def test_a_near_copy_of_exact_copies_joins_their_group():
    images = scenes(5)
    found = report(torch.cat([images, images[:1], as_jpeg(images[0], 60)[None]]))
    assert (found.exact_pictures, found.near_pictures) == (2, 1)
    assert found.groups == (("/p/0.png", "/p/5.png", "/p/6.png"),)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (256, 128), (8, 8), (33, 47)])
def test_different_pictures_are_no_doubles(size):
    images = scenes(100, size)
    assert report(images).groups == ()
    assert report(images).sentence() == "no duplicates among 100 pictures"


def test_flat_pictures_are_not_near_each_other_but_may_be_equal():
    flat = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (0, 1, 128, 255)])
    found = report(torch.cat([flat, flat[:1]]))
    assert (found.exact_pictures, found.near_pictures) == (2, 0)


@pytest.mark.parametrize(
    ("depth", "least", "near"), [(40, duplicates.MIN_STEP, 0), (40, 0, 20), (200, duplicates.MIN_STEP, 20)]
)
def test_a_covered_lens_is_not_one_picture(depth, least, near, monkeypatch):
    """Faint shading, the same in all of them, is all that they have in common; were it deep, they would be one picture."""
    monkeypatch.setattr(duplicates, "MIN_STEP", least)
    generator = torch.Generator().manual_seed(0)
    shading = torch.linspace(0, depth, 32).view(1, 1, 32, 1) * torch.linspace(0, 1, 32).square()
    dim = (20 + shading + torch.rand(20, 3, 32, 32, generator=generator)).to(torch.uint8)
    assert report(dim).near_pictures == near


def test_two_clear_skies_are_not_the_same_picture():
    """Their grey values correlate, by the gradient they share; what stands in them does not."""
    sky = torch.linspace(120, 220, 32).view(1, 32, 1).expand(3, 32, 32)
    one, other = sky.clone(), sky.clone()
    one[:, 8:12, 4:20] = 40
    other[:, 20:24, 12:28] = 40
    grey = [picture.mean(0).flatten() for picture in (one, other)]
    assert report(torch.stack([one, other]).to(torch.uint8)).groups == ()
    assert torch.corrcoef(torch.stack(grey))[0, 1] > 0.2


def thumbnail_by_hand(image):
    """Grey by ITU-R BT.601; then each of 16 x 16 pixels the mean of the rows and columns it touches."""
    _, height, width = image.shape
    grey = [
        [sum(w * float(image[c, y, x]) for c, w in enumerate((0.299, 0.587, 0.114))) for x in range(width)]
        for y in range(height)
    ]
    result = np.empty((16, 16))
    for i in range(16):
        for j in range(16):
            rows = range(math.floor(i * height / 16), math.ceil((i + 1) * height / 16))
            columns = range(math.floor(j * width / 16), math.ceil((j + 1) * width / 16))
            values = [grey[y][x] for y in rows for x in columns]
            result[i, j] = sum(values) / len(values)
    return result


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (9, 40), (50, 23)])
def test_the_thumbnail_averages_what_each_pixel_covers(size):
    images = scenes(3, size, seed=4)
    for image, got in zip(images, fingerprints(images)["thumbnail"], strict=True):
        np.testing.assert_allclose(got.astype(float), thumbnail_by_hand(image.numpy()), atol=0.51)


def steps_by_hand(image):
    """All steps to the right and downwards."""
    image = image.astype(int).tolist()
    down = [image[y + 1][x] - image[y][x] for y in range(15) for x in range(16)]
    return down + [image[y][x + 1] - image[y][x] for y in range(16) for x in range(15)]


def test_near_means_that_the_steps_correlate():
    """Against all pairs of pictures with every degree of likeness, the slow way."""
    images = scenes(24, seed=2).float()
    mixed = torch.cat([images, *(images * (1 - share) + images.roll(1, 0) * share for share in (0.1, 0.3, 0.35, 0.4, 0.5))])
    prints = fingerprints(mixed.to(torch.uint8))
    correlation = np.corrcoef([steps_by_hand(thumbnail) for thumbnail in prints["thumbnail"]])
    wanted = {tuple(pair) for pair in np.argwhere(np.triu(correlation, 1) >= NEAR_CORRELATION).tolist()}
    found = {tuple(pair) for pair in duplicates._near_pairs(prints["thumbnail"]).tolist()}
    assert found <= wanted
    assert len(found) > 0.6 * len(wanted)  # three neighbours of each picture
    joined = {tuple(sorted(group)) for group in duplicates._connected(np.array(sorted(wanted)))}
    assert {tuple(sorted(group)) for group in duplicates._connected(np.array(sorted(found)))} == joined


def test_groups_are_connected_components():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 300, (140, 2))
    groups = [{i} for i in range(300)]
    for one, other in pairs:
        (a,) = (group for group in groups if one in group)
        (b,) = (group for group in groups if other in group)
        if a is not b:
            groups.remove(b)
            a |= b
    wanted = sorted((sorted(group) for group in groups if len(group) > 1), key=lambda group: (-len(group), group))
    assert duplicates._connected(pairs) == wanted
    assert duplicates._connected(np.empty((0, 2), np.int64)) == []
    chain = np.stack([np.arange(20_000), np.arange(1, 20_001)], axis=1)
    assert [len(group) for group in duplicates._connected(chain)] == [20_001]


def test_batch_by_batch_is_the_same_as_at_once():
    images = torch.cat([scenes(50), scenes(50)[:5]])
    parts = np.concatenate([fingerprints(chunk) for chunk in images.split(7)])
    assert parts.dtype == FINGERPRINT
    assert find_duplicates(parts, [f"/p/{i}.png" for i in range(55)]) == report(images)


def test_the_cells_of_large_sets_find_what_the_exhaustive_search_finds(monkeypatch):
    images = scenes(1500, seed=3)
    copies = torch.stack([as_jpeg(image, 50) for image in images[:60]])
    every = torch.cat([images, copies])
    wanted = report(every)
    assert wanted.near_pictures == 120
    monkeypatch.setattr(duplicates, "_EXHAUSTIVE", 100)
    assert report(every).near_pictures >= 114


@pytest.mark.parametrize("flood", ["black", "one picture", "one still camera"])
def test_a_flood_of_look_alikes_is_bounded_work(flood):
    image = scenes(1)
    if flood == "black":
        images = torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8)
    elif flood == "one picture":
        images = image.expand(20_000, 3, 32, 32)
    else:
        noise = torch.randint(0, 4, (6_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images = (image // 2) + noise
    started = time.process_time()
    found = report(images)
    assert found.exact_pictures + found.near_pictures > 0.99 * len(images)
    assert time.process_time() - started < 10
    assert len(found.sentence()) < 600


def test_the_sentence_counts_warns_and_names_three_groups():
    images = scenes(60)
    every = torch.cat([images, images[:5], images[:1]])
    names = [f"/data/set/class{i % 2}/{i:02}.png" for i in range(66)]
    assert report(every, names).sentence() == (
        "11 of 66 pictures (16.7%) are duplicates of others (11 exact and 0 near, in 5 groups): SimCLR pushes two of one batch "
        "apart as if they differed; keep one of each group. Such as class0/00.png = class0/60.png and 1 more; "
        "class1/01.png = class1/61.png; class0/02.png = class0/62.png"
    )
    assert "a.png = /b/c.png" in report(torch.cat([images[:1], images[:1]]), ["a.png", "/b/c.png"]).sentence()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_very_few_pictures(count):
    assert report(scenes(count) if count else torch.empty(0, 3, 32, 32, dtype=torch.uint8)).groups == ()


def test_as_many_samples_as_pictures():
    with pytest.raises(ValueError, match="2 pictures and 1 samples"):
        report_duplicates(scenes(2), [Sample("a")])


@pytest.mark.skipif(not CIFAR.exists(), reason="../shared/data/cifar10.zip is not here")
def test_cifar_10_holds_known_doubles():
    """Looked at by eye: one press photograph of a car stands in the training set two dozen times."""
    from train.data import load_pixels

    frame = Preprocess(height_px=32, width_px=32, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
    cars = [sample for sample in open_source(CIFAR).train if sample.label == "automobile"][:1100]
    pixels = load_pixels(cars, frame)
    found = report_duplicates(pixels.images, pixels.samples)
    assert len(found.groups[0]) == 4
    assert found.groups[0][0].endswith("automobile/0186.jpg")
    assert found.near_pictures == 8
