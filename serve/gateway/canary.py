"""Whether an encoder answers: a picture must have come out of it lately, anybody's or our own."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from serve.gateway.batching import Batcher

FRESH_S = 5.0
"""An answer of the encoder counts for so long."""
PATIENCE_S = 3.0
"""A busy encoder is slow and not dead; but whoever asks for health has a deadline of their own."""


class Canary:
    """Goes the way of every picture, past admission. There is one at a time, however many ask."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._flight: asyncio.Task[str | None] | None = None

    async def fault(self) -> str | None:
        """None if the encoder answers, else what is wrong with it."""
        if time.monotonic() - self._batcher.answered_s < FRESH_S:
            return None
        if self._flight is None or self._flight.done():
            self._flight = asyncio.create_task(self._fly())
        await asyncio.wait([self._flight], timeout=PATIENCE_S)
        return self._flight.result() if self._flight.done() else f"the encoder gave no answer within {PATIENCE_S:g} s"

    async def _fly(self) -> str | None:
        try:
            await self._batcher.embed_pixels(np.zeros(self._batcher.encoder.manifest.input.shape, np.uint8))
        except Exception as error:  # whatever it is, the encoder does not answer
            return str(error) or type(error).__name__
        return None
