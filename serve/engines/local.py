"""The embedding of many shards on this machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve.encoder import Encoder
from serve.engines.shards import Shard, Tell, embed_shard


def embed_here(shards: Sequence[Shard], folder: Path, tell: Tell, *, encoder: Encoder, workers: int) -> None:
    """Work on `workers` shards at a time. One decodes while another's pictures are in the encoder, which threads suffice for.

    Raises: what `embed_shard` raises; the others under way are given up then, and with Ctrl-C too.
    """
    given_up = threading.Event()
    lock = threading.Lock()

    def tell_unless_given_up(count: int) -> None:
        if given_up.is_set():
            raise _GivenUpError
        with lock:
            tell(count)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(lambda shard: embed_shard(shard, encoder, folder, tell_unless_given_up), shards):
                pass
        except BaseException:
            given_up.set()
            pool.shutdown(cancel_futures=True)
            raise


class _GivenUpError(Exception):
    """Ends the work on a shard whose result nobody wants."""
