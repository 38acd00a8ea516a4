"""Augmentation beside lightly's SimCLRTransform: two-view samples per second and core, and whether both draw the same.

    python benchmarks/augment.py --peer-python .venv-peers/bin/python

Both sides run in processes of their own, in turn, several times, on one thread, with equal parameters: smallest crop 0.08,
strength 1, mirrored half of the time, no rotation and no normalisation, blur off at 32 px, on at 224 px (sigma 0.1 to 2).
Decoding is not timed. At 32 px ours starts from uint8 tensors in memory, as training does with small pictures. At
500 x 375 -> 224 px both start from the same Pillow pictures: ours crops them one by one, as a worker of the streaming loader
does, and changes the crops as a batch; a second row starts from uint8 tensors instead. lightly starts from Pillow
pictures throughout and returns single views, which are not stacked into a batch; ours are.

Then one step at a time, the steps that should be equal together, and whole views: the same pictures many times through both,
a number measured on every view, and the largest distance between its two distributions (two-sample Kolmogorov-Smirnov).
Chance exceeds `limit` once in a thousand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import run_side, seconds

SECONDS_PER_RATE = 2.0
SPEEDS = {
    "32 px": ("32 px", "32 px"),
    "500 x 375 -> 224 px": ("large", "large"),
    "500 x 375 -> 224 px, from tensors": ("large tensors", "large"),
}
KNOWN = {
    "crop: a": "lightly (torchvision) draws the logarithm of the aspect evenly, ours the aspect, as SimCLR; in a wide picture "
    "the wider boxes of ours fit a little more often",
    "saturation": "lightly (torchvision) blends with the grey picture, ours scales HSV saturation, as SimCLR: the value of a "
    "pixel stays, its luma does not, so bright and dark views are further apart",
    "blur": "lightly's is Pillow's: three box blurs, edges repeated; ours the Gaussian, 23 taps, zeros outside, as SimCLR",
    "views": "the three above; lightly's crop is bilinear, ours bicubic, as SimCLR. Too small to see here: lightly turns "
    "contrast about the mean of the grey picture, ours about each channel's, as SimCLR; lightly has 8 bits after every step",
}
OPERATIONS = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "blur")
EQUALS = ("flip", "brightness", "contrast", "hue", "grey")
"""With these, and our crop made bilinear for once, nothing should be left that differs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3000, help="views per step in the comparison of distributions")
    parser.add_argument("--json", type=Path, help="also write every rate and distance there")
    parser.add_argument("--side", choices=("ours", "lightly"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side is None:
        compare(arguments)
    elif arguments.measure:
        np.savez(arguments.measure, **measure(arguments.side, arguments.draws))
    else:
        print(json.dumps(rates_of(arguments.side)))


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides in turn and print both tables."""
    sides = {"ours": sys.executable, "lightly": arguments.peer_python}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side, python in sides.items():
            found[side].append(json.loads(run_side(python, __file__, side)))
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.npz" for side in sides}
        for side, python in sides.items():
            run_side(python, __file__, side, "--measure", files[side], "--draws", arguments.draws)
        measured = {side: dict(np.load(file)) for side, file in files.items()}
    show_rates(found)
    distances = show_distances(measured["ours"], measured["lightly"])
    if arguments.json:
        arguments.json.write_text(json.dumps({"samples_per_s": found, "distances": distances}, indent=2) + "\n")


def smooth_pictures(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Clouds of colour with some grain, (count, height, width, 3): neighbours are alike as in photographs."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    clouds = [np.asarray(Image.fromarray(cloud).resize((width, height), Image.Resampling.BICUBIC)) for cloud in coarse]
    return (np.stack(clouds) + random.normal(0, 8, (count, height, width, 3))).clip(0, 255).astype(np.uint8)


# --- speed ------------------------------------------------------------------------------------------------------------


def rates_of(side: str) -> dict[str, float]:
    small, large = smooth_pictures(256, 32, 32), smooth_pictures(16, 375, 500)
    steps = our_steps(small, large) if side == "ours" else lightly_steps(small, large)
    return {name: rate(step, count) for name, (step, count) in steps.items()}


def rate(step: Callable[[], object], samples: int) -> float:
    """Samples per second of the median step, after a warm-up."""
    step()
    took: list[float] = []
    while sum(took) < SECONDS_PER_RATE or len(took) < 3:
        took.append(seconds(step))
    return samples / statistics.median(took)


def our_steps(small: NDArray[np.uint8], large: NDArray[np.uint8]) -> dict[str, tuple[Callable[[], object], int]]:
    from train.augment import SimCLRAugment, crop_views

    generator = torch.Generator().manual_seed(0)
    small_images = torch.from_numpy(small).permute(0, 3, 1, 2).contiguous()
    large_images = torch.from_numpy(large).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(picture) for picture in large]
    at_32, at_224 = SimCLRAugment(32, blur=False), SimCLRAugment(224)

    def streamed() -> Tensor:
        crops = np.empty((2, len(pictures), 224, 224, 3), np.uint8)
        for place, picture in enumerate(pictures):
            crops[:, place] = crop_views(picture, (224, 224), 0.08, generator)
        return at_224.after_crop(torch.from_numpy(crops).permute(0, 1, 4, 2, 3).flatten(0, 1), generator)

    return {
        "32 px": (lambda: at_32(torch.cat([small_images, small_images]), generator), len(small)),
        "large": (streamed, len(large)),
        "large tensors": (lambda: at_224(torch.cat([large_images, large_images]), generator), len(large)),
    }


def lightly_steps(small: NDArray[np.uint8], large: NDArray[np.uint8]) -> dict[str, tuple[Callable[[], object], int]]:
    from lightly.transforms import SimCLRTransform

    at_32 = SimCLRTransform(input_size=32, gaussian_blur=0.0, normalize=None)
    at_224 = SimCLRTransform(input_size=224, normalize=None)
    small_pictures, large_pictures = ([Image.fromarray(picture) for picture in pictures] for pictures in (small, large))
    return {
        "32 px": (lambda: [at_32(picture) for picture in small_pictures], len(small)),
        "large": (lambda: [at_224(picture) for picture in large_pictures], len(large)),
    }


def show_rates(found: dict[str, list[dict[str, float]]]) -> None:
    print("two-view samples/s on one core   ours (range)              lightly (range)           ratio")
    for name, keys in SPEEDS.items():
        ours, theirs = ([run[key] for run in found[side]] for side, key in zip(found, keys, strict=True))
        cells = [f"{statistics.median(rates):6.0f} ({min(rates):.0f} to {max(rates):.0f})" for rates in (ours, theirs)]
        print(f"{name:33}{cells[0]:26}{cells[1]:26}{statistics.median(ours) / statistics.median(theirs):.1f}")


# --- distributions ----------------------------------------------------------------------------------------------------


def measure(side: str, draws: int) -> dict[str, NDArray[np.float64]]:
    """A number per view for every row of the table."""
    torch.manual_seed(0)
    np.random.seed(0)
    draw = our_views if side == "ours" else lightly_views
    found: dict[str, NDArray[np.float64]] = {}
    for name, pictures, size_px, steps, count in experiments(draws):
        parts = [measures_of(name, views) for views in draw(pictures, size_px, steps, count)]
        found |= {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return found


def experiments(draws: int) -> Iterator[tuple[str, NDArray[np.uint8], int, tuple[str, ...], int]]:
    """Name, pictures, size of the views, what is on besides the crop, number of views."""
    y, x = np.mgrid[:375, :500]
    ramp = np.stack([x / 499, y / 374, np.zeros((375, 500))], 2)
    yield "crop", (ramp[None] * 255).round().astype(np.uint8), 64, (), draws
    yield "flip", (ramp[None] * 255).round().astype(np.uint8), 64, ("flip",), draws
    orange = np.full((1, 32, 32, 3), (150, 105, 60), np.uint8)
    yield "brightness", orange // 2, 32, ("brightness",), draws
    halves = np.repeat([90, 140], 16).astype(np.uint8)[None, :, None, None]
    yield "contrast", np.broadcast_to(halves, (1, 32, 32, 3)).copy(), 32, ("contrast",), draws
    yield "saturation", orange, 32, ("saturation",), draws
    yield "hue", orange, 32, ("hue",), draws
    yield "grey", orange, 32, ("grey",), draws
    grain = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    yield "blur", grain, 224, ("blur",), draws // 4
    yield "equals at 32 px", smooth_pictures(100, 32, 32), 32, EQUALS, 2 * draws
    yield "views at 32 px", smooth_pictures(100, 32, 32), 32, OPERATIONS[:-1], 2 * draws
    yield "views at 224 px", smooth_pictures(20, 375, 500), 224, OPERATIONS, draws // 3


def uncropped(steps: tuple[str, ...]) -> bool:
    """Where the crop would blur what is looked at."""
    return steps in {("contrast",), ("blur",)}


def our_views(pictures: NDArray[np.uint8], size_px: int, steps: tuple[str, ...], count: int) -> Iterator[Tensor]:
    from train import augment
    from train.augment import SimCLRAugment

    class Only(SimCLRAugment):
        def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            turns, amounts = super().draw(count, generator)
            on = torch.tensor([OPERATIONS.index(step) for step in steps])
            return turns.where(torch.isin(turns, on), torch.tensor(-1)), amounts

    def bilinear(crop: Tensor, size_px: tuple[int, int], **_: object) -> Tensor:
        return interpolate(crop, size_px, mode="bilinear", antialias=True)

    views, generator = Only(size_px), torch.Generator().manual_seed(0)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    with mock.patch.object(augment, "interpolate", bilinear if steps == EQUALS else interpolate):
        for first in range(0, count, 100):
            batch = images[torch.arange(first, min(first + 100, count)) % len(images)]
            yield views.after_crop(batch, generator) if uncropped(steps) else views(batch, generator)


def lightly_views(pictures: NDArray[np.uint8], size_px: int, steps: tuple[str, ...], count: int) -> Iterator[Tensor]:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    transform = SimCLRViewTransform(
        input_size=size_px,
        cj_prob=0.8 * bool(set(steps) & set(OPERATIONS[1:5])),
        cj_bright=0.8 * ("brightness" in steps),
        cj_contrast=0.8 * ("contrast" in steps),
        cj_sat=0.8 * ("saturation" in steps),
        cj_hue=0.2 * ("hue" in steps),
        min_scale=1.0 if uncropped(steps) else 0.08,
        random_gray_scale=0.2 * ("grey" in steps),
        gaussian_blur=0.5 * ("blur" in steps),
        hf_prob=0.5 * ("flip" in steps),
        normalize=None,
    )
    images = [Image.fromarray(picture) for picture in pictures]
    for first in range(0, count, 100):
        yield torch.stack([transform(images[number % len(images)]) for number in range(first, min(first + 100, count))])


def measures_of(name: str, views: Tensor) -> dict[str, NDArray[np.float64]]:
    value, low = views.amax(1), views.amin(1)
    means = views.mean((2, 3))
    inner = views[:, :, 24:-24, 24:-24] if name == "blur" else views
    grain = (inner.diff(dim=3).abs().mean((1, 2, 3)) + inner.diff(dim=2).abs().mean((1, 2, 3))) / 2
    saturation = ((value - low) / value.clamp(min=1e-6)).mean((1, 2))
    is_grey = ((value - low).amax((1, 2)) < 1.5 / 255).float()
    if name == "crop":
        found = crop_of(views)
    elif name.startswith(("equals", "views")):
        found = {"red": means[:, 0], "green": means[:, 1], "blue": means[:, 2], "standard deviation": views.std((1, 2, 3))}
        found |= {"saturation": saturation, "hue": hue_of(means), "gradient": grain, "share of grey": is_grey}
    else:
        one = {
            "flip": views[:, 0, :, 0].mean(1) > views[:, 0, :, -1].mean(1),
            "brightness": value.mean((1, 2)),
            "grey": is_grey,
        }
        one |= {"contrast": views.std((1, 2, 3)), "saturation": saturation, "hue": hue_of(means), "blur": grain}
        return {name: one[name].double().numpy()}
    return {f"{name}: {key}": values.double().numpy() for key, values in found.items()}


def crop_of(views: Tensor) -> dict[str, Tensor]:
    """Where in the ramp (red grows with x, green with y) a view was cut."""
    left, right = views[:, 0, :, 0].mean(1), views[:, 0, :, -1].mean(1)
    top, bottom = views[:, 1, 0].mean(1), views[:, 1, -1].mean(1)
    width, height = 500 * (right - left), 375 * (bottom - top)
    return {"area": width * height, "aspect": width / height, "x of the middle": left + right, "y of the middle": top + bottom}


def hue_of(means_B3: Tensor) -> Tensor:
    """Angle of a colour in the plane across the grey axis, in turns; 0 for grey."""
    red, green, blue = means_B3.T
    angle = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * torch.pi)
    return angle.where(means_B3.amax(1) - means_B3.amin(1) > 2 / 255, torch.tensor(0.0))


def distance(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Two-sample Kolmogorov-Smirnov, after rounding to half of 1/255 of the range: one side has 8 bits only."""
    step = (max(ours.max(), theirs.max()) - min(ours.min(), theirs.min())) / 510 or 1.0
    ranked = [np.sort(np.round(values / step)) for values in (ours, theirs)]
    below = [np.searchsorted(values, np.concatenate(ranked), side="right") / len(values) for values in ranked]
    return float(np.abs(below[0] - below[1]).max())


def show_distances(ours: dict[str, NDArray[np.float64]], theirs: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    print("\nsame augmentation?                    ours: mean (sd)       lightly: mean (sd)    distance  limit")
    distances: dict[str, float] = {}
    for name, values in ours.items():
        distances[name] = found = distance(values, theirs[name])
        limit = 1.95 * (1 / len(values) + 1 / len(theirs[name])) ** 0.5
        known = next((key for key in KNOWN if name.startswith(key)), None)
        verdict = "same" if found <= limit else f"differs, see {known}" if known else "DIFFERS"
        cells = [f"{side.mean():10.4g} ({side.std():.4g})" for side in (values, theirs[name])]
        print(f"{name:36}{cells[0]:22}{cells[1]:22}{found:6.3f}  {limit:6.3f}  {verdict}")
    print("\nKnown differences, kept because ours follows google-research/simclr (data_util.py):")
    for key, reason in KNOWN.items():
        print(f"  {key}: {reason}")
    return distances


if __name__ == "__main__":
    main()
