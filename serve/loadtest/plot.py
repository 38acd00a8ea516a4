"""The picture of a load test: latency up to the last percentile, and what happened when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from serve.loadtest.loops import Samples
from serve.loadtest.report import LoadReport, headline
from serve.loadtest.targets import Kind

_COLOURS = {"answered": "C0", "shed": "C1", "timeout": "C3", "no_connection": "C4", "bad_request": "C5", "other": "C6"}
_LATE = "C7"
_TICKS = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def save_plot(report: LoadReport, samples: Samples, path: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(headline(report), fontsize="medium")
    left, right = figure.subplots(1, 2)
    _percentile_curves(left, report, samples)
    _course(right, report)
    figure.savefig(path, format="png", dpi=110)


def _percentile_curves(axes: Axes, report: LoadReport, samples: Samples) -> None:
    measured = samples.intended_s >= 0
    latency_s = samples.done_s - samples.intended_s
    curves = {
        "latency of answers": (latency_s[measured & (samples.kind == Kind.ANSWERED)], _COLOURS["answered"]),
        "turned away after": (latency_s[measured & (samples.kind == Kind.SHED)], _COLOURS["shed"]),
    }
    if report.late_ms is not None:
        curves["sent too late by"] = ((samples.sent_s - samples.intended_s)[measured], _LATE)
    for name, (seconds, colour) in curves.items():
        if len(seconds):
            axes.plot(*quantile_curve(seconds), color=colour, label=name)
    most = max(100, report.requests)
    ticks = [share for share in _TICKS if 1 / (1 - share) <= 1.01 * most]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, most)
    axes.set_xticks([1 / (1 - share) for share in ticks], [f"p{100 * share:.7g}" for share in ticks], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("percentile")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def quantile_curve(seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y in ms: one of x values is y or more, from the least (x = 1) to the greatest of n (x = n)."""
    slower = np.unique(np.geomspace(1, len(seconds), 400).round().astype(int))[::-1]
    return len(seconds) / slower, 1e3 * np.sort(seconds)[len(seconds) - slower]


def _course(axes: Axes, report: LoadReport) -> None:
    middles = report.interval_s * (np.arange(len(report.per_interval["answered"])) + 0.5)
    for name, rates in report.per_interval.items():
        axes.plot(middles, rates, marker="." if len(rates) < 60 else "", color=_COLOURS[name], label=name.replace("_", " "))
    if report.asked["rate"] is not None:
        axes.axhline(report.asked["rate"], color=_LATE, linestyle=":", label="asked")
    axes.set_xlim(0, report.seconds)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("s")
    axes.set_ylabel("requests/s")
    axes.grid(alpha=0.3)
    axes.legend()
