"""The connection to a Milvus server, or to Milvus Lite, which pymilvus starts in this process; its errors as ours."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from serve.errors import GalleryError
from serve.milvus.address import Address

if TYPE_CHECKING:
    from pymilvus import MilvusClient

_TIMEOUT_S = 10
_TOKEN = "MILVUS_TOKEN"  # noqa: S105  (the name of the variable)
_open_files: Counter[str] = Counter()
_lock = threading.Lock()


def connect(address: Address) -> MilvusClient:
    """Open a client; a password or key comes from the variable MILVUS_TOKEN. Raises: GalleryError."""
    try:
        import pymilvus

        if address.file:
            import milvus_lite.server_manager  # noqa: F401  (pymilvus starts it)
    except ModuleNotFoundError as error:
        needed = str(error.name).split(".")[0]
        raise GalleryError(f"{address.text}: needs {needed}: pip install 'simclr-serve[scale]'") from error
    for name in ("pymilvus", "milvus_lite", *(["grpc._server"] if address.file else [])):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log, with tracebacks, what they raise, or do without
    token = "" if address.file else os.environ.get(_TOKEN, "")
    with _lock, translated(address):
        client = pymilvus.MilvusClient(address.server, token=token, db_name=address.database, timeout=_TIMEOUT_S)
        _open_files[address.server] += 1
    return client


def disconnect(address: Address, client: MilvusClient) -> None:
    """Close a client. With the last one of this process, a file of Milvus Lite is free for other processes."""
    with _lock:
        client.close()
        _open_files[address.server] -= 1
        if address.file and not _open_files[address.server]:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(address.server)


@contextmanager
def translated(address: Address) -> Iterator[None]:
    """pymilvus' errors, once, as ours."""
    from grpc import RpcError  # type: ignore[import-untyped]
    from pymilvus import MilvusException

    try:
        yield
    except (MilvusException, RpcError) as error:
        said = " ".join(str(getattr(error, "message", error)).split())
        hint = "is the server up, and is MILVUS_TOKEN right?"
        if address.file:
            hint = f"does {address.file.parent} exist, and has no other process the file open? Milvus Lite serves one"
        raise GalleryError(f"{address.text}: Milvus says: {said}; {hint}") from error
