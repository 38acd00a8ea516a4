"""One Triton server: its address, and the few requests we make of it, over gRPC or HTTP."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from serve.errors import ContractError
from serve.triton.keep_alive import Answer, KeepAlive

_PORTS = {"grpc": 8001, "http": 8000}
_JSON_LENGTH = "Inference-Header-Content-Length"
"""How much of a body is JSON; the tensors follow it."""
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),  # gRPC's own 120 s would go on refusing long after a server has come back
]
"""Of a gRPC connection."""


class Transport(Protocol):
    """What a client asks of one server; `ends`, on time.monotonic's clock, is when it stops waiting.

    Raises: InferenceServerException with the server's status, TimeoutError or gRPC's DEADLINE_EXCEEDED, OSError,
    http.client.HTTPException.
    """

    address: str

    def models(self, ends: float) -> list[str]:
        """Names of the models that are served."""

    def config(self, model: str, ends: float) -> dict[str, Any]:
        """The model's configuration as JSON."""

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str, ends: float) -> Any:  # noqa: ANN401
        """tritonclient's InferResult for one input tensor."""

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """Of the model that gave an answer of `infer`."""


class Grpc:
    """One channel for all threads."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = tritonclient.grpc.InferenceServerClient(address, channel_args=CHANNEL)

    def models(self, ends: float) -> list[str]:
        """See `Transport`."""
        answer = self._client.get_inference_statistics(as_json=True, client_timeout=_left_s(ends))
        return [model["name"] for model in answer.get("model_stats", [])]  # the repository index wants a key

    def config(self, model: str, ends: float) -> dict[str, Any]:
        """See `Transport`."""
        answer = self._client.get_model_config(model, as_json=True, client_timeout=_left_s(ends))
        return dict(answer["config"])

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str, ends: float) -> Any:  # noqa: ANN401
        """See `Transport`."""
        tensor = tritonclient.grpc.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        return self._client.infer(model, [tensor], client_timeout=_left_s(ends))

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """See `Transport`."""
        return str(answer.get_response().model_version)


class Http:
    """tritonclient's encoding of tensors over our own connections: see `serve.triton.keep_alive`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._server = KeepAlive(address)

    def models(self, ends: float) -> list[str]:
        """See `Transport`."""
        return [model["name"] for model in self._get("/v2/models/stats", ends).get("model_stats", [])]

    def config(self, model: str, ends: float) -> dict[str, Any]:
        """See `Transport`."""
        return self._get(f"/v2/models/{quote(model)}/config", ends)

    def infer(self, model: str, name: str, array: NDArray[Any], datatype: str, ends: float) -> Any:  # noqa: ANN401
        """See `Transport`."""
        tensor = tritonclient.http.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        client = tritonclient.http.InferenceServerClient
        body, json_length = client.generate_request_body([tensor])
        path = f"/v2/models/{quote(model)}/infer"
        answer = _welcome(self._server.ask("POST", path, ends, body, {_JSON_LENGTH: str(json_length)}))
        if _JSON_LENGTH not in answer.headers:
            raise self._not_triton(path)
        return client.parse_response_body(answer.body, header_length=int(answer.headers[_JSON_LENGTH]))

    def version(self, answer: Any) -> str:  # noqa: ANN401
        """See `Transport`."""
        return str(answer.get_response()["model_version"])

    def _get(self, path: str, ends: float) -> dict[str, Any]:
        answer = _welcome(self._server.ask("GET", path, ends))
        try:
            return dict(json.loads(answer.body))
        except ValueError as error:
            raise self._not_triton(path) from error

    def _not_triton(self, path: str) -> ContractError:
        return ContractError(f"http://{self.address}{path}: the answer is none of a Triton server's; correct the address")


def _welcome(answer: Answer) -> Answer:
    """Raises: InferenceServerException if the server would not."""
    if answer.status == 200:
        return answer
    try:
        message = str(json.loads(answer.body)["error"])
    except (ValueError, LookupError, TypeError):  # a page of some proxy
        message = f"HTTP status {answer.status}"
    raise InferenceServerException(message, status=str(answer.status))


def _left_s(ends: float) -> float:
    return max(0.0, ends - time.monotonic())


def parse_url(url: str) -> tuple[str, list[str], str]:
    """Scheme, the servers' host:port, and NAME ("" if left out) of `grpc://a:8001,b:8001/NAME`. Raises: ContractError."""
    try:
        parts = urlsplit(url)
        if parts.query or parts.fragment or "/" in parts.path.strip("/"):
            raise ValueError("it is not host:port/NAME")
        if parts.scheme not in _PORTS:
            raise ValueError(f"{parts.scheme or 'nothing'}:// is not spoken here")
        addresses = [_address(parts.scheme, one) for one in parts.netloc.split(",")]
        if len(set(addresses)) < len(addresses):
            raise ValueError("it names a server twice")
    except ValueError as error:
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
