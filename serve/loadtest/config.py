"""What a load test can be told. Standard library only, so that `simclr --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.errors import SimclrError

GATEWAY_PATH = "/v1/embed"


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Load on one server, and what is measured of it."""

    url: str
    """grpc://host:port/NAME or http://host:port/NAME of Triton, or http://host:port/v1/embed of the gateway."""
    images: str | None = None
    """Pictures to send, 200 at most: folder, .csv, .zip or .tar. Default: eight drawn ones of 1024 x 768 pixels."""
    send: Literal["pixels", "bytes"] | None = None
    """Prepared pixels or encoded files. Default: pixels to Triton; the gateway takes bytes alone."""
    clients: int | None = None
    """Closed loop: so many clients, each of which asks again when it has its answer. Default: 1."""
    rate: float | None = None
    """Open loop: requests per second at random moments, whether or not the former are answered."""
    batch: int = 1
    """Pictures per request."""
    seconds: float = 10
    """Length of the measurement."""
    warmup_s: float = 2
    """The same load before it, which is not counted."""
    timeout_s: float = 10
    """A request that has no answer after so long has failed."""
    metrics_url: str | None = None
    """Triton's metrics. Default: http://host:8002/metrics of the same host, if it answers."""
    out: Path | None = None
    """Folder for report.json and load.png."""
    seed: int = 0
    """Of the drawn pictures, the choice among --images and the moments of --rate."""

    def __post_init__(self) -> None:
        if not self.to_gateway and not self.url.startswith(("grpc://", "http://")):
            raise SimclrError(
                f"{self.url}: wanted grpc://host:8001/NAME, http://host:8000/NAME or http://host:port{GATEWAY_PATH}"
            )
        if self.clients is not None and self.rate is not None:
            raise SimclrError("--clients (closed loop) and --rate (open loop) exclude each other")
        limits = ("clients", self.clients, 1), ("rate", self.rate, 0.001), ("batch", self.batch, 1), ("seed", self.seed, 0)
        times = ("seconds", self.seconds, 0.1), ("warmup-s", self.warmup_s, 0), ("timeout-s", self.timeout_s, 0.001)
        for name, value, minimum in limits + times:
            if value is not None and not minimum <= value < math.inf:
                raise SimclrError(f"--{name} is {value}, wanted at least {minimum}")
        if self.to_gateway and (self.sends, self.batch) != ("bytes", 1):
            raise SimclrError(
                f"{self.url}: the gateway takes one encoded picture a request; leave out --send pixels and --batch"
            )
        if self.metrics_url is not None and not self.metrics_url.startswith(("http://", "https://")):
            raise SimclrError(f"--metrics-url is {self.metrics_url!r}, wanted http://host:8002/metrics")

    @property
    def to_gateway(self) -> bool:
        """Whether the address is the gateway's rather than Triton's."""
        return self.url.startswith(("http://", "https://")) and self.url.endswith(GATEWAY_PATH)

    @property
    def sends(self) -> Literal["pixels", "bytes"]:
        """What goes over the wire."""
        return self.send or ("bytes" if self.to_gateway else "pixels")
