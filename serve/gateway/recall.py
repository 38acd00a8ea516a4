"""How many of the nearest the index finds, measured while it serves: stored vectors are searched as usual, and exactly."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from serve.gallery import Gallery
from serve.gateway.metrics import Metrics

log = logging.getLogger(__name__)

K = 10
_QUERIES = 4
"""Of a flight."""
_REMEMBERED = 64
"""Queries that the gauge is the mean of."""
_PAUSE_S, _SHARE = 60.0, 0.01
"""Between flights; longer where one takes long: they take at most this share of the time."""


class RecallCanary:
    """Asked for all of the gallery, no index can miss any: that is the exact answer which the usual one is compared with."""

    def __init__(self, gallery: Gallery, metrics: Metrics) -> None:
        self._gallery, self._metrics = gallery, metrics
        self._found: deque[float] = deque(maxlen=_REMEMBERED)
        self._landed = threading.Event()

    @contextmanager
    def flying(self) -> Iterator[None]:
        """Measure in the background until the block ends."""
        thread = threading.Thread(target=self._fly_on, name="recall", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._landed.set()
            thread.join()

    def fly(self) -> None:
        """Measure once. Raises: GalleryError."""
        count = len(self._gallery)
        for _ in range(_QUERIES if count else 0):
            if not self._landed.is_set():
                self._found.append(self._recall(count))
                self._metrics.recall.set(sum(self._found) / len(self._found))

    def _recall(self, count: int) -> float:
        """Of an item drawn at random. Of items that are equally near, any will do."""
        (item,) = self._gallery.items(limit=1, offset=random.randrange(count)) or self._gallery.items(limit=1)  # noqa: S311
        query_1D = self._gallery.vector(item.id)[None]
        (exact,), _ = self._gallery.search_many(query_1D, count)
        (found,), _ = self._gallery.search_many(query_1D, K)
        wanted = min(K, int(np.isfinite(exact).sum()))
        return float((found[:wanted] >= exact[wanted - 1]).mean())

    def _fly_on(self) -> None:
        pause_s = 0.0
        while not self._landed.wait(pause_s):
            started_s = time.monotonic()
            try:
                self.fly()
            except Exception as error:  # whatever it is, serving goes on
                log.warning("recall was not measured: %s", error)
            pause_s = max(_PAUSE_S, (time.monotonic() - started_s) / _SHARE)
