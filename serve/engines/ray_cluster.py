"""The embedding of many shards on a Ray cluster: one task per shard, so that whatever dies costs the shards it had.

Plain tasks and not Ray Data: the parts that are there are the record of what is done, which its open version does not keep,
and there is no operator that could wait for a CPU that another one holds.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path

import ray

from serve.encoder import Encoder
from serve.engines.shards import Shard, Tell, embed_shard
from serve.errors import SimclrError, first_line

RETRIES = 3
"""For a shard whose worker or machine has died. A picture that kills its decoder must not go round for ever."""
_OWN_STORE_BYTES = 200_000_000
"""Of a cluster started here: shards are lists of names, and vectors never travel."""


def embed_on_ray(
    shards: Sequence[Shard],
    folder: Path,
    tell: Tell,
    *,
    open_encoder: Callable[[str], Encoder],
    spec: str,
    address: str | None,
    workers: int,
) -> None:
    """Work on `workers` shards at a time on every machine of the cluster, all of which see the pictures and `folder`.

    Each worker process opens the encoder for itself. Args: address, of the cluster; None: one that is started here and ends
    with this. Raises: what `embed_shard` raises, SimclrError if there is no cluster or a shard's workers keep dying.
    """
    with _connected(address):
        cpus = _cpus_per_shard(workers)
        task = ray.remote(_embed).options(num_cpus=cpus, max_retries=RETRIES)
        ahead = iter(shards)
        under_way: dict[ray.ObjectRef[None], Shard] = {}
        while True:
            most = 2 * math.ceil(ray.cluster_resources().get("CPU", 1) / cpus)  # asked anew: clusters grow and shrink
            for shard in islice(ahead, max(0, most - len(under_way))):
                under_way[task.remote(shard, folder, open_encoder, spec)] = shard
            if not under_way:
                return
            (finished,), _ = ray.wait(list(under_way))
            _raise_failure(finished, under_way[finished])
            tell(len(under_way.pop(finished).samples))


def _embed(shard: Shard, folder: Path, open_encoder: Callable[[str], Encoder], spec: str) -> None:
    embed_shard(shard, _opened(open_encoder, spec), folder)


@cache
def _opened(open_encoder: Callable[[str], Encoder], spec: str) -> Encoder:
    """Once in each worker process."""
    return open_encoder(spec)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address is None:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OWN_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _check_reachable(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise SimclrError(
            f"{address or 'Ray'}: no cluster to work on ({first_line(error)}); give its HOST:PORT, or auto"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for two minutes. Raises: OSError."""
    if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((match[1], int(match[2])), timeout=10).close()


def _cpus_per_shard(workers: int) -> float:
    """`workers` shards fit on the smallest machine. Ray wants whole numbers above one, and four digits below."""
    sizes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    share = min((size for size in sizes if size), default=1) / workers
    return math.floor(share) if share >= 1 else math.floor(share * 10_000) / 10_000


def _raise_failure(finished: ray.ObjectRef[None], shard: Shard) -> None:
    try:
        ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise SimclrError(
            f"{shard.part_name}: its worker died {RETRIES + 1} times, at one of the {len(shard.samples)} pictures from "
            f"{shard.samples[0].source} on ({first_line(error)}); leave them out, or see Ray's logs"
        ) from error
