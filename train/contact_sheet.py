"""A picture of what the encoder takes for similar: each row a query and its nearest neighbours, with their cosines.

Shapes: N pictures, D dimensions, Q rows, K neighbours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serve.files import atomic_path

CELL_PX = 96
"""Small pictures are enlarged to this short side, large ones shrunk to fit twice it."""
GAP_PX, MARGIN_PX, CAPTION_PX, HEADER_PX, QUERY_GAP_PX = 8, 20, 20, 40, 22
PAPER, INK, FAINT, RULE = (250, 250, 248), (34, 36, 40), (116, 120, 128), (206, 208, 212)


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


def save_contact_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a PNG. Raises: OSError."""
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


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
    width, height = _cell_size(images_NCHW.shape[3], images_NCHW.shape[2])
    lefts = [MARGIN_PX + QUERY_GAP_PX * (column > 0) + column * (width + GAP_PX) for column in range(nearest_QK.shape[1] + 1)]
    tops = [HEADER_PX + CAPTION_PX + row * (height + CAPTION_PX + GAP_PX) for row in range(len(rows_Q))]
    sheet = Image.new("RGB", (lefts[-1] + width + MARGIN_PX, tops[-1] + height + CAPTION_PX + MARGIN_PX - GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, HEADER_PX / 2), title, INK, ImageFont.load_default(17), anchor="lm")
    small = ImageFont.load_default(13)
    draw.text((lefts[0], tops[0] - 7), "query", FAINT, small, anchor="ls")
    draw.text((lefts[1], tops[0] - 7), "nearest, with cosine", FAINT, small, anchor="ls")
    rule = lefts[1] - (GAP_PX + QUERY_GAP_PX) // 2
    draw.line((rule, tops[0], rule, tops[-1] + height), RULE)
    for top, row, nearest, cosines in zip(tops, rows_Q, nearest_QK, cosines_QK, strict=True):
        for left, index in zip(lefts, (row, *nearest), strict=True):
            picture = Image.fromarray(images_NCHW[index].transpose(1, 2, 0)).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, top))
        for left, cosine in zip(lefts[1:], cosines, strict=True):
            draw.text((left + width / 2, top + height + 4), f"{cosine:.2f}", INK, small, anchor="ma")
    return sheet


def _cell_size(width_px: int, height_px: int) -> tuple[int, int]:
    """Short side 96 px, long side 192 px at most."""
    scale = min(CELL_PX / min(width_px, height_px), 2 * CELL_PX / max(width_px, height_px))
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))
