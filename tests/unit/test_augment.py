"""Every step of the augmentation against a slow version in plain Python or Pillow, and how often each is drawn."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from train import augment
from train.augment import SimCLRAugment, blur_matrix, per_axis, random_boxes, resize_matrix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 4, height: int = 9, width: int = 7, seed: int = 0) -> Tensor:
    """Random colours, and among them black, white, grey and pure ones, where hue and saturation are delicate."""
    images = torch.rand(count, 3, height, width, generator=generator(seed))
    special = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    images[:, :, 0] = torch.tensor(special).T
    return images


def by_pixel(images: Tensor, change: Callable[[float, float, float, int], tuple[float, float, float]]) -> Tensor:
    """`change(red, green, blue, number of the image)` applied to every pixel in turn."""
    out = torch.empty_like(images, dtype=torch.float64)
    for b, _, y, x in np.ndindex(len(images), 1, *images.shape[2:]):
        red, green, blue = images[b, :, y, x].tolist()
        out[b, :, y, x] = torch.tensor(change(red, green, blue, b), dtype=torch.float64)
    return out


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=tolerance)


def flat(colour: tuple[int, int, int], count: int, size: int = 16) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(count, 3, size, size)


# --- colour -----------------------------------------------------------------------------------------------------------


def test_hue_turns_as_colorsys_does() -> None:
    shifts = [0.0, 0.19, -0.13, 0.5]
    close(
        augment.hue(noise(), torch.tensor(shifts)),
        by_pixel(noise(), lambda r, g, b, i: _hsv(r, g, b, lambda h, s, v: ((h + shifts[i]) % 1, s, v))),
    )


def test_saturation_scales_as_colorsys_does() -> None:
    factors = [0.0, 0.4, 1.0, 1.8]
    close(
        augment.saturation(noise(), torch.tensor(factors)),
        by_pixel(noise(), lambda r, g, b, i: _hsv(r, g, b, lambda h, s, v: (h, min(s * factors[i], 1), v))),
    )


def _hsv(r: float, g: float, b: float, change: Callable[..., tuple[float, float, float]]) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(r, g, b)))


def test_brightness_multiplies_in_version_2_and_adds_in_version_1() -> None:
    factors = [0.2, 1.0, 1.8, -0.5]
    times = by_pixel(noise(), lambda r, g, b, i: tuple(max(factors[i], 0) * c for c in (r, g, b)))
    plus = by_pixel(noise(), lambda r, g, b, i: tuple(c + factors[i] - 1 for c in (r, g, b)))
    close(augment.brightness(noise(), torch.tensor(factors), 2), times)
    close(augment.brightness(noise(), torch.tensor(factors), 1), plus)


def test_contrast_scales_the_distance_from_each_channels_mean() -> None:
    factors = [0.2, 1.0, 1.8, 0.0]
    images = noise()
    wanted = torch.empty_like(images)
    for b, channel in np.ndindex(4, 3):
        values = [value for row in images[b, channel].tolist() for value in row]
        mean = sum(values) / len(values)
        wanted[b, channel] = torch.tensor([mean + factors[b] * (value - mean) for value in values]).view(9, 7)
    close(augment.contrast(images, torch.tensor(factors)), wanted)


def test_grey_is_luma_in_all_channels() -> None:
    close(augment.grey(noise()), by_pixel(noise(), lambda r, g, b, i: (0.2989 * r + 0.587 * g + 0.114 * b,) * 3))


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 40, 30), (16, 16)),
        ((0, 0, 40, 30), (30, 40)),
        ((0, 0, 40, 30), (64, 50)),
        ((7, 3, 20, 21), (16, 12)),
        ((30, 10, 10, 20), (32, 32)),
        ((39, 29, 1, 1), (16, 16)),
    ],
)
def test_cropping_and_resizing_is_pillows_bicubic(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """In floats: with 8 bits Pillow rounds and clips after either axis, and overshoot at hard edges is lost."""
    left, top, width, height = box
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.float32)
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    wanted = np.asarray(crop.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    rows = resize_matrix(torch.tensor([float(top)]), torch.tensor([float(height)]), size[0], 30)
    columns = resize_matrix(torch.tensor([float(left)]), torch.tensor([float(width)]), size[1], 40)
    got = per_axis(torch.from_numpy(pixels)[None, None], rows, columns)[0, 0].numpy()
    assert np.abs(got - wanted).max() < 0.01


def test_training_sees_the_whole_picture_as_serving_does() -> None:
    """Within 2/255 of the 8-bit picture that serving makes."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
    rows = resize_matrix(torch.zeros(1), torch.full((1,), 30.0), 16, 30)
    columns = resize_matrix(torch.zeros(1), torch.full((1,), 40.0), 16, 40)
    got = per_axis(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), rows, columns)[0].clamp(0, 255)
    assert np.abs(got.permute(1, 2, 0).numpy() - wanted).max() <= 2


def test_resizing_between_pixels_is_pillows_resize_of_a_box() -> None:
    """A crop with fractions, well inside, so that what is beyond its border hardly counts: only the border may differ."""
    y, x = np.mgrid[:60, :60]
    smooth = (127 + 100 * np.sin(x / 9) * np.cos(y / 7)).astype(np.float32)
    box = (10.3, 12.7, 10.3 + 30.4, 12.7 + 25.6)
    wanted = np.asarray(Image.fromarray(smooth).resize((16, 16), Image.Resampling.BICUBIC, box=box))
    rows = resize_matrix(torch.tensor([12.7]), torch.tensor([25.6]), 16, 60)
    columns = resize_matrix(torch.tensor([10.3]), torch.tensor([30.4]), 16, 60)
    got = per_axis(torch.from_numpy(smooth)[None, None], rows, columns)[0, 0].numpy()
    assert np.abs(got - wanted)[1:-1, 1:-1].max() < 0.05
    assert np.abs(got - wanted).max() < 8


def test_resize_weights_sum_to_one_and_stay_inside_the_crop() -> None:
    matrix = resize_matrix(torch.tensor([3.4, 0.0]), torch.tensor([4.2, 10.0]), 6, 10)
    close(matrix.sum(2), torch.ones(2, 6))
    assert matrix[0, :, :3].abs().max() == 0
    assert matrix[0, :, 8:].abs().max() == 0


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 1), (0.8, 3), (2.0, 4), (1.0, 0)])
def test_blur_is_a_convolution_with_zeros_beyond_the_border(sigma: float, radius: int) -> None:
    image = torch.rand(11, 9, generator=generator())
    taps = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
    wanted = torch.zeros(11, 9, dtype=torch.float64)
    for y, x in np.ndindex(11, 9):
        for dy, dx in np.ndindex(2 * radius + 1, 2 * radius + 1):
            yy, xx = y + dy - radius, x + dx - radius
            if 0 <= yy < 11 and 0 <= xx < 9:
                wanted[y, x] += taps[dy] * taps[dx] / sum(taps) ** 2 * image[yy, xx].item()
    rows, columns = (blur_matrix(torch.tensor([sigma]), size, radius) for size in (11, 9))
    close(per_axis(image[None, None], rows, columns)[0, 0], wanted)


def test_a_flip_is_the_mirror_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole picture as the crop, a view is the picture or its mirror image, and nothing else."""
    monkeypatch.setattr(augment, "ASPECT_RANGE", (1, 1))
    picture = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=generator())
    views = SimCLRAugment(16, crop_area=1.0)._crop_and_flip(picture.expand(64, -1, -1, -1).float() / 255, generator())
    same = (views - picture / 255).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (views - picture.flip(3) / 255).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "target"), [(64, 64, 1.0), (60, 80, 1.0), (128, 64, 0.5)])
def test_boxes_follow_the_rules_of_area_and_aspect(height: int, width: int, target: float) -> None:
    top, left, box_height, box_width = random_boxes(4000, height, width, target, 0.08, generator())
    assert bool((top >= 0).all())
    assert bool((left >= 0).all())
    assert bool((top + box_height <= height + 1e-3).all())
    assert bool((left + box_width <= width + 1e-3).all())
    area, aspect = box_height * box_width / (height * width), box_width / box_height / target
    assert area.min() >= 0.08 - 1e-4
    assert area.max() <= 1 + 1e-4
    assert aspect.min() >= 3 / 4 - 1e-4
    assert aspect.max() <= 4 / 3 + 1e-4


def test_small_boxes_are_spread_evenly() -> None:
    """Up to an area of 3/4 every box fits, so there area and aspect are uniform, and so is the place."""
    top, left, height, width = random_boxes(20_000, 100, 100, 1.0, 0.08, generator())
    area, aspect = height * width / 1e4, width / height
    small = area < 0.75
    density = torch.histc(area[small], bins=5, min=0.08, max=0.75) / small.sum()
    close(density, torch.full((5,), 0.2), 0.02)
    spread = torch.histc(aspect[small], bins=5, min=3 / 4, max=4 / 3) / small.sum()
    close(spread, torch.full((5,), 0.2), 0.02)
    for place in (top / (100 - height), left / (100 - width)):
        close(torch.histc(place[small], bins=5, min=0, max=1) / small.sum(), torch.full((5,), 0.2), 0.02)


def test_large_boxes_are_tried_again_until_they_fit() -> None:
    area = random_boxes(4000, 100, 100, 1.0, 0.9, generator())[2:]
    share = area[0] * area[1] / 1e4
    assert 0.9 <= share.min() <= share.max() <= 1.0001
    assert (share < 0.9999).float().mean() > 0.99, "hardly ever the whole image"


@pytest.mark.parametrize(("height", "width"), [(200, 8), (8, 200)])
def test_the_whole_image_where_no_box_fits(height: int, width: int) -> None:
    top, left, box_height, box_width = random_boxes(50, height, width, 1.0, 0.5, generator())
    assert (top.max(), left.max()) == (0, 0)
    assert box_height.unique().tolist() == [height]
    assert box_width.unique().tolist() == [width]


def test_crop_area_is_respected() -> None:
    boxes = random_boxes(2000, 64, 64, 1.0, 0.4, generator())
    assert 0.4 - 1e-4 <= (boxes[2] * boxes[3] / 64**2).min() < 0.42
    half = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    half[..., 16:] = 255
    assert SimCLRAugment(16, strength=0, blur=False, crop_area=1.0)(half, generator()).std((1, 2, 3)).min() > 0.4
    assert SimCLRAugment(16, strength=0, blur=False, crop_area=0.01)(half, generator()).std((1, 2, 3)).min() < 0.1


# --- how often --------------------------------------------------------------------------------------------------------

COUNT = 3000
TOLERANCE = 3.5 * 0.5 / COUNT**0.5
"""Of a share: 3.5 standard deviations, at the widest."""


def test_a_view_is_mirrored_half_of_the_time() -> None:
    ramp = torch.linspace(0, 255, 16).byte().expand(COUNT, 3, 16, 16)
    views = SimCLRAugment(16, strength=0, blur=False)(ramp, generator())
    mirrored = views[..., :8].mean((1, 2, 3)) > views[..., 8:].mean((1, 2, 3))
    assert abs(mirrored.float().mean() - 0.5) < TOLERANCE


def test_colours_are_changed_in_eight_of_ten_views() -> None:
    images = flat((90, 120, 60), COUNT).float() / 255
    views = SimCLRAugment(16)._jitter(images.clone(), generator())
    changed = (views - images).abs().amax((1, 2, 3)) > 1e-4
    assert abs(changed.float().mean() - 0.8) < TOLERANCE


def test_a_fifth_of_the_views_is_grey() -> None:
    views = SimCLRAugment(16, strength=0.5, blur=False)(flat((200, 40, 90), COUNT), generator())
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
    assert abs(grey.float().mean() - 0.2) < TOLERANCE


def test_grey_does_not_depend_on_jitter() -> None:
    """A view may be both or neither: with independent draws 16 % are jittered and grey, 16 % are neither."""
    image = flat((200, 40, 90), COUNT).float() / 255
    source = generator()
    jittered = SimCLRAugment(16)._jitter(image.clone(), source)
    views = SimCLRAugment(16)._grey(jittered.clone(), source)
    was_jittered = (jittered - image).abs().amax((1, 2, 3)) > 1e-4
    was_greyed = (views - jittered).abs().amax((1, 2, 3)) > 1e-4
    assert abs((was_jittered & was_greyed).float().mean() - 0.16) < TOLERANCE
    assert abs((~was_jittered & ~was_greyed).float().mean() - 0.16) < TOLERANCE


def test_half_of_the_views_is_blurred_and_each_with_its_own_sigma() -> None:
    point = torch.zeros(COUNT, 3, 41, 41)
    point[:, :, 20, 20] = 1
    views = SimCLRAugment(41)._blur(point.clone(), generator())
    centre = views[:, 0, 20, 20]
    blurred = views[:, 0, 20, 21] > 0  # sigma 0.1 leaves exp(-50) there, which is still above zero
    assert abs(blurred.float().mean() - 0.5) < TOLERANCE
    assert centre[blurred].unique().numel() > 0.5 * blurred.sum(), "one sigma each, not one per batch"
    assert centre[~blurred].unique().tolist() == [1]


def test_blur_takes_the_kernel_of_the_paper_and_can_be_off() -> None:
    """A tenth of the height, made odd: 2 * ((H // 10) // 2) + 1 taps."""
    point = torch.zeros(200, 3, 64, 64)
    point[:, :, 32, 32] = 1
    views = SimCLRAugment(64)._blur(point.clone(), generator())
    assert (views[:, 0, 32].amax(0) > 0).nonzero()[:, 0].tolist() == list(range(29, 36))
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255
    image = checks.byte().expand(64, 3, 16, 16)
    monochrome = SimCLRAugment(16, strength=0, blur=False, crop_area=1.0)
    assert monochrome(image, generator()).std((1, 2, 3)).min() > 0.3, "nothing is blurred"


@pytest.mark.parametrize(("version", "low", "high"), [(2, 0.2, 1.8), (1, -0.8, 0.8)])
def test_brightness_is_drawn_from_the_range_of_its_version(
    monkeypatch: pytest.MonkeyPatch, version: int, low: float, high: float
) -> None:
    drawn: list[Tensor] = []

    def record(images: Tensor, factor: Tensor, given: int) -> Tensor:
        drawn.append(factor if given == 2 else factor - 1)
        assert given == version
        return images

    monkeypatch.setattr(augment, "brightness", record)
    SimCLRAugment(16, version=version)._jitter(torch.rand(COUNT, 3, 2, 2), generator())
    amounts = torch.cat(drawn)
    assert low <= amounts.min() < low + 0.02
    assert high - 0.02 < amounts.max() <= high
    close(torch.histc(amounts, bins=4, min=low, max=high) / len(amounts), torch.full((4,), 0.25), 0.03)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_strength_scales_the_jitter(monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    largest = {}
    for name, neutral in (("contrast", 1), ("saturation", 1), ("hue", 0)):

        def record(images: Tensor, amount: Tensor, name: str = name, neutral: int = neutral) -> Tensor:
            largest[name] = max(largest.get(name, 0), *((amount - neutral).abs().tolist() or [0]))
            return images

        monkeypatch.setattr(augment, name, record)
    SimCLRAugment(16, strength=strength)._jitter(torch.rand(COUNT, 3, 2, 2), generator())
    wanted = {"contrast": 0.8 * strength, "saturation": 0.8 * strength, "hue": 0.2 * strength}
    assert largest == pytest.approx(wanted, rel=0.02)


def test_the_order_of_the_jitter_is_drawn_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation writes its digit behind what is there: all 24 orders appear, each about equally often."""
    for digit, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        monkeypatch.setattr(augment, name, lambda images, *_, digit=digit: images * 0.2 + digit * 0.1)
    views = SimCLRAugment(16)._jitter(torch.zeros(COUNT, 3, 1, 1), generator())
    codes, counts = views[:, 0, 0, 0].mul(1e4).round().unique(return_counts=True)
    assert len(codes) == 25, "24 orders, and no jitter"
    shares = counts[1:] / COUNT
    close(shares, torch.full((24,), 0.8 / 24), 4 * (0.033 / COUNT) ** 0.5)


# --- whole views ------------------------------------------------------------------------------------------------------


def test_the_same_generator_draws_the_same_views_and_another_does_not() -> None:
    images = (noise(8, 20, 7) * 255).byte()
    views = SimCLRAugment(16)
    torch.testing.assert_close(views(images, generator(3)), views(images, generator(3)), rtol=0, atol=0)
    assert not torch.equal(views(images, generator(3)), views(images, generator(4)))


def test_one_picture_twice_in_a_batch_gets_two_views() -> None:
    images = (noise(8, 20, 7) * 255).byte()
    first, second = SimCLRAugment(16)(torch.cat([images, images]), generator()).chunk(2)
    assert (first - second).abs().mean((1, 2, 3)).min() > 0.01


def test_the_pictures_themselves_are_left_alone() -> None:
    images = (noise(8, 20, 7) * 255).byte()
    before = images.clone()
    SimCLRAugment(16)(images, generator())
    assert torch.equal(images, before)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [16, (48, 16), (16, 50)])
def test_views_have_the_size_asked_for_and_stay_in_range(size: int | tuple[int, int], version: int) -> None:
    images = torch.randint(0, 2, (64, 3, 20, 30), generator=generator()).mul(255).byte()
    views = SimCLRAugment(size, version=version)(images, generator())
    assert views.shape == (64, 3, *((size, size) if isinstance(size, int) else size))
    assert views.dtype == torch.float32
    assert 0 <= views.min() < 0.01
    assert 0.99 < views.max() <= 1


def test_one_picture_is_a_batch_too() -> None:
    assert SimCLRAugment(16)((noise(1, 20, 7) * 255).byte(), generator()).shape == (1, 3, 16, 16)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version is 3, wanted 1 or 2"):
        SimCLRAugment(16, version=3)
