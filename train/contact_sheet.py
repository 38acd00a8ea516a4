"""A picture of what the encoder takes for similar: each row a query and its nearest neighbours, with their cosines.

Shapes: N pictures, D dimensions, Q rows, K neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contact_sheet import Cell, draw_sheet

CELL_PX = 96
"""Small pictures are enlarged to this short side, large ones shrunk to fit twice it."""


def contact_sheet(
    images_NCHW: NDArray[np.uint8], vectors_ND: NDArray[np.float32], *, title: str = "", queries: int = 8, neighbours: int = 8
) -> Image.Image:
    """Rows of a query and its nearest among the others, by cosine; queries are spread evenly over the pictures.

    Raises: ValueError unless there are two or more uint8 pictures of three channels and a vector of each.
    """
    count = len(images_NCHW)
    if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3:
        raise ValueError(f"images_NCHW is {images_NCHW.dtype} {images_NCHW.shape}, wanted uint8 (N, 3, H, W)")
    if count < 2 or len(vectors_ND) != count:
        raise ValueError(f"{count} pictures and {len(vectors_ND)} vectors, wanted as many of each, two or more")
    rows_Q, nearest_QK, cosines_QK = _nearest(vectors_ND, min(queries, count), min(neighbours, count - 1))
    return _draw(images_NCHW, rows_Q, nearest_QK, cosines_QK, title)


def _nearest(
    vectors_ND: NDArray[np.float32], queries: int, neighbours: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Rows of the queries (Q,), their nearest (Q, K) and the cosines (Q, K), largest first."""
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True).clip(1e-12)
    rows_Q = np.arange(queries) * len(unit_ND) // queries
    cosines_QN = unit_ND[rows_Q] @ unit_ND.T
    cosines_QN[np.arange(queries), rows_Q] = -np.inf  # a picture is no neighbour of itself
    nearest_QK = np.argsort(-cosines_QN, axis=1, kind="stable")[:, :neighbours]
    return rows_Q, nearest_QK, np.take_along_axis(cosines_QN, nearest_QK, axis=1)


def _draw(
    images_NCHW: NDArray[np.uint8],
    rows_Q: NDArray[np.intp],
    nearest_QK: NDArray[np.intp],
    cosines_QK: NDArray[np.float32],
    title: str,
) -> Image.Image:
    size = _cell_size(images_NCHW.shape[3], images_NCHW.shape[2])

    def cell(index: int, caption: str = "") -> Cell:
        return Cell(Image.fromarray(images_NCHW[index].transpose(1, 2, 0)).resize(size, Image.Resampling.BICUBIC), caption)

    rows = [
        [cell(row), *(cell(index, f"{cosine:.2f}") for index, cosine in zip(nearest, cosines, strict=True))]
        for row, nearest, cosines in zip(rows_Q, nearest_QK, cosines_QK, strict=True)
    ]
    return draw_sheet(rows, size, title=title, first="query", others="nearest, with cosine")


def _cell_size(width_px: int, height_px: int) -> tuple[int, int]:
    """Short side 96 px, long side 192 px at most."""
    scale = min(CELL_PX / min(width_px, height_px), 2 * CELL_PX / max(width_px, height_px))
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))
