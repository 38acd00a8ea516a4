"""`simclr bench serve` from the pictures to the report."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from serve.errors import ContractError, EncoderUnavailable
from serve.files import atomic_path
from serve.loadtest.config import LoadConfig
from serve.loadtest.loops import Load, Samples, event_loop, poisson_arrivals
from serve.loadtest.plot import save_plot
from serve.loadtest.report import LoadReport, make_report
from serve.loadtest.requests import TritonRequests, draw_pictures, gateway_bodies, take_pictures
from serve.loadtest.targets import GrpcTarget, HttpTarget, RequestFailed, Target
from serve.loadtest.triton_metrics import Counters, ModelFigures, between, read_counters
from serve.triton.client import TritonEncoder
from serve.triton.transport import parse_url

_METRICS_PORT = 8002
_GLANCE_S = 0.2
"""Between two looks at how far it has come."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total:g} s{postfix}"


def bench_serve(config: LoadConfig) -> LoadReport:
    """Measure and, with `out`, write report.json and load.png. Ctrl-C ends the sending; the report is of what was measured.

    Raises: EncoderUnavailable, ContractError, SourceError, OSError; KeyboardInterrupt during the warm-up.
    """
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)  # rather now than after the measurement
    pictures = draw_pictures(config.seed) if config.images is None else take_pictures(config.images, config.seed)
    open_target, encoder_id = _prepare(config, pictures)
    metrics_url = config.metrics_url or f"http://{_host(config.url)}:{_METRICS_PORT}/metrics"
    with asyncio.Runner(loop_factory=event_loop) as runner:
        samples, busy, triton = runner.run(_measure(config, open_target, metrics_url))
    if samples.seconds <= 0:
        raise KeyboardInterrupt("stopped while it warmed up; nothing was measured")
    report = make_report(config, samples, encoder_id=encoder_id, busy=busy, metrics_url=metrics_url, triton=triton)
    if config.out is not None:
        _save(report, samples, config.out)
    return report


def report_json(report: LoadReport) -> str:
    """Valid JSON: what could not be measured is null."""
    return json.dumps(asdict(report), indent=2, allow_nan=False, default=str)


def _prepare(config: LoadConfig, pictures: list[bytes]) -> tuple[Callable[[], Target], str | None]:
    """What opens the target, with all requests made up, and who the encoder is."""
    if config.to_gateway:
        return partial(HttpTarget, config.url, gateway_bodies(pictures), config.timeout_s), None
    scheme, (address, *others), _ = parse_url(config.url)
    if others:
        raise ContractError(f"{config.url}: names several servers; measure one at a time")
    encoder = TritonEncoder(config.url, timeout_s=config.timeout_s)
    requests = TritonRequests(encoder.manifest, pictures, config.sends, config.batch)
    if scheme == "grpc":
        return partial(GrpcTarget, address, requests.messages(), config.timeout_s), encoder.encoder_id
    url = f"http://{address}/v2/models/{requests.model}/infer"
    return partial(HttpTarget, url, requests.bodies(), config.timeout_s), encoder.encoder_id


async def _measure(
    config: LoadConfig, open_target: Callable[[], Target], metrics_url: str
) -> tuple[Samples, float, dict[str, ModelFigures] | None]:
    """The samples, the share of the time that this thread was running, and what Triton counted meanwhile."""
    async with aclosing(open_target()) as target:
        await _probe(config, target, metrics_url)
        load = Load(target.send, seconds=config.seconds, warmup_s=config.warmup_s)
        watching = asyncio.create_task(_watch(load, config, metrics_url))
        if config.rate is None:
            await load.closed(config.clients or 1)
        else:
            await load.open(poisson_arrivals(config.rate, -config.warmup_s, config.seconds, config.seed).tolist())
        before, busy = await watching
        after = await read_counters(metrics_url)
        return load.samples(), busy, None if before is None or after is None else between(before, after)


async def _probe(config: LoadConfig, target: Target, metrics_url: str) -> None:
    """One request beforehand. Raises: EncoderUnavailable with the reason, rather than a report full of errors."""
    try:
        await target.send(0)
    except RequestFailed as failure:
        reason = f"{failure.kind.name.lower().replace('_', ' ')}: {failure}"
        raise EncoderUnavailable(f"{config.url}: the first request failed ({reason}); nothing was measured") from failure
    if config.metrics_url is not None and await read_counters(metrics_url) is None:
        raise EncoderUnavailable(f"{metrics_url}: no metrics of a Triton server there; correct --metrics-url or leave it out")


async def _watch(load: Load, config: LoadConfig, metrics_url: str) -> tuple[Counters | None, float]:
    """Show how far it has come; Triton's counters as the measurement begins, and this thread's share of it."""
    with tqdm(total=config.warmup_s + config.seconds, bar_format=_BAR, leave=False, dynamic_ncols=True) as bar:
        await _until(0, load, config, bar)
        before = await read_counters(metrics_url)
        began_s, thread_s = load.now(), time.thread_time()
        await _until(config.seconds, load, config, bar)
        return before, (time.thread_time() - thread_s) / (load.now() - began_s)


async def _until(end_s: float, load: Load, config: LoadConfig, bar: tqdm) -> None:
    while load.sending and (now_s := load.now()) < end_s:
        bar.n = now_s + config.warmup_s
        bar.set_description_str("warm-up" if now_s < 0 else "measuring", refresh=False)
        bar.set_postfix_str(f"{load.done:,} requests, {load.failed:,} failed")
        await asyncio.sleep(min(_GLANCE_S, end_s - now_s))


def _host(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def _save(report: LoadReport, samples: Samples, folder: Path) -> None:
    with atomic_path(folder / "load.png") as temporary:
        save_plot(report, samples, temporary)
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(report_json(report) + "\n")
