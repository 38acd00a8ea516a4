"""Routes over the gallery's items: list, add, read, change, remove. What is answered with success is on disk."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Annotated, NoReturn, cast

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, WithJsonSchema
from starlette.exceptions import HTTPException

from serve.filters import Condition, Where
from serve.gallery import Gallery
from serve.gateway.batching import Batcher
from serve.gateway.examples import ENCODER_ID, ITEM, VECTOR, example, item_example
from serve.gateway.json_body import json_body, read_json
from serve.gateway.limits import MAX_HITS, MAX_ROWS, MAX_TEXT
from serve.gateway.problems import ITEM_PROBLEMS, PICTURE_PROBLEMS, documented
from serve.gateway.search import ItemId
from serve.gateway.shelf import Shelf, asked_where, on_item
from serve.gateway.uploads import PICTURE_BODY, read_picture
from serve.item import Item, Known
from serve.samples import Sample


def _storable(extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(extra, allow_nan=False)  # raises ValueError
    return extra


Text = Annotated[str, Field(max_length=MAX_TEXT, pattern=r"^[^\x00]*$")]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Extra = Annotated[dict[str, JsonValue], AfterValidator(_storable), WithJsonSchema({"type": "object"})]
"""With a schema of its own, because JsonValue's is a reference that leads nowhere inside an OpenAPI document."""
_EXTRA: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(Extra)


class NewItem(BaseModel):
    """What is known about a picture that is added."""

    model_config = ConfigDict(extra="forbid")

    source: Annotated[Text, Field(min_length=1)] | None = Field(
        None, description="Its name, which no other item has. Default: `sha256:` and the digest of the picture."
    )
    label: Text | None = None
    identity: Text | None = None
    camera: Text | None = None
    time: Seconds | None = Field(None, description="Seconds.")
    extra: str | None = Field(None, description="More facts, as a JSON object.")


class Relabel(BaseModel):
    """What is to be known about an item from now on; null: it is not known. What is not named stays."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"label": "cat", "time": None, "extra": {"seen": None}}]}
    )

    label: Text | None = None
    identity: Text | None = None
    camera: Text | None = None
    time: Seconds | None = None
    extra: Extra | None = Field(None, description="Laid over what is there; a fact that is null goes, and with null all go.")


class ItemsPage(BaseModel):
    """Items in the order they were added, and how many there are in all."""

    model_config = example({"items": [ITEM], "total": 1})
    items: list[Item]
    total: int


class ItemVector(BaseModel):
    """An item's unit vector (D)."""

    model_config = example({"encoder_id": ENCODER_ID, "embedding": VECTOR})
    encoder_id: str
    embedding: list[float]


def item_routes(shelf: Shelf, batcher: Batcher) -> APIRouter:
    """/v1/items and what is under it."""
    router = APIRouter(prefix="/v1/items", tags=["items"])
    _add_reading_routes(router, shelf, batcher.encoder.encoder_id)
    _add_writing_routes(router, shelf, batcher)
    return router


def _add_reading_routes(router: APIRouter, shelf: Shelf, encoder_id: str) -> None:
    @router.get("", summary="Items, page by page", responses=documented(400, 422))
    async def list_items(
        where: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 100,
        offset: Annotated[int, Query(ge=0, le=MAX_ROWS)] = 0,
    ) -> ItemsPage:
        return await shelf.read(partial(_page, where=asked_where(where), limit=limit, offset=offset))

    @router.get("/{item_id}", summary="One item", responses=item_example(200) | documented(*ITEM_PROBLEMS))
    async def get_item(item_id: ItemId) -> Item:
        return await shelf.read(on_item(item_id, lambda gallery: gallery.item(item_id)))

    @router.get("/{item_id}/vector", summary="An item's vector", responses=documented(*ITEM_PROBLEMS))
    async def get_item_vector(item_id: ItemId) -> ItemVector:
        vector_D = await shelf.read(on_item(item_id, lambda gallery: gallery.vector(item_id)))
        return ItemVector(encoder_id=encoder_id, embedding=vector_D.tolist())


def _add_writing_routes(router: APIRouter, shelf: Shelf, batcher: Batcher) -> None:
    @router.post(
        "",
        status_code=201,
        summary="Add a picture",
        openapi_extra=PICTURE_BODY,
        responses=item_example(201) | documented(*PICTURE_PROBLEMS),
    )
    async def add_item(request: Request, response: Response, new: Annotated[NewItem, Query()]) -> Item:
        extra = _extra(new.extra)
        picture = await read_picture(request)
        facts = new.model_dump(exclude={"source", "extra"})
        sample = Sample(new.source or f"sha256:{hashlib.sha256(picture).hexdigest()}", **facts)
        vector_D = await batcher.embed(picture)
        item = await shelf.write(partial(_add, sample=sample, vector_D=vector_D, extra=extra))
        response.headers["Location"] = f"/v1/items/{item.id}"
        return item

    @router.patch(
        "/{item_id}",
        summary="Say anew what is known about an item",
        openapi_extra=json_body(Relabel),
        responses=item_example(200) | documented(*ITEM_PROBLEMS, 400, 408, 413, 415),
    )
    async def relabel_item(item_id: ItemId, request: Request) -> Item:
        known = cast("Known", (await read_json(request, Relabel)).model_dump(exclude_unset=True))
        return await shelf.write(on_item(item_id, partial(_relabel, item_id=item_id, known=known)))

    @router.put(
        "/{item_id}/image",
        summary="Give an item another picture",
        openapi_extra=PICTURE_BODY,
        responses=item_example(200) | documented(*PICTURE_PROBLEMS, 404),
    )
    async def replace_image(item_id: ItemId, request: Request) -> Item:
        vector_D = await batcher.embed(await read_picture(request))
        return await shelf.write(on_item(item_id, partial(_replace, item_id=item_id, vector_D=vector_D)))

    @router.delete("/{item_id}", status_code=204, summary="Remove an item", responses=documented(*ITEM_PROBLEMS))
    async def remove_item(item_id: ItemId) -> None:
        await shelf.write(on_item(item_id, lambda gallery: gallery.remove([item_id])))


def _page(gallery: Gallery, where: Where, limit: int, offset: int) -> ItemsPage:
    return ItemsPage(items=gallery.items(where, limit, offset), total=gallery.count(where))


def _extra(text: str | None) -> dict[str, JsonValue]:
    try:
        return _EXTRA.validate_json(text or "{}")
    except ValidationError as error:
        wanted = 'wanted a JSON object such as {"seen": true}'
        raise HTTPException(422, f"extra: {wanted} ({error.errors()[0]['msg']})") from error


def _add(gallery: Gallery, sample: Sample, vector_D: NDArray[np.float32], extra: dict[str, JsonValue]) -> Item:
    report = gallery.add([sample], vector_D[None], extra={sample.source: extra})
    if not report.ids:
        _taken(gallery, sample.source)
    return gallery.item(report.ids[0])


def _taken(gallery: Gallery, source: str) -> NoReturn:
    ids = [item.id for item in gallery.items(Condition("source", "=", (source,)), 1)]
    told = f"; PUT /v1/items/{ids[0]}/image gives that item another picture" if ids else ""
    raise HTTPException(409, f"{source[:100]} is in the gallery already{told}")


def _relabel(gallery: Gallery, item_id: int, known: Known) -> Item:
    if "extra" in known and known["extra"] is None:
        known = {**known, "extra": dict.fromkeys(gallery.item(item_id).extra)}
    gallery.relabel([item_id], **known)
    return gallery.item(item_id)


def _replace(gallery: Gallery, item_id: int, vector_D: NDArray[np.float32]) -> Item:
    gallery.update(item_id, vector_D)
    return gallery.item(item_id)
