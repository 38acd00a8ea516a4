"""What Triton itself counted during a load test, from its Prometheus metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT = aiohttp.ClientTimeout(total=2)
_PREFIX = "nv_inference_"
_COMPUTE = ("compute_input_duration_us", "compute_infer_duration_us", "compute_output_duration_us")
_COUNTERS = ("request_success", "count", "exec_count", "queue_duration_us", *_COMPUTE)
Counters: TypeAlias = dict[str, defaultdict[str, float]]
"""Model -> counter without `nv_inference_` -> its sum over versions and devices."""


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One model between two readings."""

    requests: int
    mean_batch: float
    """Pictures per execution: what the dynamic batcher made of the requests."""
    queue_ms: float
    compute_ms: float
    """Per request, of which each is charged the whole time of its batch."""


async def read_counters(url: str) -> Counters | None:
    """Triton's counters now; None if nobody answers there, or something else."""
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(url) as response:
            counters = parse_counters(await response.text())
    except (aiohttp.ClientError, OSError, ValueError):  # TimeoutError is an OSError
        return None
    return counters or None


def parse_counters(text: str) -> Counters:
    """The nv_inference_* counters in a page of metrics. Raises: ValueError if it is none."""
    counters: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.type == "counter" and family.name.startswith(_PREFIX) and "model" in sample.labels:
                model = counters.setdefault(sample.labels["model"], defaultdict(float))
                model[family.name.removeprefix(_PREFIX)] += sample.value
    return counters


def between(before: Counters, after: Counters) -> dict[str, ModelFigures]:
    """The models that ran meanwhile, by name; without those whose server began to count anew."""
    figures = {}
    for model in sorted(before.keys() & after.keys()):
        found = {name: after[model][name] - before[model][name] for name in _COUNTERS}
        requests, executions = found["request_success"], found["exec_count"]
        if min(found.values()) >= 0 and requests > 0 and executions > 0:
            figures[model] = ModelFigures(
                requests=int(requests),
                mean_batch=found["count"] / executions,
                queue_ms=found["queue_duration_us"] / requests / 1e3,
                compute_ms=sum(found[name] for name in _COMPUTE) / requests / 1e3,
            )
    return figures
