"""The manifest: strict, without defaults, and tied to its encoder_id."""

import hashlib
import json

import pytest
from pydantic import ValidationError

from serve.contract import Manifest, Parity, Preprocess, TensorSpec, file_sha256
from serve.errors import ContractError

FIELDS = {
    "name": "cats",
    "embedding_dim": 512,
    "input": TensorSpec(name="image", shape=(64, 32, 3), dtype="uint8"),
    "output": TensorSpec(name="embedding", shape=(512,), dtype="float32"),
    "preprocess": Preprocess(height_px=64, width_px=32, resize="stretch", crop=1.0, resample="bicubic", jpeg="full"),
    "metric": "cosine",
    "precision": "fp32",
    "weights_sha256": "0" * 64,
    "parity": Parity(images=32, batch_sizes=(1, 32), max_abs_error=1e-7, min_cosine=0.9999999),
    "retrieval": None,
    "training": {"arch": "resnet18", "epochs": 100, "nested": {"list": [1, 2.5, None, "é"]}},
}


def manifest(**changes):
    return Manifest.create(**(FIELDS | changes))


def plain():
    return json.loads(manifest().model_dump_json())


def refused(document, origin="here"):
    text = document if isinstance(document, (str, bytes)) else json.dumps(document)
    with pytest.raises(ContractError) as caught:
        Manifest.parse(text, origin)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{origin}: not a valid manifest: ")
    return str(caught.value)


def test_it_survives_the_journey_through_json():
    assert Manifest.parse(manifest().model_dump_json(), "here") == manifest()
    assert Manifest.parse(manifest().model_dump_json(indent=2).encode(), "here") == manifest()
    assert Manifest.parse(manifest(parity=None).model_dump_json(), "here").parity is None


def test_the_id_is_the_digest_written_out():
    """Frozen: an id that changes with the code would orphan every gallery and head in the world."""
    decisive = ("embedding_dim", "input", "output", "preprocess", "metric", "precision", "weights_sha256")
    fields = {name: plain()[name] for name in decisive}
    assert fields["preprocess"].pop("jpeg") == "full", "what schema 1 knew is left out of the digest"
    text = json.dumps(fields, sort_keys=True)
    assert manifest().encoder_id == hashlib.sha256(text.encode()).hexdigest()[:16] == "12665100592f46fc"


@pytest.mark.parametrize(
    "change",
    [{"name": "dogs"}, {"parity": None}, {"training": {}}, {"parity": FIELDS["parity"].model_copy(update={"images": 33})}],
)
def test_names_and_provenance_do_not_count(change):
    assert manifest(**change).encoder_id == manifest().encoder_id


def other(field, **update):
    return {field: FIELDS[field].model_copy(update=update)}


DECISIVE = [
    {"embedding_dim": 256},
    {"precision": "fp16"},
    {"weights_sha256": "1" * 64},
    other("input", name="picture"),
    other("input", shape=(32, 64, 3)),
    other("input", dtype="float32"),
    other("output", name="vector"),
    other("output", shape=(256,)),
    other("preprocess", height_px=32),
    other("preprocess", width_px=64),
    other("preprocess", resize="center_crop"),
    other("preprocess", crop=0.875),
]


def test_each_decisive_field_changes_the_id():
    ids = [manifest(**change).encoder_id for change in ({}, *DECISIVE)]
    assert len(set(ids)) == len(DECISIVE) + 1


@pytest.mark.parametrize("change", DECISIVE, ids=lambda change: next(iter(change)))
def test_a_tampered_manifest_is_refused(change):
    changed = json.loads(manifest(**change).model_dump_json())
    message = refused(changed | {"encoder_id": manifest().encoder_id})
    assert manifest().encoder_id in message
    assert changed["encoder_id"] in message
    assert "export the run again" in message
    assert refused(plain() | {"encoder_id": "f" * 16})


@pytest.mark.parametrize("field", list(Manifest.model_fields))
def test_no_field_has_a_default(field):
    assert Manifest.model_fields[field].is_required()
    document = plain()
    del document[field]
    message = refused(document)
    assert f"{field}: Field required" in message


@pytest.mark.parametrize("part", [Preprocess, TensorSpec, Parity])
def test_nor_has_any_field_of_its_parts(part):
    assert all(field.is_required() for field in part.model_fields.values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("preprocess", "surprise"), 1),
        (("input", "surprise"), 1),
        (("schema_version",), 3),
        (("schema_version",), "1"),
        (("embedding_dim",), "512"),
        (("embedding_dim",), 0),
        (("embedding_dim",), 512.5),
        (("name",), 7),
        (("metric",), "euclidean"),
        (("precision",), "bf16"),
        (("input", "dtype"), "int8"),
        (("input", "shape"), [64, -1, 3]),
        (("input", "shape"), "64x32"),
        (("preprocess", "height_px"), 64.0),
        (("preprocess", "height_px"), True),
        (("preprocess", "resize"), "letterbox"),
        (("preprocess", "resample"), "nearest"),
        (("preprocess", "crop"), 0),
        (("preprocess", "crop"), 1.5),
        (("preprocess", "crop"), "0.875"),
        (("parity",), {}),
        (("training",), None),
    ],
)
def test_whatever_does_not_fit_is_refused_by_its_name(path, value):
    document = plain()
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert ".".join(path) in refused(document)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "no json", b"\xff\xfe", '{"a": 1', "NaN"])
def test_what_is_no_manifest_at_all(text):
    refused(text)


def test_it_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        manifest().name = "dogs"
    with pytest.raises(ValidationError, match="frozen"):
        manifest().preprocess.crop = 0.5


def test_reading_a_file(tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(ContractError, match=r"manifest\.json: no manifest \(No such file or directory\).*simclr export"):
        Manifest.read(path)
    path.write_text(manifest().model_dump_json())
    assert Manifest.read(path) == manifest()
    path.write_text("{}")
    with pytest.raises(ContractError, match=r"manifest\.json: not a valid manifest"):
        Manifest.read(path)
    with pytest.raises(ContractError, match="Is a directory"):
        Manifest.read(tmp_path)


def test_the_digest_of_a_file(tmp_path):
    data = bytes(range(256)) * 9999
    (tmp_path / "weights").write_bytes(data)
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(data).hexdigest()
