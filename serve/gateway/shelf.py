"""The gallery, asked from the event loop: reading in a few threads, writing in one, as a gallery has one writer at a time."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.exceptions import HTTPException

from serve.errors import GalleryError, NoSuchItem
from serve.filters import Where, as_where
from serve.gallery import Gallery
from serve.gateway.metrics import Metrics

_T = TypeVar("_T")


class Shelf:
    """A GalleryError that comes out of here says that the gallery cannot do it now: the question was looked at before."""

    def __init__(self, gallery: Gallery, metrics: Metrics) -> None:
        self._gallery = gallery
        self._readers = ThreadPoolExecutor(os.cpu_count(), "reader")
        self._writer = ThreadPoolExecutor(1, "writer")
        metrics.gallery_items.set_function(lambda: _size(gallery))

    async def read(self, work: Callable[[Gallery], _T]) -> _T:
        """What `work` finds. Raises: GalleryError."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, self._gallery)

    async def write(self, work: Callable[[Gallery], _T]) -> _T:
        """Let `work` change something, which is on disk then. Who is given up in line never begins. Raises: GalleryError."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, self._gallery)


def on_item(item_id: int, work: Callable[[Gallery], _T]) -> Callable[[Gallery], _T]:
    """`work` that needs an item. It raises: HTTPException 404 if there is no such item, GalleryError."""

    def done(gallery: Gallery) -> _T:
        try:
            return work(gallery)
        except NoSuchItem as error:
            raise HTTPException(404, f"there is no item {item_id}; was it removed?") from error

    return done


def asked_where(text: str | None) -> Where:
    """The filter of a request. Raises: HTTPException 400."""
    try:
        return as_where(text)
    except GalleryError as error:
        raise HTTPException(400, str(error)) from error


def _size(gallery: Gallery) -> float:
    try:
        return len(gallery)
    except GalleryError:
        return math.nan
