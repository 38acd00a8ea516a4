"""Pictures of many requests -> one encoder, in batches of whatever is waiting, without ever waiting for more."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve.encoder import Encoder
from serve.errors import EncoderUnavailable
from serve.gateway.metrics import Metrics
from serve.preprocess import ImageError, load_image

MAX_BATCH = 32
"""What `simclr export` publishes for."""


@dataclass(frozen=True, eq=False)
class _Job:
    pixels: NDArray[np.uint8]
    answer: Future[NDArray[np.float32]] = field(default_factory=Future)
    since_s: float = field(default_factory=time.monotonic)


class Batcher:
    """Decodes in a bounded pool and embeds in threads of its own; the event loop only waits.

    A big picture takes hundreds of megabytes while it is decoded, so no more are decoded together than there are cores.
    """

    def __init__(self, encoder: Encoder, metrics: Metrics, *, batches: int, room: int) -> None:
        """Args: batches, how many are at the encoder together; room, how many decoded pictures may wait for it."""
        self.encoder = encoder
        self.answered_s = -math.inf
        """When the encoder last gave an answer, on time.monotonic's clock."""
        self._metrics = metrics
        self._decoders = ThreadPoolExecutor(os.cpu_count(), "decoder")
        self._jobs: queue.Queue[_Job] = queue.Queue(room)
        metrics.queued.set_function(self._jobs.qsize)
        for _ in range(batches):  # daemons: one that is stuck in its encoder does not keep a stopped server from ending
            threading.Thread(target=self._send_for_ever, name="sender", daemon=True).start()

    async def embed_each(self, pictures: Sequence[bytes]) -> list[NDArray[np.float32] | ImageError]:
        """As `serve.encoder.embed_each`: one answer per picture, in order. Raises: what the encoder raises."""
        return await asyncio.gather(*map(self._vector_or_error, pictures))

    async def embed(self, picture: bytes) -> NDArray[np.float32]:
        """The unit vector (D,) of one picture. Raises: ImageError, and what the encoder raises."""
        answer = await self._vector_or_error(picture)
        if isinstance(answer, ImageError):
            raise answer
        return answer

    async def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The unit vector (D,) of a prepared picture (H, W, 3). Raises: what the encoder raises."""
        job = _Job(pixels)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:  # with the pictures of requests that have been given up
            raise EncoderUnavailable("the encoder is stuck: it answers none of the pictures that wait for it") from None
        return await asyncio.wrap_future(job.answer)

    async def _vector_or_error(self, picture: bytes) -> NDArray[np.float32] | ImageError:
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, picture)
        except ImageError as error:
            self._metrics.pictures.labels("unreadable").inc()
            return error
        vector = await self.embed_pixels(pixels)
        self._metrics.pictures.labels("embedded").inc()
        return vector

    def _decode(self, picture: bytes) -> NDArray[np.uint8]:
        with self._metrics.decode_s.time():
            return load_image(picture, self.encoder.manifest.preprocess)

    def _send_for_ever(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            with suppress(queue.Empty):
                while len(jobs) < MAX_BATCH:
                    jobs.append(self._jobs.get_nowait())
            self._send([job for job in jobs if job.answer.set_running_or_notify_cancel()])

    def _send(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        started_s = time.monotonic()
        try:
            vectors = self.encoder.embed([job.pixels for job in jobs])
            answered = list(zip(jobs, vectors, strict=True))
        except BaseException as error:  # whatever it is, it is theirs to handle
            for job in jobs:
                job.answer.set_exception(error)
            return
        self.answered_s = time.monotonic()
        self._metrics.batches.observe(len(jobs))
        self._metrics.infer_s.observe(self.answered_s - started_s)
        for job, vector in answered:
            self._metrics.queue_s.observe(started_s - job.since_s)
            job.answer.set_result(vector)
