"""The figures of a load test, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.loadtest.config import LoadConfig
from serve.loadtest.loops import Samples
from serve.loadtest.targets import Kind
from serve.loadtest.triton_metrics import ModelFigures

PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
"""In thousandths: ranks are counted in whole numbers, because numpy's, of 0.999 and 1,000 values, is one too high."""
LATE_MS, LATE_SHARE, BUSY = 1.0, 0.1, 0.9
"""The generator is the bottleneck if the p99 of its own lateness is above the first and above this share of the p99 of
latency, or if its thread is busy for more than this share of the time."""
Percentiles: TypeAlias = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was asked and what came of it.

    Requests, errors and percentiles are of what was meant to be sent during the measurement. Rates are of what happened during
    it: a queue that drains afterwards is no capacity.
    """

    asked: dict[str, Any]
    """The `LoadConfig`."""
    sends: str
    """Pixels or bytes."""
    encoder_id: str | None
    """None behind the gateway."""
    seconds: float
    """Measured."""
    stopped: bool
    """Ended early by Ctrl-C."""
    requests: int
    answered: int
    errors: dict[str, int]
    first_errors: dict[str, str]
    """The first message of each kind, in the warm-up too."""
    requests_per_s: float
    """Sent."""
    images_per_s: float
    """Goodput: pictures that got their vector."""
    latency_ms: Percentiles | None
    """Of answers; in an open loop since the moment that the request was meant for."""
    shed_ms: Percentiles | None
    """How fast a request is turned away."""
    interval_s: float
    per_interval: dict[str, list[float]]
    """Kind of outcome -> requests per second in each interval."""
    late_ms: Percentiles | None
    """Open loop: sent, minus meant to be sent."""
    generator_busy: float
    """Share of the time that the generator's thread was running."""
    unsent: int
    """Requests of the open loop that the generator never came to."""
    bottleneck: bool
    """Part of these figures is the generator's own doing."""
    metrics_url: str
    triton: dict[str, ModelFigures] | None
    """None if Triton's metrics could not be read."""


def make_report(
    config: LoadConfig,
    samples: Samples,
    *,
    encoder_id: str | None,
    busy: float,
    metrics_url: str,
    triton: dict[str, ModelFigures] | None,
) -> LoadReport:
    """The figures; the arguments beside them are fields of `LoadReport`."""
    measured = samples.intended_s >= 0
    kind, latency_s = samples.kind[measured], (samples.done_s - samples.intended_s)[measured]
    late_ms = percentiles_ms((samples.sent_s - samples.intended_s)[measured]) if config.rate is not None else None
    per_interval = _per_interval(samples)
    return LoadReport(
        asked={field.name: getattr(config, field.name) for field in fields(LoadConfig)},
        sends=config.sends,
        encoder_id=encoder_id,
        seconds=samples.seconds,
        stopped=samples.stopped,
        requests=len(kind),
        answered=int((kind == Kind.ANSWERED).sum()),
        errors={one.name.lower(): int((kind == one).sum()) for one in Kind if one != Kind.ANSWERED},
        first_errors={one.name.lower(): reason for one, reason in samples.reasons.items()},
        requests_per_s=int(((samples.sent_s >= 0) & (samples.sent_s < samples.seconds)).sum()) / samples.seconds,
        images_per_s=config.batch * float(np.mean(per_interval["answered"])),
        latency_ms=percentiles_ms(latency_s[kind == Kind.ANSWERED]),
        shed_ms=percentiles_ms(latency_s[kind == Kind.SHED]),
        interval_s=samples.seconds / len(per_interval["answered"]),
        per_interval=per_interval,
        late_ms=late_ms,
        generator_busy=busy,
        unsent=samples.unsent,
        bottleneck=samples.unsent > 0 or busy > BUSY or _too_late(late_ms, percentiles_ms(latency_s)),
        metrics_url=metrics_url,
        triton=triton,
    )


def percentiles_ms(seconds: NDArray[np.float64]) -> Percentiles | None:
    """PERCENTILES, each one of the values: the smallest that so many of them do not exceed. None if there are no values."""
    if not len(seconds):
        return None
    ordered_ms = 1e3 * np.sort(seconds)
    ranks = {name: -(-share * len(seconds) // 1000) for name, share in PERCENTILES.items()}  # rounded up
    return {name: float(ordered_ms[rank - 1]) for name, rank in ranks.items()}


def report_lines(report: LoadReport) -> Iterator[str]:
    """The table."""
    yield headline(report)
    yield f"{'ms':14}" + "".join(f"{name:>10}" for name in PERCENTILES)
    rows = {"latency": report.latency_ms, "turned away": report.shed_ms, "sent too late": report.late_ms}
    for name, row in rows.items():
        if row is not None:
            yield f"{name:14}" + "".join(f"{row[one]:10.2f}" for one in PERCENTILES)
    rates = [report.asked["batch"] * rate for rate in report.per_interval["answered"]]
    course = f", second by second {min(rates):,.1f} to {max(rates):,.1f}" * (len(rates) > 1)
    yield f"{'goodput':14}{report.images_per_s:10,.1f} pictures/s{course}"
    yield f"{'requests':14}{report.requests:10,} ({report.requests_per_s:,.1f}/s), {report.answered:,} answered"
    for name, count in report.errors.items():
        if count:
            yield f"{name.replace('_', ' '):14}{count:10,} requests, the first: {report.first_errors[name]}"
    yield f"{'generator':14}{report.generator_busy:10.0%} busy"
    yield from _triton_lines(report)
    if report.bottleneck:
        unsent = f" and never sent {report.unsent:,} requests" if report.unsent else ""
        yield f"The generator was too slow{unsent}: part of these figures is its own. Ask for less, or from another machine."


def headline(report: LoadReport) -> str:
    """What was asked, in one line."""
    asked = report.asked
    clients = asked["clients"] or 1
    if asked["rate"] is not None:
        loop = f"open loop, {asked['rate']:g} requests/s"
    else:
        loop = f"closed loop, {clients} client{'s' * (clients > 1)}"
    time = f"{round(report.seconds, 1):g} s after {asked['warmup_s']:g} s of warm-up"
    return f"{asked['url']}: {loop}, {report.sends}, batch {asked['batch']}, {time}{' (stopped early)' * report.stopped}"


def _triton_lines(report: LoadReport) -> Iterator[str]:
    if report.triton is None:
        yield f"{'Triton':14}no metrics at {report.metrics_url}, so no mean batch; --metrics-url says where they are"
        return
    width = max(map(len, [*report.triton, "Triton"]))
    yield f"{'Triton':{width}}   requests  mean batch  queue ms  compute ms"
    for model, found in report.triton.items():
        yield f"{model:{width}} {found.requests:10,} {found.mean_batch:11.2f} {found.queue_ms:9.2f} {found.compute_ms:11.2f}"


def _per_interval(samples: Samples) -> dict[str, list[float]]:
    """Requests per second that ended in each of equal intervals of about a second, by outcome; those that occurred."""
    edges = np.linspace(0, samples.seconds, max(1, round(samples.seconds)) + 1)
    rates = {
        kind.name.lower(): (np.histogram(samples.done_s[samples.kind == kind], edges)[0] / edges[1]).tolist() for kind in Kind
    }
    return {name: rate for name, rate in rates.items() if name == "answered" or any(rate)}


def _too_late(late_ms: Percentiles | None, latency_ms: Percentiles | None) -> bool:
    if late_ms is None or latency_ms is None:
        return False
    return late_ms["p99"] > max(LATE_MS, LATE_SHARE * latency_ms["p99"])
