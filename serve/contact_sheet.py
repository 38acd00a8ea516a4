"""A contact sheet: rows of pictures with captions, the first of each row set apart from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from serve.files import atomic_path

GAP_PX, MARGIN_PX, HEADER_PX, FIRST_GAP_PX = 8, 20, 40, 22
CAPTION_PX, _LINE_PX, _FRAME_PX = 4, 16, 3
PAPER, INK, FAINT, RULE, FRAME = (250, 250, 248), (34, 36, 40), (116, 120, 128), (206, 208, 212), (32, 128, 88)


@dataclass(frozen=True)
class Cell:
    """A picture, no larger than its cell, and lines of text below it, cut to its width."""

    picture: Image.Image
    caption: str = ""
    framed: bool = False


def draw_sheet(rows: Sequence[Sequence[Cell]], cell_px: tuple[int, int], *, title: str, first: str, others: str) -> Image.Image:
    """Rows of cells of `cell_px` (width, height); `first` and `others` stand above the first column and the rest."""
    width, height = cell_px
    caption_px = CAPTION_PX + _LINE_PX * max(1 + cell.caption.count("\n") for row in rows for cell in row)
    columns = max(map(len, rows))
    lefts = [MARGIN_PX + FIRST_GAP_PX * (column > 0) + column * (width + GAP_PX) for column in range(columns)]
    tops = [HEADER_PX + _LINE_PX + CAPTION_PX + row * (height + caption_px + GAP_PX) for row in range(len(rows))]
    sheet = Image.new("RGB", (lefts[-1] + width + MARGIN_PX, tops[-1] + height + caption_px + MARGIN_PX - GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, HEADER_PX / 2), title, INK, ImageFont.load_default(17), anchor="lm")
    small = ImageFont.load_default(13)
    for left, heading in zip(lefts[:2], (first, others), strict=False):
        draw.text((left, tops[0] - 7), heading, FAINT, small, anchor="ls")
    rule = lefts[0] + width + (GAP_PX + FIRST_GAP_PX) // 2
    draw.line((rule, tops[0], rule, tops[-1] + height), RULE)
    for top, row in zip(tops, rows, strict=True):
        for left, cell in zip(lefts, row, strict=False):
            _draw_cell(sheet, cell, (left, top, left + width, top + height), small)
    return sheet


def _draw_cell(
    sheet: Image.Image, cell: Cell, box: tuple[int, int, int, int], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    left, top, right, bottom = box
    draw, picture = ImageDraw.Draw(sheet), cell.picture
    sheet.paste(picture, ((left + right - picture.width) // 2, (top + bottom - picture.height) // 2))
    if cell.framed:
        around = left - _FRAME_PX, top - _FRAME_PX, right + _FRAME_PX - 1, bottom + _FRAME_PX - 1
        draw.rectangle(around, outline=FRAME, width=_FRAME_PX)
    for number, line in enumerate(cell.caption.split("\n")):
        while font.getlength(line) > right - left:
            line = line[:-1]
        draw.text(((left + right) / 2, bottom + CAPTION_PX + number * _LINE_PX), line, INK, font, anchor="ma")


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a PNG, or JPEG if `path` says so. Raises: OSError."""
    with atomic_path(path) as temporary:
        sheet.save(temporary, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=90)
