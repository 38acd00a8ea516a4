"""Servers: Triton, the HTTP API, the web page; load on them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from commands.opening import GalleryName, open_encoder
from commands.options import check_ports
from serve.errors import SimclrError
from serve.gateway.keys import Scope
from serve.gateway.limits import Limits
from serve.loadtest.config import LoadConfig
from serve.ports import is_loopback


@dataclass(frozen=True, kw_only=True)
class Triton:
    """Serve a model repository with the real Triton server until Ctrl-C."""

    repository: Path
    """A folder written by `simclr export`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network that this machine is in."""
    http_port: int = 8000
    """Port of the HTTP protocol."""
    grpc_port: int = 8001
    """Port of the gRPC protocol."""
    metrics_port: int = 8002
    """Port of the Prometheus metrics."""

    def __post_init__(self) -> None:
        check_ports(http_port=self.http_port, grpc_port=self.grpc_port, metrics_port=self.metrics_port)

    def __call__(self) -> None:
        from serve.triton.supervisor import serve
        from serve.triton_server import TritonServer

        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        serve(TritonServer(self.repository, host=self.host, **ports))


@dataclass(frozen=True, kw_only=True)
class BenchServe(LoadConfig):
    """Put a server under load and measure latency, throughput and errors."""

    url: Positional[Annotated[str, arg(metavar="URL")]]
    """grpc://host:port/NAME or http://host:port/NAME of Triton, or http://host:port/v1/embed of the gateway."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from serve.loadtest.bench import bench_serve, report_json
        from serve.loadtest.report import report_lines

        report = bench_serve(self)
        print(report_json(report) if self.json else "\n".join(report_lines(report)))
        if report.stopped:
            raise KeyboardInterrupt(f"stopped after {report.seconds:.1f} of {self.seconds:g} s; the report is of these")


@dataclass(frozen=True, kw_only=True)
class Api:
    """Serve embeddings, classes and a gallery over HTTP, with keys and admission control, until Ctrl-C."""

    encoder: str
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME."""
    head: tuple[Path, ...] = ()
    """HEAD.npz of `simclr fit-head`, one or more, to classify as well; each goes by the name of its file."""
    gallery: GalleryName | None = None
    """A gallery of this encoder, to search in and to change."""
    threshold_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of `simclr reid calibrate`, to say who is known. Without it, identities are ranked and nothing is decided."""
    keys: Path | None = None
    """Whom to let in: the file of `simclr key`. Default: everybody on this machine."""
    open: bool = False
    """Without --keys, let in everybody who reaches --host."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network that this machine is in."""
    port: int = 7861
    """Port of the API."""
    url_hosts: tuple[str, ...] = ()
    """Whom a search by URL may ask: NAME, NAME:PORT, ADDRESS or ADDRESS:PORT. Default: nobody."""
    rate: float = Limits.rate_per_s
    """Requests per second of each key, or of each address without keys; 0: as many as find a place."""
    burst: int = Limits.burst
    """Requests that may come together before --rate counts."""
    at_once: int = Limits.at_once
    """Requests that are worked on together."""
    waiting: int = Limits.waiting
    """Requests that may wait; one more is refused at once."""
    batches: int = Limits.batches
    """Batches at the encoder together: two for each Triton server behind the address."""
    max_bytes: int = Limits.max_bytes
    """Largest body of a request."""

    def __post_init__(self) -> None:
        check_ports(port=self.port)
        self._limits()
        if self.threshold_file is not None and self.gallery is None:
            raise SimclrError("--threshold-file decides who of a gallery it is; wanted --gallery GALLERY as well")
        if self.keys is None and not self.open and not is_loopback(self.host):
            raise SimclrError(
                f"--host {self.host} without --keys would let in everybody who reaches it; wanted --keys FILE "
                "(make one: simclr key NAME --keys FILE), or --open if that is meant"
            )

    def __call__(self) -> None:
        from serve.api import create_api
        from serve.classify import load_heads
        from serve.gallery import Gallery
        from serve.gateway.http_server import serve_api
        from serve.gateway.keys import Keyring
        from serve.identity.calibration import Calibration

        keys = Keyring(self.keys) if self.keys else None
        heads = load_heads(self.head)
        calibration = Calibration.load(self.threshold_file) if self.threshold_file else None
        encoder = open_encoder(self.encoder)
        with Gallery.open(self.gallery, encoder) if self.gallery else nullcontext() as gallery:
            api = create_api(
                encoder,
                heads=heads,
                gallery=gallery,
                keys=keys,
                url_hosts=self.url_hosts,
                limits=self._limits(),
                calibration=calibration,
            )
            serve_api(api, host=self.host, port=self.port)

    def _limits(self) -> Limits:
        try:
            return Limits(
                at_once=self.at_once,
                waiting=self.waiting,
                batches=self.batches,
                max_bytes=self.max_bytes,
                rate_per_s=self.rate,
                burst=self.burst,
            )
        except ValueError as error:
            raise SimclrError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Key:
    """Make a key for `simclr api`. It is printed once; the file holds its hash alone."""

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Whose it is."""
    scope: Scope = "read"
    """read: embed, classify, search. write: change the gallery as well. admin: also /metrics."""
    keys: Annotated[Path, arg(metavar="FILE")]
    """File of keys, which is made if it is missing; to take a key back, delete its line."""

    def __call__(self) -> None:
        from serve.gateway.keys import add_key

        print(add_key(self.keys, self.name, self.scope))
        print(f"{self.keys}: {self.name} may {self.scope}; the key above is not shown again", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class App:
    """Open the web page on a gallery, with its HTTP API on the same port."""

    gallery: GalleryName
    """A folder, or an address in Milvus (docs/scaling.md)."""
    encoder: str
    """The encoder that made the gallery: RUN, a model repository, grpc://… or http://…"""
    head: tuple[Path, ...] = ()
    """HEAD.npz of `simclr fit-head`, one or more, to classify as well; each goes by the name of its file."""
    threshold_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of `simclr reid calibrate`, so that the page decides who is known; without it, it ranks alone."""
    port: int = 7860
    """Port of the page."""

    def __post_init__(self) -> None:
        check_ports(port=self.port)

    def __call__(self) -> None:
        from app import build_app, serve_app
        from serve.api import create_api
        from serve.classify import load_heads
        from serve.gallery import Gallery
        from serve.identity.calibration import Calibration
        from serve.signals import stopped_by_sigterm

        encoder = open_encoder(self.encoder)
        heads = load_heads(self.head)
        calibration = Calibration.load(self.threshold_file) if self.threshold_file else None
        with stopped_by_sigterm(), Gallery.open(self.gallery, encoder) as gallery:
            blocks = build_app(gallery, encoder, heads=heads, encoder_spec=self.encoder, calibration=calibration)
            api = create_api(encoder, heads=heads, gallery=gallery, calibration=calibration)
            serve_app(blocks, api=api, port=self.port)
