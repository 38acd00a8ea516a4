"""The protocol that is followed in the end: the one asked for, unless its rule about cameras leaves no query a match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve.errors import SourceError
from serve.protocols.known import PROTOCOLS, Protocol, identity_of
from serve.protocols.names import ProtocolName
from serve.samples import Sample


@dataclass(frozen=True)
class Choice:
    """What was asked for, and what is done."""

    asked: ProtocolName
    name: ProtocolName
    protocol: Protocol
    note: str | None = None
    """Why it is another, in a sentence."""


def settle(asked: ProtocolName, queries: Sequence[Sample], gallery: Sequence[Sample]) -> Choice:
    """Look at what is known of the pictures, before anything is embedded.

    Raises: SourceError where queries have no identity, some pictures no camera, or no query anybody to find.
    """
    protocol = PROTOCOLS[asked]
    for sample in queries:
        if identity_of(sample) is None:
            raise SourceError(f"{sample.source}: a query without identity cannot be scored; name it or leave it out")
    if not {identity_of(sample) for sample in queries} & {identity_of(sample) for sample in gallery}:
        raise SourceError("no identity of the queries is in the gallery, so that none can be found; check the names of both")
    why = _why_no_cameras(queries, gallery) if protocol.by_camera else None
    if why is None:
        return Choice(asked, asked, protocol)
    return Choice(
        asked,
        asked if protocol.draws else "single-camera",
        replace(protocol, by_camera=False),
        f"{why}; scored without the same-camera rule: all pictures of the identity count, but the query and its track",
    )


def _why_no_cameras(queries: Sequence[Sample], gallery: Sequence[Sample]) -> str | None:
    """Why the same-camera rule would leave no query a match; None if it leaves some. Raises: SourceError."""
    nameless = [sample for sample in (*queries, *gallery) if sample.camera is None]
    if len(nameless) == len(queries) + len(gallery):
        return "no camera is named"
    if nameless:
        raise SourceError(f"{nameless[0].source}: names no camera, others do; name it, or leave the camera out everywhere")
    cameras: dict[str | None, set[str | None]] = {}
    for sample in gallery:
        cameras.setdefault(identity_of(sample), set()).add(sample.camera)
    seen = any(cameras.get(identity_of(sample), set()) - {sample.camera} for sample in queries)
    return None if seen else "no identity is seen by two cameras"
