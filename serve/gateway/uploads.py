"""Pictures out of a request: its body is one encoded picture, or a form with one or more of them."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

FIELD = "images"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
PICTURES_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"One encoded picture (JPEG, PNG, WebP, ...), or a form with one or more files named `{FIELD}`.",
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {FIELD: {"type": "array", "minItems": 1, "items": _BINARY["schema"]}},
                    "required": [FIELD],
                }
            },
        },
    }
}
"""What OpenAPI says of `read_pictures`."""


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
