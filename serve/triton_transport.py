"""One Triton server: its address, and the few requests we make of it, over gRPC or HTTP."""

from __future__ import annotations

import threading
from typing import Any, Protocol
from urllib.parse import urlsplit

import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray

from serve.errors import ContractError

_PORTS = {"grpc": 8001, "http": 8000}
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),  # gRPC's own 120 s would go on refusing long after a server has come back
]


class Transport(Protocol):
    """What a client asks of one server; every call has the deadline that the transport was made with."""

    address: str

    def models(self) -> list[str]:
        """Names of the models that are served."""

    def config(self, model: str) -> dict[str, Any]:
        """The model's configuration as JSON."""

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        """tritonclient's InferResult for one input tensor."""

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """Of the model that gave an answer of `infer`."""


class Grpc:
    """One channel for all threads."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._client = tritonclient.grpc.InferenceServerClient(address, channel_args=_CHANNEL)
        self._timeout_s = timeout_s

    def models(self) -> list[str]:
        """See `Transport`."""
        answer = self._client.get_inference_statistics(as_json=True, client_timeout=self._timeout_s)
        return [model["name"] for model in answer.get("model_stats", [])]  # the repository index wants a key

    def config(self, model: str) -> dict[str, Any]:
        """See `Transport`."""
        answer = self._client.get_model_config(model, as_json=True, client_timeout=self._timeout_s)
        return dict(answer["config"])

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        """See `Transport`."""
        tensor = tritonclient.grpc.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        return self._client.infer(model, [tensor], client_timeout=self._timeout_s)

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """See `Transport`."""
        return str(answer.get_response().model_version)


class Http:
    """One client per thread: tritonclient.http is built on gevent, whose sockets belong to the thread that made them."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._local = threading.local()

    def models(self) -> list[str]:
        """See `Transport`."""
        return [model["name"] for model in self._client().get_inference_statistics()["model_stats"]]

    def config(self, model: str) -> dict[str, Any]:
        """See `Transport`."""
        return dict(self._client().get_model_config(model))

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str) -> Any:  # noqa: ANN401
        """See `Transport`."""
        tensor = tritonclient.http.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        return self._client().infer(model, [tensor])

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """See `Transport`."""
        return str(answer.get_response()["model_version"])

    def _client(self) -> Any:  # noqa: ANN401
        if not hasattr(self._local, "client"):
            self._local.client = tritonclient.http.InferenceServerClient(
                self.address, connection_timeout=self._timeout_s, network_timeout=self._timeout_s
            )
        return self._local.client


def parse_url(url: str) -> tuple[str, list[str], str]:
    """Scheme, the servers' host:port, and NAME ("" if left out) of `grpc://a:8001,b:8001/NAME`. Raises: ContractError."""
    try:
        parts = urlsplit(url)
        if parts.query or parts.fragment or "/" in parts.path.strip("/"):
            raise ValueError("it is not host:port/NAME")
        addresses = [_address(parts.scheme, one) for one in parts.netloc.split(",")]
        if len(set(addresses)) < len(addresses):
            raise ValueError("it names a server twice")
    except (ValueError, KeyError) as error:
        raise ContractError(
            f"{url}: not the address of an encoder ({error}); wanted grpc://host:8001/NAME, http://..., "
            "or several servers as grpc://a:8001,b:8001/NAME"
        ) from error
    return parts.scheme, addresses, parts.path.strip("/")


def _address(scheme: str, netloc: str) -> str:
    parts = urlsplit(f"//{netloc}")
    port = parts.port or _PORTS[scheme]
    if not parts.hostname:
        raise ValueError("it is not host:port/NAME")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"
