"""The picture of who was taken for whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from serve.files import atomic_path

_MOST_COUNTS, _MOST_NAMES, _LONGEST_NAME = 25, 60, 24


def save_confusion(path: Path, counts_CC: NDArray[np.int64], classes: Sequence[str], title: str) -> None:
    """Write a PNG: a row for each true class, coloured by share of the row. Raises: OSError."""
    count = len(classes)
    side = min(16.0, 3.2 + 0.42 * count)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    share_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, format=lambda share, _: f"{share:.0%}", label="of the true class")
    places = range(0, count, -(-count // _MOST_NAMES))
    names = [_short(classes[place]) for place in places]
    axes.set_xticks(places, names, rotation=90, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xlabel("named by the head")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize="medium", parse_math=False)
    for true, named in np.argwhere(counts_CC) if count <= _MOST_COUNTS else ():
        colour = "white" if share_CC[true, named] > 0.5 else "black"
        axes.text(named, true, str(counts_CC[true, named]), ha="center", va="center", color=colour, fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
