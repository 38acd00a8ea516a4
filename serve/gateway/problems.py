"""Errors as HTTP answers: one table, and RFC 9457's application/problem+json for every one of them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from serve.errors import DamagedItem, EncoderMismatch, EncoderUnavailable, GalleryError, Reembedded, SimclrError
from serve.preprocess import ImageError
from serve.sources import printable

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[Exception], int] = {
    ImageError: 422,
    EncoderMismatch: 409,
    EncoderUnavailable: 503,
    Reembedded: 409,
    DamagedItem: 500,
    GalleryError: 503,
    SimclrError: 500,
}
"""The nearest class of an error's ancestry counts."""
_ANYWHERE = (401, 403, 408, 413, 429, 500, 503)
PICTURE_PROBLEMS = (400, 409, 415, 422)
ITEM_PROBLEMS = (404, 422)
RETRY_AFTER_S = 1
"""After 429 and 503. The line is short: whoever comes back so soon has a fair chance."""


class Problem(BaseModel):
    """RFC 9457 without a type of its own: the status says what kind it is."""

    title: str
    status: int
    detail: str


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """The answer that tells of a problem, in one line whatever came in."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=" ".join(printable(detail).split()))
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return Response(body.model_dump_json(), status, headers={**retry, **(headers or {})}, media_type=MEDIA_TYPE)


def add_problem_handlers(api: FastAPI) -> None:
    """Errors that routes raise become problems, whoever raises them."""
    for kind in (SimclrError, ImageError):
        api.add_exception_handler(kind, _ours)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(Exception, _unknown)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these problems."""
    schema = Problem.model_json_schema()
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted(statuses)
    }


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the problems of a route that may want a key: these, and those that can come anywhere."""
    return problems(*_ANYWHERE, *statuses)


async def _ours(_: Request, error: Exception) -> Response:
    return problem(next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), str(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route alone
        headers["Allow"] = ", ".join(_methods(request))
    return problem(error.status_code, error.detail, headers)


def _methods(request: Request) -> list[str]:
    """What may be done at this path."""
    scopes = {method: {**request.scope, "method": method} for method in ("DELETE", "GET", "PATCH", "POST", "PUT")}
    routes = request.app.routes
    return [method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _unknown(_: Request, __: Exception) -> Response:
    """Starlette raises it again for the server to log."""
    return problem(500, "the server failed; its log says why")
