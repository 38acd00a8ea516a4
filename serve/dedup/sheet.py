"""The largest groups of duplicates as a picture."""

from __future__ import annotations

from PIL import Image

from serve.contact_sheet import PAPER, RULE, Cell, draw_sheet
from serve.dedup.groups import Copy, Group
from serve.duplicates import Duplicates
from serve.samples import Unreadable
from serve.sources import read_picture

_CELL_PX = (112, 112)
_GROUPS, _OTHERS = 16, 8


def duplicate_sheet(found: Duplicates) -> Image.Image:
    """A row for each of the 16 largest groups: the one to keep in a frame, then its 8 nearest."""
    shown, total = found.groups[:_GROUPS], len(found.groups)
    title = f"{found.count():,} duplicates in {total:,} groups" + (f", the {len(shown)} largest" if total > len(shown) else "")
    rows = [_row(group) for group in shown] or [[_cell(None, "none found")]]
    return draw_sheet(rows, _CELL_PX, title=title, first="keep", others="similarity to it, and what they share")


def _row(group: Group) -> list[Cell]:
    keep = group.keep
    row = [_cell(keep, f"#{keep.item.id}  {keep.bytes / 1000:.1f} kB", framed=True)]
    row += [_cell(copy, f"{copy.similarity:.4f}  {copy.kind}") for copy in group.others[:_OTHERS]]
    more = len(group.others) - _OTHERS
    return [*row, _cell(None, f"and {more:,} more")] if more > 0 else row


def _cell(copy: Copy | None, caption: str, *, framed: bool = False) -> Cell:
    """With the label below the caption, which may be what somebody got wrong."""
    if copy is None:
        return Cell(Image.new("RGB", _CELL_PX, PAPER), caption)
    picture = read_picture(copy.item.source)
    if isinstance(picture, Unreadable):
        picture = Image.new("RGB", _CELL_PX, RULE)
    return Cell(_fitted(picture), f"{caption}\n{copy.item.label or ''}", framed)


def _fitted(picture: Image.Image) -> Image.Image:
    """As large as the cell allows; small pictures are enlarged."""
    scale = min(_CELL_PX[0] / picture.width, _CELL_PX[1] / picture.height)
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
