"""The HTML that callbacks show: messages, and pictures as cards.

Everything that comes from users (file names, labels, names) goes through `text`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from PIL import Image

from serve.errors import SourceError
from serve.item import Item
from serve.preprocess import ImageError, decode
from serve.reid import RankedHit
from serve.search import Hit
from serve.sources import read_bytes

THUMBNAIL_PX = 256
_MARKS = {
    True: ("right", "✓", "same identity"),
    False: ("wrong", "✗", "another identity"),
    None: ("open", "?", "identity unknown"),
}


def text(value: object) -> str:
    """User data as HTML text."""
    return html.escape(str(value))


def message(line: str, kind: str = "hint") -> str:
    """A paragraph of HTML: a `hint`, a `problem` or a `notice`."""
    return f'<p class="sc-{kind}" role="status">{line}</p>'


def result(title: str, hits: Sequence[Hit]) -> str:
    """Found pictures under a title, which is HTML."""
    if not hits:
        return message("Nothing found: no picture of the gallery passes the filter. Loosen it, or clear it.")
    return f"{message(title)}{grid(cards(hits))}"


def grid(some: Iterable[str]) -> str:
    """Cards side by side."""
    return f'<div class="sc-grid">{"".join(some)}</div>'


def cards(items: Sequence[Item], heads: Sequence[str] | None = None, hint: str = "Click to search with it") -> list[str]:
    """A button for each item. Its head is what is given, or the rank and the score of a hit; `hint` says what a click does."""
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(thumbnail, [item.source for item in items]))
    if heads is None:
        heads = [_ranked(place, item) if isinstance(item, Hit) else "" for place, item in enumerate(items, start=1)]
    return [_card(item, picture, head, hint) for item, picture, head in zip(items, pictures, heads, strict=True)]


def headline(left: str, right: str) -> str:
    """The line above a card's facts: something minor, and what counts."""
    return f'<span class="sc-rank">{left}</span><span class="sc-score">{right}</span>'


def _ranked(place: int, hit: Hit) -> str:
    return headline(str(place), f"{hit.score:.3f}")


def _card(item: Item, picture: str, head: str, hint: str) -> str:
    mark = ""
    if isinstance(item, RankedHit):
        kind, sign, words = _MARKS[item.match]
        mark = f'<span class="sc-mark sc-{kind}" title="{words}" role="img" aria-label="{words}">{sign}</span>'
    facts = {"": item.label, "id ": item.identity, "camera ": item.camera}
    lines = "".join(f"<span>{text(word + value)}</span>" for word, value in facts.items() if value is not None)
    return (
        f'<button type="button" class="sc-card" data-id="{item.id}" title="{text(_tooltip(item, hint))}">'
        f'<span class="sc-picture">{picture}{mark}</span><span class="sc-head">{head}</span>'
        f'<span class="sc-facts">{lines}</span></button>'
    )


def _tooltip(item: Item, hint: str) -> str:
    time = [] if item.time is None else [f"time {item.time:g}"]
    extra = [f"{key}: {value}" for key, value in item.extra.items()]
    return "\n".join([Path(item.source).name, *time, *extra, hint])


def thumbnail(source: str) -> str:
    """The picture as an element of HTML, or words if it cannot be read."""
    try:
        return f'<img alt="" src="{_data_url(source)}">'
    except (SourceError, ImageError):  # moved away since it was added: the hit still counts
        return '<span class="sc-gone">picture not found</span>'


@lru_cache(maxsize=2048)
def _data_url(source: str) -> str:
    file = io.BytesIO()
    shrunk(read_bytes(source)).save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def shrunk(encoded: bytes) -> Image.Image:
    """A small picture that every browser can show. Raises: ImageError."""
    image = decode(encoded)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image
