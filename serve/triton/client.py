"""An encoder that runs in Triton: `grpc://host:port/NAME`, `http://host:port/NAME`, or several, `grpc://a:8001,b:8001/NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract import METADATA_KEY, Manifest
from serve.errors import ContractError, EncoderMismatch
from serve.pictures import Picture, prepare_batch
from serve.preprocess import ImageError
from serve.triton.endpoints import Endpoints, RefusedError
from serve.triton.transport import Transport, parse_url


class TritonEncoder:
    """The `Encoder` protocol over the network; may be used from many threads at once.

    Of several servers the least busy one is asked, and another one if that does not answer (`serve.triton.endpoints`).

    Args: timeout_s, the limit for connecting, and for each batch that is sent, whatever happens.
    Raises: EncoderMismatch if the servers' encoders differ, ContractError if there is no such encoder, EncoderUnavailable if
    no server answers.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        scheme, addresses, name = parse_url(url)
        self.url = url
        self._servers = Endpoints(url, scheme, addresses, timeout_s)
        self._name = name or self._only_name()
        config = self._servers.call(self._config)
        self.manifest = self._manifest_in(config)
        self._max_batch = max(1, int(config.get("max_batch_size", 0)))
        self._versions: dict[tuple[str, str], str] = {}
        """(server, role) -> the version that it said it serves; "" where its configuration names none."""
        self._servers.meet(partial(self._greet, "encoder"))

    @property
    def encoder_id(self) -> str:
        """Who made the vectors, as the server said when we connected."""
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, D); pictures are prepared here, the server gets pixels.

        Raises: ImageError, EncoderUnavailable, EncoderMismatch if another encoder has come up at the address.
        """
        vectors = np.empty((len(images), self.manifest.embedding_dim), np.float32)
        for chunk in self._chunks(len(images)):
            pixels = prepare_batch(images[chunk], self.manifest.preprocess)
            answer = self._infer("encoder", self.manifest.input.name, pixels, "UINT8")
            vectors[chunk] = answer.as_numpy(self.manifest.output.name)
        return vectors

    def embed_bytes(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Unit vectors (N, D) of encoded images, prepared by the server. Raises: ImageError, EncoderUnavailable."""
        vectors = np.empty((len(images), self.manifest.embedding_dim), np.float32)
        for chunk in self._chunks(len(images)):
            vectors[chunk] = self._infer_bytes("embed", images, chunk).as_numpy("embedding")
        return vectors

    def classify_bytes(self, images: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Unit vectors (N, D) and class probabilities (N, C) of encoded images.

        Raises: ContractError if the server has no head for this encoder, ImageError, EncoderUnavailable.
        """
        if not images:
            raise ValueError("no images to classify; pass at least one")
        answers = [self._infer_bytes("classify", images, chunk) for chunk in self._chunks(len(images))]
        vectors, probabilities = ([answer.as_numpy(name) for answer in answers] for name in ("embedding", "probabilities"))
        return np.concatenate(vectors), np.concatenate(probabilities)

    def _config(self, server: Transport, ends: float) -> dict[str, Any]:
        return server.config(f"{self._name}_encoder", ends)

    def _manifest_in(self, config: dict[str, Any]) -> Manifest:
        if METADATA_KEY not in config.get("parameters", {}):
            raise ContractError(
                f"{self.url}: model {self._name}_encoder carries no manifest; serve a folder written by `simclr export`"
            )
        return Manifest.parse(config["parameters"][METADATA_KEY]["string_value"], self.url)

    def _greet(self, role: str, server: Transport, ends: float) -> None:
        """Vectors of two encoders are never mixed, whatever has come up at an address since. Raises: EncoderMismatch.

        Triton knows the configuration of a model while that is ready, and of no other.
        """
        config = server.config(f"{self._name}_{role}", ends)
        found = config.get("parameters", {}).get("encoder_id", {}).get("string_value") or self._manifest_in(config).encoder_id
        if found != self.encoder_id:
            raise EncoderMismatch(
                f"{self.url}: {server.address} has encoder {found} now, this client began with {self.encoder_id}; "
                "open it anew, and change a gallery of the old one's vectors over: simclr gallery reembed GALLERY --encoder ENC"
            )
        named = config.get("version_policy", {}).get("specific", {}).get("versions", [])
        self._versions[server.address, role] = str(max(map(int, named), default=""))

    def _only_name(self) -> str:
        names = sorted(
            name.removesuffix("_encoder")
            for name in self._servers.call(lambda server, ends: server.models(ends))
            if name.endswith("_encoder")
        )
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise ContractError(f"{self.url}: wanted one encoder, the server has {found}; add /NAME to the address")
        return names[0]

    def _chunks(self, count: int) -> Iterator[slice]:
        """Triton refuses what is larger than max_batch_size; it never splits."""
        return (slice(start, start + self._max_batch) for start in range(0, count, self._max_batch))

    def _infer_bytes(self, role: str, images: Sequence[bytes], chunk: slice) -> Any:  # noqa: ANN401
        batch = np.array(images[chunk], dtype=np.object_).reshape(-1, 1)
        try:
            return self._infer(role, "bytes", batch, "BYTES")
        except RefusedError as refused:  # the request is well formed, so it is a picture that the server complains about
            reason = str(refused).removeprefix(f"in ensemble '{self._name}_{role}', ")
            after = f" (counted from {chunk.start})" if chunk.start else ""
            raise ImageError(f"{reason}{after}") from refused

    def _infer(self, role: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        def request(server: Transport, ends: float) -> Any:  # noqa: ANN401
            answer = server.infer(f"{self._name}_{role}", name, array, datatype, ends)
            if server.version(answer) != self._versions[server.address, role] != "":  # changed over since it was greeted
                self._greet(role, server, ends)
            return answer

        return self._servers.call(request, partial(self._greet, role), role)
