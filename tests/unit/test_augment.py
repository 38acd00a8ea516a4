"""Every step of the augmentation against a slow version in plain Python or Pillow, and how often each is drawn."""

import colorsys
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train import augment
from train.augment import SimCLRAugment, crop_views, per_axis, random_boxes, resize_matrix

OPERATIONS = ["flip", "brightness", "contrast", "saturation", "hue", "grey", "blur"]


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


def changed(operation: Callable[[Tensor, Tensor], None], images: Tensor, amounts: list[float]) -> Tensor:
    images = images.clone()
    operation(images, torch.tensor(amounts))
    return images


def flat(colour: tuple[int, int, int], count: int, size: int = 16) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(count, 3, size, size)


# --- colour -----------------------------------------------------------------------------------------------------------


def test_hue_turns_as_colorsys_does() -> None:
    shifts = [0.0, 0.19, -0.13, 1 / 3]
    close(
        changed(augment.hue, noise(), shifts),
        by_pixel(noise(), lambda r, g, b, i: _hsv(r, g, b, lambda h, s, v: ((h + shifts[i]) % 1, s, v))),
    )


def test_saturation_scales_as_colorsys_does() -> None:
    factors = [0.0, 0.4, 1.0, 1.8]
    close(
        changed(augment.saturation, noise(), factors),
        by_pixel(noise(), lambda r, g, b, i: _hsv(r, g, b, lambda h, s, v: (h, min(s * factors[i], 1), v))),
    )


def _hsv(r: float, g: float, b: float, change: Callable[..., tuple[float, float, float]]) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(r, g, b)))


def test_brightness_multiplies_in_version_2_and_adds_in_version_1() -> None:
    """The numbers are worked out by hand: 0.5 by 1.8 is 0.9, and 0.5 less 0.4 is 0.1."""
    half = torch.full((2, 3, 2, 2), 0.5)
    close(changed(augment.scale_brightness, half, [1.8, 0.2])[:, 0, 0, 0], torch.tensor([0.9, 0.1]))
    close(changed(augment.add_brightness, half, [0.3, -0.4])[:, 0, 0, 0], torch.tensor([0.8, 0.1]))


def test_contrast_scales_the_distance_from_each_channels_mean() -> None:
    factors = [0.2, 1.0, 1.8, 0.0]
    images = noise()
    wanted = torch.empty_like(images)
    for b, channel in np.ndindex(4, 3):
        values = [value for row in images[b, channel].tolist() for value in row]
        mean = sum(values) / len(values)
        wanted[b, channel] = torch.tensor([mean + factors[b] * (value - mean) for value in values]).view(9, 7)
    close(changed(augment.contrast, images, factors), wanted)


def test_grey_is_luma_in_all_channels() -> None:
    close(
        changed(augment.grey, noise(), [0.0] * 4),
        by_pixel(noise(), lambda r, g, b, i: (0.2989 * r + 0.587 * g + 0.114 * b,) * 3),
    )


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
    rows = resize_matrix(torch.tensor([top]), torch.tensor([height]), size[0], 30)
    columns = resize_matrix(torch.tensor([left]), torch.tensor([width]), size[1], 40)
    got = per_axis(torch.from_numpy(pixels)[None, None], rows, columns)[0, 0].numpy()
    assert np.abs(got - wanted).max() < 0.01


BOXES = [(0, 0, 30, 40), (3, 7, 21, 20), (10, 30, 20, 10), (29, 39, 1, 1), (0, 5, 12, 9)]
"""Top, left, height, width in a picture of 30 x 40."""


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 12), (64, 50)])
def test_all_ways_of_resizing_give_pillows_picture(size: tuple[int, int], layout: torch.memory_format) -> None:
    """The CPU's, from either layout, and the GPU's: the 8-bit picture that serving makes of this box, but for rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(memory_format=layout)
    by_matrices = augment.resize_by_matrices(image.expand(len(BOXES), -1, -1, -1), tuple(torch.tensor(BOXES).T), size)
    for number, (top, left, height, width) in enumerate(BOXES):
        crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        wanted = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        for got, most in ((augment.resize(image, BOXES[number], size)[0], 1), (by_matrices[number], 70)):
            difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - wanted)
            assert difference.max() <= most, "Pillow also clips between the axes, which tells in noise enlarged"
            assert (difference > 2).mean() < 0.1


def test_smooth_pictures_are_the_same_by_matrices_to_the_last_bit_but_one() -> None:
    y, x = np.mgrid[:60, :60]
    smooth = torch.from_numpy((127 + 100 * np.sin(x / 9) * np.cos(y / 7)).round().astype(np.uint8)).expand(1, 3, 60, 60)
    for box in ([0, 0, 60, 60], [12, 10, 26, 30], [40, 3, 20, 57]):
        by_matrices = augment.resize_by_matrices(smooth, tuple(torch.tensor([side]) for side in box), (24, 32))
        difference = by_matrices.int() - augment.resize(smooth, box, (24, 32)).int()
        assert difference.abs().max() <= 1


def test_resizing_is_tf2s_bicubic_where_nothing_shrinks() -> None:
    """TensorFlow's resize_bicubic_op.cc with half-pixel centres: Keys' kernel over four neighbours, those outside left out.

    Where it shrinks we differ on purpose (anti-aliasing).
    """

    def keys(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    wanted = torch.zeros(24, 10, dtype=torch.float64)
    for out in range(24):
        place = (out + 0.5) * 10 / 24 - 0.5
        weights = {
            pixel: keys(place - pixel) for pixel in range(math.floor(place) - 1, math.floor(place) + 3) if 0 <= pixel < 10
        }
        for pixel, weight in weights.items():
            wanted[out, pixel] = weight / sum(weights.values())
    close(resize_matrix(torch.tensor([0]), torch.tensor([10]), 24, 10)[0], wanted)


def test_resize_weights_sum_to_one_and_stay_inside_the_crop() -> None:
    matrix = resize_matrix(torch.tensor([3, 0]), torch.tensor([4, 10]), 6, 10)
    close(matrix.sum(2), torch.ones(2, 6))
    assert matrix[0, :, :3].abs().max() == 0
    assert matrix[0, :, 7:].abs().max() == 0


@pytest.mark.parametrize(("height", "width"), [(40, 37), (20, 70), (73, 33), (9, 12)])
def test_blur_is_a_convolution_with_zeros_beyond_the_border(height: int, width: int) -> None:
    """The kernel has 2 * ((height // 10) // 2) + 1 taps, by the height alone."""
    sigmas, radius = [0.1, 0.8, 2.0], height // 10 // 2
    images = torch.rand(3, 3, height, width, generator=generator())
    got = changed(augment.blur, images, sigmas)
    for one, together, sigma in zip(images, got, sigmas, strict=True):
        close(changed(augment.blur, one[None], [sigma])[0], together)  # alone it is computed in another way
    for number, sigma in enumerate(sigmas):
        taps = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
        padded = np.pad(images[number].double().numpy(), ((0, 0), (radius, radius), (radius, radius)))
        wanted = np.zeros((3, height, width))
        for dy, dx in np.ndindex(2 * radius + 1, 2 * radius + 1):
            wanted += taps[dy] * taps[dx] / sum(taps) ** 2 * padded[:, dy : dy + height, dx : dx + width]
        close(got[number], torch.from_numpy(wanted))


@pytest.mark.parametrize(("height", "taps"), [(224, 23), (96, 9), (64, 7), (32, 3), (16, 1)])
def test_blur_takes_the_kernel_of_the_paper(height: int, taps: int) -> None:
    point = torch.zeros(1, 3, height, height)
    point[..., height // 2, height // 2] = 1
    assert (changed(augment.blur, point, [2.0])[0, 0, height // 2] > 0).sum() == taps


def test_a_flip_is_the_mirror_image() -> None:
    """Nothing else is on: a view is the picture or its mirror image."""
    picture = torch.randint(0, 256, (1, 3, 16, 12), dtype=torch.uint8, generator=generator())
    views = only("flip")(16).after_crop(picture.expand(64, -1, -1, -1), generator())
    same = (views - picture / 255).abs().amax((1, 2, 3)) < 1e-6
    mirrored = (views - picture.flip(3) / 255).abs().amax((1, 2, 3)) < 1e-6
    assert bool((same ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def only(*names: str) -> type[SimCLRAugment]:
    """The augmentation with all other operations switched off."""

    class Some(SimCLRAugment):
        def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            turns, amounts = super().draw(count, generator)
            off = ~torch.isin(turns, torch.tensor([OPERATIONS.index(name) for name in names]))
            return turns.masked_fill(off, -1), amounts

    return Some


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "target"), [(64, 64, 1.0), (60, 80, 1.0), (128, 64, 0.5)])
def test_boxes_follow_the_rules_of_area_and_aspect(height: int, width: int, target: float) -> None:
    top, left, box_height, box_width = random_boxes(4000, height, width, target, 0.08, generator())
    assert bool((top >= 0).all())
    assert bool((left >= 0).all())
    assert bool((top + box_height <= height + 1e-3).all())
    assert bool((left + box_width <= width + 1e-3).all())
    area, aspect = box_height * box_width / (height * width), box_width / box_height / target
    rounded = 0.5 * (1 / box_height + 1 / box_width)  # sides are whole pixels
    assert bool((area >= 0.08 * (1 - 2.1 * rounded)).all())
    assert area.max() <= 1
    assert bool((aspect >= 3 / 4 * (1 - 1.1 * rounded)).all())
    assert bool((aspect <= 4 / 3 * (1 + 1.1 * rounded)).all())


def test_small_boxes_are_spread_evenly() -> None:
    """Up to an area of 3/4 every box fits, so there area and aspect are uniform, and so is the place."""
    top, left, height, width = random_boxes(20_000, 1000, 1000, 1.0, 0.08, generator())
    area, aspect = height * width / 1e6, width / height
    small = area < 0.75
    density = torch.histc(area[small], bins=5, min=0.08, max=0.75) / small.sum()
    close(density, torch.full((5,), 0.2), 0.02)
    spread = torch.histc(aspect[small], bins=5, min=3 / 4, max=4 / 3) / small.sum()
    close(spread, torch.full((5,), 0.2), 0.02)
    for place in (top / (1000 - height), left / (1000 - width)):
        close(torch.histc(place[small], bins=5, min=0, max=1) / small.sum(), torch.full((5,), 0.2), 0.02)


def one_box(height: int, width: int, target: float, smallest: float, random: np.random.Generator) -> tuple[int, ...]:
    """The rule of the paper for one box, as torchvision's RandomResizedCrop spells it, with 100 tries and an even aspect."""
    for _ in range(100):
        area = height * width * random.uniform(smallest, 1)
        aspect = target * random.uniform(3 / 4, 4 / 3)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if h <= height and w <= width:
            return int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w
    return 0, 0, height, width


@pytest.mark.parametrize(
    ("height", "width", "target", "smallest"), [(32, 32, 1.0, 0.08), (30, 90, 1.5, 0.2), (64, 48, 1.0, 0.6)]
)
def test_boxes_are_spread_as_those_of_a_plain_loop(height: int, width: int, target: float, smallest: float) -> None:
    count = 4000
    random = np.random.default_rng(1)
    wanted = np.array([one_box(height, width, target, smallest, random) for _ in range(count)])
    got = torch.stack(random_boxes(count, height, width, target, smallest, generator()), 1).numpy()
    limit = 1.95 * (2 / count) ** 0.5  # Kolmogorov-Smirnov: passed by chance once in a thousand
    for name, one, other in zip(("top", "left", "height", "width"), got.T, wanted.T, strict=True):
        assert largest_distance(one, other) < limit, name
    assert largest_distance(got[:, 2] * got[:, 3], wanted[:, 2] * wanted[:, 3]) < limit, "area"
    assert largest_distance(got[:, 3] / got[:, 2], wanted[:, 3] / wanted[:, 2]) < limit, "aspect"


def largest_distance(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    places = np.unique(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_a_picture_of_one_pixel_is_its_own_crop() -> None:
    assert torch.stack(random_boxes(50, 1, 1, 1.0, 0.08, generator()), 1).unique(dim=0).tolist() == [[0, 0, 1, 1]]


def test_large_boxes_are_tried_again_until_they_fit() -> None:
    area = random_boxes(4000, 100, 100, 1.0, 0.9, generator())[2:]
    share = area[0] * area[1] / 1e4
    assert 0.9 - 0.01 <= share.min() <= share.max() <= 1
    assert (share < 1).float().mean() > 0.98, "hardly ever the whole image"


@pytest.mark.parametrize(("height", "width"), [(200, 8), (8, 200)])
def test_the_whole_image_where_no_box_fits(height: int, width: int) -> None:
    top, left, box_height, box_width = random_boxes(50, height, width, 1.0, 0.5, generator())
    assert (top.max(), left.max()) == (0, 0)
    assert box_height.unique().tolist() == [height]
    assert box_width.unique().tolist() == [width]


def test_crop_area_is_respected() -> None:
    boxes = random_boxes(2000, 64, 64, 1.0, 0.4, generator())
    assert 0.4 - 0.015 <= (boxes[2] * boxes[3] / 64**2).min() < 0.42
    half = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    half[..., 16:] = 255
    assert SimCLRAugment(16, strength=0, blur=False, crop_area=1.0)(half, generator()).std((1, 2, 3)).min() > 0.4
    assert SimCLRAugment(16, strength=0, blur=False, crop_area=0.01)(half, generator()).std((1, 2, 3)).min() < 0.1


# --- one picture in a worker process ----------------------------------------------------------------------------------


def test_a_workers_crops_are_those_of_a_batch() -> None:
    """The same boxes and pixels as `crop` gives for this picture, twice in a batch, with the same generator."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1).expand(2, 3, 50, 70)
    wanted = SimCLRAugment((48, 24), crop_area=0.2).crop(images, generator(5)).permute(0, 2, 3, 1).numpy()
    got = crop_views(Image.fromarray(pixels), (48, 24), 0.2, generator(5))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.array_equal(got, wanted)


def test_a_worker_may_crop_at_another_aspect_than_the_views() -> None:
    """As for pictures that are stretched: the view of a whole picture of 90 x 30 shows wide boxes of it."""
    y, x = np.mgrid[:30, :90]
    ramp = Image.fromarray(np.stack([x, y, y], 2).astype(np.uint8))
    for aspect, low, high in ((3.0, 9 / 4, 4), (None, 3 / 4, 4 / 3)):
        for seed in range(20):
            crop = crop_views(ramp, (16, 16), 0.08, generator(seed), aspect)[0].astype(float)
            wide, high_px = np.ptp(crop[..., 0].mean(0)), np.ptp(crop[..., 1].mean(1))
            assert low * 0.8 < wide / high_px < high * 1.25


# --- how often --------------------------------------------------------------------------------------------------------

COUNT = 3000
TOLERANCE = 3.5 * 0.5 / COUNT**0.5
"""Of a share: 3.5 standard deviations, at the widest."""


def draws(count: int = 20_000, **settings: Any) -> tuple[Tensor, Tensor]:
    return SimCLRAugment(16, **settings).draw(count, generator())


def test_each_step_is_drawn_as_often_as_in_the_paper() -> None:
    turns, _ = draws()
    for name, share in (("flip", 0.5), ("grey", 0.2), ("blur", 0.5), *((name, 0.8) for name in OPERATIONS[1:5])):
        drawn = (turns == OPERATIONS.index(name)).any(1).double().mean()
        assert abs(drawn - share) < 3.5 * (share * (1 - share) / len(turns)) ** 0.5, name
    assert not (draws(blur=False)[0] == OPERATIONS.index("blur")).any()


def test_steps_are_drawn_independently_and_jitter_as_a_whole() -> None:
    turns, _ = draws()
    flip, jitter, grey, blur = (turns[:, turn] >= 0 for turn in (0, 1, 5, 6))
    for turn in (2, 3, 4):
        assert torch.equal(jitter, turns[:, turn] >= 0), "all four or none"
    pairs = torch.stack([flip, jitter, grey, blur]).double()
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 4 / len(turns) ** 0.5


def test_all_24_orders_of_the_jitter_are_equally_likely() -> None:
    """Chi-square with 23 degrees of freedom: above 49.7 once in a thousand."""
    turns, _ = draws()
    jittered = turns[turns[:, 1] >= 0][:, 1:5]
    orders, counts = jittered.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(itertools.permutations(range(1, 5)))
    expected = len(jittered) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_amounts_are_even_in_the_ranges_of_the_paper(strength: float, version: int) -> None:
    """Strength 1: factors 0.2 to 1.8, shifts of hue to 0.2 either way; version 1 adds -0.8 to 0.8 of brightness."""
    _, amounts = draws(strength=strength, version=version)
    jitter = 0.8 * strength
    ranges = dict.fromkeys(("brightness", "contrast", "saturation"), (1 - jitter, 1 + jitter))
    ranges |= {"hue": (-0.2 * strength, 0.2 * strength), "blur": (0.1, 2.0)}
    if version == 1:
        ranges["brightness"] = (-jitter, jitter)
    for name, (low, high) in ranges.items():
        drawn = amounts[:, OPERATIONS.index(name)]
        assert low <= drawn.min() + 1e-6, name
        assert drawn.max() - 1e-6 <= high, name
        close(torch.histc(drawn, bins=8, min=low, max=high) / len(drawn), torch.full((8,), 1 / 8), 0.01)
    independent = torch.corrcoef(amounts[:, [1, 2, 3, 4, 6]].T) - torch.eye(5)
    assert independent.abs().max() < 4 / len(amounts) ** 0.5


def test_a_view_is_mirrored_half_of_the_time() -> None:
    ramp = torch.linspace(0, 255, 16).byte().expand(COUNT, 3, 16, 16)
    views = SimCLRAugment(16, strength=0, blur=False)(ramp, generator())
    mirrored = views[..., :8].mean((1, 2, 3)) > views[..., 8:].mean((1, 2, 3))
    assert abs(mirrored.float().mean() - 0.5) < TOLERANCE


def test_colours_are_changed_in_eight_of_ten_views() -> None:
    images = flat((90, 120, 60), COUNT)
    views = only(*OPERATIONS[1:5])(16).after_crop(images, generator())
    differs = (views - images / 255).abs().amax((1, 2, 3)) > 1e-4
    assert abs(differs.float().mean() - 0.8) < TOLERANCE


def test_a_fifth_of_the_views_is_grey() -> None:
    views = SimCLRAugment(16, strength=0.5, blur=False)(flat((200, 40, 90), COUNT), generator())
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
    assert abs(grey.float().mean() - 0.2) < TOLERANCE


def test_every_blurred_view_has_its_own_sigma() -> None:
    point = torch.zeros(500, 3, 41, 41, dtype=torch.uint8)
    point[:, :, 20, 20] = 255
    blurring = only("blur")(41)
    drawn = (blurring.draw(500, generator())[0] >= 0).any(1)
    centre = blurring.after_crop(point, generator())[:, 0, 20, 20]
    assert centre[drawn].unique().numel() > 0.8 * drawn.sum(), "one sigma each, not one per batch"
    assert centre[~drawn].unique().tolist() == [1]


def test_blur_can_be_off() -> None:
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255
    image = checks.byte().expand(64, 3, 16, 16)
    monochrome = SimCLRAugment(16, strength=0, blur=False, crop_area=1.0)
    assert monochrome(image, generator()).std((1, 2, 3)).min() > 0.3, "nothing is blurred"


@pytest.mark.parametrize("size", [8, 100])
@pytest.mark.parametrize("version", [1, 2])
def test_after_the_crop_every_view_goes_through_its_own_steps_in_turn(size: int, version: int) -> None:
    """All of it again, one image after the other by the drawn table, clipped after each step; small and large images."""
    crops = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8, generator=generator(1))
    views = SimCLRAugment(size, version=version)
    turns, amounts = views.draw(len(crops), generator(2))
    brightness = augment.scale_brightness if version == 2 else augment.add_brightness
    steps = [augment.flip, brightness, augment.contrast, augment.saturation, augment.hue, augment.grey, augment.blur]
    got = views.after_crop(crops, generator(2))
    for number, crop in enumerate(crops):
        wanted = crop[None].float() / 255
        for step in turns[number].tolist():
            if step >= 0:
                wanted = changed(steps[step], wanted, [amounts[number, step].item()]).clamp(0, 1)
        close(got[number], wanted[0], 1e-5)


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


def test_a_view_is_a_crop_and_what_comes_after() -> None:
    images, views, source = (noise(8, 20, 7) * 255).byte(), SimCLRAugment(16), generator(3)
    torch.testing.assert_close(
        views(images, generator(3)), views.after_crop(views.crop(images, source), source), rtol=0, atol=0
    )


@pytest.mark.parametrize("size", [16, 100])
def test_views_do_not_depend_on_how_many_are_made_together(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    images, views = (noise(12, 20, 7) * 255).byte(), SimCLRAugment(size)
    wanted = views(images, generator(3))
    for together, alone in ((1, 1), (5, 10_000), (512, 10_000)):
        monkeypatch.setattr(augment, "CPU_TOGETHER", together)
        monkeypatch.setattr(augment, "CPU_ALONE_PX", alone)
        close(views(images, generator(3)), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_views_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generator draws other numbers, so the draws are made on the CPU; a smooth picture, see the resizing above."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    images = torch.stack([4 * x, 6 * y, 2 * (x + y)]).byte().expand(16, 3, 40, 60)
    views = SimCLRAugment(32)
    boxes, drawn = random_boxes(16, 40, 60, 1.0, 0.08, generator()), views.draw(16, generator())
    made: dict[str, Tensor] = {}
    monkeypatch.setattr(augment, "random_boxes", lambda *_: tuple(side.to(device) for side in boxes))
    monkeypatch.setattr(SimCLRAugment, "draw", lambda *_: tuple(table.to(device) for table in drawn))
    for device in ("cpu", "cuda"):
        made[device] = views(images.to(device), torch.Generator(device)).cpu()
    close(made["cuda"], made["cpu"], 3 / 255)


def test_no_pictures_give_no_views() -> None:
    crops = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    assert SimCLRAugment(16).after_crop(crops, generator()).shape == (0, 3, 16, 16)


def test_one_picture_is_a_batch_too() -> None:
    assert SimCLRAugment(16)((noise(1, 20, 7) * 255).byte(), generator()).shape == (1, 3, 16, 16)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version is 3, wanted 1 or 2"):
        SimCLRAugment(16, version=3)


@pytest.mark.parametrize("strength", [-0.1, 1.3])
def test_strengths_that_the_official_code_refuses_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength is {strength}, wanted 0 to 1.25"):
        SimCLRAugment(16, strength=strength)
