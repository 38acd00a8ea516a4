"""Samples -> pixels in memory -> batches, and the order in which training takes them."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from serve.contract import Preprocess
from serve.errors import SourceError
from serve.preprocess import ImageError, decode
from serve.samples import Sample, Unreadable
from serve.sources import read_batches, read_bytes
from train.augment import SimCLRAugment
from train.positives import Tracks

MEMORY_SHARE = 0.5
"""Pixels may take this share of the machine's memory."""


@dataclass(frozen=True)
class Batch:
    """The pictures of one step on one process, uint8: whole frames (b, 3, H, W), or a crop for each view (2, b, 3, H, W)."""

    pixels: Tensor
    rows: Tensor
    """Which samples they are, (b,)."""
    partners: Tensor | None = None
    """Whole frames of the second views, where these are of other pictures."""

    def __len__(self) -> int:
        return len(self.rows)

    def views(self, part: slice, augment: SimCLRAugment, generator: torch.Generator) -> Tensor:
        """Both views of some of the pictures, stacked: row i and row i + n are a pair. Float (2n, 3, H, W) in [0, 1]."""
        device = generator.device
        if self.pixels.ndim == 5:
            views = augment.after_crop(self.pixels[:, part].to(device, non_blocking=True).flatten(0, 1), generator)
        else:
            first = self.pixels[part].to(device, non_blocking=True)
            second = first if self.partners is None else self.partners[part].to(device, non_blocking=True)
            views = augment(torch.cat([first, second]), generator)
        return views.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Pixels:
    """Decoded pictures: uint8 (N, 3, H, W), the sample of each row, and what could not be read."""

    images: Tensor
    samples: tuple[Sample, ...]
    unreadable: tuple[Unreadable, ...]
    traits: Counter[str] = field(default_factory=Counter)
    """How many are grey, 16-bit and so on (`serve.sources.describe_traits`)."""
    tracks: Tracks | None = None
    """Where the two views are of two pictures of one track."""

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, steps: Iterator[tuple[int, Tensor]]) -> Generator[Batch]:
        """The pictures of each (epoch, rows), pinned for a GPU."""
        for epoch, rows in steps:
            yield Batch(self._frames(rows), rows, self._partners(epoch, rows))

    def _partners(self, epoch: int, rows: Tensor) -> Tensor | None:
        if self.tracks is None:
            return None
        return self._frames(torch.tensor([self.tracks.partner(row, self.samples[row].source, epoch) for row in rows.tolist()]))

    def _frames(self, rows: Tensor) -> Tensor:
        pixels = self.images[rows]
        return pixels.pin_memory() if torch.cuda.is_available() else pixels


def load_pixels(samples: Sequence[Sample], preprocess: Preprocess, *, progress: str | None = None) -> Pixels:
    """Decode every picture into memory. Raises: SourceError if they do not fit or none can be read.

    `progress` names the bar; None shows none.
    """
    if shortage := memory_shortage(len(samples), preprocess):
        raise SourceError(f"{shortage}; choose a smaller --image-size or fewer pictures, or, to pretrain, --workers 1 or more")
    images = torch.empty((len(samples), 3, preprocess.height_px, preprocess.width_px), dtype=torch.uint8)
    kept: list[Sample] = []
    unreadable: list[Unreadable] = []
    traits: Counter[str] = Counter()
    with tqdm(total=len(samples), desc=progress, unit="img", disable=progress is None) as bar:
        for good, pixels, bad in read_batches(samples, preprocess, traits=traits):
            images[len(kept) : len(kept) + len(good)] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            kept += good
            unreadable += bad
            bar.update(len(good) + len(bad))
    if not kept:
        first = f"; the first: {unreadable[0].reason}" if unreadable else ""
        raise SourceError(f"none of {len(samples)} pictures can be read{first}")
    return Pixels(images[: len(kept)], tuple(kept), tuple(unreadable), traits)


def preprocess_for(samples: Sequence[Sample], image_size: str | None) -> Preprocess:
    """The encoder's input size: `image_size` as 'PX' or 'HxW', or chosen from the pictures.

    Square frames keep the central 0.875 of the picture, or all of it at 32 px; other frames stretch it (re-ID).
    """
    height, width = _parse_size(image_size) if image_size else _fitting_size(samples)
    square = height == width
    return Preprocess(
        height_px=height,
        width_px=width,
        resize="center_crop" if square else "stretch",
        crop=0.875 if square and height > 32 else 1.0,
        resample="bicubic",
        jpeg="reduced",
    )


def training_frame(preprocess: Preprocess) -> Preprocess:
    """The same frame without the central crop, larger by what the crop would take: views are cut from all of it."""
    height, width = (round(size / preprocess.crop) for size in (preprocess.height_px, preprocess.width_px))
    return preprocess.model_copy(update={"height_px": height, "width_px": width, "crop": 1.0})


def step_rows(
    count: int,
    batch_size: int,
    seed: int,
    *,
    first_step: int,
    total_steps: int,
    steps_per_epoch: int,
    rank: int = 0,
    tracks: Tracks | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, rows) of every step that is left. Rows that fill no batch wait for another epoch.

    With `tracks` no batch has two rows of one track.
    """
    epoch, order = -1, torch.empty(0)
    for step in range(first_step, total_steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = epoch_order(count, epoch, seed, rank)
            if tracks:
                order = tracks.spread(order, batch_size, step_generator(seed, epoch, stream=f"batches/{rank}"))
        place = step % steps_per_epoch
        yield epoch, order[place * batch_size : (place + 1) * batch_size]


def epoch_order(count: int, epoch: int, seed: int, rank: int = 0) -> Tensor:
    """The permutation of one epoch; a function of its arguments, so that resuming needs no saved state.

    Every process has its own: neighbours in a sorted list, one to a process, would else always meet in one batch.
    """
    return torch.randperm(count, generator=step_generator(seed, epoch, stream=f"order/{rank}"))


def step_generator(seed: int, number: int, *, stream: str = "views", device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, stream, number) alone: nothing of it has to be saved to go on."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sources_sha256(samples: Sequence[Sample]) -> str:
    """Digest of the list of pictures, so that a run is not resumed on other data."""
    return hashlib.sha256("\n".join(sample.source for sample in samples).encode()).hexdigest()


def memory_shortage(count: int, preprocess: Preprocess) -> str | None:
    """Why so many pictures of this frame cannot be kept in memory; None if they can."""
    needed = count * 3 * preprocess.height_px * preprocess.width_px
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed * 4
    if needed <= MEMORY_SHARE * total:
        return None
    frame = f"{preprocess.height_px}x{preprocess.width_px}"
    most = MEMORY_SHARE * total / 2**30
    return f"{count} pictures of {frame} px take {needed / 2**30:.1f} GiB, at most {most:.1f} GiB may be used"


def spread(samples: Sequence[Sample], most: int) -> Sequence[Sample]:
    """Every n-th sample, `most` of them at most: they are sorted, often by class."""
    return samples[:: max(1, -(-len(samples) // most))]


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        size = int(height), int(width or height)
    except ValueError:
        size = (0, 0)
    if not all(16 <= px <= 1024 for px in size):
        raise SourceError(f"--image-size is {text!r}, wanted PX or HxW with 16 to 1024 px, such as 64 or 256x128")
    return size


def _fitting_size(samples: Sequence[Sample]) -> tuple[int, int]:
    """32, 64 or 224 px by the median short side of up to 50 pictures; 256x128 for tall boxes with identities or tracks."""
    sizes = []
    for sample in spread(samples, 50):
        try:
            sizes.append(decode(read_bytes(sample.source)).size)
        except (ImageError, SourceError):
            continue
    if not sizes:
        raise SourceError(f"none of the first pictures can be read, such as {samples[0].source}; are these images?")
    width, height = (statistics.median(side) for side in zip(*sizes, strict=True))
    if (samples[0].identity is not None or samples[0].track is not None) and height > 1.5 * width:
        return (256, 128)
    short = min(width, height)
    size = 32 if short <= 40 else 64 if short <= 100 else 224
    return (size, size)
