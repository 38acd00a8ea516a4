"""Pictures out of a request: its body is one encoded picture, or a form with one or more of them."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

FIELD = "images"
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _body(description: str, most: int | None) -> dict[str, Any]:
    files = {"type": "array", "minItems": 1, "items": _BINARY["schema"]} | ({} if most is None else {"maxItems": most})
    form = {"type": "object", "properties": {FIELD: files}, "required": [FIELD]}
    raw = dict.fromkeys(("image/jpeg", "image/png", "image/*", "application/octet-stream"), _BINARY)
    content = {**raw, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


PICTURES_BODY = _body(f"One encoded picture (JPEG, PNG, WebP, ...), or a form with one or more files named `{FIELD}`.", None)
"""What OpenAPI says of `read_pictures`."""
PICTURE_BODY = _body(f"One encoded picture (JPEG, PNG, WebP, ...), or a form with one file named `{FIELD}`.", 1)
"""What OpenAPI says of `read_picture`."""


async def read_pictures(request: Request, *, most: int) -> list[bytes]:
    """The encoded pictures, in order. Raises: HTTPException 400, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await request.body()]
    if kind != "multipart/form-data":
        raise HTTPException(415, f"the content type is {kind or 'missing'}, wanted image/* or multipart/form-data")
    async with request.form(max_files=most) as form:
        pictures = [await file.read() for file in form.getlist(FIELD) if isinstance(file, UploadFile)]
    if not pictures:
        raise HTTPException(400, f"the form has no file named {FIELD}; send one picture or more under that name")
    return pictures


async def read_picture(request: Request) -> bytes:
    """The only picture. Raises: HTTPException 400, 415."""
    (picture,) = await read_pictures(request, most=1)
    return picture
