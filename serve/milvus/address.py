"""Addresses of galleries in Milvus: `milvus://HOST[:PORT]/[DATABASE/]COLLECTION` and `milvus-lite:///FILE.db[#COLLECTION]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from serve.errors import GalleryError

DEFAULT_PORT, DEFAULT_COLLECTION = 19530, "simclr"
_LITE, _SERVER = "milvus-lite://", "milvus://"
_NAME = re.compile(r"[A-Za-z_]\w{0,254}", re.ASCII)  # what Milvus allows


@dataclass(frozen=True)
class Address:
    """Which collection, of which server or file. `database` is empty for the server's default one."""

    text: str
    server: str
    """What pymilvus connects to: http://HOST:PORT or the file's path."""
    database: str
    collection: str
    file: Path | None
    """Of Milvus Lite."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: GalleryError."""
        address = cls._lite(text) if text.startswith(_LITE) else cls._server(text)
        for name in filter(None, (address.database, address.collection)):
            if not _NAME.fullmatch(name):
                raise GalleryError(f"{text}: {name!r} is no name for Milvus; wanted letters, digits and _, no digit first")
        return address

    @classmethod
    def _lite(cls, text: str) -> Self:
        path, _, collection = text.removeprefix(_LITE).partition("#")
        if not path.endswith(".db"):
            raise GalleryError(f"{text}: wanted {_LITE}/FILE.db or {_LITE}/FILE.db#COLLECTION, the file ending in .db")
        file = Path(path).absolute()
        return cls(text, str(file), "", collection or DEFAULT_COLLECTION, file)

    @classmethod
    def _server(cls, text: str) -> Self:
        url = urlsplit(text)
        *databases, collection = url.path.strip("/").split("/")
        try:
            port = url.port or DEFAULT_PORT
        except ValueError:
            port = 0
        if not text.startswith(_SERVER) or not url.hostname or not collection or len(databases) > 1 or not port:
            wanted = f"a folder, {_SERVER}HOST:PORT/COLLECTION or {_LITE}/FILE.db"
            raise GalleryError(f"{text}: no address of a gallery; wanted {wanted}")
        if url.username or url.password:
            raise GalleryError(f"{_SERVER}: an address is shown, so it takes no password; set MILVUS_TOKEN=USER:PASSWORD")
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return cls(text, f"http://{host}:{port}", "".join(databases), collection, None)
