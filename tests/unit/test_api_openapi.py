"""What the API says of itself: every route with its name, problems and examples; keys where there are keys."""

import json
import re

import pytest
from fastapi.openapi.models import OpenAPI
from pydantic import TypeAdapter

from serve.api import create_api
from serve.encoder import OnnxEncoder
from serve.gallery import Gallery
from serve.gateway.guard import needed_scope
from serve.gateway.items import ItemsPage, ItemVector
from serve.gateway.keys import Keyring, add_key
from serve.gateway.reid import IdentifyAnswer, IdentifyQuery
from serve.gateway.search import SearchAnswer, SearchQuery
from serve.item import Item
from tests.asgi_client import ask
from tests.toy_encoder import toy_head, write_toy_encoder

OPERATIONS = {
    "embed": ("POST", "/v1/embed", "read"),
    "classify": ("POST", "/v1/classify", "read"),
    "info": ("GET", "/v1/info", "read"),
    "search": ("POST", "/v1/search", "read"),
    "search_image": ("POST", "/v1/search/image", "read"),
    "identify": ("POST", "/v1/reid/identify", "read"),
    "identify_image": ("POST", "/v1/reid/identify/image", "read"),
    "list_items": ("GET", "/v1/items", "read"),
    "add_item": ("POST", "/v1/items", "write"),
    "get_item": ("GET", "/v1/items/{item_id}", "read"),
    "get_item_vector": ("GET", "/v1/items/{item_id}/vector", "read"),
    "relabel_item": ("PATCH", "/v1/items/{item_id}", "write"),
    "replace_image": ("PUT", "/v1/items/{item_id}/image", "write"),
    "remove_item": ("DELETE", "/v1/items/{item_id}", "write"),
    "live": ("GET", "/health/live", None),
    "ready": ("GET", "/health/ready", None),
    "metrics_page": ("GET", "/metrics", "admin"),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Without keys, and with."""
    folder = tmp_path_factory.mktemp("world")
    encoder = OnnxEncoder(write_toy_encoder(folder / "toy")[0])
    add_key(folder / "keys", "me", "read")
    with Gallery.open(folder / "gallery", encoder, create=True) as gallery:
        options = {"heads": {"toy": toy_head(encoder.encoder_id)}, "gallery": gallery}
        apis = [create_api(encoder, **options, keys=keys) for keys in (None, Keyring(folder / "keys"))]
        return [ask(api, lambda http: http.get("/openapi.json")).json() for api in apis]


def operations(document):
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_route_has_its_name_and_scope(documents):
    for document in documents:
        OpenAPI.model_validate(document)
        found = {op["operationId"]: (method, path, needed_scope(method, path)) for method, path, op in operations(document)}
        assert found == OPERATIONS
        for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
            assert reference in document["components"]["schemas"]


def test_keys_are_asked_for_where_there_are_keys(documents):
    without, with_keys = documents
    assert "securitySchemes" not in without["components"]
    assert with_keys["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for _, path, operation in operations(with_keys):
        assert operation.get("security", []) == ([] if path.startswith("/health") else [{"key": []}])
    assert not any("security" in operation for *_, operation in operations(without))


def test_problems_are_documented(documents):
    for method, path, operation in operations(documents[1]):
        statuses = set(operation["responses"])
        if path.startswith("/health"):
            continue
        assert {"401", "403", "429", "500", "503"} <= statuses, path
        if method != "GET" and method != "DELETE":
            assert {"400", "408", "413", "415", "422"} <= statuses, path
        if "{item_id}" in path:
            assert {"404", "422"} <= statuses, path
        for status, response in operation["responses"].items():
            if int(status) >= 400 and status != "422":
                assert "application/problem+json" in response["content"], (path, status)
            if status == "422":
                assert set(response["content"]) == {"application/problem+json"}, path


def test_examples_are_what_is_answered(documents):
    schemas = documents[0]["components"]["schemas"]
    for model in (SearchAnswer, IdentifyAnswer, ItemsPage, ItemVector):
        (example,) = schemas[model.__name__]["examples"]
        assert TypeAdapter(model).dump_python(model.model_validate(example), mode="json") == example
    for _, path, operation in operations(documents[0]):
        for response in operation["responses"].values():
            example = response.get("content", {}).get("application/json", {}).get("example")
            if example is not None:
                assert vars(TypeAdapter(Item).validate_python(example)) == example, path
    for path, model in (("/v1/search", SearchQuery), ("/v1/reid/identify", IdentifyQuery)):
        body = documents[0]["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for example in body["examples"]:
            model.model_validate_json(json.dumps(example))
        assert [one["required"] for one in body["oneOf"]] == [[name] for name in model.ways]
