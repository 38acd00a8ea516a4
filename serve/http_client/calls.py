"""What the client asks of the HTTP API and makes of its answers, without sending anything.

Each method of `Calls` is a generator: it yields requests and is sent what came of them. So it is written once, for threads and
for asyncio.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeAlias, TypeVar, Unpack

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from serve.contract import Manifest
from serve.errors import EncoderMismatch, EncoderUnavailable
from serve.gateway.limits import Limits
from serve.http_client.errors import foreign, refusal, unreached
from serve.http_client.uploads import Options, Upload, alone, encoded, groups, together
from serve.identity.decision import Decision
from serve.item import Item, Known
from serve.preprocess import ImageError
from serve.search import Hit

BUSY = (429, 503)
"""Asked again after `Retry-After` while there is time: everything that may be done twice."""
UNTOUCHED = (429,)
"""The same for what may not: 429 is said before anything is done, 503 perhaps after."""
RETRY_AFTER_S = 1.0
"""The shortest pause, and that for an answer which does not say, or names a date."""
ITEMS, IDENTIFY = "/v1/items", "/v1/reid/identify"
Query: TypeAlias = Upload | int | NDArray[np.floating]
"""A picture, a URL, an item's id, or a vector (D,)."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Info:
    """Which encoder serves, the classes of its head (none without), and what a request may bring."""

    manifest: Manifest
    classes: list[str]
    limits: Limits


@dataclass(frozen=True)
class Classified:
    """A picture's likeliest class, None where the head is not confident enough, and the probability of each."""

    label: str | None
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Identified(Decision):
    """A decision, and why the server's threshold no longer keeps its promise; None as long as it does."""

    warning: str | None


@dataclass(frozen=True)
class Page:
    """Some items of a gallery, and how many there are in all."""

    items: list[Item]
    total: int


@dataclass(frozen=True)
class _Embedded:
    embedding: list[float]


@dataclass(frozen=True)
class _Unreadable:
    error: str


@dataclass(frozen=True)
class _Results(Generic[_T]):
    encoder_id: str | None
    results: list[_T | _Unreadable]


@dataclass(frozen=True)
class _Hits:
    hits: list[Hit]


@dataclass(frozen=True)
class Request:
    """To be sent after a pause."""

    method: str
    path: str
    options: Options
    after_s: float
    timeout_s: float


_HITS, _INFO, _ITEM, _PAGE = TypeAdapter(_Hits), TypeAdapter(Info), TypeAdapter(Item), TypeAdapter(Page)
_VECTOR, _EMBEDDED = TypeAdapter(_Embedded), TypeAdapter(_Results[_Embedded])
_IDENTIFIED = TypeAdapter(Identified)
_CLASSIFIED = TypeAdapter(_Results[Classified])
Steps: TypeAlias = Generator[Request, httpx.Response | httpx.RequestError, _T]
"""Requests that lead to a result."""


class Calls:
    """What can be asked of one server.

    Raises, everywhere: EncoderUnavailable if no answer comes in time, or only that there is too much to do; ContractError if it
    is not one of this API; SimclrError if it is a refusal, as without the right key.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s

    def embed(self, pictures: Sequence[Upload]) -> Steps[NDArray[np.float32]]:
        """Unit vectors (N, D) of pictures. Raises: ImageError of the first unreadable one, EncoderMismatch."""
        vectors = []
        for answer in (yield from self.embed_each(pictures)):
            if isinstance(answer, ImageError):
                raise answer
            vectors.append(answer)
        return np.stack(vectors) if vectors else np.empty((0, (yield from self.info()).manifest.embedding_dim), np.float32)

    def embed_each(self, pictures: Sequence[Upload]) -> Steps[list[NDArray[np.float32] | ImageError]]:
        """One answer per picture, in order: its unit vector (D,), or why it cannot be read. Raises: EncoderMismatch."""
        found = yield from self._each("/v1/embed", pictures, _EMBEDDED)
        return [one if isinstance(one, ImageError) else np.array(one.embedding, np.float32) for one in found]

    def classify(self, pictures: Sequence[Upload]) -> Steps[list[Classified | ImageError]]:
        """One answer per picture, in order: its classes, or why it cannot be read. Raises: EncoderMismatch."""
        return (yield from self._each("/v1/classify", pictures, _CLASSIFIED))

    def search(
        self,
        query: Query,
        k: int = 10,
        where: str | None = None,
        *,
        offset: int = 0,
        threshold: float | None = None,
    ) -> Steps[list[Hit]]:
        """The `k` items most similar to a picture, here or at a URL, to an item (its id) or to a vector (D,), best first.

        As `serve.gallery.Gallery.search`; with a threshold, those whose score is not below it.
        Raises: GalleryError, ImageError, SourceError if the URL does not answer.
        """
        page = {"k": k, "where": where, "offset": offset, "threshold": threshold}
        subject = _subject(query)
        if isinstance(subject, dict):
            return (yield from self._ask(_HITS, "POST", "/v1/search", json=page | subject)).hits
        (picture,) = subject
        return (yield from self._ask(_HITS, "POST", "/v1/search/image", **alone(encoded(picture), page))).hits

    def identify(self, probe: Query | Sequence[Upload], k: int = 5, where: str | None = None) -> Steps[Identified]:
        """Who is on a picture, several of one tracklet, or what `search` takes; several vectors are an array (N, D).

        As `serve.identity.identify.identify` with the server's calibration; an item is left out of its own answer.
        Raises: GalleryError, ImageError of the first unreadable picture, SourceError if the URL does not answer.
        """
        among = {"k": k, "where": where}
        subject = _subject(probe)
        if isinstance(subject, dict):
            return (yield from self._ask(_IDENTIFIED, "POST", IDENTIFY, json=among | subject))
        pictures = [encoded(picture) for picture in subject]
        return (yield from self._ask(_IDENTIFIED, "POST", f"{IDENTIFY}/image", **together(pictures, among)))

    def items(self, where: str | None = None, *, limit: int = 100, offset: int = 0) -> Steps[Page]:
        """Items that pass `where`, in the order they were added. Raises: GalleryError."""
        page: dict[str, str | float] = {"limit": limit, "offset": offset}
        if where is not None:
            page["where"] = where
        return (yield from self._ask(_PAGE, "GET", ITEMS, params=page))

    def item(self, item_id: int) -> Steps[Item]:
        """One item. Raises: GalleryError if it does not exist."""
        return (yield from self._ask(_ITEM, "GET", f"{ITEMS}/{item_id}"))

    def vector(self, item_id: int) -> Steps[NDArray[np.float32]]:
        """The unit vector (D,) of an item. Raises: GalleryError if it does not exist."""
        found = yield from self._ask(_VECTOR, "GET", f"{ITEMS}/{item_id}/vector")
        return np.array(found.embedding, np.float32)

    def add(self, picture: Upload, source: str | None = None, **known: Unpack[Known]) -> Steps[Item]:
        """Add a picture under the name `source`, by default its digest.

        Raises: GalleryError, ImageError; nothing is added then. After EncoderUnavailable it may have been: what may have
        begun is not asked for twice.
        """
        extra = known.get("extra")
        facts: dict[str, str | float | None] = {
            "source": source,
            "label": known.get("label"),
            "identity": known.get("identity"),
            "camera": known.get("camera"),
            "time": known.get("time"),
            "extra": None if extra is None else json.dumps(extra),
        }
        return (yield from self._ask(_ITEM, "POST", ITEMS, again=UNTOUCHED, **alone(encoded(picture), facts)))

    def relabel(self, item_id: int, **known: Unpack[Known]) -> Steps[Item]:
        """Say anew what is known about an item, as `serve.gallery.Gallery.relabel`. Raises: GalleryError."""
        return (yield from self._ask(_ITEM, "PATCH", f"{ITEMS}/{item_id}", json=known))

    def replace(self, item_id: int, picture: Upload) -> Steps[Item]:
        """Give an item another picture. Raises: GalleryError, ImageError; nothing is changed then."""
        return (yield from self._ask(_ITEM, "PUT", f"{ITEMS}/{item_id}/image", **alone(encoded(picture))))

    def remove(self, item_id: int) -> Steps[None]:
        """Remove an item; its id is never used again. Raises: GalleryError if it does not exist."""
        yield from self._answer("DELETE", f"{ITEMS}/{item_id}", again=UNTOUCHED)

    def info(self) -> Steps[Info]:
        """Which encoder serves, and within which limits."""
        return (yield from self._ask(_INFO, "GET", "/v1/info"))

    def ready(self) -> Steps[bool]:
        """Whether the API is there and its encoder answers; asked once."""
        try:
            yield from self._answer("GET", "/health/ready", again=())
        except EncoderUnavailable:
            return False
        return True

    def _each(self, path: str, pictures: Sequence[Upload], kind: TypeAdapter[_Results[_T]]) -> Steps[list[_T | ImageError]]:
        """In as many requests as the server's limits make of them."""
        limits = (yield from self.info()).limits if len(pictures) > 1 else Limits()  # one goes alone anyhow
        found: list[_T | ImageError] = []
        encoders: set[str | None] = {None}
        for group in groups(pictures, limits):
            sent = [one for one in group if isinstance(one, bytes)]
            answer = yield from self._group(path, sent, kind)
            if len(answer.results) != len(sent):
                raise foreign(self._url + path, f"{len(answer.results)} results for {len(sent)} pictures")
            encoders.add(answer.encoder_id)
            if len(encoders) > 2:
                raise EncoderMismatch(f"{self._url}: another encoder came up there meanwhile; ask for all of them again")
            results = iter(answer.results)
            found += [one if isinstance(one, ImageError) else _or_error(next(results)) for one in group]
        return found

    def _group(self, path: str, pictures: list[bytes], kind: TypeAdapter[_Results[_T]]) -> Steps[_Results[_T]]:
        """One result per picture; alone, an unreadable one is refused instead."""
        if not pictures:
            return _Results(None, [])
        if len(pictures) > 1:
            return (yield from self._ask(kind, "POST", path, **together(pictures)))
        try:
            return (yield from self._ask(kind, "POST", path, **alone(pictures[0])))
        except ImageError as error:
            return _Results(None, [_Unreadable(str(error))])

    def _ask(
        self, kind: TypeAdapter[_T], method: str, path: str, *, again: Sequence[int] = BUSY, **options: Unpack[Options]
    ) -> Steps[_T]:
        answer = yield from self._answer(method, path, again=again, **options)
        try:
            return kind.validate_json(answer.content)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise foreign(self._url + path, f"no right {place}" if place else "no JSON") from error

    def _answer(
        self, method: str, path: str, *, again: Sequence[int] = BUSY, **options: Unpack[Options]
    ) -> Steps[httpx.Response]:
        """The answer to a request that succeeded, if need be when it was repeated."""
        ends = monotonic() + self._timeout_s
        pause_s = 0.0
        while True:
            answer = yield Request(method, path, options, pause_s, ends - monotonic() - pause_s)
            if isinstance(answer, httpx.RequestError):
                raise unreached(self._url, self._timeout_s, answer) from answer
            pause_s = _retry_after_s(answer)
            if answer.status_code not in again or monotonic() + pause_s >= ends:
                break
        if not answer.is_success:
            raise refusal(self._url + path, answer)
        return answer


def _subject(query: Query | Sequence[Upload]) -> dict[str, object] | Sequence[Upload]:
    """What says it in JSON, or the pictures that have to be sent."""
    if isinstance(query, np.ndarray):
        return {"vector" if query.ndim == 1 else "vectors": query.tolist()}
    if isinstance(query, int | np.integer):
        return {"id": int(query)}
    if isinstance(query, str) and query.startswith(("http://", "https://")):
        return {"url": query}
    return [query] if isinstance(query, Upload) else query


def _or_error(result: _T | _Unreadable) -> _T | ImageError:
    return ImageError(result.error) if isinstance(result, _Unreadable) else result


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return max(RETRY_AFTER_S, float(text)) if text.isdecimal() else RETRY_AFTER_S
