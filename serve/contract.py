"""What an encoder promises: its input, its output, how pictures must be prepared, and who it is.

Every artefact made with an encoder (gallery, head, Triton configuration) carries its `encoder_id`, so that vectors of two
encoders are never compared. Standard library and pydantic only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, ValidationError, model_validator

from serve.errors import ContractError

MANIFEST_NAME = "manifest.json"
METADATA_KEY = "simclr_manifest"
"""Where the same JSON stands inside the ONNX file and inside Triton's config.pbtxt."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Preprocess(_Strict):
    """How a picture becomes the encoder's uint8 input; the arguments of `serve.preprocess.prepare`."""

    height_px: PositiveInt
    width_px: PositiveInt
    resize: Literal["center_crop", "stretch"]
    """`center_crop` keeps the aspect; `stretch` (re-ID) squeezes the whole picture into the frame."""
    crop: Annotated[float, Field(gt=0, le=1)]
    """Share of the limiting side that `center_crop` keeps: 0.875, or 1.0 for pictures of 32 px; 1.0 for `stretch`."""
    resample: Literal["bicubic"]
    jpeg: Literal["full", "reduced"]
    """How a JPEG file is decoded: `full`, or `reduced`, at the smallest of 1/1, 1/2, 1/4 and 1/8 that leaves enough pixels."""


class TensorSpec(_Strict):
    """A tensor of the graph; `shape` leaves out the batch dimension."""

    name: str
    shape: tuple[PositiveInt, ...]
    dtype: Literal["uint8", "float32"]


class Parity(_Strict):
    """How far the published graph is from the network it was made of, on golden images."""

    images: PositiveInt
    batch_sizes: tuple[PositiveInt, ...]
    max_abs_error: float
    min_cosine: float


class Retrieval(_Strict):
    """What a precision costs a search, against float32 on the same pictures (each in turn the query of all the others)."""

    pictures: PositiveInt
    mean_cosine: float
    min_cosine: float
    """Of a picture's vector in this precision with its float32 vector."""
    overlap_at_10: float
    """Share of the ten nearest that queries and gallery in this precision have in common with float32 on both sides."""
    recall_at_10: float
    """The same with queries in this precision and the float32 gallery."""
    knn_accuracy: float | None
    """Leave-one-out vote of the ten nearest on labelled pictures, in this precision; None without labels."""
    knn_accuracy_fp32: float | None
    head_agreement: float | None
    """Share of pictures that the published head puts into the same class as with float32 vectors; None without a head."""
    size_bytes: PositiveInt
    size_bytes_fp32: PositiveInt
    images_per_s: float
    """ONNX Runtime on the machine that exported, batches of 32; beside it float32's in the same minute."""
    images_per_s_fp32: float


class Manifest(_Strict):
    """The card of one encoder: written beside its ONNX file and into the ONNX metadata. No field has a default."""

    schema_version: Literal[2]
    encoder_id: str
    name: str
    embedding_dim: PositiveInt
    input: TensorSpec
    output: TensorSpec
    preprocess: Preprocess
    metric: Literal["cosine"]
    precision: Literal["fp32", "fp16", "int8"]
    weights_sha256: str
    parity: Parity | None
    """None for a run that has not been exported."""
    retrieval: Retrieval | None
    """None for float32, which is what the others are measured against."""
    training: dict[str, JsonValue]
    """Provenance: architecture, data, recipe, when."""

    @classmethod
    def create(cls, **fields: object) -> Self:
        """A manifest with its encoder_id worked out."""
        return cls.model_validate({"schema_version": 2, "encoder_id": _encoder_id(fields), **fields})

    @model_validator(mode="after")
    def _id_fits(self) -> Self:
        wanted = _encoder_id(dict(self))
        if self.encoder_id != wanted:
            raise ValueError(f"encoder_id is {self.encoder_id}, the contract and weights give {wanted}")
        return self

    @classmethod
    def parse(cls, text: str | bytes, origin: str) -> Self:
        """Read a manifest, of schema 1 as well. Raises: ContractError naming `origin`."""
        try:
            return cls.model_validate_json(_as_schema_2(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "manifest"
            raise ContractError(f"{origin}: not a valid manifest: {where}: {first['msg']}; export the run again") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read manifest.json. Raises: ContractError."""
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise ContractError(f"{path}: no manifest ({error.strerror}); was this written by `simclr export`?") from error


def _encoder_id(fields: Mapping[str, object]) -> str:
    """Digest of what decides a vector: interface, preparation, precision, weights. Names and provenance do not count."""
    decisive = ("embedding_dim", "input", "output", "preprocess", "metric", "precision", "weights_sha256")
    plain: dict[str, Any] = {
        key: value.model_dump() if isinstance(value, BaseModel) else value for key in decisive for value in [fields[key]]
    }
    if plain["preprocess"]["jpeg"] == "full":  # schema 1 knew nothing else: the ids of its encoders live on
        del plain["preprocess"]["jpeg"]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _as_schema_2(text: str | bytes) -> str | bytes:
    """Schema 1 had no `retrieval`, and decoded every JPEG in full."""
    try:
        document = json.loads(text)
        if document["schema_version"] != 1 or isinstance(document["schema_version"], bool):
            return text
        document["preprocess"] = {**document["preprocess"], "jpeg": "full"}
        return json.dumps({**document, "schema_version": 2, "retrieval": None})
    except (ValueError, KeyError, TypeError):
        return text  # validation says what is wrong with it


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
