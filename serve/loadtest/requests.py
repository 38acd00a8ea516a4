"""Pictures for a load test, and the finished requests that are made of them."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.http
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from serve.contract import Manifest
from serve.errors import SourceError
from serve.pictures import prepare_batch
from serve.samples import Unreadable
from serve.sources import open_source, read_bytes, read_picture

MOST = 200
"""Of a source's pictures: enough that no cache remembers all of them, few enough to lie ready in memory."""
DRAWN, PHOTO_PX = 8, (1024, 768)
_log = logging.getLogger(__name__)


def draw_pictures(seed: int) -> list[bytes]:
    """JPEG files of photo size, about 170 KB each: soft colours and grain."""
    rng = np.random.default_rng(seed)
    return [_draw(rng) for _ in range(DRAWN)]


def _draw(rng: np.random.Generator) -> bytes:
    width, height = PHOTO_PX
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    waves = [np.sin(6 * rng.uniform(-1, 1) * x + 6 * rng.uniform(-1, 1) * y + 6 * rng.uniform()) for _ in range(3)]
    colours = 128 + 100 * np.stack(waves, axis=-1)
    grain = rng.normal(0, 6, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray((colours + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def take_pictures(source: str, seed: int) -> list[bytes]:
    """The encoded files of at most MOST pictures, chosen at random; unreadable ones are left out, with a warning.

    Raises: SourceError if there are none.
    """
    samples = open_source(source).everything
    chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:MOST])
    names = [samples[number].source for number in chosen]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock while it decodes
        bad = [picture for picture in pool.map(read_picture, names) if isinstance(picture, Unreadable)]
    if len(bad) == len(names):
        raise SourceError(f"{source}: none of {len(names)} pictures can be read; the first: {bad[0].reason}")
    if bad:
        _log.warning("left out: %d of %d pictures that cannot be read; the first: %s", len(bad), len(names), bad[0].reason)
    unreadable = {picture.source for picture in bad}
    return [read_bytes(name) for name in names if name not in unreadable]


class TritonRequests:
    """Every picture in a batch; the last batch is filled up from the front."""

    def __init__(self, manifest: Manifest, pictures: Sequence[bytes], sends: str, batch: int) -> None:
        if sends == "pixels":
            self.model, self._input, self._type = f"{manifest.name}_encoder", manifest.input.name, "UINT8"
            every: NDArray[Any] = prepare_batch(pictures, manifest.preprocess)
        else:
            self.model, self._input, self._type = f"{manifest.name}_embed", "bytes", "BYTES"
            every = np.array(pictures, np.object_).reshape(-1, 1)
        starts = range(0, len(every), batch)
        self._batches = [every.take(range(start, start + batch), axis=0, mode="wrap") for start in starts]

    def messages(self) -> list[bytes]:
        """As gRPC messages."""
        return [self._message(batch) for batch in self._batches]

    def bodies(self) -> list[tuple[bytes, dict[str, str]]]:
        """As HTTP bodies, each with its headers."""
        return [self._body(batch) for batch in self._batches]

    def _message(self, batch: NDArray[Any]) -> bytes:
        data = serialize_byte_tensor(batch).item() if self._type == "BYTES" else batch.tobytes()
        message = service_pb2.ModelInferRequest(model_name=self.model, raw_input_contents=[data])
        message.inputs.add(name=self._input, datatype=self._type, shape=batch.shape)
        return bytes(message.SerializeToString())

    def _body(self, batch: NDArray[Any]) -> tuple[bytes, dict[str, str]]:
        tensor = tritonclient.http.InferInput(self._input, batch.shape, self._type)
        tensor.set_data_from_numpy(batch)
        body, header_length = tritonclient.http.InferenceServerClient.generate_request_body([tensor])
        return body, {"Inference-Header-Content-Length": str(header_length)}


def gateway_bodies(pictures: Sequence[bytes]) -> list[tuple[bytes, dict[str, str]]]:
    """One encoded file each; the gateway looks at the file itself for what it is."""
    return [(picture, {"Content-Type": "application/octet-stream"}) for picture in pictures]
