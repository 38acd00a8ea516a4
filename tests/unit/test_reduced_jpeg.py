"""JPEG decoding with DCT scaling: the same picture, of fewer pixels, never of too few."""

import io

import numpy as np
import pytest
from PIL import Image

from serve.contract import Preprocess
from serve.preprocess import MARGIN, jpeg_scale, load_image


def smooth(width, height, mode="RGB"):
    """Colours that change slowly, with an edge: a shift of one pixel would show."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 20, 20), (width // 3, height // 4, width // 2, height // 2))
    return image.convert(mode)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def frame(jpeg, height=48, width=48, resize="center_crop", crop=0.875):
    return Preprocess(height_px=height, width_px=width, resize=resize, crop=crop, resample="bicubic", jpeg=jpeg)


def both(data, **options):
    return [load_image(data, frame(jpeg, **options)).astype(int) for jpeg in ("full", "reduced")]


TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {
    "wide": (smooth(803, 402), {}),
    "tall": (smooth(301, 997), {}),
    "progressive": (smooth(640, 480), {"progressive": True}),
    "grey": (smooth(640, 480, "L"), {}),
    "CMYK": (smooth(640, 480, "CMYK"), {}),
    "turned": (smooth(900, 300), {"exif": TURNED}),
    "sizes that do not divide by 8": (smooth(613, 619), {}),
    "4:4:4": (smooth(640, 480), {"subsampling": 0}),
}


@pytest.mark.parametrize(
    "options", [{}, {"height": 64, "width": 32, "resize": "stretch", "crop": 1.0}], ids=["crop", "stretch"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_shows_the_same_picture(kind, options):
    image, save = KINDS[kind]
    full, reduced = both(encoded(image, **save), **options)
    assert 0 < np.abs(full - reduced).mean() < 2.5
    shifted = np.abs(full[:, 1:] - full[:, :-1]).mean()
    assert np.abs(full - reduced).mean() < shifted / 3, "much less than a pixel's shift"


def test_other_formats_and_small_photos_are_as_before():
    for data in (encoded(smooth(640, 480), "PNG"), encoded(smooth(100, 75)), encoded(smooth(640, 480), "WEBP")):
        full, reduced = both(data)
        np.testing.assert_array_equal(full, reduced)


def test_an_opened_picture_is_taken_as_it_is():
    image = Image.open(io.BytesIO(encoded(smooth(640, 480))))
    np.testing.assert_array_equal(load_image(image, frame("reduced")), load_image(encoded(smooth(640, 480)), frame("full")))
    assert image.size == (640, 480)


@pytest.mark.parametrize("width", [50, 111, 144, 145, 300, 601, 2000, 5000])
@pytest.mark.parametrize("height", [64, 333, 4001])
@pytest.mark.parametrize("crop", [None, 0.875, 1.0])
def test_the_largest_scale_that_leaves_the_margin(width, height, crop):
    if crop is None:
        kept_width, kept_height = width, height
    else:
        kept_height = crop * min(height, width * 64 / 48)
        kept_width = kept_height * 48 / 64
    allowed = [scale for scale in (2, 4, 8) if kept_width / scale >= MARGIN * 48 and kept_height / scale >= MARGIN * 64]
    assert jpeg_scale(width, height, height_px=64, width_px=48, crop=crop) == max([1, *allowed])


def test_fewer_pixels_are_decoded(monkeypatch):
    sizes = []
    load = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *a, **k: (sizes.append(image.size), load(image, *a, **k))[1])
    both(encoded(Image.new("RGB", (1600, 1200))))
    assert sizes == [(1600, 1200), (200, 150)]
