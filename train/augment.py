"""SimCLR's random views, batched on tensors with parameters of its own for every image: the only randomness of training.

Steps, order and numbers follow google-research/simclr, tf2/data_util.py: crop and resize, flip, colour jitter, grey, blur;
values stay in [0, 1] and no mean is subtracted. Where we differ on purpose:

- Boxes: area uniform, as the paper says (appendix A); TensorFlow's `sample_distorted_bounding_box` draws the height
  uniformly (small crops are more frequent) and caps it at the picture where we draw again.
- Resize: bicubic (a = -0.5, nothing from beyond the crop) as TF 2's `tf.image.resize`, but with anti-aliasing, which that call
  leaves off (TF 1's `resize_bicubic` has a = -0.75 besides): serving shrinks with anti-aliasing, so training must. The
  crop is rounded to 8 bits like a served picture, which clips overshoot; officially that waits for the first colour step.
- Blur: each image has its own sigma; there, all of a batch share one, and only whether to blur is drawn per image.

Shapes: B images, 3 channels, H x W pixels, O output pixels, I input pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 100
FLIP_PROBABILITY, JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY = 0.5, 0.8, 0.2, 0.5
BLUR_SIGMA_RANGE = (0.1, 2.0)
LUMA = (0.2989, 0.587, 0.114)

LARGEST_STRENGTH = 1.25
"""Beyond, contrast and saturation could be negative, which `tf.image.random_contrast` refuses."""

# On a CPU large images are changed one by one, so that all steps find them in the core's cache, and small ones many
# together, for fewer calls. Best on a core with 1 MiB of L2 cache, and flat around it.
CPU_ALONE_PX = 96
CPU_TOGETHER = 512


class SimCLRAugment:
    """One random view of every image of a batch.

    `strength` is the paper's s: 1.0 for ImageNet, 0.5 for CIFAR. `version` 2 multiplies the brightness, 1 adds to it.
    `crop_area` is the smallest share of the picture that a view shows.
    Paper: section 3 and appendix A.
    """

    def __init__(
        self,
        size_px: int | tuple[int, int],
        strength: float = 1.0,
        blur: bool = True,
        version: int = 2,
        *,
        crop_area: float = 0.08,
    ) -> None:
        if version not in (1, 2):
            raise ValueError(f"version is {version}, wanted 1 or 2 (SimCLR v1 or v2 brightness)")
        if not 0 <= strength <= LARGEST_STRENGTH:
            raise ValueError(f"strength is {strength}, wanted 0 to {LARGEST_STRENGTH}: 1 for ImageNet, 0.5 for CIFAR")
        self.height_px, self.width_px = (size_px, size_px) if isinstance(size_px, int) else size_px
        self.strength, self.blur, self.version, self.crop_area = strength, blur, version, crop_area

    def __call__(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Views float32 (B, 3, height_px, width_px) in [0, 1] of uint8 (B, 3, H, W); `generator` lives on the same device."""
        return self.after_crop(self.crop(images_BCHW, generator), generator)

    def crop(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """A random box of every image, resized: uint8 (B, 3, height_px, width_px)."""
        size_px = self.height_px, self.width_px
        height, width = images_BCHW.shape[-2:]
        boxes = random_boxes(len(images_BCHW), height, width, size_px[1] / size_px[0], self.crop_area, generator)
        if images_BCHW.is_cuda:
            return resize_by_matrices(images_BCHW, boxes, size_px)
        corners = torch.stack(boxes, 1).tolist()
        return torch.cat([resize(image[None], box, size_px) for image, box in zip(images_BCHW, corners, strict=True)])

    def after_crop(self, views_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Flip, colour jitter, grey and blur of crops: float32 in [0, 1] of uint8, both (B, 3, H, W)."""
        turns_B7, amounts_B7 = self.draw(len(views_BCHW), generator)
        turns = turns_B7.tolist()
        out = torch.empty(views_BCHW.shape, device=views_BCHW.device)
        large = out.shape[2] * out.shape[3] >= CPU_ALONE_PX**2
        together = len(out) if out.is_cuda else 1 if large else CPU_TOGETHER
        for first in range(0, len(out), max(together, 1)):
            part = slice(first, first + together)
            out[part].copy_(views_BCHW[part]).div_(255)
            self._change(out[part], turns[part], amounts_B7[part])
        return out

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The operation (its number in `_operations`, -1 for none) of every turn, and every operation's amount: (B, 7) each."""
        device = generator.device
        jitter, hue_shift = 0.8 * self.strength, 0.2 * self.strength
        factor = (1 - jitter, 1 + jitter)
        brightness = (-jitter, jitter) if self.version == 1 else factor
        ranges = [(0.0, 0.0), brightness, factor, factor, (-hue_shift, hue_shift), (0.0, 0.0), BLUR_SIGMA_RANGE]
        low, high = torch.tensor(ranges, device=device).T
        amounts_B7 = low + (high - low) * torch.rand((count, 7), generator=generator, device=device)
        blur = BLUR_PROBABILITY if self.blur else 0.0
        probability = torch.tensor([FLIP_PROBABILITY, *4 * [JITTER_PROBABILITY], GREY_PROBABILITY, blur], device=device)
        chance_B4 = torch.rand((count, 4), generator=generator, device=device)
        order_B4 = torch.rand((count, 4), generator=generator, device=device).argsort(1)
        turns_B7 = torch.arange(7, device=device).repeat(count, 1)
        turns_B7[:, 1:5] = 1 + order_B4
        return turns_B7.masked_fill(chance_B4[:, [0, 1, 1, 1, 1, 2, 3]] >= probability, -1), amounts_B7

    @property
    def _operations(self) -> tuple[Callable[[Tensor, Tensor], object], ...]:
        return (flip, add_brightness if self.version == 1 else scale_brightness, contrast, saturation, hue, grey, blur)

    def _change(self, views: Tensor, turns: list[list[int]], amounts_B7: Tensor) -> None:
        """Take all turns on some views, in place; clipped after each."""
        for operations in zip(*turns, strict=True):
            for number in set(operations) - {-1}:
                change, amounts = self._operations[number], amounts_B7[:, number]
                if len(views) == 1:
                    change(views, amounts)
                    views.clamp_(0, 1)
                    continue
                rows = [row for row, operation in enumerate(operations) if operation == number]
                index = torch.tensor(rows, device=views.device)
                chosen = views.index_select(0, index)
                change(chosen, amounts.index_select(0, index))
                views.index_copy_(0, index, chosen.clamp_(0, 1))


# --- crop and resize --------------------------------------------------------------------------------------------------


def crop_views(
    picture: Image.Image,
    size_px: tuple[int, int],
    crop_area: float,
    generator: torch.Generator,
    target_aspect: float | None = None,
    *,
    count: int = 2,
) -> NDArray[np.uint8]:
    """Random boxes of one RGB picture, resized to (height, width): uint8 (count, h, w, 3). What a worker does of `crop`.

    `target_aspect` (width / height) is that of `size_px` unless given.
    """
    aspect = size_px[1] / size_px[0] if target_aspect is None else target_aspect
    boxes = random_boxes(count, picture.height, picture.width, aspect, crop_area, generator)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    crops = [resize(image, box, size_px) for box in torch.stack(boxes, 1).tolist()]
    return torch.cat(crops).permute(0, 2, 3, 1).contiguous().numpy()


def random_boxes(
    count: int, height: int, width: int, target_aspect: float, crop_area: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width (each int64 (B,), pixels) of crops: area U(crop_area, 1), aspect U(3/4, 4/3) x the target's.

    The first of 100 tries that fits inside the image counts, else the whole image.
    """
    device = generator.device
    low = torch.tensor([crop_area, ASPECT_RANGE[0]], device=device)[:, None, None]
    high = torch.tensor([1, ASPECT_RANGE[1]], device=device)[:, None, None]
    area, aspect = low + (high - low) * torch.rand((2, count, CROP_ATTEMPTS), generator=generator, device=device)
    area, aspect = area * (height * width), aspect * target_aspect
    heights, widths = (area / aspect).sqrt_().round_(), (area * aspect).sqrt_().round_()
    fits = (heights <= height) & (widths <= width)
    first = fits.int().argmax(1, keepdim=True)
    whole = ~fits.any(1)
    crop_height = heights.gather(1, first)[:, 0].clamp(min=1).masked_fill(whole, height)
    crop_width = widths.gather(1, first)[:, 0].clamp(min=1).masked_fill(whole, width)
    place = torch.rand((2, count), generator=generator, device=device)
    top, left = place[0] * (height + 1 - crop_height), place[1] * (width + 1 - crop_width)
    return top.long(), left.long(), crop_height.long(), crop_width.long()


def resize(image: Tensor, box: list[int], size_px: tuple[int, int]) -> Tensor:
    """A box of one uint8 image (1, 3, H, W), resized as Pillow does, bicubic with anti-aliasing; within 1/255 of it."""
    top, left, height, width = box
    layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format
    crop = image[..., top : top + height, left : left + width].contiguous(memory_format=layout)
    return interpolate(crop, size_px, mode="bicubic", antialias=True)


def resize_by_matrices(images: Tensor, boxes: tuple[Tensor, Tensor, Tensor, Tensor], size_px: tuple[int, int]) -> Tensor:
    """The same of a batch of uint8 (B, 3, H, W) and as many boxes, in two matrix products: for a GPU."""
    top, left, height, width = boxes
    rows_BOI = resize_matrix(top, height, size_px[0], images.shape[2])
    columns_BOI = resize_matrix(left, width, size_px[1], images.shape[3])
    return per_axis(images.float(), rows_BOI, columns_BOI).round_().clamp_(0, 255).byte()


def per_axis(images_BCII: Tensor, rows_BOI: Tensor, columns_BOI: Tensor) -> Tensor:
    """Apply one matrix per image to its rows and one to its columns."""
    return rows_BOI[:, None] @ images_BCII @ columns_BOI[:, None].mT


def resize_matrix(start: Tensor, length: Tensor, size_out: int, size_in: int) -> Tensor:
    """Weights (B, O, I) that resample [start, start + length) to `size_out` pixels: bicubic (a = -0.5) with anti-aliasing.

    Like Pillow's resize of the cropped image; pixels outside the crop get no weight.
    """
    start, scale = start[:, None, None], (length / size_out)[:, None, None]
    centre = start + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weights = cubic_kernel((pixel - centre) / scale.clamp(min=1))
    weights *= (pixel > start) & (pixel < start + length[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def cubic_kernel(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, as a sum of clipped powers: on a CPU, choosing between pieces is slow."""
    x = x.abs()
    below_2, below_1 = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    return 0.5 * below_2 * below_2 * (below_2 - 1) + below_1 * below_1 * (1 - 2 * below_1)


# --- what is done to crops: each changes images (n, 3, H, W) in place, by an amount (n,) of its own for every image -------


def flip(images: Tensor, _: Tensor) -> None:
    """Left to right."""
    images.copy_(images.flip(3))


def scale_brightness(images: Tensor, factor: Tensor) -> None:
    """Version 2."""
    images.mul_(_per_image(factor))


def add_brightness(images: Tensor, amount: Tensor) -> None:
    """Version 1."""
    images.add_(_per_image(amount))


def contrast(images: Tensor, factor: Tensor) -> None:
    """Scale the distance from each channel's own mean."""
    rest = images.mean((2, 3), keepdim=True) * (1 - _per_image(factor))
    images.mul_(_per_image(factor)).add_(rest)


def saturation(images: Tensor, factor: Tensor) -> None:
    """Scale HSV saturation up to 1, hue and value kept: x' = v - (v - x) * min(factor, 1 / s)."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    limit = value / (value - low).clamp_(min=1e-6)
    torch.lerp(value, images, torch.minimum(limit, _per_image(factor)), out=images)


def hue(images: Tensor, shift: Tensor) -> None:
    """Turn HSV hue by `shift` of a full circle (at most a third), saturation and value kept.

    Angles count sixths of the circle from red, -3 to 3: green is 2, blue -2. A channel is at the value up to 1 from its
    own colour, at the lowest from 2 on, and falls evenly between; the angle of a colour follows from that.
    """
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = (value - low).clamp_(min=1e-6)
    angle = (green + blue).sub_(red).sub_(value).div_(chroma).add_(2)  # its size; where green leads, its sign is +
    angle = angle.copysign_(green - blue).add_(6 * shift[:, None, None])
    own = images.new_tensor([0, 2, -2])[:, None, None]
    nearness = (angle[:, None] - own).abs_().sub_(3).abs_()  # 3 less the distance on the circle
    torch.addcmul(low[:, None], chroma[:, None], nearness.sub_(1).clamp_(0, 1), out=images)


def grey(images: Tensor, _: Tensor) -> None:
    """Luma in all three channels."""
    red, green, blue = images.unbind(1)
    images.copy_((red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None])


def blur(images: Tensor, sigma: Tensor) -> None:
    """Gaussian of 2 * ((H // 10) // 2) + 1 taps per axis, zeros beyond the border ('SAME')."""
    height, width = images.shape[2:]
    radius = height // 10 // 2
    if len(images) == 1 and not images.is_cuda:
        _blur_by_shifts(images, _taps(sigma, torch.arange(radius + 1), radius)[0].tolist())
    else:
        rows, columns = (_taps(sigma, _distances(size, sigma.device), radius) for size in (height, width))
        images.copy_(per_axis(images, rows, columns))


def _blur_by_shifts(image: Tensor, taps: list[float]) -> None:
    """Add the image to itself, shifted by 1, 2, ...: of one large image on a CPU most of a matrix would be zeros."""
    down = image * taps[0]
    for shift, tap in enumerate(taps[1:], start=1):
        if tap:
            down[:, :, shift:].add_(image[:, :, :-shift], alpha=tap)
            down[:, :, :-shift].add_(image[:, :, shift:], alpha=tap)
    torch.mul(down, taps[0], out=image)
    for shift, tap in enumerate(taps[1:], start=1):
        if tap:
            image[..., shift:].add_(down[..., :-shift], alpha=tap)
            image[..., :-shift].add_(down[..., shift:], alpha=tap)


def _taps(sigma: Tensor, distance: Tensor, radius: int) -> Tensor:
    """Weights (n, *distance.shape) at these distances of a Gaussian with `radius` taps on either side.

    Weights below e^-16 of the largest are left out: beneath the last bit of a float32, and slow on a CPU as denormal numbers.
    """
    variance = (sigma**2).view(-1, *[1] * distance.ndim)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    total = torch.exp(-(offset**2) / (2 * sigma[:, None] ** 2)).sum(1).view_as(variance)
    exponent = -(distance**2) / (2 * variance)
    return torch.exp(exponent) * ((distance <= radius) & (exponent > -16)) / total


def _distances(size: int, device: torch.device) -> Tensor:
    place = torch.arange(size, device=device)
    return (place[:, None] - place).abs()


def _per_image(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]
