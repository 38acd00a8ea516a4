"""Decode and resize, on golden images made on the spot: every mode and format that has gone wrong somewhere."""

import io
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import serve.preprocess
from serve.contract import Preprocess
from serve.preprocess import MAX_PIXELS, TRAITS, ImageError, crop_box, decode, load_image

RED, WHITE = (200, 30, 60), (255, 255, 255)


def frame(height=8, width=8, resize="stretch", crop=1.0):
    return Preprocess(height_px=height, width_px=width, resize=resize, crop=crop, resample="bicubic", jpeg="full")


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(source):
    image = decode(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(source):
    with pytest.raises(ImageError) as caught:
        decode(source)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search("0x[0-9a-f]{6}", message), "an address in memory tells nobody anything"
    return message


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_exactly_their_pixels(kind):
    array = noise(9, 14)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(array), kind)), array)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_give_nearly_their_colour(kind):
    image = Image.new("RGB", (14, 9), RED)
    np.testing.assert_allclose(pixels(encoded(image, kind)), np.broadcast_to(RED, (9, 14, 3)), atol=4)


def test_grey_is_spread_over_three_channels():
    array = noise(5, 9, channels=1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(array))), np.repeat(array[..., None], 3, axis=2))


def test_one_bit_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("image", "options", "wanted"),
    [
        (Image.new("RGBA", (3, 2), (*RED, 0)), {}, WHITE),
        (Image.new("RGBA", (3, 2), (*RED, 255)), {}, RED),
        (Image.new("RGBA", (3, 2), (*RED, 51)), {}, tuple(round(0.2 * c + 0.8 * 255) for c in RED)),
        (Image.new("LA", (3, 2), (90, 0)), {}, WHITE),
        (Image.new("LA", (3, 2), (90, 255)), {}, (90, 90, 90)),
        (Image.new("LA", (3, 2), (90, 51)), {}, (222, 222, 222)),
        (Image.new("RGB", (3, 2), RED), {"transparency": RED}, WHITE),
        (Image.new("RGB", (3, 2), RED), {"transparency": (1, 2, 3)}, RED),
        (Image.new("L", (3, 2), 90), {"transparency": 90}, WHITE),
    ],
)
def test_transparency_is_laid_on_white(image, options, wanted):
    np.testing.assert_array_equal(pixels(encoded(image, **options)), np.broadcast_to(wanted, (2, 3, 3)))


@pytest.mark.parametrize("transparency", [0, b"\x00\xff", b"\x33\xff"])
def test_a_palette_with_transparency_is_laid_on_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 10, 20, 30])
    image.putpixel((1, 0), 1)
    share = 0.2 if transparency == b"\x33\xff" else 0
    mixed = [round(share * c + (1 - share) * 255) for c in RED]
    assert pixels(encoded(image, transparency=transparency)).tolist() == [[mixed, [10, 20, 30]]]


def test_cmyk_becomes_rgb_and_adobes_inversion_is_undone():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        np.testing.assert_allclose(pixels(encoded(cyan, kind)), np.broadcast_to((0, 255, 255), (8, 8, 3)), atol=3)
    # Photoshop writes CMYK JPEGs inverted and says so in an Adobe marker, as Pillow does.
    assert b"Adobe" in encoded(cyan, "JPEG")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_shades(kind):
    """Pillow's own conversion clips everything above 255 to white."""
    array = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    grey = pixels(encoded(Image.fromarray(array), kind))
    assert grey[..., 0].ravel().tolist() == list(range(256))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()


def test_32_bit_integers_and_floats_within_8_bits_are_taken_as_they_are():
    ramp = np.arange(256).reshape(16, 16)
    for array in (ramp.astype(np.int32), ramp.astype(np.float32)):
        assert pixels(encoded(Image.fromarray(array), "TIFF"))[..., 1].ravel().tolist() == list(range(256))


def test_what_is_not_a_number_is_black(recwarn):
    array = np.array([[np.nan, 7], [-3, 200]], np.float32)
    assert pixels(encoded(Image.fromarray(array), "TIFF"))[..., 0].tolist() == [[0, 7], [0, 200]]
    assert not recwarn.list


@pytest.mark.parametrize("top", [1.0, 0.5, 1e-3])
def test_floats_in_0_to_1_are_not_taken_for_black(top):
    array = np.array([[0, top / 2, top, -1]], np.float32)
    assert pixels(encoded(Image.fromarray(array), "TIFF"))[0, :, 1].tolist() == [0, round(top * 127.5), round(top * 255), 0]


def test_integers_of_0_and_1_and_black_floats_stay_black():
    assert pixels(encoded(Image.fromarray(np.array([[0, 1]], np.int32)), "TIFF"))[0, :, 0].tolist() == [0, 1]
    assert pixels(encoded(Image.fromarray(np.zeros((1, 2), np.float32)), "TIFF"))[0, :, 0].tolist() == [0, 0]


def png_of_16_bits():
    """RGB of 16 bits, which Pillow reads but does not write."""
    row = b"\0" + struct.pack(">6H", 0, 65535, 257, 514, 771, 1028)
    return png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), zlib.compress(row))


def traits_of(data):
    traits = []
    seen = np.asarray(decode(data, traits))
    np.testing.assert_array_equal(seen, pixels(data), err_msg="looking at a picture changes it")
    return traits


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FRAMES = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
SHADES = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
MANY = {"save_all": True, "append_images": FRAMES[1:]}


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        *((encoded(FRAMES[0], kind), []) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")),
        *((encoded(FRAMES[0], kind, **MANY), ["animated"]) for kind in ("GIF", "PNG", "WEBP", "TIFF")),
        (encoded(FRAMES[0], "MPO", **MANY), []),  # what phones write: one photograph and its previews
        *((encoded(Image.new("L", (4, 4), 7), kind), ["grey"]) for kind in ("PNG", "JPEG", "TIFF")),
        (encoded(Image.new("1", (4, 4))), ["grey"]),
        (encoded(Image.new("LA", (4, 4))), ["grey"]),
        *((encoded(SHADES, kind), ["grey", "16-bit"]) for kind in ("PNG", "TIFF")),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), ["grey", "16-bit"]),
        *((encoded(Image.new("CMYK", (4, 4)), kind), ["CMYK"]) for kind in ("JPEG", "TIFF")),
        *((encoded(FRAMES[0], kind, exif=turned(6)), ["EXIF-rotated"]) for kind in ("PNG", "JPEG", "WEBP")),
        (encoded(FRAMES[0], "JPEG", exif=turned(1)), []),
        (encoded(Image.new("L", (4, 4)), "JPEG", exif=turned(3)), ["grey", "EXIF-rotated"]),
    ],
)
def test_what_is_unusual_about_a_file(data, wanted):
    assert traits_of(data) == wanted
    assert set(wanted) <= set(TRAITS)


def test_16_bit_colour_is_noticed_although_pillow_reads_8_bits():
    assert traits_of(png_of_16_bits()) == ["16-bit"]
    assert pixels(png_of_16_bits()).tolist() == [[[0, 255, 1], [2, 3, 4]]]


def test_an_animation_cut_short_still_has_its_first_frame():
    data = encoded(FRAMES[0], "GIF", **MANY)
    for end in range(len(data) - 60, len(data)):
        traits = []
        assert decode(data[:end], traits).mode == "RGB"
        assert traits in ([], ["animated"])


def test_traits_pass_through_resizing_and_unreadable_files_have_none():
    traits = []
    load_image(encoded(Image.new("L", (9, 9))), frame(), traits)
    assert traits == ["grey"]
    with pytest.raises(ImageError):
        load_image(encoded(Image.fromarray(noise(90, 90)).convert("L"))[:2000], frame(), traits)
    assert traits == ["grey"]


def upright_by_hand(array, orientation):
    """EXIF 2.3: where the stored picture's row 0 and column 0 are in the upright one, written out pixel by pixel."""
    height, width = array.shape[:2]
    places = {
        1: lambda y, x: (y, x),
        2: lambda y, x: (y, width - 1 - x),
        3: lambda y, x: (height - 1 - y, width - 1 - x),
        4: lambda y, x: (height - 1 - y, x),
        5: lambda y, x: (x, y),
        6: lambda y, x: (x, height - 1 - y),
        7: lambda y, x: (width - 1 - x, height - 1 - y),
        8: lambda y, x: (width - 1 - x, y),
    }
    turned = np.empty((width, height, 3) if orientation >= 5 else array.shape, np.uint8)
    for y in range(height):
        for x in range(width):
            turned[places[orientation](y, x)] = array[y, x]
    return turned


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = noise(2, 3, seed=1).repeat(8, axis=0).repeat(8, axis=1)  # JPEG keeps 8 x 8 blocks of one colour
    jpeg = encoded(Image.fromarray(blocks), "JPEG", quality=100, subsampling=0, exif=exif)
    np.testing.assert_allclose(pixels(jpeg).astype(int), upright_by_hand(blocks, orientation), atol=3)
    array = noise(3, 5)
    for kind in ("PNG", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(array), kind, exif=exif, lossless=True)
        np.testing.assert_array_equal(pixels(data), upright_by_hand(array, orientation), err_msg=kind)


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_orientation_that_means_nothing_is_left_alone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = noise(3, 5)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(array), exif=exif)), array)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
def test_damaged_exif_does_not_cost_the_picture(exif):
    array = noise(3, 5)
    for kind in ("PNG", "WEBP"):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(array), kind, exif=exif, lossless=True)), array)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(data), np.broadcast_to(RED, (4, 4, 3)), atol=4)


def test_path_bytes_and_pil_give_the_same_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture.jpg"
    Image.fromarray(noise(21, 34)).save(path, exif=exif)
    wanted = load_image(path, frame(16, 8))
    assert wanted.shape == (16, 8, 3)
    assert wanted.dtype == np.uint8
    with Image.open(path) as image:
        for source in (str(path), path.read_bytes(), image):
            np.testing.assert_array_equal(load_image(source, frame(16, 8)), wanted)


def test_what_is_given_as_pil_is_not_changed():
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    decode(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (*RED, 0))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: b"", "empty file"),
        (lambda: b"hello, I am a text\n" * 50, "not a picture in a known format"),
        (lambda: encoded(Image.fromarray(noise(9, 9)))[:20], "Truncated"),
        (lambda: encoded(Image.fromarray(noise(90, 90)), "JPEG")[:2000], "truncated"),
        (lambda: encoded(Image.fromarray(noise(90, 90)))[:2000], "truncated"),
    ],
)
def test_what_is_no_picture_says_why(make, wanted):
    message = reason(make())
    assert message.startswith("image: not a readable picture (")
    assert wanted in message


def test_a_file_is_named(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    assert reason(text) == reason(str(text)) == f"{text}: not a readable picture (not a picture in a known format)"
    assert reason(tmp_path / "gone.png") == f"{tmp_path}/gone.png: not a readable picture (No such file or directory)"
    assert reason(tmp_path) == f"{tmp_path}: not a readable picture (Is a directory)"
    (tmp_path / "two\nlines.png").write_text("no picture")
    assert "two?lines.png" in reason(tmp_path / "two\nlines.png")


def png(header, data):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_that_claims(width, height):
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(10_000_000)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width, height):
    assert width * height > MAX_PIXELS
    data = png_that_claims(width, height)
    tracemalloc.start()
    started = time.perf_counter()
    message = reason(data)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "pixels" in message
    assert seconds < 1
    assert peak < 50e6


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_raise_nothing_but_image_error(seed):
    """Pillow's decoders raise a dozen unrelated types, RuntimeError and struct.error among them."""
    rng = np.random.default_rng(seed)
    image, exif = Image.fromarray(noise(24, 18, seed=seed)), Image.Exif()
    exif[0x0112], exif[0x829A], exif[0x0110] = 6, (1, 100), "camera"
    originals = [encoded(image, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    originals += [encoded(image.convert("P"), "GIF"), encoded(image, "BMP"), encoded(image, "TIFF"), encoded(image, "PPM")]
    if "AVIF" in Image.SAVE:
        originals.append(encoded(image, "AVIF"))
    messages = []
    for turn in range(400):
        data = bytearray(originals[turn % len(originals)])
        for place in rng.integers(0, min(len(data), 300), 3):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data[: rng.integers(len(data) // 2, 3 * len(data))])).mode == "RGB"
        except ImageError as error:
            messages.append(str(error))
    assert 50 < len(messages) < 400
    assert not any("\n" in message for message in messages)


def google_research_crop(image_height, image_width, height, width, crop_proportion):
    """_compute_crop_shape and center_crop of google-research/simclr, data_util.py: whole pixels (y, x, height, width)."""
    aspect_ratio = width / height
    if aspect_ratio > image_width / image_height:
        crop_height = round(crop_proportion / aspect_ratio * image_width)
        crop_width = round(crop_proportion * image_width)
    else:
        crop_height = round(crop_proportion * image_height)
        crop_width = round(crop_proportion * aspect_ratio * image_height)
    return (image_height - crop_height + 1) // 2, (image_width - crop_width + 1) // 2, crop_height, crop_width


@given(
    image=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    target=st.sampled_from([(224, 224), (32, 32), (256, 128), (100, 300)]),
    crop=st.sampled_from([0.875, 1.0, 0.5]),
)
@settings(deadline=None, derandomize=True)
def test_the_central_crop_is_simclrs(image, target, crop):
    left, top, right, bottom = crop_box(image[1], image[0], target[0] / target[1], crop)
    y, x, height, width = google_research_crop(*image, *target, crop)
    assert abs(right - left - width) <= 0.5 + 1e-6  # they round to whole pixels, we do not
    assert abs(bottom - top - height) <= 0.5 + 1e-6
    assert abs(left - x) <= 0.75 + 1e-6
    assert abs(top - y) <= 0.75 + 1e-6
    assert (bottom - top) / (right - left) == pytest.approx(target[0] / target[1])
    assert left + right == pytest.approx(image[1])
    assert top + bottom == pytest.approx(image[0])
    limiting = min(image[0], image[1] * target[0] / target[1])
    assert bottom - top == pytest.approx(crop * limiting)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (224, 224), (1000, 3)])
def test_what_stands_outside_the_crop_does_not_count(width, height):
    array = noise(height, width)
    _, top, _, bottom = box = crop_box(width, height, 1.0, 0.875)
    margin = max(2, 2 / 224 * (bottom - top)) + 1  # bicubic reaches two pixels beyond the box, of whichever are larger
    changed = array.copy()
    changed[: max(0, int(top - margin))] = changed[min(height, int(bottom + margin) + 1) :] = 0
    changed[:, : max(0, int(box[0] - margin))] = changed[:, min(width, int(box[2] + margin) + 1) :] = 0
    wanted, got = (load_image(Image.fromarray(a), frame(224, 224, "center_crop", 0.875)) for a in (array, changed))
    np.testing.assert_array_equal(got, wanted)


def test_center_crop_keeps_the_aspect_and_stretch_the_whole():
    """A grey square beside black bars: cropped, only grey is left; stretched, bars and square share the frame."""
    array = np.zeros((40, 120, 3), np.uint8)
    array[:, 40:80] = 200
    cropped = load_image(Image.fromarray(array), frame(20, 20, "center_crop", 0.875))
    assert (cropped == 200).all()
    stretched = load_image(Image.fromarray(array), frame(20, 30, "stretch"))
    assert (stretched[:, 12:18] == 200).all()
    assert (stretched[:, :8] == 0).all()
    assert (stretched[:, 22:] == 0).all()


@pytest.mark.parametrize("resize", ["center_crop", "stretch"])
def test_pictures_of_32_px_pass_unchanged(resize):
    array = noise(32, 32)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(array)), frame(32, 32, resize, 1.0)), array)


def bicubic_by_hand(row, size):
    """Keys' cubic (a = -0.5) widened by the scale, so that shrinking averages: one row of numbers, the slow way."""
    scale = len(row) / size
    width = max(scale, 1.0)

    def kernel(t):
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    result = []
    for i in range(size):
        centre = (i + 0.5) * scale
        weights = [kernel((j + 0.5 - centre) / width) for j in range(len(row))]
        result.append(sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights))
    return np.clip(result, 0, 255)


@pytest.mark.parametrize("size", [8, 16, 100])
def test_the_resize_is_an_anti_aliased_bicubic(size):
    row = noise(1, 40, channels=1)[0]
    image = Image.fromarray(np.broadcast_to(row, (4, 40)).copy())
    got = load_image(image, frame(4, size))
    np.testing.assert_allclose(got[2, :, 0].astype(float), bicubic_by_hand(row.tolist(), size), atol=1.01)


@pytest.mark.parametrize("resize", ["center_crop", "stretch"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 999), (999, 1), (2, 3)])
def test_the_smallest_and_thinnest_pictures_fill_the_frame(resize, shape):
    array = np.broadcast_to(np.array(RED, np.uint8), (*shape, 3)).copy()
    got = load_image(Image.fromarray(array), frame(24, 16, resize, 0.875 if resize == "center_crop" else 1.0))
    np.testing.assert_array_equal(got, np.broadcast_to(RED, (24, 16, 3)))


ALONE = """
import builtins, importlib.machinery, sys
class Wall(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "numpy", "PIL", "simclr_preprocess"}:
            raise ModuleNotFoundError(name)
        return super().find_spec(name, path, target)
sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not importlib.machinery.PathFinder] + [Wall]
import simclr_preprocess as alone
values = dict(height_px=4, width_px=6, resize="center_crop", crop=0.875, resample="bicubic", jpeg="full")
print(alone.prepare(sys.argv[1], **values).tobytes().hex())
assert not any(name.split(".")[0] in ("serve", "pydantic", "simclr") for name in sys.modules)
"""


def test_the_file_travels_alone(tmp_path):
    """As it does into Triton's preprocess model, where there is numpy and Pillow and nothing of ours."""
    shutil.copyfile(serve.preprocess.__file__, tmp_path / "simclr_preprocess.py")
    Image.fromarray(noise(30, 20)).save(tmp_path / "picture.png")
    homes = {str(Path(module.__file__).parents[1]) for module in (np, PIL)}
    paths = f"import sys; sys.path[:0] = {[str(tmp_path), *homes]!r}\n"
    command = [sys.executable, "-I", "-S", "-c", paths + ALONE, str(tmp_path / "picture.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = load_image(tmp_path / "picture.png", frame(4, 6, "center_crop", 0.875))
    assert bytes.fromhex(done.stdout.strip()) == wanted.tobytes()


def test_nothing_else_decodes_or_resizes():
    """The house rule: what happens in one place cannot drift. Triton's copy is this very file; the app only shrinks to show."""
    root = Path(serve.preprocess.__file__).parents[1]
    drawing = ("train/demo_data.py", "train/demo_figure.py", "train/contact_sheet.py", "serve/dedup/sheet.py")
    draws = {root / name for name in drawing}  # to be looked at; none reads
    elsewhere = {root / "export" / "dali_preprocess.py"}  # travels to servers whose GPU decodes; docs say how far it differs
    files = {*root.glob("serve/**/*.py"), *root.glob("train/*.py"), *root.glob("export/*.py"), root / "app.py", root / "cli.py"}
    for path in files - draws - elsewhere - {Path(serve.preprocess.__file__)}:
        found = re.findall(r"Image\.open|ImageOps|\.resize\(|cv2|torchvision\.io|imageio", path.read_text())
        assert not found, f"{path}: {found}"
