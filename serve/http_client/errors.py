"""Problems of the HTTP API -> the errors of this project, the way back of serve/gateway/problems.py."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from pydantic import TypeAdapter, ValidationError

from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable, GalleryError, SimclrError, SourceError
from serve.preprocess import ImageError

_ERRORS: dict[int, type[Exception]] = {
    400: GalleryError,
    404: GalleryError,
    409: EncoderMismatch,
    413: ImageError,
    422: GalleryError,
    429: EncoderUnavailable,
    502: SourceError,
    503: EncoderUnavailable,
}
_AWAY = (429, 502, 503, 504)
"""What proxies say while there is no server behind them."""


@dataclass(frozen=True)
class _Problem:
    title: str
    detail: str


_PROBLEM = TypeAdapter(_Problem)


def refusal(url: str, answer: httpx.Response) -> Exception:
    """The error that an answer tells of."""
    try:
        problem = _PROBLEM.validate_json(answer.content)
    except ValidationError:  # somebody between here and there says it
        said = f"{answer.status_code} {answer.reason_phrase}"
        if answer.status_code in _AWAY:
            return EncoderUnavailable(f"{url}: the server cannot be asked at the moment ({said})")
        return foreign(url, said)
    if problem.detail == problem.title:  # no route of this API says so little
        return foreign(url, f"{answer.status_code} {problem.detail}, as without a head or a gallery")
    if answer.status_code == 422 and problem.detail.startswith("image: "):
        return ImageError(problem.detail)
    if answer.status_code == 409 and url.endswith("/v1/items"):  # its source is there already
        return GalleryError(problem.detail)
    return _ERRORS.get(answer.status_code, SimclrError)(problem.detail)


def foreign(url: str, said: str) -> ContractError:
    """Of an answer that this API does not give."""
    return ContractError(f"{url}: no answer that this client knows ({said}); wanted a `simclr api` of this version")


def unreached(url: str, timeout_s: float, error: httpx.RequestError) -> EncoderUnavailable:
    """Of a request that got no answer."""
    if isinstance(error, httpx.TimeoutException):
        return EncoderUnavailable(f"{url}: no answer within {timeout_s:g} s; is the server overloaded or stuck?")
    reason = str(error) or type(error).__name__
    return EncoderUnavailable(f"{url}: no answer ({reason}); start `simclr api` or correct the address")
