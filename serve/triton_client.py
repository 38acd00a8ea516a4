"""An encoder that runs in a Triton server: `grpc://host:port/NAME` or `http://host:port/NAME`."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from serve.contract import METADATA_KEY, Manifest
from serve.encoder import Picture, prepare_batch
from serve.errors import ContractError, EncoderUnavailable
from serve.preprocess import ImageError

TRIES = 3
BACKOFF_S = 0.1
"""Waited before the second try; doubles for each further one."""
_PORTS = {"grpc": 8001, "http": 8000}
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),  # gRPC's own 120 s would go on refusing long after a server has come back
]
_T = TypeVar("_T")


class TritonEncoder:
    """The `Encoder` protocol over the network; may be used from many threads at once.

    Raises: ContractError if the server has no such encoder, EncoderUnavailable if it does not answer.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        scheme, address, name = _parse_url(url)
        self.url = url
        self._timeout_s = timeout_s
        self._transport: _Transport = (_Grpc if scheme == "grpc" else _Http)(address, timeout_s)
        self._name = name or self._only_name()
        config = self._call(lambda: self._transport.config(f"{self._name}_encoder"))
        if METADATA_KEY not in config.get("parameters", {}):
            raise ContractError(
                f"{url}: model {self._name}_encoder carries no manifest; serve a folder written by `simclr export`"
            )
        self.manifest = Manifest.parse(config["parameters"][METADATA_KEY]["string_value"], url)
        self._max_batch = max(1, int(config.get("max_batch_size", 0)))

    @property
    def encoder_id(self) -> str:
        """Who made the vectors, as the server said when we connected."""
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, D); pictures are prepared here, the server gets pixels.

        Raises: ImageError, EncoderUnavailable.
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

    def _only_name(self) -> str:
        names = sorted(
            name.removesuffix("_encoder") for name in self._call(self._transport.models) if name.endswith("_encoder")
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
        except _RefusedError as refused:  # the request is well formed, so it is a picture that the server complains about
            reason = str(refused).removeprefix(f"in ensemble '{self._name}_{role}', ")
            after = f" (counted from {chunk.start})" if chunk.start else ""
            raise ImageError(f"{reason}{after}") from refused

    def _infer(self, role: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        return self._call(lambda: self._transport.infer(f"{self._name}_{role}", name, array, datatype))

    def _call(self, request: Callable[[], _T]) -> _T:
        """Send, and send again while nobody answers; every foreign exception is translated here."""
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                return request()
            except InferenceServerException as error:
                if error.status() not in ("StatusCode.UNAVAILABLE", "503"):
                    raise self._translated(error) from error
                reason = str(error.message())
            except TimeoutError as error:
                raise self._too_slow() from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
        do = "start one with `simclr triton --repository REPO` or correct the address"
        raise EncoderUnavailable(f"{self.url}: no Triton server answers ({reason.splitlines()[0]}); {do}")

    def _translated(self, error: InferenceServerException) -> Exception:
        status, message = error.status(), str(error.message())
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return self._too_slow()
        if "unknown model" in message:
            head = "; export with --head" if "_classify'" in message else "; look at the address, or export the run again"
            return ContractError(f"{self.url}: {message[0].lower()}{message[1:]}{head}")
        if status in ("StatusCode.INVALID_ARGUMENT", "400"):
            return _RefusedError(message)
        return EncoderUnavailable(f"{self.url}: the server failed ({message.splitlines()[0]}); its log says more")

    def _too_slow(self) -> EncoderUnavailable:
        return EncoderUnavailable(f"{self.url}: no answer within {self._timeout_s:g} s; is the server overloaded or stuck?")


class _RefusedError(ContractError):
    """The server understood the request and does not want it."""


class _Transport(Protocol):
    def models(self) -> list[str]: ...

    def config(self, model: str) -> dict[str, Any]: ...

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any: ...  # noqa: ANN401


class _Grpc:
    """One channel for all threads."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._client = tritonclient.grpc.InferenceServerClient(address, channel_args=_CHANNEL)
        self._timeout_s = timeout_s

    def models(self) -> list[str]:
        answer = self._client.get_inference_statistics(as_json=True, client_timeout=self._timeout_s)
        return [model["name"] for model in answer.get("model_stats", [])]  # the repository index wants a key

    def config(self, model: str) -> dict[str, Any]:
        answer = self._client.get_model_config(model, as_json=True, client_timeout=self._timeout_s)
        return dict(answer["config"])

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        tensor = tritonclient.grpc.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        return self._client.infer(model, [tensor], client_timeout=self._timeout_s)


class _Http:
    """One client per thread: tritonclient.http is built on gevent, whose sockets belong to the thread that made them."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._local = threading.local()

    def models(self) -> list[str]:
        return [model["name"] for model in self._client().get_inference_statistics()["model_stats"]]

    def config(self, model: str) -> dict[str, Any]:
        return dict(self._client().get_model_config(model))

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        tensor = tritonclient.http.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        return self._client().infer(model, [tensor])

    def _client(self) -> Any:  # noqa: ANN401
        if not hasattr(self._local, "client"):
            self._local.client = tritonclient.http.InferenceServerClient(
                self._address, connection_timeout=self._timeout_s, network_timeout=self._timeout_s
            )
        return self._local.client


def _parse_url(url: str) -> tuple[str, str, str]:
    """Scheme, host:port and NAME ("" if left out)."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        name = parts.path.strip("/")
        if not parts.hostname or "/" in name or parts.query or parts.fragment:
            raise ValueError("it is not host:port/NAME")
    except (ValueError, KeyError) as error:
        raise ContractError(
            f"{url}: not the address of an encoder ({error}); wanted grpc://host:8001/NAME or http://..."
        ) from error
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, f"{host}:{port}", name
