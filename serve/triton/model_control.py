"""Loading and unloading models of a running Triton server, which asks for the key."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from serve.errors import EncoderUnavailable

KEY_VARIABLE = "SIMCLR_TRITON_KEY"
KEY_NAME = "simclr-key"
"""The HTTP header that carries the key; in gRPC's metadata it is called triton-grpc-protocol-simclr-key."""
TIMEOUT_S = 300.0
"""Loading builds TensorRT engines, where there are some."""


class ModelControl:
    """Triton's model-repository extension at `http://host:8000`; the key is that of the environment unless given."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        self._timeout_s = timeout_s

    def load(self, model: str) -> None:
        """Read the model's folder again; returns when the versions it names are ready. Raises: EncoderUnavailable."""
        self._ask(f"models/{model}/load")

    def unload(self, model: str) -> None:
        """Take no more requests for the model. Raises: EncoderUnavailable."""
        self._ask(f"models/{model}/unload")

    def states(self) -> dict[str, str]:
        """Model and version -> READY, UNLOADING ... as `NAME_embed/3`. Raises: EncoderUnavailable."""
        return {f"{model['name']}/{model.get('version', '')}": model.get("state", "") for model in self._ask("index")}

    def _ask(self, path: str) -> Any:  # noqa: ANN401  # JSON
        request = urllib.request.Request(f"{self._url}/v2/repository/{path}", b"{}", {KEY_NAME: self._key}, method="POST")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:  # noqa: S310
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            if error.code == 403:
                reason = f"the server wants its key: set {KEY_VARIABLE} to the value that it was started with"
            raise EncoderUnavailable(f"{self._url}: {path} was refused ({reason})") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EncoderUnavailable(
                f"{self._url}: {path} failed ({error}); wanted http://host:8000 of a Triton server"
            ) from error


def changed_on(url: str | None) -> Callable[[list[str]], None]:
    """What `export` tells a server after every step of a publication; without a server, nothing."""
    if url is None:
        return lambda _: None
    control = ModelControl(url)
    control.states()  # rather now than in the middle

    def load_all(models: list[str]) -> None:
        for model in models:
            control.load(model)

    return load_all
