"""Data larger than memory: worker processes decode and crop, the rest of the augmentation is batched on the device.

The crop of a picture, and which other one of its track is the second view, depend on (seed, epoch, picture) alone, so
neither the number of workers nor an interruption changes a run.
"""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from serve.contract import Preprocess
from serve.errors import SourceError, TrainingError, first_line
from serve.samples import Sample, Unreadable
from serve.sources import read_picture
from train.augment import crop_views
from train.data import Batch, step_generator
from train.positives import Tracks

PIECE, PREFETCHED = 32, 2
"""Pictures that a worker hands over at once, and how often ahead of time. At 224 px a piece is 9 MiB of /dev/shm."""

Order: TypeAlias = tuple[int, Tensor]
"""An epoch and rows of it."""


class Piece(NamedTuple):
    """What a worker hands over: crops uint8 (2, n, 3, H, W), their rows (n,), what could not be read, what stood out."""

    crops: Tensor
    rows: Tensor
    faults: list[Unreadable]
    traits: list[str]


class Streamed:
    """Pictures that are read anew in every epoch. One that cannot be read is replaced by the next one and told once.

    With `tracks` the next one is of the same track, as long as that has any, and the second view is of another one of them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        crop_area: float,
        *,
        workers: int,
        seed: int,
        tracks: Tracks | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}, wanted at least 1")
        self.samples = tuple(samples)
        self.unreadable: list[Unreadable] = []
        self.traits: Counter[str] = Counter()
        """Of the first epoch's pictures, as they arrive."""
        self.tracks = tracks
        self._crops = _Crops([sample.source for sample in samples], preprocess, crop_area, seed, tracks)
        self._workers = workers

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, steps: Iterator[Order]) -> Generator[Batch]:
        """A crop for each view of the pictures of each (epoch, rows); to be closed, which ends the workers.

        Raises: SourceError if nothing can be read, TrainingError or RuntimeError if a worker dies (see `worker_died`).
        """
        pieces_per_step: list[int] = []

        def pieces() -> Iterator[Order]:
            for epoch, rows in steps:
                parts = rows.split(PIECE)
                pieces_per_step.append(len(parts))
                yield from ((epoch, part) for part in parts)

        loader = DataLoader(
            self._crops,
            batch_size=None,
            sampler=pieces(),
            num_workers=self._workers,
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCHED,
        )
        arriving: Any = iter(loader)
        try:
            for first in arriving:
                done = [first, *itertools.islice(arriving, pieces_per_step.pop(0) - 1)]
                for piece in done:
                    self.traits.update(piece.traits)
                self._note([fault for piece in done for fault in piece.faults])
                yield Batch(_joined([piece.crops for piece in done]), torch.cat([piece.rows for piece in done]))
        except (ConnectionError, EOFError) as error:  # it died while it handed over a batch, before torch noticed
            raise _death(str(error) or type(error).__name__) from error
        finally:
            arriving._shutdown_workers()  # they ignore the SIGTERM by which multiprocessing would end them

    def _note(self, faults: list[Unreadable]) -> None:
        known = {fault.source for fault in self.unreadable}
        self.unreadable += {fault.source: fault for fault in faults if fault.source not in known}.values()
        if len(self.unreadable) == len(self):
            raise SourceError(f"none of {len(self)} pictures can be read; the first: {self.unreadable[0].reason}")


class _Crops(Dataset[Any]):
    """Decodes and crops, in the workers."""

    def __init__(
        self, sources: Sequence[str], preprocess: Preprocess, crop_area: float, seed: int, tracks: Tracks | None
    ) -> None:
        names = [source.encode("utf-8", "surrogateescape") for source in sources]
        # One array, not a million strings: counting their references would copy them into every worker.
        self._names = np.frombuffer(b"".join(names), np.uint8)
        self._ends = np.cumsum([len(name) for name in names])
        self._preprocess, self._crop_area, self._seed, self._tracks = preprocess, crop_area, seed, tracks

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, order: Order) -> Piece:
        epoch, rows = order
        size = self._preprocess.height_px, self._preprocess.width_px
        crops = np.empty((2, len(rows), *size, 3), np.uint8)
        piece = Piece(torch.from_numpy(crops).permute(0, 1, 4, 2, 3), rows.clone(), [], [])
        for place, row in enumerate(rows.tolist()):
            traits: list[str] = []
            picture, found = self._next_readable(row, piece.faults, traits)
            piece.rows[place] = found
            if picture is None:
                break
            piece.traits.extend(traits if epoch == 0 else ())
            generator = step_generator(self._seed, epoch, stream=f"crop/{self._name(row)}")
            partner = self._partner(found, epoch, piece.faults)
            if partner is None:
                crops[:, place] = self._crop(picture, 2, generator)
            else:
                crops[0, place], crops[1, place] = (self._crop(one, 1, generator)[0] for one in (picture, partner))
        return piece

    def _crop(self, picture: Image.Image, count: int, generator: torch.Generator) -> NDArray[np.uint8]:
        size = self._preprocess.height_px, self._preprocess.width_px
        aspect = picture.width / picture.height if self._preprocess.resize == "stretch" else size[1] / size[0]
        return crop_views(picture, size, self._crop_area, generator, aspect, count=count)

    def _next_readable(self, row: int, faults: list[Unreadable], traits: list[str]) -> tuple[Image.Image | None, int]:
        """This picture or the first after it that can be read, and which one it is; None if there is none at all."""
        others = self._tracks.others(row) if self._tracks else []
        after = (candidate % len(self) for candidate in range(row + 1, row + len(self)))
        for candidate in itertools.chain([row], others, after):
            picture = read_picture(self._name(candidate), traits)
            if not isinstance(picture, Unreadable):
                return picture, candidate
            faults.append(picture)
        return None, row

    def _partner(self, row: int, epoch: int, faults: list[Unreadable]) -> Image.Image | None:
        """What the second view is of; None for the picture itself: alone in its track, or the other one cannot be read."""
        partner = self._tracks.partner(row, self._name(row), epoch) if self._tracks else row
        if partner == row:
            return None
        picture = read_picture(self._name(partner))
        if isinstance(picture, Unreadable):
            faults.append(picture)
            return None
        return picture

    def _name(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._names[start : self._ends[row]].tobytes().decode("utf-8", "surrogateescape")


def worker_died(error: RuntimeError) -> TrainingError | None:
    """What to tell if this is the death of a worker, which torch raises wherever the trainer is at that moment."""
    reason = first_line(error)
    if not reason.startswith("DataLoader worker (pid"):
        return None
    return _death(reason.rstrip(". "))


def _death(reason: str) -> TrainingError:
    remedy = "use fewer --workers or a larger /dev/shm (docker --shm-size), then --resume"
    return TrainingError(f"a worker process died ({reason}); {remedy}")


def _joined(crops: list[Tensor]) -> Tensor:
    size = (2, sum(part.shape[1] for part in crops), *crops[0].shape[2:])
    joined = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return torch.cat(crops, dim=1, out=joined)


def _start_worker(_worker: int) -> None:
    """Signals to a whole group reach the workers too: they go on, so that the step can be finished and saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
