"""The web app: search by picture, re-ID and classification over one gallery. Widgets and callbacks only, no maths.

What a callback shows is HTML made here, so everything that comes from users (file names, labels) goes through `_text`.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.catalog import Item
from serve.classify import Head
from serve.encoder import Encoder
from serve.errors import SimclrError, SourceError
from serve.filters import Condition, Where, parse_where
from serve.gallery import Gallery, Hit
from serve.preprocess import ImageError, decode
from serve.reid import RankedHit, rank
from serve.sources import JUNK_IDENTITY, MARKET_NAME, read_bytes

THUMBNAIL_PX, EXAMPLES, MAX_HITS, MAX_CHOICES, TOP_CLASSES = 256, 8, 60, 1000, 5
NOBODY = (JUNK_IDENTITY, "0000")
"""Market-1501's codes for boxes that show nobody in particular: two that carry one are not the same person."""
FILTER_FIELDS = ("label", "identity", "camera")
SEARCH_HINT = "Drop a picture on the left, paste one, or click an example: the most similar pictures appear here."
REID_HINT = "Give a probe on the left, or click an example: the gallery appears here, ranked."
REID_RULE = (
    "<b>✓ green</b> same identity, <b>✗ red</b> another one, <b>? grey</b> the identity of the probe or of the picture is "
    "unknown. As usual in re-ID, pictures of the probe's identity taken by the probe's own camera are left out, and so is junk."
)
log = logging.getLogger(__name__)

Query: TypeAlias = int | str | None
"""What is searched with: an item of the gallery, an uploaded file, or nothing yet."""


class PictureInput(gr.Image):  # type: ignore[misc]
    """gr.Image that hands over the uploaded file untouched: serve.preprocess decodes it, or says what is wrong with it."""

    is_template = True  # tells Gradio to draw it as its parent

    def preprocess(self, payload: Any) -> str | None:
        """The path of the upload."""
        return None if payload is None else payload.path


@dataclass(frozen=True)
class Desk:
    """The callbacks: plain functions of what the user chose."""

    gallery: Gallery
    encoder: Encoder
    head: Head | None = None

    def search(self, query: Query, k: int, expression: str = "", *chosen: Sequence[str]) -> str:
        """Result cards for a query; `chosen` holds the values ticked per field of FILTER_FIELDS."""
        if query is None:
            return _message(SEARCH_HINT)
        try:
            where = _where(expression, chosen)
            hits = self.gallery.search(self._asked(query), int(k), where, _itself(query))
        except (SimclrError, ImageError) as error:
            return _complaint(error, query)
        return _result(f"The {len(hits)} pictures most similar to {self._name(query)}; score = cosine", hits)

    def rank(self, query: Query, k: int, identity: str | None, camera: str | None, others_only: bool) -> str:
        """Rank list of the gallery for a probe, each card marked right or wrong where that is known."""
        if query is None:
            return _message(REID_HINT)
        try:
            hits = rank(
                self.gallery,
                self._asked(query),
                identity=(identity or "").strip() or None,
                camera=(camera or "").strip() or None,
                other_cameras_only=others_only,
                exclude_ids=_itself(query),
                k=int(k),
            )
        except (SimclrError, ImageError) as error:
            return _complaint(error, query)
        return _result(f"{_tally(hits)} of the {len(hits)} nearest to {self._name(query)}", hits)

    def classify(self, query: Query) -> tuple[dict[str, float] | None, str]:
        """Class -> probability, and a message."""
        if query is None or self.head is None:
            return None, _message("Give a picture, or click an example.")
        try:
            asked = self._asked(query)
            vector_D = asked if isinstance(asked, np.ndarray) else self.encoder.embed([asked])[0]
        except (SimclrError, ImageError) as error:
            return None, _complaint(error, query)
        (chances_C,) = self.head.probabilities(vector_D[None])
        return dict(zip(self.head.classes, chances_C.tolist(), strict=True)), _message(f"Classes of {self._name(query)}")

    def preview(self, query: Query) -> Image.Image | None:
        """The query as a small picture that every browser can show (it could not show TIFF); None if it cannot be read."""
        try:
            return None if query is None else _shrunk(read_bytes(self._source(query)))
        except (SimclrError, ImageError):
            return None

    def describe_probe(self, query: Query) -> tuple[str | None, str | None]:
        """Identity and camera of a probe: as the gallery has them, or as a file name of the Market-1501 family says."""
        if isinstance(query, int):
            item = self.gallery.item(query)
            identity, camera = item.identity, item.camera
        else:
            match = MARKET_NAME.match(Path(query or "").name)
            identity, camera = (match[1], str(int(match[2]))) if match else (None, None)
        return None if identity in NOBODY else identity, camera

    def examples(self, *, with_identity: bool = False) -> list[Item]:
        """A few items from all over the gallery."""
        ids = self.gallery.ids()
        items = [self.gallery.item(i) for i in ids[:: max(1, len(ids) // (8 * EXAMPLES))]]
        fit = [item for item in items if not with_identity or (item.identity is not None and item.identity not in NOBODY)]
        return fit[:: max(1, len(fit) // EXAMPLES)][:EXAMPLES]

    def _asked(self, query: int | str) -> Path | NDArray[np.float32]:
        return self.gallery.vector(query) if isinstance(query, int) else Path(query)

    def _source(self, query: int | str) -> str:
        return self.gallery.item(query).source if isinstance(query, int) else query

    def _name(self, query: int | str) -> str:
        return f"<b>{_text(Path(self._source(query)).name)}</b>"


def _itself(query: int | str) -> list[int]:
    return [query] if isinstance(query, int) else []


def _where(expression: str, chosen: Iterable[Sequence[str]]) -> Where:
    ticked = [Condition(field, "in", tuple(values)) for field, values in zip(FILTER_FIELDS, chosen, strict=False) if values]
    return Where((*ticked, *parse_where(expression).conditions))


def _text(value: object) -> str:
    """User data as HTML text; braces and $ too, because Gradio runs HTML values through a template."""
    escaped = html.escape(str(value))
    return "".join(f"&#{ord(sign)};" if sign in "{}$`\\" else sign for sign in escaped)


def _message(text: str, kind: str = "hint") -> str:
    return f'<p class="sc-{kind}" role="status">{text}</p>'


def _complaint(error: Exception, query: Query) -> str:
    """The error's line, where the user looks and as a toast; an upload goes by its name, not by its place on the server."""
    line = str(error)
    if isinstance(query, str):
        line = line.replace(query, Path(query).name)
    gr.Warning(_text(line), title="That did not work")
    return _message(_text(line), "problem")


def _result(title: str, hits: Sequence[Hit]) -> str:
    if not hits:
        return _message("No picture of the gallery passes the filter. Loosen it, or clear it.")
    return f'{_message(title)}<div class="sc-grid">{"".join(_cards(hits))}</div>'


def _tally(hits: Sequence[RankedHit]) -> str:
    counts = [sum(hit.match is verdict for hit in hits) for verdict in (True, False, None)]
    return ", ".join(f"{count} {mark}" for count, mark in zip(counts, "✓✗?", strict=True) if count) or "0"


def _cards(items: Sequence[Item]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(_picture, [item.source for item in items]))
    return [_card(place, item, picture) for place, (item, picture) in enumerate(zip(items, pictures, strict=True), start=1)]


def _card(place: int, item: Item, picture: str) -> str:
    mark = ""
    if isinstance(item, RankedHit):
        kind, sign, words = {
            True: ("right", "✓", "same identity"),
            False: ("wrong", "✗", "another identity"),
            None: ("open", "?", "identity unknown"),
        }[item.match]
        mark = f'<span class="sc-mark sc-{kind}" title="{words}" role="img" aria-label="{words}">{sign}</span>'
    score = f'<span class="sc-rank">{place}</span><span class="sc-score">{item.score:.3f}</span>' if isinstance(item, Hit) else ""
    facts = {"": item.label, "id ": item.identity, "camera ": item.camera}
    lines = "".join(f"<span>{_text(word + value)}</span>" for word, value in facts.items() if value is not None)
    return (
        f'<button type="button" class="sc-card" data-id="{item.id}" title="{_text(_tooltip(item))}">'
        f'<span class="sc-picture">{picture}{mark}</span><span class="sc-head">{score}</span>'
        f'<span class="sc-facts">{lines}</span></button>'
    )


def _tooltip(item: Item) -> str:
    time = [] if item.time is None else [f"time {item.time:g}"]
    extra = [f"{key}: {value}" for key, value in item.extra.items()]
    return "\n".join([Path(item.source).name, *time, *extra, "Click to search with it"])


def _picture(source: str) -> str:
    try:
        return f'<img alt="" src="{_thumbnail(source)}">'
    except (SourceError, ImageError):  # moved away since it was added: the hit still counts
        return '<span class="sc-gone">picture not found</span>'


@lru_cache(maxsize=2048)
def _thumbnail(source: str) -> str:
    file = io.BytesIO()
    _shrunk(read_bytes(source)).save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _shrunk(encoded: bytes) -> Image.Image:
    image = decode(encoded)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image
