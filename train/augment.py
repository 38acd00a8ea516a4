"""SimCLR's random views, batched on tensors with parameters of its own for every image: the only randomness of training.

Order and numbers follow google-research/simclr, data_util.py: crop and resize, flip, colour jitter, grey, blur; values stay
in [0, 1] and no mean is subtracted. Cropping and blurring are both a product of the image with one small matrix per axis,
so a whole batch is two matrix multiplications: this is what makes it fast on a CPU.

Shapes: B images, C = 3 channels, H x W pixels, O output pixels, I input pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 100
JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
BLUR_SIGMA_RANGE = (0.1, 2.0)
LUMA = (0.2989, 0.587, 0.114)


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
        self.height_px, self.width_px = (size_px, size_px) if isinstance(size_px, int) else size_px
        self.strength, self.blur, self.version, self.crop_area = strength, blur, version, crop_area

    def __call__(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Views float32 (B, 3, height_px, width_px) in [0, 1] of uint8 (B, 3, H, W); `generator` lives on the same device."""
        views = self._crop_and_flip(images_BCHW.float() / 255, generator)
        views = self._jitter(views, generator)
        views = self._grey(views, generator)
        if self.blur:
            views = self._blur(views, generator)
        return views

    def _crop_and_flip(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        aspect = self.width_px / self.height_px
        top, left, crop_height, crop_width = random_boxes(len(images), height, width, aspect, self.crop_area, generator)
        rows_BOI = resize_matrix(top, crop_height, self.height_px, height)
        columns_BOI = resize_matrix(left, crop_width, self.width_px, width)
        flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        columns_BOI = torch.where(flipped[:, None, None], columns_BOI.flip(1), columns_BOI)
        return per_axis(images, rows_BOI, columns_BOI).clamp_(0, 1)

    def _jitter(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness, contrast, saturation, hue, in an order drawn for every image; clipped after each."""
        device = views.device
        amount = 0.8 * self.strength
        factors = 1 + amount * _uniform((3, len(views)), -1, 1, generator, device)
        shifts = 0.2 * self.strength * _uniform((len(views),), -1, 1, generator, device)
        order_B4 = torch.rand((len(views), 4), generator=generator, device=device).argsort(1)
        order_B4[torch.rand(len(views), generator=generator, device=device) >= JITTER_PROBABILITY] = -1
        for turn in range(4):
            for operation in range(4):
                chosen = (order_B4[:, turn] == operation).nonzero()[:, 0]
                if operation == 0:
                    changed = brightness(views[chosen], factors[0, chosen], self.version)
                elif operation == 1:
                    changed = contrast(views[chosen], factors[1, chosen])
                elif operation == 2:
                    changed = saturation(views[chosen], factors[2, chosen])
                else:
                    changed = hue(views[chosen], shifts[chosen])
                views[chosen] = changed.clamp_(0, 1)
        return views

    def _grey(self, views: Tensor, generator: torch.Generator) -> Tensor:
        chosen = (torch.rand(len(views), generator=generator, device=views.device) < GREY_PROBABILITY).nonzero()[:, 0]
        views[chosen] = grey(views[chosen])
        return views

    def _blur(self, views: Tensor, generator: torch.Generator) -> Tensor:
        sigmas = _uniform((len(views),), *BLUR_SIGMA_RANGE, generator, views.device)
        drawn = torch.rand(len(views), generator=generator, device=views.device) < BLUR_PROBABILITY
        chosen = drawn.nonzero()[:, 0]
        radius = self.height_px // 10 // 2
        rows = blur_matrix(sigmas[chosen], self.height_px, radius)
        columns = blur_matrix(sigmas[chosen], self.width_px, radius)
        views[chosen] = per_axis(views[chosen], rows, columns).clamp_(0, 1)
        return views


def random_boxes(
    count: int, height: int, width: int, target_aspect: float, crop_area: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width (each (B,), pixels) of crops: area U(crop_area, 1), aspect U(3/4, 4/3) x the target's.

    The first of 100 tries that fits inside the image counts, else the whole image (`sample_distorted_bounding_box`).
    """
    device = generator.device
    area = height * width * _uniform((count, CROP_ATTEMPTS), crop_area, 1, generator, device)
    aspect = target_aspect * _uniform((count, CROP_ATTEMPTS), *ASPECT_RANGE, generator, device)
    heights, widths = (area / aspect).sqrt(), (area * aspect).sqrt()
    fits = (heights <= height) & (widths <= width)
    first = fits.int().argmax(1, keepdim=True)
    none_fits = ~fits.any(1)
    crop_height = heights.gather(1, first)[:, 0].masked_fill(none_fits, height)
    crop_width = widths.gather(1, first)[:, 0].masked_fill(none_fits, width)
    top, left = torch.rand((2, count), generator=generator, device=device)
    return top * (height - crop_height), left * (width - crop_width), crop_height, crop_width


def resize_matrix(start: Tensor, length: Tensor, size_out: int, size_in: int) -> Tensor:
    """Weights (B, O, I) that resample [start, start + length) to `size_out` pixels: bicubic (a = -0.5) with anti-aliasing.

    Like Pillow's and TensorFlow's antialiased resize of the cropped image; pixels outside the crop get no weight.
    """
    scale = (length / size_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weights = cubic_kernel((pixel - centre) / scale.clamp(min=1))
    inside = (pixel > start[:, None, None] - 0.5) & (pixel < (start + length)[:, None, None] + 0.5)
    weights = weights * inside
    return weights / weights.sum(2, keepdim=True)


def cubic_kernel(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def blur_matrix(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Banded Gaussian (B, size, size) with `radius` taps on either side; beyond the border there are zeros ('SAME')."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    taps = torch.exp(-(offset**2) / (2 * sigma[:, None] ** 2))
    total = taps.sum(1)[:, None, None]
    position = torch.arange(size, device=sigma.device)
    distance = position[:, None] - position[None]
    band = torch.exp(-(distance**2) / (2 * sigma[:, None, None] ** 2)) * (distance.abs() <= radius)
    return band / total


def per_axis(images_BCII: Tensor, rows_BOI: Tensor, columns_BOI: Tensor) -> Tensor:
    """Apply one matrix per image to its rows and one to its columns."""
    return rows_BOI[:, None] @ images_BCII @ columns_BOI[:, None].transpose(2, 3)


def brightness(images: Tensor, factor_B: Tensor, version: int) -> Tensor:
    """Version 2 multiplies by max(factor, 0); version 1 adds factor - 1."""
    factor = _per_image(factor_B)
    return images * factor.clamp(min=0) if version == 2 else images + (factor - 1)


def contrast(images: Tensor, factor_B: Tensor) -> Tensor:
    """Scale the distance from each channel's own mean."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + (images - mean) * _per_image(factor_B)


def saturation(images: Tensor, factor_B: Tensor) -> Tensor:
    """Scale HSV saturation, hue and value kept: x' = v - (v - x) * min(factor, 1 / s)."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    limit = value / (value - low).clamp(min=1e-6)
    return value - (value - images) * torch.minimum(_per_image(factor_B).clamp(min=0), limit)


def hue(images: Tensor, shift_B: Tensor) -> Tensor:
    """Turn HSV hue by `shift` of a full circle, saturation and value kept."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    sextant = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sextant = torch.where(value == red, (green - blue) / safe, sextant) + 6 * shift_B[:, None, None]
    turned = [value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for n in (5, 3, 1) for k in [(n + sextant) % 6]]
    return torch.stack(turned, 1)


def grey(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    weights = images.new_tensor(LUMA)[:, None, None]
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=device)


def _per_image(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]
