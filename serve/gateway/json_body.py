"""A JSON body -> a model of pydantic's. FastAPI would read it on the event loop in Python, whatever its size and kind."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.gateway.limits import MAX_JSON_BYTES

_Model = TypeVar("_Model", bound=BaseModel)


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of `read_json`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


async def read_json(request: Request, model: type[_Model]) -> _Model:
    """The body. Raises: HTTPException 400 if it is no JSON, 413, 415, 422 if it is not what was wanted."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the content type is {kind or 'missing'}, wanted application/json")
    body = await request.body()
    if len(body) > MAX_JSON_BYTES:
        raise HTTPException(413, f"the body has {len(body):,} bytes, at most {MAX_JSON_BYTES:,} are accepted as JSON")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        detail = f"{place}: {first['msg']}" if place else first["msg"]
        raise HTTPException(400 if first["type"] == "json_invalid" else 422, detail) from error
