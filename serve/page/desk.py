"""What the tabs do alike with a query: an item of the gallery, or an uploaded file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.encoder import Encoder
from serve.errors import GalleryError, SimclrError
from serve.gallery import Gallery
from serve.item import Item
from serve.page.cards import message, shrunk, text
from serve.preprocess import ImageError
from serve.samples import NOBODY
from serve.sources import read_bytes

EXAMPLES = 8
Query: TypeAlias = int | str | None
"""What is searched with: an item of the gallery, an uploaded file, or nothing yet."""


@dataclass(frozen=True)
class Desk:
    """A gallery and the encoder that made it."""

    gallery: Gallery
    encoder: Encoder

    @property
    def folder(self) -> Path | None:
        """The gallery's folder; None if it is in Milvus."""
        try:
            return self.gallery.folder
        except GalleryError:
            return None

    def asked(self, query: int | str) -> Path | NDArray[np.float32]:
        """What to search with. Raises: GalleryError."""
        return self.gallery.vector(query) if isinstance(query, int) else Path(query)

    def vectors(self, queries: Sequence[int | str]) -> NDArray[np.float32]:
        """Their vectors (N, D); uploads go to the encoder together. Raises: GalleryError, ImageError, EncoderUnavailable."""
        uploads = [Path(query) for query in queries if isinstance(query, str)]
        embedded = iter(self.encoder.embed(uploads) if uploads else ())
        return np.stack([self.gallery.vector(query) if isinstance(query, int) else next(embedded) for query in queries])

    def source(self, query: int | str) -> str:
        """Where its picture is. Raises: GalleryError."""
        return self.gallery.item(query).source if isinstance(query, int) else query

    def name(self, query: int | str) -> str:
        """Its file's name as HTML."""
        return f"<b>{text(Path(self.source(query)).name)}</b>"

    def preview(self, query: Query) -> Image.Image | None:
        """The query as a small picture that every browser can show (it could not show TIFF); None if it cannot be read."""
        try:
            return None if query is None else shrunk(read_bytes(self.source(query)))
        except (SimclrError, ImageError):
            return None

    def examples(self, *, with_identity: bool = False) -> list[Item]:
        """A few items from all over the gallery."""
        ids = self.gallery.ids()
        items = [self.gallery.item(i) for i in ids[:: max(1, len(ids) // (8 * EXAMPLES))]]
        unfit = (*NOBODY, None) if with_identity else NOBODY
        fit = [item for item in items if item.identity not in unfit]
        return fit[:: max(1, len(fit) // EXAMPLES)][:EXAMPLES]


def itself(query: int | str) -> list[int]:
    """The item that the query is, which should not find itself."""
    return [query] if isinstance(query, int) else []


def complaint(error: Exception, *queries: Query) -> str:
    """The error's line, where the user looks and as a toast; an upload goes by its name, not by its place on the server."""
    line = str(error)
    for upload in (query for query in queries if isinstance(query, str)):
        line = line.replace(upload, Path(upload).name)
    gr.Warning(text(line), title="That did not work")
    return message(text(line), "problem")
