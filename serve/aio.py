"""Encoders for asyncio, on a few threads: failover is written once, and requests that wait for a thread travel together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.contract import Manifest
from serve.encoder import Encoder, open_encoder
from serve.errors import ContractError
from serve.pictures import Picture
from serve.triton.client import TritonEncoder

THREADS = 4
"""Groups under way: two servers work then, and have the next at hand."""
GROUP = 32
"""Pictures that travel together at most: what `simclr export` publishes for."""
Arrays: TypeAlias = tuple[NDArray[np.float32], ...]
"""Each with one row per picture."""


class AsyncEncoder:
    """Any `Encoder` for the tasks of one event loop; use it with `async with`, or `close` it.

    A request that finds a thread free goes at once; those that have to wait go together then, as one request of up to 32
    pictures. A picture that cannot be read fails its own request alone. A task that is cancelled is free at once.
    """

    def __init__(self, encoder: Encoder, *, threads: int = THREADS) -> None:
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(threads, "encoder")
        self._embed = _Grouped(lambda images: (encoder.embed(images),), self._pool, threads)
        self._embed_bytes, self._classify_bytes = self._embed, None
        if isinstance(encoder, TritonEncoder):
            self._embed_bytes = _Grouped(lambda images: (encoder.embed_bytes(images),), self._pool, threads)
            self._classify_bytes = _Grouped(encoder.classify_bytes, self._pool, threads)

    @property
    def manifest(self) -> Manifest:
        """Interface, preparation and provenance."""
        return self._encoder.manifest

    @property
    def encoder_id(self) -> str:
        """Who makes the vectors."""
        return self._encoder.encoder_id

    async def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors (N, D) of pictures, prepared here. Raises: as the encoder's `embed`."""
        (vectors,) = await self._embed.ask(images)
        return vectors

    async def embed_bytes(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Unit vectors (N, D) of encoded images, prepared where the encoder runs. Raises: as the encoder's."""
        (vectors,) = await self._embed_bytes.ask(images)
        return vectors

    async def classify_bytes(self, images: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Unit vectors (N, D) and class probabilities (N, C) of encoded images.

        Raises: ContractError if the encoder has no head, as one in this process never has; else as `TritonEncoder`'s.
        """
        if self._classify_bytes is None:
            raise ContractError(
                "an encoder in this process has no head; use serve.classify.Head, or open grpc://host:8001/NAME"
            )
        vectors, probabilities = await self._classify_bytes.ask(images)
        return vectors, probabilities

    async def close(self) -> None:
        """Take no more, wait for what is under way, and end the threads."""
        for grouped in (self._embed, self._embed_bytes, self._classify_bytes):
            if grouped is not None:
                await grouped.close()
        await asyncio.to_thread(self._pool.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def open_async_encoder(spec: str | Path, *, threads: int = THREADS) -> AsyncEncoder:
    """`open_encoder` for asyncio. Raises: as that."""
    return AsyncEncoder(await asyncio.to_thread(open_encoder, spec), threads=threads)


@dataclass(frozen=True, eq=False)
class _Request:
    images: Sequence[Any]
    answer: asyncio.Future[Arrays]


class _Grouped:
    """One call of an encoder, for many requests."""

    def __init__(self, call: Callable[[list[Any]], Arrays], pool: ThreadPoolExecutor, threads: int) -> None:
        self._call = call
        self._pool = pool
        self._free = threads
        self._waiting: deque[_Request] = deque()
        self._under_way: set[asyncio.Future[list[Arrays | Exception]]] = set()
        self._closed = False

    async def ask(self, images: Sequence[Any]) -> Arrays:
        """Raises: what the call raises; RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the encoder is closed")
        request = _Request(images, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._send()
        return await request.answer

    async def close(self) -> None:
        """Wait for every request that was made."""
        self._closed = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _send(self) -> None:
        while self._free and (group := self._next_group()):
            self._free -= 1
            images = [request.images for request in group]
            sent = asyncio.get_running_loop().run_in_executor(self._pool, self._answers, images)
            self._under_way.add(sent)
            sent.add_done_callback(partial(self._deliver, group))

    def _next_group(self) -> list[_Request]:
        group: list[_Request] = []
        count = 0
        while self._waiting and (not group or count + len(self._waiting[0].images) <= GROUP):
            request = self._waiting.popleft()
            if not request.answer.done():  # it has not been cancelled
                group.append(request)
                count += len(request.images)
        return group

    def _answers(self, requests: list[Sequence[Any]]) -> list[Arrays | Exception]:
        """In a thread: one answer per request."""
        try:
            arrays = self._call([image for images in requests for image in images])
        except ValueError as error:  # one of the pictures is bad: halves, and halves of these, find out whose it is
            half = len(requests) // 2
            return self._answers(requests[:half]) + self._answers(requests[half:]) if half else [error]
        except Exception as error:  # whatever it is, it is theirs to handle
            return [error for _ in requests]
        bounds = pairwise(accumulate(map(len, requests), initial=0))
        return [tuple(array[start:end] for array in arrays) for start, end in bounds]

    def _deliver(self, group: list[_Request], done: asyncio.Future[list[Arrays | Exception]]) -> None:
        self._under_way.discard(done)
        self._free += 1
        for request, answer in zip(group, done.result(), strict=True):
            if request.answer.done():
                continue
            if isinstance(answer, Exception):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)
        self._send()
