"""Pictures on their way to the HTTP API: encoded, and grouped by what one request may bring."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypedDict

from PIL import Image

from serve.errors import SourceError
from serve.gateway.limits import Limits
from serve.preprocess import ImageError, decode
from serve.sources import read_bytes

Upload: TypeAlias = str | Path | bytes | Image.Image
"""A path (also `archive.zip!/member`), an encoded picture, or a PIL image, which travels without loss."""
FORM_BYTES = 256
"""What a form adds to each of its pictures, at most."""
_ENCODED = "application/octet-stream"


def encoded(picture: Upload) -> bytes:
    """The bytes that are sent; those of a file, or given as bytes, are left for the server to judge. Raises: ImageError."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        decode(picture).save(file, "PNG", compress_level=1)
        return file.getvalue()
    try:
        return read_bytes(str(picture))
    except SourceError as error:
        raise ImageError(str(error)) from error


class Options(TypedDict, total=False):
    """Those of `httpx.Client.request` that are used here."""

    content: bytes
    files: list[tuple[str, tuple[str, bytes, str]]]
    headers: dict[str, str]
    json: object
    params: dict[str, str | float]


def alone(picture: bytes, facts: Mapping[str, str | float | None] | None = None) -> Options:
    """A body that is one picture, with the facts that are known in the query."""
    return {"content": picture, "headers": {"Content-Type": _ENCODED}, "params": _known(facts or {})}


def together(pictures: Sequence[bytes], facts: Mapping[str, str | float | None] | None = None) -> Options:
    """A form of pictures, with the facts that are known in the query."""
    files = [("images", (str(number), picture, _ENCODED)) for number, picture in enumerate(pictures)]
    return {"files": files, "params": _known(facts or {})}


def _known(facts: Mapping[str, str | float | None]) -> dict[str, str | float]:
    return {name: value for name, value in facts.items() if value is not None}


def groups(pictures: Iterable[Upload], limits: Limits) -> Iterator[list[bytes | ImageError]]:
    """All of them in order, cut so that each group is within the limits; one that is too large goes alone."""
    group: list[bytes | ImageError] = []
    size = 0
    for picture in pictures:
        body = _encoded_or_error(picture)
        weight = FORM_BYTES + (len(body) if isinstance(body, bytes) else 0)
        if group and (len(group) == limits.max_pictures or size + weight > limits.max_bytes):
            yield group
            group, size = [], 0
        group.append(body)
        size += weight
    if group:
        yield group


def _encoded_or_error(picture: Upload) -> bytes | ImageError:
    try:
        return encoded(picture)
    except ImageError as error:
        return error
